"""Supervised losses: a model and a criterion as a pure function of tensors."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.utils import _pytree as pytree

from samfn import checks
from samfn.batches import length_of
from samfn.loss import Aux, Loss, graph, is_reentrant
from samfn.modules.lending import (
    Lender,
    ReadOnly,
    changes_gradients,
)
from samfn.modules.memory import inside, is_watchable
from samfn.modules.parameters import arguments, references, require_layout, require_plain
from samfn.tree import Batch, Params

RECOMPUTES = (
    "this model computes parts of its forward pass again during the backward pass (gradient"
    " checkpointing), and would read its own weights then: take the gradient by a step or a"
    " measure of samfn, or by samfn.evaluate, which lends it `params` until the"
    " backward pass is done"
)


class _Supervised:
    """What makes the functions of `supervised`: a model that lends its forward pass."""

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[[Any, Any], Tensor],
        dtype: torch.dtype | None,
    ) -> None:
        require_plain(model)
        self._model, self._criterion, self._dtype = model, criterion, dtype
        self._params, self._buffers = references(model)
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
            self._params, self._buffers = references(self._model)
        try:
            self._require_own(params, buffers)
        except ValueError:  # The model may have been moved or cast since it was wrapped.
            self._params, self._buffers = references(self._model)
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
        checks.require_same_names(self._params, params, names="the model and params")
        checks.require_same_names(self._buffers, buffers, names="the model and buffers")
        compiling, lent = torch.compiler.is_compiling(), {}
        if not compiling:
            self._look_again()
            lent = self._lent(params, buffers, leaves=leaves)
        elif self._hooks:
            raise RuntimeError(f"hooks of parameters: {[*self._hooks]}")
        fresh = {name: _copied(buffers[name]) for name in self._lender.buffers}
        pair, others = _apart(_pair(batch))
        with self._lender.holding({**params, **buffers, **lent, **fresh}):
            # Inside of torch.func there is no memory to be watched.
            if compiling or any(map(is_functorch_wrapped_tensor, lent.values())):
                found = self._run(buffers, pair)
            else:
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
        require_layout(self._params, params, "params")
        require_layout(self._buffers, buffers, "buffers")


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
                f"the criterion has parameters of its own, {checks.some(learnt)}, that no"
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
            came = f"a mapping of {checks.some([*map(str, batch)])}"
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


def _apart(pair: tuple[Any, Any]) -> tuple[tuple[Any, Any], list[Any]]:
    """Return a batch with tensors of its own, and what it holds beside tensors."""
    inputs, targets = pair
    if isinstance(inputs, Tensor) and isinstance(targets, Tensor):  # spares two walks
        return (inputs.clone(), targets.clone()), []
    given, structure = pytree.tree_flatten(pair)
    copies = [x.clone() if isinstance(x, Tensor) else x for x in given]
    others = [x for x in given if not isinstance(x, Tensor)]
    return pytree.tree_unflatten(copies, structure), others


def _copied(tensor: Tensor) -> Tensor:
    # A sparse tensor has no entries that a forward pass could write to by their place.
    return tensor.clone() if tensor.layout is torch.strided else tensor


def _loss_of(returned: Any) -> Tensor:
    if not isinstance(returned, Tensor):
        raise TypeError(
            "the criterion must return the loss, a tensor of shape () or (examples,), got"
            f" {type(returned).__name__}"
        )
    return returned
