"""The border to torch.nn: the one module that knows nn.Module."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.optim.swa_utils import update_bn
from torch.utils import _pytree as pytree

from samfn import border
from samfn.batches import length_of
from samfn.gradient import Aux, Loss
from samfn.lending import (
    Lender,
    ReadOnly,
    changes_gradients,
    graph,
    is_reentrant,
)
from samfn.memory import inside, is_watchable, sharing
from samfn.tree import Batch, Params

# By name: importing FSDP takes a second.
WRAPPERS = {
    "DataParallel",
    "DistributedDataParallel",
    "FullyShardedDataParallel",
    "FSDPModule",
}

RECOMPUTES = (
    "this model computes parts of its forward pass again during the backward pass (gradient"
    " checkpointing), and would read its own weights then: take the gradient by a step or a"
    " measure of samfn, or by samfn.gradient.evaluate, which lends it `params` until the"
    " backward pass is done"
)


def split(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Copy out of a model what trains and what does not.

    Returns:
        params: every parameter that requires grad, detached, by its qualified name. A
            weight that is tied to another appears once.
        buffers: the registered buffers and the frozen parameters.

    Raises:
        TypeError: `model` is wrapped for several devices, where gradients would
            silently stay unsynchronised.
        ValueError: no parameter requires grad, or some are not initialised yet.
    """
    _require_plain(model)
    params: dict[str, Tensor] = {}
    frozen: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"run a batch through the model first: {name} is lazy")
        group = params if parameter.requires_grad else frozen
        group[name] = parameter.detach().clone()
    if not params:
        raise ValueError("the model has no parameter that requires grad")
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    _require_memory_apart(*_references(model))
    return params, frozen | buffers


@torch.no_grad()
def load(model: nn.Module, params: Params, buffers: Params) -> None:
    """Copy parameters and buffers back into a model, in place.

    Raises:
        ValueError: names, shapes or dtypes are not those of `split(model)`; the model is
            unchanged then.
    """
    own_params, own_buffers = _references(model)
    _require_layout(own_params, params, "params")
    _require_layout(own_buffers, buffers, "buffers")
    for own, new in ((own_params, params), (own_buffers, buffers)):
        for name, tensor in own.items():
            tensor.copy_(new[name])


def state_dict(model: nn.Module, params: Params, buffers: Params) -> dict[str, Tensor]:
    """Return what `model.load_state_dict` takes, made of parameters and buffers.

    Raises:
        ValueError: names, shapes or dtypes are not those of `split(model)`.
    """
    own_params, own_buffers = _references(model)
    _require_layout(own_params, params, "params")
    _require_layout(own_buffers, buffers, "buffers")
    given, tied = {**params, **buffers}, _tied(model)
    return {name: given[tied.get(name, name)] for name in model.state_dict()}


def trained(model: nn.Module, params: Params, buffers: Params) -> nn.Module:
    """Return a copy of a model, in evaluation mode, with these parameters and buffers.

    Raises:
        ValueError: names, shapes or dtypes are not those of `split(model)`.
    """
    copied = copy.deepcopy(model)
    load(copied, params, buffers)
    return copied.eval()


def reestimated(
    model: nn.Module, params: Params, buffers: Params, inputs: Iterable[Any]
) -> dict[str, Tensor]:
    """Return the buffers with the statistics of BatchNorm taken anew, as for averages.

    The average of weights has not the average of statistics: mean and variance are those of
    `inputs` at `params`, every batch counting alike.

    Args:
        model: as `split` took it; unchanged.
        params: where.
        buffers: the rest stays as it is in them.
        inputs: batches of what the model takes, or (inputs, targets), of at least two
            examples; those of some thousand examples suffice. Several inputs of a model are
            a tuple, ((a, b), targets).

    Raises:
        ValueError: names, shapes or dtypes are not those of `split(model)`.
    """
    copied = trained(model, params, buffers)
    update_bn(inputs, _Unpacking(copied))
    return {name: tensor.detach() for name, tensor in _references(copied)[1].items()}


class _Unpacking(nn.Module):
    """A model that takes its inputs as one argument."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model

    def forward(self, inputs: Any) -> Any:
        return self._model(*arguments(inputs))


def norm_parameters(model: nn.Module) -> tuple[str, ...]:
    """Return the names of what the normalisation layers of a model train.

    Layers of torch.nn whose name has "Norm" in it, and others that are called so.
    """
    return tuple(
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if "Norm" in type(module).__name__
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad
    )


def no_decay_parameters(model: nn.Module) -> tuple[str, ...]:
    """Return the names of what is commonly spared weight decay.

    The parameters of normalisation layers and all that have one dimension or none, as
    biases: decay cannot make a network simpler by them.
    """
    normalising = {*norm_parameters(model)}
    return tuple(
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (parameter.ndim <= 1 or name in normalising)
    )


class PartedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm by the mean and variance of several parts of a batch, of one length."""

    def __init__(self, like: Any, total: Callable[[Tensor], Tensor], parts: int) -> None:
        super().__init__(1)
        vars(self).update(vars(like))
        self._like, self._total, self._parts = type(like), total, parts

    def _check_input_dim(self, inputs: Tensor) -> None:
        self._like._check_input_dim(self, inputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the normalised inputs, shape (examples, channels, ...)."""
        if not self.training:
            alone: Tensor = super().forward(inputs)
            return alone
        self._check_input_dim(inputs)
        others = [place for place in range(inputs.ndim) if place != 1]
        shape = [1, -1, *[1] * (inputs.ndim - 2)]
        count = self._parts * (inputs.numel() // inputs.shape[1])
        wide = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        # Squares of the distance from a number nearby lose fewer digits.
        near = self.running_mean
        if near is None:
            near = wide.new_zeros(wide.shape[1])
        shifted = wide - near.view(shape)
        sums = self._total(torch.stack([shifted.sum(others), shifted.square().sum(others)]))
        mean, square = sums / count
        variance = square - mean.square()
        self._remember(near + mean.detach(), variance.detach() * (count / (count - 1)))
        scaled = (shifted - mean.view(shape)) * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            scaled = scaled * self.weight.view(shape) + self.bias.view(shape)
        outputs: Tensor = scaled.to(inputs.dtype)
        return outputs

    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        kept: Any = self
        if not kept.track_running_stats:
            return
        kept.num_batches_tracked.add_(1)
        share = 1 / kept.num_batches_tracked if kept.momentum is None else kept.momentum
        kept.running_mean.lerp_(mean, share)
        kept.running_var.lerp_(variance, share)


def normalised_over(
    model: nn.Module, total: Callable[[Tensor], Tensor], parts: int
) -> nn.Module:
    """Return a copy of a model whose BatchNorm normalises by several parts of a batch.

    Args:
        model: unchanged.
        total: sums a tensor over the parts, and can be differentiated.
        parts: how many there are, of one length.
    """
    kind = nn.modules.batchnorm._BatchNorm
    copied = copy.deepcopy(model)
    if isinstance(copied, kind):
        return PartedBatchNorm(copied, total, parts)
    for name, module in [*copied.named_modules()]:
        if isinstance(module, kind):
            copied.set_submodule(name, PartedBatchNorm(module, total, parts))
    return copied


class _Supervised:
    """What makes the functions of `supervised`: a model that lends its forward pass."""

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[[Any, Any], Tensor],
        dtype: torch.dtype | None,
    ) -> None:
        _require_plain(model)
        self._model, self._criterion, self._dtype = model, criterion, dtype
        self._params, self._buffers = _references(model)
        self._lender = Lender(model)
        self._hooks = self._lender.hooks()
        self._modes: set[bool] = set()  # in which a forward pass was watched

    def function(self, params: Params, buffers: Params, batch: Batch) -> tuple[Tensor, Aux]:
        """Return the loss and, beside it, the model's outputs and new buffers."""
        recorded = torch.is_grad_enabled() and any(w.requires_grad for w in params.values())
        if not recorded or torch.compiler.is_compiling():
            with self._forward(params, buffers, batch) as found:
                return found
        forbidden = disable_saved_tensors_hooks(RECOMPUTES)
        with forbidden, self._forward(params, buffers, batch) as (loss, aux):
            if is_reentrant(graph(loss)):
                raise RuntimeError(RECOMPUTES)
            return loss, aux

    @contextmanager
    def differentiating(
        self, params: Params, buffers: Params, batch: Batch, *, twice: bool = False
    ) -> Iterator[tuple[Tensor, Aux]]:
        """Give what `function` returns, and lend the parameters to the backward pass.

        Gradient checkpointing runs parts of the model again, and hooks and functions of
        users may read it: they find what the forward pass found.
        """
        if twice and (hooked := changes_gradients(self._model)):
            raise ValueError(
                f"{hooked} has a hook that may change gradients; the second derivative of"
                " the loss is another thing than that of what hooks make of the first"
            )
        with self._forward(params, buffers, batch, leaves=True) as found:
            # What is computed again writes statistics again: to copies that nobody reads.
            again = {name: _copied(buffers[name]) for name in self._lender.buffers}
            self._lender.put(again)
            yield found

    def check(self, params: Params, buffers: Params) -> None:
        """Raise unless `params` and `buffers` are what `split(model)` gives.

        Raises:
            ValueError: a name, shape or dtype differs, or a tensor shares its memory
                with the model's own.
        """
        if torch.compiler.is_compiling():
            return  # `function` compares the names, and a graph knows no addresses.
        self._look_again()
        own_parameters = self._lender.parameters.items()
        trained = {name for name, parameter in own_parameters if parameter.requires_grad}
        if trained != self._params.keys():  # Some were frozen since, or no longer are.
            self._params, self._buffers = _references(self._model)
        try:
            self._require_own(params, buffers)
        except ValueError:  # The model may have been moved or cast since it was wrapped.
            self._params, self._buffers = _references(self._model)
            self._require_own(params, buffers)
        for own, given in ((self._params, params), (self._buffers, buffers)):
            for name, tensor in given.items():
                strided = tensor.layout is torch.strided and tensor.numel()
                if strided and tensor.data_ptr() == own[name].data_ptr():
                    raise ValueError(
                        f"{name} shares its memory with the model; expected copies, as"
                        " samfn.split(model) makes"
                    )

    def _look_again(self) -> None:
        """Take note of the layers and hooks that the model has now."""
        if not self._lender.stands():
            self._lender = Lender(self._model)
        self._hooks = self._lender.hooks()

    @contextmanager
    def _forward(
        self, params: Params, buffers: Params, batch: Batch, *, leaves: bool = False
    ) -> Iterator[tuple[Tensor, Aux]]:
        """Go forward, and lend the model what it was lent until the context is left.

        Args:
            params: at which.
            buffers: beside them.
            batch: (inputs, targets).
            leaves: `params` were made for this pass alone.
        """
        # The model's own tensor would stand in for a missing name.
        border.require_same_names(self._params, params, names="the model and params")
        border.require_same_names(self._buffers, buffers, names="the model and buffers")
        compiling, lent = torch.compiler.is_compiling(), {}
        if not compiling:
            self._look_again()
            lent = self._lent(params, buffers, leaves=leaves)
        elif self._hooks:
            raise RuntimeError(f"hooks of parameters: {[*self._hooks]}")
        fresh = {name: _copied(buffers[name]) for name in self._lender.buffers}
        given, structure = pytree.tree_flatten(_pair(batch))
        copies = [x.clone() if isinstance(x, Tensor) else x for x in given]
        pair = pytree.tree_unflatten(copies, structure)
        with self._lender.holding({**params, **buffers, **lent, **fresh}):
            # Inside of torch.func there is no memory to be watched.
            if compiling or any(map(is_functorch_wrapped_tensor, lent.values())):
                found = self._run(buffers, pair)
            else:
                others = [x for x in given if not isinstance(x, Tensor)]
                hidden = {
                    type(x).__name__: [*filter(is_watchable, inside(x))] for x in others
                }
                with self._reading(params, buffers), self._lender.reading(lent, hidden):
                    found = self._run(buffers, pair)
                self._modes.add(self._model.training)
            yield found

    def _run(self, buffers: Params, pair: tuple[Any, Any]) -> tuple[Tensor, Aux]:
        inputs, targets = pair  # copies, and so are the buffers that it may write to
        device = next(iter(self._params.values())).device.type
        with self._precision(device):
            outputs = self._model(*arguments(inputs))
            loss = _loss_of(self._criterion(outputs, targets))
        aux = Aux(outputs, {**buffers, **self._lender.left()})
        if loss.ndim == 1:
            return loss.mean(), aux._replace(losses=loss)
        return loss, aux

    def _reading(self, params: Params, buffers: Params) -> AbstractContextManager[Any]:
        """Watch the first pass in each mode as it goes; others are looked at after."""
        if self._model.training in self._modes:
            return nullcontext()
        criterion = self._criterion
        kept = dict(criterion.named_buffers()) if isinstance(criterion, nn.Module) else {}
        mine = {f"the criterion's {name}": buffer for name, buffer in kept.items()}
        own = {name: w for name, w in self._params.items() if name in params}
        return ReadOnly({**mine, **buffers, **params}, own)

    def _lent(self, params: Params, buffers: Params, *, leaves: bool) -> dict[str, Tensor]:
        """Return the parameters as the model knows its own: with attributes and hooks."""
        lent: dict[str, Tensor] = {}
        for name, own in self._lender.parameters.items():
            given = params[name] if name in params else buffers[name]
            if given.requires_grad:
                new = given if leaves else given.view_as(given)
            else:
                new = given.detach()
                if not torch.is_grad_enabled() and not leaves:
                    new.requires_grad_(own.requires_grad)
            vars(new).update(vars(own))
            if isinstance(own, nn.Parameter):
                cast(Any, new)._is_param = True  # isinstance of a Parameter asks for it.
            lent[name] = new
        for name, hooks in self._hooks.items():
            if lent[name].requires_grad and torch.is_grad_enabled():
                hooked = lent[name].view_as(lent[name])
                for hook in hooks:
                    hooked.register_hook(hook)  # type: ignore[no-untyped-call]
                lent[name] = hooked
        return lent

    def _precision(self, device: str) -> AbstractContextManager[Any]:
        if self._dtype is None and not torch.is_autocast_enabled(device):
            return nullcontext()  # Entering autocast costs as much as a small layer.
        return torch.autocast(device, self._dtype, enabled=self._dtype is not None)

    def _require_own(self, params: Params, buffers: Params) -> None:
        _require_layout(self._params, params, "params")
        _require_layout(self._buffers, buffers, "buffers")


def supervised(
    model: nn.Module,
    criterion: Callable[[Any, Any], Tensor],
    *,
    dtype: torch.dtype | None = None,
) -> Loss:
    """Turn a model and a criterion into a pure loss function.

    (params, buffers, (inputs, targets)) -> criterion(model(inputs), targets), Aux

    The model lends its forward pass; none of its tensors is read or written, and neither
    is the batch. Its mode counts at every call: `model.eval()` makes this the loss of
    evaluation, which leaves nothing in the attributes of modules that a pass at other
    parameters could read. Buffers may be changed in place or assigned anew. Gradient
    checkpointing works, as steps and measures of samfn keep the parameters in the model
    until the backward pass is done; differentiating the result by other means is refused.

    Args:
        model: any module. A tuple of inputs becomes its positional arguments.
        criterion: (outputs, targets) -> the loss, a scalar, or the loss of each example,
            shape (examples,), whose mean is the loss then. `esam` needs the latter. It may
            read the model, as for a penalty on its weights, and has no parameters itself.
        dtype: compute in this dtype where PyTorch's autocast deems it safe, as
            `torch.bfloat16`; parameters, gradients and buffers keep theirs. None computes
            in the dtype of the parameters.

    Raises:
        TypeError: `model` is wrapped for several devices, or a script.
        ValueError: `criterion` has parameters of its own.
    """
    if isinstance(criterion, nn.Module):
        own = {id(p) for p in model.parameters()}
        learnt = [
            name
            for name, p in criterion.named_parameters()
            if p.requires_grad and id(p) not in own
        ]
        if learnt:
            raise ValueError(
                f"the criterion has parameters of its own, {border.some(learnt)}, that no"
                " step would train: put them into the model, or let them not require grad"
            )
    made = _Supervised(model, criterion, dtype)
    weigh = _weighing(criterion) or length_of
    return Loss(made.function, made.check, made.differentiating, weigh)


def _weighing(criterion: Any) -> Callable[[Batch], int | Tensor] | None:
    """Return what a criterion of PyTorch is a mean over, if that is not all examples.

    sum of weight[target] over the targets that are not ignored
    """
    given: dict[str, Any] = {}
    while isinstance(criterion, partial) and not criterion.args:
        given, criterion = {**criterion.keywords, **given}, criterion.func
    is_module = type(criterion) in (nn.CrossEntropyLoss, nn.NLLLoss)
    if not is_module and criterion not in (
        nn.functional.cross_entropy,
        nn.functional.nll_loss,
    ):
        return None

    def weigh(batch: Batch) -> int | Tensor:
        said = given
        if is_module:  # Its attributes may be set anew.
            said = {**vars(criterion), "weight": criterion.weight}
        reduction = said.get("reduction", "mean")
        if reduction == "sum":
            raise ValueError("expected a mean of the examples' losses, got their sum")
        _, targets = _pair(batch)
        # Of probabilities of the classes, none is ignored.
        if reduction != "mean" or targets.is_floating_point():
            return length_of(batch)
        counts = targets != said.get("ignore_index", -100)
        if (weights := said.get("weight")) is None:
            number: Tensor = counts.sum()
            return number
        return torch.where(counts, weights[torch.where(counts, targets, 0)], 0).sum()

    return weigh


def _pair(batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        if isinstance(batch, Mapping):
            came = f"a mapping of {border.some([*map(str, batch)])}"
        elif isinstance(batch, tuple | list):
            came = f"{len(batch)} of them"
        else:
            came = type(batch).__name__
        raise ValueError(
            f"expected a batch of two, (inputs, targets), got {came}: several inputs are a"
            " tuple, ((a, b), targets); for batches of another form write a loss function"
            " (params, buffers, batch) -> loss"
        )
    inputs, targets = batch
    if isinstance(targets, Tensor) and targets.numel() == 0:
        raise ValueError(
            "expected a batch of at least one example, got targets of shape"
            f" {tuple(targets.shape)}"
        )
    return inputs, targets


def _copied(tensor: Tensor) -> Tensor:
    # A sparse tensor has no entries that a forward pass could write to by their place.
    return tensor.clone() if tensor.layout is torch.strided else tensor


def arguments(inputs: Any) -> tuple[Any, ...]:
    """Return the positional arguments of a model: those of a tuple, or one."""
    # A packed sequence, and any named tuple, is one argument.
    return inputs if type(inputs) is tuple else (inputs,)


def _loss_of(returned: Any) -> Tensor:
    if not isinstance(returned, Tensor):
        raise TypeError(
            "the criterion must return the loss, a tensor of shape () or (examples,), got"
            f" {type(returned).__name__}"
        )
    return returned


def _references(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the model's own tensors, with the names that `split` gives."""
    parameters = dict(model.named_parameters())
    params = {name: p for name, p in parameters.items() if p.requires_grad}
    frozen = {name: p for name, p in parameters.items() if not p.requires_grad}
    return {**params}, {**frozen, **dict(model.named_buffers())}


def _tied(model: nn.Module) -> dict[str, str]:
    """Return further names of shared tensors, each with the name that `split` gives."""
    first: dict[int, str] = {}
    everything = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    names = {name: first.setdefault(id(tensor), name) for name, tensor in everything}
    return {name: own for name, own in names.items() if name != own}


def _require_plain(model: nn.Module) -> None:
    """Raise where a wrapper would exchange gradients in hooks that nothing here calls."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"expected a module of Python, got a script ({name or 'the model'}), which"
                " keeps its tensors to itself: pass what it was made from"
            )
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if found := sorted(kinds & WRAPPERS):
            where = f" at {name}" if name else ""
            raise TypeError(
                f"expected a plain module, got {found[0]}{where}: pass what it wraps;"
                " samfn.distributed spreads a step over several devices"
            )


def _require_memory_apart(params: Params, others: Params) -> None:
    """Raise where a parameter is one with another tensor in memory only.

    Copies would part them, where a loop that writes to the model changes both.
    """
    for one, other in sharing({**params, **others}):
        if one in params:
            raise ValueError(
                f"{one} and {other} share memory, but are two tensors: to tie weights, let"
                " both modules hold the same torch.nn.Parameter"
            )


def _require_layout(expected: Params, given: Params, what: str) -> None:
    if not isinstance(given, Mapping):
        raise TypeError(f"{what} must be a mapping, got {type(given).__name__}")
    border.require_same_layout(expected, given, names=f"the model and {what}")
