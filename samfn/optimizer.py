"""SAM for existing loops: an Optimizer of PyTorch around another, on the pure functions.

New code wants `samfn.sam_update`, which overwrites nothing; this is for loops that are
written already.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from samfn import border, tree
from samfn.perturb import rate
from samfn.tree import Params

Groups = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation around an optimizer of PyTorch.

    first_step: w <- w + e, e = rho T^2 g / ||T g||;  second_step: w back, base optimizer

    T is |w| in groups that are `adaptive`, else 1; one norm over all groups together, in
    float32 or wider. The interface and the arithmetic are those of davda54/sam::

        optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)

        loss_fn(model(inputs), targets).backward()
        optimizer.first_step(zero_grad=True)
        loss_fn(model(inputs), targets).backward()  # a whole forward pass again
        optimizer.second_step(zero_grad=True)

    Where the two passes see different parameters, each counts for what it saw: one with a
    gradient in the first pass only is perturbed, put back, and left where it was; one with
    a gradient in the second only moves by it, unperturbed. Weights are put back exactly,
    into the memory that they had. BatchNorm's statistics are the caller's business here.

    Args:
        params: parameters, or groups of them, as every optimizer of PyTorch takes.
        base_optimizer: its class, or anything that makes one of groups and `kwargs`.
        rho: radius of the perturbation, at least 0; groups may have their own.
            Where it is the number 0 in all of them, `step` with a closure takes one pass.
        adaptive: perturb each weight in proportion to its size (ASAM with eta = 0 on all
            parameters); groups may have their own.
        skip_nonfinite: skip steps in which the gradient of either pass is not finite, as
            its norm tells: the weights are put back, base optimizer and its state stay as
            they are, and `skipped` counts it. Makes a GPU wait once a step. After such a
            first pass the second sees the weights unperturbed, and gives a NaN to one
            gradient: by it a GradScaler lowers its scale, and under DDP all replicas skip.
            A GradScaler skips what it finds by itself, with this or without; that counts.
        kwargs: of the base optimizer.

    Raises:
        ValueError: a rho is no finite number of at least 0.

    Source:
        Foret et al., 2021, arXiv:2010.01412, algorithm 1; Kwon et al., 2021,
        arXiv:2102.11600; interface of github.com/davda54/sam. He adds 1e-12 to the norm,
        and is 0.5 % short of rho at a norm of 2e-10; here the length is rho, or 0 where
        the gradient is.
    """

    # Tells torch.amp.GradScaler to call `step` with `grad_scale` and `found_inf` set, also
    # where they are infinite: the weights must be put back then, too.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Groups,
        base_optimizer: Callable[..., torch.optim.Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        skip_nonfinite: bool = False,
        **kwargs: Any,
    ) -> None:
        rho = cast(float, border.require_dial("rho", rho))
        super().__init__(cast(Any, params), {"rho": rho, "adaptive": adaptive, **kwargs})
        _require_plain([p for _, p, _ in self._parameters()])
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        _require_no_closure(self.base_optimizer)
        self.defaults.update(self.base_optimizer.defaults)
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state
        self.skip_nonfinite = skip_nonfinite
        self.skipped = 0
        self._start()

    def _start(self) -> None:
        self._clean: dict[str, Tensor] | None = None  # Between the steps: the weights.
        self._used: dict[str, tuple[Tensor, int]] = {}  # Gradients of the step before.
        self._finite: Tensor | None = None  # Of the first pass, if steps may be skipped.
        self._watch: _Watch | None = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, which may have a `rho` and `adaptive` of its own."""
        if "rho" in param_group:
            rho = border.require_dial("rho", param_group["rho"])
            param_group = {**param_group, "rho": rho}
        super().add_param_group(param_group)

    # Dynamo would lose what it sets, and has nothing to win on foreach kernels.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Move the weights to the worst point nearby.

        Raises:
            RuntimeError: no parameter has a gradient, or the weights are perturbed already.
        """
        if self._clean is not None:
            raise RuntimeError("first_step was called twice: call second_step in between")
        groups = {
            name: group for name, p, group in self._parameters() if p.grad is not None
        }
        params = {name: p for name, p, _ in self._parameters() if name in groups}
        if not params:
            raise RuntimeError("no parameter has a gradient: call backward before")
        # The way up has an entry for every weight, also where the gradient is sparse.
        up = {name: _dense(p.grad) for name, p in params.items()}
        metric = {n: params[n].abs() for n, group in groups.items() if group["adaptive"]}
        up |= _multiplied(metric, up)
        length = _norm(up)
        up |= _multiplied(metric, up)
        self._finite = length.isfinite() if self.skip_nonfinite else None
        if self._finite is not None:
            # The second pass must leave no NaN in BatchNorm's statistics.
            finite = {name: self._finite.to(way.device) for name, way in up.items()}
            up = {name: torch.where(finite[name], way, 0.0) for name, way in up.items()}
        moved = [name for name, group in groups.items() if not _is_zero(group["rho"])]
        self._clean = tree.clone(tree.only(params, moved)) if moved else {}
        for (rho, device), part in _parts(
            tree.only(up, moved), lambda name: (groups[name]["rho"], up[name].device)
        ):
            step = tree.scale(part, rate(length.to(device), rho))
            torch._foreach_add_([params[name] for name in part], list(step.values()))
        if zero_grad:
            self.zero_grad()
        full = [p for p in params.values() if p.numel()]
        self._watch = _Watch(min(full, key=Tensor.numel), self._finite) if full else None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Put the weights back, and take the base optimizer's step.

        Raises:
            RuntimeError: `first_step` was not called before.
        """
        self._restore()
        self._descend()
        self._finish(zero_grad)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take both steps, or the second one.

        With a closure, which computes the loss, calls backward and returns the loss, this
        is the whole step, and calls it twice; once after `first_step`, or with a rho of 0
        in all groups, for the base optimizer's step. For accumulated gradients, it is a
        closure that goes through all micro-batches. Without one this is `second_step`, as
        `torch.amp.GradScaler.step` calls it.

        Returns:
            What the closure returned, the first time that it was called.

        Raises:
            RuntimeError: there is no closure, and `first_step` was not called; there are
                gradients of another backward pass, which might be of another batch than
                the closure's; or the closure came through a GradScaler, or it scaled the
                first pass alone.
        """
        if closure is None:
            self._scaled_second_step()
            return None
        if hasattr(self, "found_inf"):
            self._refuse(
                "GradScaler.step cannot take a closure: scaled gradients would be used as"
                " they are. Call first_step after the first scaled backward pass, and"
                " scaler.step(optimizer) after the second"
            )
        if self._clean is not None:
            return self._closed(closure)
        if self._has_new_gradients():
            self._refuse(
                "step(closure) found gradients of a backward pass outside of the closure."
                " If they are of its batch, call first_step(zero_grad=True) before, or"
                " leave that pass out, since step calls the closure for both. If they are"
                " accumulated from other batches, the closure has to go through all of them"
            )
        one_pass = all(_is_zero(group["rho"]) for group in self.param_groups)
        self.zero_grad()
        with torch.enable_grad():
            loss = closure()
        self.first_step(zero_grad=not one_pass)
        if one_pass:
            self.second_step()
        else:
            self._closed(closure)
        return loss

    def _closed(self, closure: Callable[[], Any]) -> Any:
        """Take the second pass by a closure, and the second step."""
        try:
            with torch.enable_grad():
                loss = closure()
        except BaseException:
            self._restore()
            raise
        self.second_step()
        return loss

    def _scaled_second_step(self) -> None:
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is None:
            self.second_step()
            return
        scale: Tensor | None = getattr(self, "grad_scale", None)
        if scale is None and self._watch is not None and self._watch.is_untouched():
            self._restore()
            self._refuse(
                "scaler.unscale_(optimizer) was called for the first pass, and the second"
                " is still scaled: call it after the second backward pass, or not at all"
            )
        self._restore()
        if found_inf:
            self.skipped += 1
        else:
            if scale is not None:
                for grad in self._grads().values():
                    grad.mul_(scale.reciprocal().to(grad.device))
            self._descend()
        self._finish(zero_grad=False)

    def _descend(self) -> None:
        """Take the base optimizer's step, unless a gradient is not finite."""
        if self._finite is None or self._is_finite(self._finite):
            self.base_optimizer.step()
        else:
            self.skipped += 1

    def _is_finite(self, finite: Tensor) -> bool:
        grads = {name: _dense(grad) for name, grad in self._grads().items()}
        if grads:
            finite = finite & _norm(grads).isfinite().to(finite.device)
        return bool(finite)

    def _grads(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p, _ in self._parameters() if p.grad is not None}

    def _refuse(self, message: str) -> NoReturn:
        for name in ("grad_scale", "found_inf"):  # GradScaler deletes them, if we return.
            self.__dict__.pop(name, None)
        raise RuntimeError(message)

    def _restore(self) -> None:
        if self._clean is None:
            self._refuse(
                "call first_step, and backward again, before second_step, which step is"
                " without a closure: SAM takes two passes a step. A loop that calls step"
                " alone has to give it a closure that computes the loss, calls backward and"
                " returns the loss"
            )
        if self._clean:
            params = [p for name, p, _ in self._parameters() if name in self._clean]
            torch._foreach_copy_(params, list(self._clean.values()))
        self._clean = None
        if self._watch is not None:
            self._watch.end()
            self._watch = None

    def _finish(self, zero_grad: bool) -> None:
        self._opt_called = True  # What a scheduler looks for, before it warns.
        if zero_grad:
            self.zero_grad()
        self._remember_gradients()

    def _remember_gradients(self) -> None:
        self._used = {name: (grad, grad._version) for name, grad in self._grads().items()}

    def _has_new_gradients(self) -> bool:
        """Return whether a backward pass came after the last step."""
        for name, new in self._grads().items():
            grad, version = self._used.get(name, (None, 0))
            if new is not grad or new._version != version:
                return True
        return False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        super().zero_grad(set_to_none)
        self._remember_gradients()

    def _parameters(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        """Yield the parameters, by the names that they have here, with their groups."""
        for number, group in enumerate(self.param_groups):
            for index, parameter in enumerate(group["params"]):
                yield f"{number}.{index}", parameter, group

    def state_dict(self) -> dict[str, Any]:
        """Return settings, the base optimizer's state, and how many steps were skipped.

        Raises:
            RuntimeError: the weights are perturbed.
        """
        if self._clean is not None:
            raise RuntimeError(
                "the weights are perturbed, so there is no state to save: call second_step"
            )
        return {**super().state_dict(), "skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; also one of davda54/sam, which has no momentum in it."""
        kept = {
            index: {name: value for name, value in state.items() if name != "old_p"}
            for index, state in state_dict["state"].items()
        }
        kept = {index: state for index, state in kept.items() if state}
        super().load_state_dict({**state_dict, "state": kept})
        shared = {"state": self.state, "param_groups": self.param_groups}
        self.base_optimizer.__setstate__(shared)
        self.skipped = state_dict.get("skipped", 0)
        self._start()

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied: the base optimizer, too."""
        own = ("base_optimizer", "skip_nonfinite", "skipped")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what was copied."""
        super().__setstate__(state)
        if "_clean" not in self.__dict__:
            self._start()


class _Watch:
    """Tells whether a gradient was changed after the backward pass that made it.

    Makes it NaN first, unless the pass before was `finite`.
    """

    def __init__(self, parameter: Tensor, finite: Tensor | None) -> None:
        self._parameter, self._finite = parameter, finite
        self._made: Tensor | None = None
        register: Any = parameter.register_post_accumulate_grad_hook
        self._handle = register(self._look)

    @torch.no_grad()
    def _look(self, parameter: Tensor) -> None:
        grad = cast(Tensor, parameter.grad)
        if self._finite is not None:
            grad.mul_(torch.where(self._finite, 1.0, torch.nan).to(grad.device))
        self._made = _dense(grad).clone()

    def is_untouched(self) -> bool:
        # By its values: unscaling it leaves its version counter as it was.
        grad, made = self._parameter.grad, self._made
        if grad is None or made is None or not made.any():
            return False
        return torch.equal(_dense(grad), made)

    def end(self) -> None:
        self._handle.remove()


def _require_plain(parameters: list[Tensor]) -> None:
    if any(type(p).__name__ == "DTensor" for p in parameters):
        raise TypeError(
            "expected plain tensors, got DTensors, as of fully_shard or"
            " parallelize_module, which samfn.SAM does not spread over devices: use it with"
            " DistributedDataParallel, or samfn.sam_update with samfn.distributed"
        )


def _require_no_closure(optimizer: torch.optim.Optimizer) -> None:
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"expected an optimizer whose step needs no closure, got"
            f" {type(optimizer).__name__}, which evaluates the loss by itself"
        )


def _dense(grad: Any) -> Tensor:
    dense: Tensor = grad if grad.layout is torch.strided else grad.to_dense()
    return dense


def _is_zero(rho: float | Tensor) -> bool:
    # What a tensor holds is not looked at: that would make a GPU wait.
    return not isinstance(rho, Tensor) and rho == 0


def _multiplied(metric: Params, up: Params) -> dict[str, Tensor]:
    return tree.multiply(metric, up) if metric else {}


def _norm(up: Params) -> Tensor:
    """Return one norm of tensors that may be on several devices."""
    device = next(iter(up.values())).device
    parts = _parts(up, lambda name: up[name].device)
    norms = [tree.norm(part).to(device) for _, part in parts]
    length: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return length


def _parts(
    tensors: Params, key: Callable[[str], Any]
) -> Iterable[tuple[Any, dict[str, Tensor]]]:
    """Return the tensors in parts that have a key in common."""
    parts: dict[Any, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parts.setdefault(key(name), {})[name] = tensor
    return parts.items()
