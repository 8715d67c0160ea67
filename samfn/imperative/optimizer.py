"""SAM for existing loops: an Optimizer of PyTorch around another, on the pure functions.

New code wants `samfn.sam_update`, which overwrites nothing; this is for loops that are
written already.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from samfn import tree
from samfn.gradient import dense
from samfn.imperative import parts
from samfn.imperative.guard import COPY_LATER, Guard, Mark
from samfn.imperative.kept import Kept
from samfn.imperative.passes import Home, Passes, Seen, homes
from samfn.methods.base import is_number_zero
from samfn.support import checks

Groups = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
P = ParamSpec("P")
R = TypeVar("R")


def _in_any_mode(method: Callable[P, R]) -> Callable[P, R]:
    """Let a method do the same wherever it is called: compiled, or in inference mode."""
    # Dynamo would lose what it sets, and has nothing to win on foreach kernels. What is
    # made in inference mode, as the memory of the base optimizer, could not change later.
    # As in torch.optim: torch.compiler.disable would import Dynamo here, not when used.
    disable: Any = _disable_dynamo
    same: Callable[P, R] = disable(torch.inference_mode(False)(torch.no_grad()(method)))
    return same


def _itself(optimizer: Any) -> Any:
    """Return the optimizer, where it may be a wrapper of it.

    What `self.optimizers()` is in a module of Lightning gets a subclass of ours as its
    class, so that a method of ours is called with it; all that is written is to be here.
    """
    if "base_optimizer" in optimizer.__dict__:
        return optimizer
    return getattr(optimizer, "optimizer", optimizer)


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation around an optimizer of PyTorch.

    first_step: w <- w + e, e = rho T^2 g / ||T g||;  second_step: w back, base optimizer

    T is `|w|` in groups that are `adaptive`, else 1; one norm over all groups together, in
    float32 or wider. Where parameters are DTensors, as of `fully_shard` or
    `parallelize_module`, it is that of the whole vector, and m, the number of examples that
    a perturbation is of, is the global batch: all ranks share one. Plain tensors beside
    DTensors must have the same gradients on all ranks.

    The interface and the arithmetic are those of davda54/sam::

        optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)

        loss_fn(model(inputs), targets).backward()
        optimizer.first_step(zero_grad=True)
        loss_fn(model(inputs), targets).backward()  # a whole forward pass again
        optimizer.second_step(zero_grad=True)

    Where the two passes see different parameters, each counts for what it saw: one with a
    gradient in the first pass only is perturbed, put back, and left where it was; one with
    a gradient in the second only moves by it, unperturbed. Both passes must be of as many
    backward passes; accumulated gradients take `keep_step`. Weights are put back exactly,
    into the memory that they had; before that, see `guard`, `unperturbed` and `restore`.
    BatchNorm's statistics are the caller's business here.

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
        ValueError: a rho is no finite number of at least 0; the base optimizer has a rho of
            its own, as Adadelta.

    Source:
        Foret et al., 2021, arXiv:2010.01412, algorithm 1; Kwon et al., 2021,
        arXiv:2102.11600; interface of github.com/davda54/sam. He adds 1e-12 to the norm,
        and is 0.5 % short of rho at a norm of 2e-10; here the length is rho, or 0 where
        the norm is below 1e-15 or above 1e19, which float32 cannot square. The step is
        then the base optimizer's; above, `skip_nonfinite` skips it, as `sam_update` does.
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
        super().__init__(cast(Any, params), {"rho": rho, "adaptive": adaptive, **kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        if isinstance(self.base_optimizer, SAM):
            raise TypeError("expected a base optimizer, got samfn.SAM inside of samfn.SAM")
        checks.require_base_optimizer(self.base_optimizer)
        _require_apart(self.base_optimizer)
        self.defaults.update(self.base_optimizer.defaults)
        self.base_optimizer.defaults = self.defaults  # Groups may be added to either.
        self.skip_nonfinite = skip_nonfinite
        self.skipped = 0
        self._guarded: dict[int, Home] = {}  # Parameters, by their identity.
        self._start()

    def _start(self) -> None:
        self._clean: dict[Tensor, Tensor] | None = None  # Between the steps: the weights.
        self._is_aside = False  # Whether the perturbation is, while somebody looks at them.
        self._used: dict[str, Seen] = {}  # Gradients of the step before.
        self._finite: Tensor | None = None  # Of first passes, if steps may be skipped.
        self._mark: Mark | None = None
        self._kept = Kept()
        self._watch()
        self._asked = False  # For the groups, since the first step; see `param_groups`.

    def _watch(self) -> None:
        before: Passes | None = vars(self).get("_passes")
        if before is not None:
            before.end()
        self._passes = Passes()
        self._passes.watch(self._all(), self._guarded)
        weakref.finalize(self, self._passes.end).atexit = False

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups, which are those of the base optimizer."""
        # So does a GradScaler to unscale gradients, which shows in nothing else.
        self = _itself(self)
        self._asked = True
        return self._groups()

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        vars(vars(self).get("base_optimizer", self))["param_groups"] = groups

    @property
    def state(self) -> Any:
        """The memory, which is that of the base optimizer."""
        self = _itself(self)
        return vars(vars(self).get("base_optimizer", self))["state"]

    @state.setter
    def state(self, state: Any) -> None:
        self = _itself(self)
        vars(vars(self).get("base_optimizer", self))["state"] = state

    def _groups(self) -> list[dict[str, Any]]:
        owner = vars(vars(self).get("base_optimizer", self))
        return cast(list[dict[str, Any]], owner["param_groups"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, which may have a `rho` and `adaptive` of its own.

        Raises:
            TypeError, ValueError: as the constructor; there is no new group then.
        """
        super().add_param_group(param_group)
        try:
            _require_usable(self.param_groups[-1])
        except (TypeError, ValueError):
            del self.param_groups[-1]
            raise

    @property
    def perturbed(self) -> bool:
        """Whether the weights are w + e, as after `first_step`, and not w."""
        return self._clean is not None and not self._is_aside

    @_in_any_mode
    def restore(self) -> None:
        """Put the weights back if they are perturbed, and give up the step.

        For a loop that leaves between the two steps; see `restore_on_error`. What
        `keep_step` kept for the step is given up, too.
        """
        self = _itself(self)
        self._put_back()
        self._kept.give_up()
        self._finite = None

    @contextmanager
    def restore_on_error(self) -> Iterator[None]:
        """Call `restore` where what is inside of a `with` fails, as for lack of memory.

        For passes that are written once, and run by programs that may go on after errors::

            with optimizer.restore_on_error():
                loss_fn(model(inputs), targets).backward()
                optimizer.first_step(zero_grad=True)
                loss_fn(model(inputs), targets).backward()
            optimizer.second_step(zero_grad=True)
        """
        try:
            yield
        except BaseException:
            self.restore()
            raise

    def _put_back(self) -> None:
        if self._clean is not None:
            _assign(self._clean)
        self._clean = None
        if self._mark is not None:
            self._mark.end()
            self._mark = None

    @contextmanager
    def unperturbed(self) -> Iterator[None]:
        """Let the weights be w inside of a `with`, and what they were after it.

        To evaluate, copy or average the model between the two steps. Weights that are
        written inside become w, and e is added to them after it. If the step ends inside,
        the weights stay what it makes of them.
        """
        self = _itself(self)
        clean = self._clean
        if clean is None or self._is_aside:
            yield
            return
        perturbed = {p: tree.local(p.detach()).clone() for p in clean}
        _assign(clean)
        self._is_aside = True
        try:
            yield
        finally:
            self._is_aside = False
            if self._clean is clean:
                _take_over(clean, perturbed)
                _assign(perturbed)

    def guard(self, model: torch.nn.Module) -> None:
        """Let nothing be saved of a model, or loaded into it, but its own weights.

        Between the two steps `state_dict` of the model and of its modules then holds w,
        also in a signal handler; `load_state_dict` calls `restore` first; and to copy or
        pickle the model, or to give it to `samfn.split` or `samfn.load`, is an error. This
        optimizer's `state_dict` may then be taken, too: from both, training goes on before
        this step. Buffers are as they are.

        Under `fully_shard` it also lets backward passes be counted that are not
        synchronised: call it before the first of them.
        """
        self = _itself(self)
        Guard(self).watch(model)
        self._guarded |= homes(model)
        self._passes.visit(self._guarded)

    @_in_any_mode
    def first_step(self, zero_grad: bool = False) -> None:
        """Move the weights to the worst point nearby.

        Raises:
            RuntimeError: no parameter has a gradient, the weights are perturbed already, or
                the gradients stay where those that `keep_step` kept have to be.
            TypeError, ValueError: a group was given a rho, or else, that is none.
        """
        self = _itself(self)
        if self._clean is not None:
            raise RuntimeError(
                "first_step was called twice: call second_step or keep_step in between, or"
                " restore"
            )
        if self.kept and not zero_grad:
            raise RuntimeError("after keep_step, call first_step(zero_grad=True)")
        for group in self.param_groups:
            _require_usable(group)
        groups = {n: group for n, p, group in self._parameters() if p.grad is not None}
        params = {name: p for name, p, _ in self._parameters() if name in groups}
        if not params:
            way = parts.way_to_gradients(self._all())
            raise RuntimeError(f"no parameter has a gradient: {way}")
        parts.align(params.values())
        self._perturb(params, groups)
        self._passes.end_first([*params.values()], self._guarded)
        torch.clear_autocast_cache()  # Within one autocast, it holds casts of w.
        if zero_grad:
            self.zero_grad()
            self._kept.place()
        if self._kept.is_placed or not zero_grad:
            self._passes.begin(anew=self._kept.is_placed)
        if self._finite is not None:
            self._mark = Mark(self._all(), self._finite)
        self._asked = False

    def _perturb(self, wholes: dict[str, Tensor], groups: parts.Groups) -> None:
        up, length = parts.uphill(wholes, groups)
        up |= {name: -up[name] for name in up if self._maximises(groups[name])}
        if self.skip_nonfinite:
            finite = length.isfinite()
            # The second pass must leave no NaN in BatchNorm's statistics.
            up = {n: torch.where(finite.to(w.device), w, 0.0) for n, w in up.items()}
            before = finite if self._finite is None else self._finite.to(finite.device)
            self._finite = finite & before
        moved = [name for name, group in groups.items() if not is_number_zero(group["rho"])]
        params = {name: tree.local(wholes[name]) for name in moved}
        clean = tree.clone(params) if moved else {}
        self._clean = {wholes[name]: weight for name, weight in clean.items()}
        try:
            parts.move(params, tree.only(up, moved), length, groups)
        except BaseException:  # As where memory is full.
            self._put_back()
            raise

    def _maximises(self, group: Mapping[str, Any]) -> bool:
        # What is worst for an objective that is maximised is where it is lowest.
        return bool(getattr(self.base_optimizer, "maximize", group.get("maximize")))

    @_in_any_mode
    def second_step(self, zero_grad: bool = False) -> None:
        """Put the weights back, and take the base optimizer's step.

        Its gradient is the sum of those of the second passes since the step before, see
        `keep_step`. Hooks that were registered for steps are called, as by `step`.

        Raises:
            RuntimeError: `first_step` was not called before, or the two passes are not of
                as many backward passes; the step is given up then.
        """
        self = _itself(self)
        for hook in self._optimizer_step_pre_hooks.values():
            hook(self, (self, zero_grad), {})
        self._second_step(zero_grad)
        for hook in self._optimizer_step_post_hooks.values():
            hook(self, (self, zero_grad), {})

    def _second_step(self, zero_grad: bool = False) -> None:
        self._come_back()
        self._descend()
        self._finish(zero_grad)

    @_in_any_mode
    def keep_step(self, zero_grad: bool = False) -> None:
        """Put the weights back, and keep the gradient for the next `second_step`.

        For accumulated gradients, with a perturbation for each micro-batch (m-sharpness)::

            for micro_batch, is_last in group:
                (loss_of(micro_batch) / n).backward()
                optimizer.first_step(zero_grad=True)
                (loss_of(micro_batch) / n).backward()
                step = optimizer.second_step if is_last else optimizer.keep_step
                step(zero_grad=True)

        The base optimizer takes the sum, as PyTorch's users scale their losses by
        themselves. `kept` says of how many micro-batches it has it; `restore` gives all of
        them up. In the second pass, gradients begin with what is kept, so that clipping, a
        GradScaler and `no_sync` find the sum.

        For one perturbation of all micro-batches, give `step` a closure::

            def closure():
                for micro_batch in group:
                    (loss_of(micro_batch) / n).backward()

        Raises:
            RuntimeError: as `second_step`, or there is no gradient of a second pass.
        """
        self = _itself(self)
        self._come_back()
        parameters = self._all()
        if self._kept.is_alone(parameters):
            way = parts.way_to_gradients(parameters)
            self.restore()
            self._refuse(f"the second pass left no gradient: {way}")
        self._kept.take(parameters)
        if zero_grad:
            self.zero_grad()
        else:
            self._passes.begin()

    @property
    def kept(self) -> int:
        """Of how many micro-batches gradients are kept, for a step that is to come."""
        return self._kept.count

    @_in_any_mode
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
            if self._clean is None and parts.moves_nothing(self._groups()):
                return self.base_optimizer.step()
            self._scaled_second_step()
            return None
        try:
            return self._step_by(closure)
        except BaseException:  # Ctrl-C, too, wherever it comes.
            if self._clean is not None:
                self.restore()
            raise

    def _step_by(self, closure: Callable[[], Any]) -> Any:
        """Take both steps by a closure, or the second one."""
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
                " accumulated from other batches, as by a trainer, the closure has to go"
                " through all of them, or each of those takes first_step and keep_step"
            )
        rhos = [cast(float, group.get("rho")) for group in self.param_groups]
        one_pass = all(map(is_number_zero, rhos)) and not self.kept
        self.zero_grad()
        with torch.enable_grad():
            loss = closure()
        self.first_step(zero_grad=not one_pass)
        if one_pass:
            self._second_step()
        else:
            self._closed(closure)
        return loss

    def _closed(self, closure: Callable[[], Any]) -> Any:
        """Take the second pass by a closure, and the second step."""
        with torch.enable_grad():
            loss = closure()
        self._second_step()
        return loss

    def _scaled_second_step(self) -> None:
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is None:
            self._second_step()
            return
        scale: Tensor | None = getattr(self, "grad_scale", None)
        if scale is None and self._clean is not None and not self._asked:
            self.restore()
            self._refuse(
                "scaler.unscale_(optimizer) was called for the first pass, and the second"
                " is still scaled: call it after the second backward pass, or not at all"
            )
        self._come_back()
        parts.require_agreement(found_inf, self._all())
        if found_inf:
            self.skipped += 1
        else:
            if scale is not None:
                for grad in self._grads().values():
                    tree.local(grad).mul_(scale.reciprocal().to(grad.device))
            self._descend()
        self._finish(zero_grad=False)

    def _descend(self) -> None:
        """Take the base optimizer's step, unless a gradient is not finite."""
        if self._finite is None or self._is_finite(self._finite):
            self.base_optimizer.step()
        else:
            self.skipped += 1

    def _is_finite(self, finite: Tensor) -> bool:
        grads = {name: dense(tree.local(g)) for name, g in self._grads().items()}
        if grads:
            wholes = {name: p for name, p, _ in self._parameters()}
            length = tree.norm_of_any(grads, wholes)
            finite = finite & length.isfinite().to(finite.device)
        return bool(finite)

    def _grads(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p, _ in self._parameters() if p.grad is not None}

    def _refuse(self, message: str) -> NoReturn:
        for name in ("grad_scale", "found_inf"):  # GradScaler deletes them, if we return.
            self.__dict__.pop(name, None)
        raise RuntimeError(message)

    def _come_back(self) -> None:
        if self._clean is None:
            self._refuse(
                "call first_step, and backward again, before second_step, which step is"
                " without a closure: SAM takes two passes a step. A loop that calls step"
                " alone has to give it a closure that computes the loss, calls backward and"
                " returns the loss"
            )
        self._put_back()
        if wrong := self._kept.wrong_with(self._passes, self._all()):
            self.restore()
            self._refuse(wrong)
        parts.align(self._all())

    def _finish(self, zero_grad: bool) -> None:
        self._opt_called = True  # What a scheduler looks for, before it warns.
        self._kept.end()
        self._finite = None
        torch.clear_autocast_cache()
        if zero_grad:
            self.zero_grad()
        else:
            self._remember_gradients()
            self._passes.begin()

    def _remember_gradients(self) -> None:
        self._used = {name: Seen.of(grad) for name, grad in self._grads().items()}

    def _has_new_gradients(self) -> bool:
        """Return whether a backward pass came after the last step."""
        return any(
            name not in self._used or not self._used[name].is_still(grad)
            for name, grad in self._grads().items()
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, but not those that `keep_step` keeps.

        Raises:
            RuntimeError: the second pass has added to those already.
        """
        self = _itself(self)
        if self._kept.is_placed:
            if not self._kept.is_alone(self._all()):
                raise RuntimeError(
                    "the gradients hold what keep_step kept: call second_step or keep_step"
                    " before zero_grad, or restore to give up the step"
                )
            return
        self.base_optimizer.zero_grad(set_to_none)
        self._remember_gradients()
        self._passes.begin(anew=True)

    def _parameters(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        """Yield the parameters, by the names that they have here, with their groups."""
        for number, group in enumerate(self._groups()):
            for index, parameter in enumerate(group["params"]):
                yield f"{number}.{index}", parameter, group

    def _all(self) -> list[Tensor]:
        return [p for group in self._groups() for p in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        """Return settings, the base optimizer's state, and how many steps were skipped.

        Raises:
            RuntimeError: the weights are perturbed, or gradients are kept, and not all are
                of a model that is guarded; see `guard`.
        """
        self = _itself(self)
        if self.perturbed and not self._guarded.keys() >= {*map(id, self._clean or ())}:
            raise RuntimeError(
                "the weights are perturbed, so there is no state to save: call second_step"
                " before, save inside of `with optimizer.unperturbed()`, or call"
                " optimizer.guard(model) once"
            )
        if not self._guarded.keys() >= {*map(id, self._kept.parameters())}:
            self._kept.require_none("second_step, or optimizer.guard(model) once")
        return {**super().state_dict(), "skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; also one of davda54/sam, which has no momentum in it.

        A state of the base optimizer alone, or of any that has no `rho` and `adaptive` in
        it, leaves these as they are.

        Raises:
            RuntimeError: the weights are perturbed, or gradients are kept.
            TypeError, ValueError: the state has a rho, or else, that is none, or is of
                other groups. Nothing has changed then.
        """
        self = _itself(self)
        if self._clean is not None:
            raise RuntimeError(
                "the weights are perturbed: call restore() before a state is loaded, and"
                " before the model's weights are"
            )
        self._kept.require_none("restore() before a state is loaded")
        own, loaded = self.param_groups, state_dict["param_groups"]
        if len(own) == len(loaded):  # PyTorch says so, if not.
            loaded = [
                {"rho": mine.get("rho"), "adaptive": mine.get("adaptive"), **group}
                for mine, group in zip(own, loaded, strict=True)
            ]
            for group in loaded:
                _require_usable(group)
        skipped = state_dict.get("skipped", 0)
        checks.require_count("skipped", skipped, least=0)
        kept = {
            index: {name: value for name, value in state.items() if name != "old_p"}
            for index, state in state_dict["state"].items()
        }
        kept = {index: state for index, state in kept.items() if state}
        super().load_state_dict({**state_dict, "state": kept, "param_groups": loaded})
        shared = {name: vars(self)[name] for name in ("state", "param_groups")}
        self.base_optimizer.__setstate__(shared)
        self.skipped = skipped
        used = self._used  # Gradients of the step before are still no new ones.
        self._start()
        self._used = used

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied: the base optimizer, too.

        Raises:
            RuntimeError: the weights are perturbed, or gradients are kept.
        """
        if self.perturbed:
            raise RuntimeError(f"the weights are perturbed: {COPY_LATER}")
        self._kept.require_none("second_step or restore before this is copied")
        own = ("base_optimizer", "skip_nonfinite", "skipped")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what was copied."""
        super().__setstate__(state)
        if "_clean" not in self.__dict__:
            self._guarded = {}
            self._start()


_assign = _in_any_mode(parts.write)
_take_over = _in_any_mode(parts.take_over)


def _require_apart(base: torch.optim.Optimizer) -> None:
    """Raise if a setting of the base optimizer has the name of one of SAM's."""
    if same := sorted({"rho", "adaptive"} & base.defaults.keys()):
        raise ValueError(
            f"expected a base optimizer without a setting {', '.join(same)}, got"
            f" {type(base).__name__}, which would take that of samfn.SAM for its own: as"
            " samfn.from_torch, in samfn.sam_update, it has both"
        )


def _require_usable(group: dict[str, Any]) -> None:
    """Raise unless the settings of a group can be used; a number becomes Python's."""
    group["rho"] = checks.require_dial("rho", cast(float, group.get("rho")))
    if (adaptive := group.get("adaptive")) not in (True, False):
        raise TypeError(f"adaptive must be True or False, got {adaptive!r}")
    if group.get("differentiable"):
        raise ValueError(
            "differentiable must be False: samfn.SAM takes its steps outside of autograd"
        )
