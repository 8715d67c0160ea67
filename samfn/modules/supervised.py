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

from samfn.gradient import graph, is_reentrant, leaving
from samfn.loss import Aux, Loss
from samfn.modules import weighing
from samfn.modules.gathering import Gathering
from samfn.modules.lending import WRITES, ImpureError, Lender, changes_gradients, read_only
from samfn.modules.means import Means
from samfn.modules.memory import is_watchable
from samfn.modules.parameters import arguments, references, require_layout, require_plain
from samfn.support import checks
from samfn.support.batches import VALUES, keyed, pair_of
from samfn.support.nested import inside, remembered
from samfn.tree import Batch, Params, is_sharded, local, unmixed

RECOMPUTES = (
    "this model computes parts of its forward pass again during the backward pass (gradient"
    " checkpointing), and would read its own weights then: take the gradient by a step or a"
    " measure of samfn, or by samfn.evaluate, which lends it `params` until the"
    " backward pass is done"
)

Criterion = Callable[[Any, Any], Tensor]
Call = Callable[[Any, Any], Any]

NO_LOSS = (
    "without a criterion, the model must return its loss: a tensor of shape (), or"
    ' something that has it as `.loss` or under "loss"; got {}: give the batch the labels'
    " that it needs for one, or give samfn.supervised a criterion, as of several losses"
    " lambda outputs, targets: sum(outputs.values())"
)

CHANGED = (
    "{} is frozen in the model and trained in the state, or the other way round: let"
    " requires_grad be what it was when the state was made; or samfn.load the state into"
    " the model before it changes, and make another by samfn.split and samfn.init after it"
)

_Note = tuple[Lender, dict[str, list[Any]], dict[str, Tensor], dict[str, Tensor]]


class _Supervised:
    """What makes the functions of `supervised`: a model that lends its forward pass."""

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion | None,
        call: Call | None,
        dtype: torch.dtype | None,
        reshard_after_forward: bool,
        asks: bool,
    ) -> None:
        self._model, self._criterion, self._call = model, criterion, call
        self._dtype, self._reshards = dtype, reshard_after_forward
        self.users = criterion, call, model
        self._before: _Note | None = None
        self._take_note()
        self.means = Means(model, criterion, self._loss_alone, asks=asks)
        self._leaves: dict[bool, bool] = {}  # Whether it puts nothing into a batch.

    def function(self, params: Params, buffers: Params, batch: Batch) -> tuple[Tensor, Aux]:
        """Return the loss and, beside it, the model's outputs and new buffers."""
        if torch.compiler.is_compiling():
            with self._forward(params, buffers, batch) as found:
                return found
        return self._eagerly(params, buffers, batch)

    @leaving
    def _eagerly(self, params: Params, buffers: Params, batch: Batch) -> tuple[Tensor, Aux]:
        recorded = torch.is_grad_enabled() and any(w.requires_grad for w in params.values())
        if not recorded:
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
        forward = self._forward(params, buffers, batch, leaves=True)
        with unmixed(params), forward as found:
            # What is computed again writes statistics again: to copies that nobody reads.
            again = {name: _copied(buffers[name]) for name in self._lender.buffers}
            self._lender.put(again)
            yield found

    @property
    def criterion(self) -> Callable[[Any, Batch], Tensor] | None:
        """The criterion of outputs and a batch; None where it may read the weights."""
        criterion = self._criterion
        if isinstance(criterion, nn.Module) and [*criterion.parameters()]:
            return None
        return None if criterion is None else self._loss_at

    def _loss_at(self, outputs: Any, batch: Batch) -> Tensor:
        targets = None if self._call else pair_of(keyed(batch))[1]
        return _loss_of(cast(Criterion, self._criterion)(outputs, targets))

    def _loss_alone(self, outputs: Any, batch: Batch) -> Tensor:
        """Return the same, in the precision of a pass."""
        device = next(iter(self._params.values())).device.type
        with self._precision(device):
            return self._loss_at(outputs, batch)

    def check(self, params: Params, buffers: Params) -> None:
        """Raise unless `params` and `buffers` are what `split(model)` gives.

        Raises:
            ValueError: a name, shape or dtype differs, or a tensor shares its memory
                with the model's own.
        """
        if torch.compiler.is_compiling():
            return  # `function` compares the names, and a graph knows no addresses.
        self.standing()
        self._require_own(params, buffers)
        written = {name: buffers[name] for name in self._lender.buffers}
        checks.require_tensors("buffers that a forward pass may write to", written)
        for own, given in ((self._params, params), (self._buffers, buffers)):
            for name, leaf in given.items():
                tensor = local(leaf)
                strided = tensor.layout is torch.strided and tensor.numel()
                if strided and tensor.data_ptr() == local(own[name]).data_ptr():
                    raise ValueError(
                        f"{name} shares its memory with the model; expected copies, as"
                        " samfn.split(model) makes"
                    )

    def standing(self) -> Lender:
        """Return the same object as long as modules, tensors and hooks are the same."""
        if not self._lender.stands():  # Or moved, cast, frozen since.
            # Who counts operations hooks all modules for a while.
            now, self._before = self._before, self._note
            if now and now[0].stands():
                self._note = now
            else:
                self._take_note()
        return self._lender

    @property
    def _note(self) -> _Note:
        return self._lender, self._hooks, self._params, self._buffers

    @_note.setter
    def _note(self, note: _Note) -> None:
        self._lender, self._hooks, self._params, self._buffers = note

    def _take_note(self) -> None:
        require_plain(self._model)
        lender = Lender(self._model, self._criterion)
        self._hooks = lender.hooks()
        self._params, self._buffers = references(self._model)
        self._lender = lender

    @contextmanager
    def _forward(
        self, params: Params, buffers: Params, batch: Batch, *, leaves: bool = False
    ) -> Iterator[tuple[Tensor, Aux]]:
        """Go forward, and lend the model what it was lent until the context is left.

        Args:
            params: at which.
            buffers: beside them.
            batch: beside them, too.
            leaves: `params` were made for this pass alone.
        """
        compiling, lent = torch.compiler.is_compiling(), {}
        if not compiling:
            self.standing()
        # The model's own tensor would stand in for a missing name.
        self._require_roles(params, buffers)
        checks.require_same_names(self._params, params, names="the model and params")
        checks.require_same_names(self._buffers, buffers, names="the model and buffers")
        if not compiling:
            lent = self._lent(params, buffers, leaves=leaves)
        elif self._hooks:
            raise RuntimeError(f"hooks of parameters: {[*self._hooks]}")
        fresh = {name: _copied(buffers[name]) for name in self._lender.buffers}
        own, others = _apart(batch if self._call else keyed(batch))
        objects = [x for x in others if not isinstance(x, VALUES)]
        if compiling and objects and not self._leaves.get(self._model.training):
            raise RuntimeError("objects in a batch that forward is not seen to leave alone")
        apart = self._apart(objects) if objects and not compiling else nullcontext()
        given = {**params, **buffers, **lent, **fresh}
        parts = {}
        if not compiling and is_sharded(next(iter(params.values()), None)):
            parts = {name: w for name, w in lent.items() if is_sharded(w)}
        gathering = self._gathering(parts, leaves)
        with self._lender.holding(given), apart, gathering as again:
            # Inside of torch.func there is no memory to be watched.
            if compiling or any(map(is_functorch_wrapped_tensor, lent.values())):
                found = self._run(buffers, own)
            else:
                hidden = {
                    type(x).__name__: [*filter(is_watchable, inside(x))] for x in others
                }
                plain = {n: w for n, w in lent.items() if n not in parts} if parts else lent
                watching = self._reading(params, buffers, own)
                with watching as told, self._lender.reading(plain, hidden), again:
                    found = self._run(buffers, own)
                    told.append(found)
                if self.means.wants:
                    self.means.keep(*found, batch)
            yield found

    @contextmanager
    def _gathering(
        self, parts: Params, leaves: bool
    ) -> Iterator[AbstractContextManager[Any]]:
        """Let the model read DTensors as whole tensors; give a context for its forward."""
        if not parts:
            yield nullcontext()
            return
        names = {id(w): name for name, w in parts.items()}

        def dress(full: Tensor, leaf: Tensor) -> Tensor:
            own = self._lender.parameters[names[id(leaf)]]
            if not (torch.is_grad_enabled() or leaves):
                full.requires_grad_(own.requires_grad)
            return _dressed(full, own)

        def written(leaf: Tensor) -> None:
            raise ImpureError(WRITES.format(names[id(leaf)]))

        gathering = Gathering(dress, written)
        again = gathering.gathering_again() if leaves and self._reshards else nullcontext()
        with gathering.in_modules(self._lender.modules()):
            yield again

    @contextmanager
    def _apart(self, objects: list[Any]) -> Iterator[None]:
        """Put back what a pass puts into objects of a batch; the next must not find it."""
        put_back, whole = remembered(objects), False
        try:
            yield
            whole = True
        finally:
            changed, mode = put_back(), self._model.training
            if changed or whole:
                self._leaves[mode] = self._leaves.get(mode, True) and not changed

    def _run(self, buffers: Params, batch: Batch) -> tuple[Tensor, Aux]:
        # The batch is a copy, and so are the buffers that it may write to.
        device = next(iter(self._params.values())).device.type
        with self._precision(device):
            outputs, loss = self._outputs_and_loss(batch)
        after = {**buffers, **self._lender.left()}
        if loss.ndim == 1:  # PyTorch 2.11 compiles no _replace of what it returns.
            return loss.mean(), Aux(outputs, after, loss)
        return loss, Aux(outputs, after)

    def _outputs_and_loss(self, batch: Batch) -> tuple[Any, Tensor]:
        if self._call:
            outputs, targets = self._call(self._model, batch), None
        else:
            inputs, targets = pair_of(batch)
            positional, named = arguments(inputs)
            outputs = self._model(*positional, **named)
        if self._criterion is None:
            return outputs, _own_loss(outputs)
        return outputs, _loss_of(self._criterion(outputs, targets))

    def _reading(
        self, params: Params, buffers: Params, batch: Batch
    ) -> AbstractContextManager[list[tuple[Tensor, Aux]]]:
        """Watch the first pass in each mode as it goes; others are looked at after.

        Returns:
            A context with a list for what the pass gives.
        """
        known = self.means.are_known
        return nullcontext([]) if known else self._watching(params, buffers, batch)

    @contextmanager
    def _watching(
        self, params: Params, buffers: Params, batch: Batch
    ) -> Iterator[list[tuple[Tensor, Aux]]]:
        criterion = self._criterion
        kept = dict(criterion.named_buffers()) if isinstance(criterion, nn.Module) else {}
        mine = {f"the criterion's {name}": buffer for name, buffer in kept.items()}
        own = {name: w for name, w in self._params.items() if name in params}
        told: list[tuple[Tensor, Aux]] = []
        with read_only({**mine, **buffers, **params}, own, batch) as watch:
            yield told
        self.means.note(watch.taken, *told[0], batch)

    def _lent(self, params: Params, buffers: Params, *, leaves: bool) -> dict[str, Tensor]:
        """Return the parameters as the model knows its own: with attributes and hooks."""
        lent: dict[str, Tensor] = {}
        for name, own in self._lender.parameters.items():
            given = params[name] if name in params else buffers[name]
            if is_sharded(given):
                lent[name] = given
                continue
            if given.requires_grad:
                new = given if leaves else given.view_as(given)
            else:
                new = given.detach()
                if not torch.is_grad_enabled() and not leaves:
                    new.requires_grad_(own.requires_grad)
            lent[name] = _dressed(new, own)
        for name, hooks in self._hooks.items():
            if is_sharded(lent[name]):
                raise ValueError(
                    f"the parameter {name} has a hook for its gradient, of which each rank"
                    " has a part: expected none with DTensors"
                )
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

    def _require_roles(self, params: Params, buffers: Params) -> None:
        frozen = [name for name in params if name in self._buffers]
        changed = frozen + [name for name in buffers if name in self._params]
        if changed:
            raise ValueError(CHANGED.format(checks.some(changed)))

    def _require_own(self, params: Params, buffers: Params) -> None:
        if isinstance(params, Mapping) and isinstance(buffers, Mapping):
            self._require_roles(params, buffers)
        require_layout(self._params, params, "params")
        require_layout(self._buffers, buffers, "buffers")


def supervised(
    model: nn.Module,
    criterion: Criterion | None = None,
    *,
    call: Call | None = None,
    dtype: torch.dtype | None = None,
    weigh: Callable[[Batch], int | Tensor] | None = None,
    reshard_after_forward: bool = True,
) -> Loss:
    """Turn a model and a criterion into a pure loss function.

    (params, buffers, (inputs, targets)) -> criterion(model(inputs), targets), Aux

    Inputs that are a tuple are positional arguments, model(a, b); those that are a dict,
    or another mapping, are keyword arguments, model(a=a, b=b); anything else is one
    argument. A model that takes one tuple or dict is given it in a tuple, ((a_dict,),
    targets). A batch that is itself a mapping has no targets, as (batch, None).

    The model lends its forward pass; none of its tensors is read or written, and neither
    is the batch. Its mode counts at every call: `model.eval()` makes this the loss of
    evaluation, which leaves nothing in the attributes of modules that a pass at other
    parameters could read. Buffers may be changed in place or assigned anew. Gradient
    checkpointing works, as steps and measures of samfn keep the parameters in the model
    until the backward pass is done; differentiating the result by other means is refused.

    Args:
        model: any module.
        criterion: (outputs, targets) -> the loss, a scalar, or the loss of each example,
            shape (examples,), whose mean is the loss then. `esam` needs the latter. It may
            read the model, as for a penalty on its weights, and has no parameters itself.
            None takes the loss that the model returns: a scalar, or what it has as `.loss`
            or under "loss", as models of transformers do that are given labels.
        call: (model, batch) -> outputs, for models that are entered by another method than
            forward, as lambda module, batch: module.training_step(batch, 0). The batch is
            of any form then, and a criterion is given None for targets.
        dtype: compute in this dtype where PyTorch's autocast deems it safe, as
            `torch.bfloat16`; parameters, gradients and buffers keep theirs. None computes
            in the dtype of the parameters.
        weigh: batch -> what its loss is a mean over, a number or shape (), by which parts
            of a batch, ranks and evaluations are averaged. None is known of the losses of
            classes, whose `ignore_index` and weights count: of PyTorch's own by what they
            are, and of those in a function, or in the model, by what its first pass
            computes, be it of tokens that are shifted by one; where that cannot be told
            from a batch, to average is an error. Of any other loss it is the number of
            examples; where the criterion's losses of parts of the first batches have
            another mean than that of the whole, to average is an error, too.
        reshard_after_forward: where parameters are DTensors, each is gathered as its module
            reads it, and released after; for the backward pass it is gathered again, as by
            `fully_shard`. False keeps it until then: less to send, more memory. A compiled
            step keeps it.

    Raises:
        TypeError: `model` is wrapped for several devices, or a script.
        ValueError: `criterion` has parameters of its own. When a mean is taken: `weigh`
            gives no number of at least 0.
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
    named = weighing.of_criterion(criterion)
    asks = criterion is not None and named is None and weigh is None
    made = _Supervised(model, criterion, call, dtype, reshard_after_forward, asks)
    known = named or made.means
    return Loss(
        made.function,
        made.check,
        made.differentiating,
        weigh=known.weigh if weigh is None else partial(_weight, weigh),
        counts=known.counts,
        standing=made.standing,
        criterion=made.criterion,
        look=made.means.look,
    )


def _weight(weigh: Callable[[Batch], float | Tensor], batch: Batch) -> Any:
    return checks.require_dial("what weigh returns", weigh(batch))


def _apart(batch: Batch) -> tuple[Batch, list[Any]]:
    """Return a batch with tensors of its own, and what it holds beside tensors."""
    kind = type(batch)
    if kind in (tuple, list) and len(batch) == 2:
        inputs, targets = batch
        if isinstance(inputs, Tensor) and isinstance(targets, Tensor):
            return kind((inputs.clone(), targets.clone())), []  # It spares two walks.
    given, structure = pytree.tree_flatten(batch)
    copies = [x.clone() if isinstance(x, Tensor) else x for x in given]
    others = [x for x in given if not isinstance(x, Tensor)]
    return pytree.tree_unflatten(copies, structure), others


def _dressed(new: Tensor, own: Tensor) -> Tensor:
    """Return a tensor with the attributes of the model's own."""
    vars(new).update(vars(own))
    if isinstance(own, nn.Parameter):
        cast(Any, new)._is_param = True  # isinstance of a Parameter asks for it.
    return new


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


def _own_loss(outputs: Any) -> Tensor:
    """Return the loss that a model returns, alone or among its outputs."""
    if isinstance(outputs, Mapping):
        came = f"a {type(outputs).__name__} of {checks.some([*map(str, outputs)])}"
        loss = outputs.get("loss")
    else:
        came = type(outputs).__name__
        if isinstance(outputs, tuple):
            came += ": call=lambda module, batch: module(**batch)[0] takes its first"
        loss = getattr(outputs, "loss", None)
    if isinstance(outputs, Tensor):
        came = f"a tensor of shape {tuple(outputs.shape)}"
        loss = outputs if outputs.ndim == 0 else None
    if not isinstance(loss, Tensor):
        raise TypeError(NO_LOSS.format(came))
    return loss
