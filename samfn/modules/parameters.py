"""Parameters and buffers of a module: copied out, put back, and told apart by name."""

import copy
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from samfn.modules.memory import sharing
from samfn.support import checks
from samfn.support.collectives import placed_alike, whole
from samfn.tree import Params, is_sharded

# By name: importing FSDP takes a second.
WRAPPERS = {
    "DataParallel",
    "DistributedDataParallel",
    "FullyShardedDataParallel",
}
IN_PARTS = (
    "expected a plain module, got {}: pass it as it was before that, with parameters that"
    " samfn.distributed.shard cuts; samfn.SAM takes the module as it is"
)
OF_DTENSOR = "torch.distributed.tensor"  # where its hooks are from

EXTRA = "_extra_state"  # how torch.nn calls it in a state_dict


def split(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Copy out of a model what trains and what does not.

    Parameters that are DTensors stay so, and none is whole on a rank: a state in parts, as
    `samfn.distributed.shard` makes of others. Registered buffers are made whole.

    Returns:
        - params: every parameter that requires grad, detached, by its qualified name. A
          weight that is tied to another appears once.
        - buffers: the registered buffers and the frozen parameters.

    Raises:
        TypeError: `model` is wrapped for several devices, where gradients would
            silently stay unsynchronised.
        ValueError: no parameter requires grad, or some are not initialised yet.
        RuntimeError: `samfn.SAM` guards the model, and has perturbed it.
    """
    require_plain(model)
    _require_unperturbed(model)
    params: dict[str, Tensor] = {}
    frozen: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        group = params if parameter.requires_grad else frozen
        group[name] = parameter.detach().clone()
    if not params:
        raise ValueError("the model has no parameter that requires grad")
    buffers = {name: whole(b.detach()).clone() for name, b in model.named_buffers()}
    _require_memory_apart(*references(model))
    return params, frozen | buffers


def _require_unperturbed(model: nn.Module) -> None:
    """Raise between the steps of a `samfn.SAM` that guards the model."""
    for module in model.modules():
        for hook in module._state_dict_hooks.values():
            if ask := getattr(hook, "require_unperturbed", None):
                ask()


@torch.no_grad()
def load(model: nn.Module, params: Params, buffers: Params) -> None:
    """Copy parameters and buffers back into a model, in place.

    DTensors are put together where the model's own are plain, one after the other, and
    plain ones cut where the model's own are DTensors; all ranks have to call it then.

    Raises:
        ValueError: names, shapes or dtypes are not those of `split(model)`; the model is
            unchanged then.
        RuntimeError: as `split`.
    """
    _require_unperturbed(model)
    own_params, own_buffers = references(model)
    require_layout(own_params, params, "params")
    require_layout(own_buffers, buffers, "buffers")
    for own, new in ((own_params, params), (own_buffers, buffers)):
        for name, tensor in own.items():
            tensor.copy_(placed_alike(new[name], tensor))
    torch.clear_autocast_cache()  # Within one autocast, it holds casts of the old ones.


def state_dict(model: nn.Module, params: Params, buffers: Params) -> dict[str, Tensor]:
    """Return what `model.load_state_dict` takes, made of parameters and buffers.

    As in `load`, tensors are plain or DTensors as the model's own are. Extra state of its
    modules is the model's own.

    Raises:
        ValueError: names, shapes or dtypes are not those of `split(model)`, or hooks of the
            model give its tensors other names.
    """
    own_params, own_buffers = references(model)
    require_layout(own_params, params, "params")
    require_layout(own_buffers, buffers, "buffers")
    given, tied, found = {**params, **buffers}, _tied(model), model.state_dict()
    extra = {name for name in found if name.rpartition(".")[2] == EXTRA}
    if others := [n for n in found if n not in extra and tied.get(n, n) not in given]:
        raise ValueError(
            f"model.state_dict() holds {others[0]}, which is none of its parameters and"
            " buffers: hooks that rename or add tensors are not known here"
        )
    return {
        name: own if name in extra else placed_alike(given[tied.get(name, name)], own)
        for name, own in found.items()
    }


def trained(model: nn.Module, params: Params, buffers: Params) -> nn.Module:
    """Return a copy of a model, in evaluation mode, with these parameters and buffers.

    All of its tensors are plain ones, as `load` makes them.

    Raises:
        ValueError: names, shapes or dtypes are not those of `split(model)`.
    """
    copied = copy.deepcopy(model)
    _make_whole(copied)
    load(copied, params, buffers)
    return copied.eval()


def _make_whole(model: nn.Module) -> None:
    """Give a model plain tensors, of any values, in place of its DTensors."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, own in held.items():
                if own is not None and is_sharded(own):
                    kept = made.setdefault(id(own), _plain_like(own))
                    held[name] = kept  # type: ignore[assignment]


def _plain_like(own: Tensor) -> Tensor:
    new = torch.empty(own.shape, dtype=own.dtype, device=own.device)
    if isinstance(own, nn.Parameter):
        return nn.Parameter(new, requires_grad=own.requires_grad)
    return new


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
            a tuple, ((a, b), targets), or a mapping.

    Raises:
        ValueError: names, shapes or dtypes are not those of `split(model)`; there are no
            batches.
    """
    copied = trained(model, params, buffers)
    left = iter(inputs)
    if (first := next(left, None)) is None:  # Statistics of nothing would be 0 and 1.
        raise ValueError("expected at least one batch of inputs, got none")
    update_bn(chain([first], left), _Unpacking(copied))
    return {name: tensor.detach() for name, tensor in references(copied)[1].items()}


class _Unpacking(nn.Module):
    """A model that takes its inputs as one argument."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model

    def forward(self, inputs: Any) -> Any:
        positional, named = arguments(inputs)
        return self._model(*positional, **named)


def norm_parameters(model: nn.Module) -> tuple[str, ...]:
    """Return the names of what the normalisation layers of a model train.

    Layers of torch.nn whose name has "Norm" in it, and others that are called so. Official
    SAM-ON goes by the names of parameters, with "norm" or "bn" in them, and misses some:
    it takes 34 of 40 tensors of torchvision's ResNet-18, and none of 50 of its ViT-B/16.
    """
    own = dict(model.named_parameters())  # A tied one under its first name alone.
    names = (
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if "Norm" in type(module).__name__
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad
    )
    return tuple(name for name in names if name in own)


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


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and the keyword arguments of a model.

    A tuple is the positional ones, a mapping the others; anything else is one argument.
    """
    # A packed sequence, and any named tuple, is one argument.
    if type(inputs) is tuple:
        return inputs, {}
    if not isinstance(inputs, Tensor) and isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs,), {}


def references(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
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


def require_plain(model: nn.Module) -> None:
    """Raise where a wrapper would exchange gradients in hooks that nothing here calls.

    Raises:
        TypeError: the model, or a module in it, is such a wrapper or a script.
        ValueError: a tensor has no shape yet.
    """
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise ValueError(f"run a batch through the model first: {name} is lazy")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"expected a module of Python, got a script ({name or 'the model'}), which"
                " keeps its tensors to itself: pass what it was made from"
            )
        kinds = {kind.__name__ for kind in type(module).__mro__}
        where = f" at {name}" if name else ""
        if "FSDPModule" in kinds:
            raise TypeError(IN_PARTS.format(f"FSDPModule{where}, as of fully_shard"))
        if found := sorted(kinds & WRAPPERS):
            raise TypeError(
                f"expected a plain module, got {found[0]}{where}: pass what it wraps;"
                " samfn.distributed spreads a step over several devices"
            )
        hooks = *module._forward_pre_hooks.values(), *module._forward_hooks.values()
        if any(getattr(hook, "__module__", "").startswith(OF_DTENSOR) for hook in hooks):
            changed = f"one that parallelize_module has changed{where}"
            raise TypeError(IN_PARTS.format(changed))


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


def require_layout(expected: Params, given: Params, what: str) -> None:
    """Raise unless names, shapes and dtypes are those of the model.

    Raises:
        TypeError: `given` is no mapping.
        ValueError: a name, shape or dtype differs.
    """
    if not isinstance(given, Mapping):
        raise TypeError(f"{what} must be a mapping, got {type(given).__name__}")
    checks.require_same_layout(expected, given, names=f"the model and {what}")
