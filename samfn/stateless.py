"""The border to torch.nn: the one module that knows nn.Module."""

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.swa_utils import update_bn

from samfn import border
from samfn.gradient import Aux
from samfn.tree import Params

# By name: importing FSDP takes a second.
WRAPPERS = {
    "DataParallel",
    "DistributedDataParallel",
    "FullyShardedDataParallel",
    "FSDPModule",
}


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
            examples; those of some thousand examples suffice.

    Raises:
        ValueError: names, shapes or dtypes are not those of `split(model)`.
    """
    copied = trained(model, params, buffers)
    update_bn(inputs, copied)
    return {name: tensor.detach() for name, tensor in _references(copied)[1].items()}


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


class Supervised:
    """The loss of a model on `(inputs, targets)` as a pure function; see `supervised`."""

    pure = True  # `__call__` gives the model a copy of every tensor that it may change.

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[[Any, Any], Tensor],
        dtype: torch.dtype | None,
    ) -> None:
        _require_plain(model)
        self._model, self._criterion, self._dtype = model, criterion, dtype
        self._params, self._buffers = _references(model)
        self._mutable = [name for name, _ in model.named_buffers()]
        self._tied = _tied(model)

    def __call__(
        self, params: Params, buffers: Params, batch: tuple[Any, Any]
    ) -> tuple[Tensor, Aux]:
        """Return the loss and, beside it, the model's outputs and new buffers."""
        # functional_call would take the model's own tensor for a missing name.
        border.require_same_names(self._params, params, names="the model and params")
        border.require_same_names(self._buffers, buffers, names="the model and buffers")
        inputs, targets = batch
        if isinstance(targets, Tensor) and targets.numel() == 0:
            raise ValueError(
                "expected a batch of at least one example, got targets of shape"
                f" {tuple(targets.shape)}"
            )
        # BatchNorm writes its statistics in place; these copies are what it writes to.
        fresh = {**buffers, **{name: buffers[name].clone() for name in self._mutable}}
        given = {**params, **fresh}
        given |= {alias: given[name] for alias, name in self._tied.items()}
        with self._precision(next(iter(params.values())).device.type):
            outputs = functional_call(self._model, given, inputs, tie_weights=False)
            loss = self._criterion(outputs, targets)
        if loss.ndim == 1:
            return loss.mean(), Aux(outputs, fresh, loss)
        return loss, Aux(outputs, fresh)

    def check(self, params: Params, buffers: Params) -> None:
        """Raise unless `params` and `buffers` are what `split(model)` gives.

        Raises:
            ValueError: a name, shape or dtype differs, or a tensor shares its memory
                with the model's own.
        """
        if torch.compiler.is_compiling():
            return  # `__call__` compares the names, and a graph knows no addresses.
        try:
            self._require_own(params, buffers)
        except ValueError:  # The model may have been moved or cast since it was wrapped.
            self._params, self._buffers = _references(self._model)
            self._require_own(params, buffers)
        for own, given in ((self._params, params), (self._buffers, buffers)):
            for name, tensor in given.items():
                if tensor.data_ptr() == own[name].data_ptr() and tensor.numel():
                    raise ValueError(
                        f"{name} shares its memory with the model; expected copies, as"
                        " samfn.split(model) makes"
                    )

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
) -> Supervised:
    """Turn a model and a criterion into a pure loss function.

    (params, buffers, (inputs, targets)) -> criterion(model(inputs), targets), Aux

    The model lends its forward pass; none of its tensors is read or written. Its mode
    counts at every call: `model.eval()` makes this the loss of evaluation.

    Args:
        model: any module. A tuple of inputs becomes its positional arguments.
        criterion: (outputs, targets) -> the loss, a scalar, or the loss of each example,
            shape (examples,), whose mean is the loss then. `esam` needs the latter.
        dtype: compute in this dtype where PyTorch's autocast deems it safe, as
            `torch.bfloat16`; parameters, gradients and buffers keep theirs. None computes
            in the dtype of the parameters.

    Raises:
        TypeError: `model` is wrapped for several devices.
    """
    return Supervised(model, criterion, dtype)


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
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if found := sorted(kinds & WRAPPERS):
            where = f" at {name}" if name else ""
            raise TypeError(
                f"expected a plain module, got {found[0]}{where}: pass what it wraps;"
                " samfn.distributed spreads a step over several devices"
            )


def _require_layout(expected: Params, given: Params, what: str) -> None:
    if not isinstance(given, Mapping):
        raise TypeError(f"{what} must be a mapping, got {type(given).__name__}")
    border.require_same_layout(expected, given, names=f"the model and {what}")
