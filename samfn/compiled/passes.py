"""The parts of a step that are compiled apart: its passes, and the optimizer."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from samfn.compiled.plan import Parts
from samfn.descend import Optimizer
from samfn.gradient import Pass, evaluate
from samfn.loss import Loss, LossFn, as_loss, loss_and_aux
from samfn.support.collectives import kept, wholes
from samfn.tree import Batch, Params, unmixed


def compiled(function: Callable[..., Any], how: Mapping[str, Any]) -> Any:
    """Return a function as one graph for each shape of its arguments."""
    # A copy of the options, since torch.compile takes some of them out.
    own = {**how, "options": how.get("options") and dict(how["options"])}
    return torch.compile(_with_own_code(function), fullgraph=True, dynamic=False, **own)


class CompiledPasses:
    """A loss function, compiled once for each set of parameters that it is derived by."""

    def __init__(self, loss_fn: LossFn, how: Mapping[str, Any], plan: Parts) -> None:
        self._loss_fn, self._how, self.plan = loss_fn, how, plan
        self._made: dict[Any, Any] = {}

    def __call__(
        self,
        params: Params,
        buffers: Params,
        batch: Batch,
        *,
        wrt: Collection[str] | None = None,
        scale: Tensor | None = None,
        slope_at: Any = None,
        other: LossFn | None = None,
    ) -> Pass:
        """Evaluate the loss function, or another, as `samfn.evaluate` does."""
        chosen = self._loss_fn if other is None else other
        if self.plan == "loss":
            how: Any = {"wrt": wrt, "scale": scale, "slope_at": slope_at}
            return evaluate(self._forward(chosen), params, buffers, batch, **how)
        names = wrt if wrt is None else tuple(wrt)
        key = id(chosen), names, slope_at is None
        if key not in self._made:

            def one(
                params: Params,
                buffers: Params,
                batch: Batch,
                scale: Tensor | None,
                slope_at: Any,
            ) -> Pass:
                how: Any = {"wrt": names, "scale": scale, "slope_at": slope_at}
                return evaluate(chosen, params, buffers, batch, **how)

            self._made[key] = compiled(one, self._how)
        result: Pass = self._made[key](params, buffers, batch, scale, slope_at)
        return result

    def _forward(self, chosen: LossFn) -> Loss:
        """Return a loss function with forward and backward pass compiled."""
        if id(chosen) not in self._made:
            loss_fn = as_loss(chosen)
            function = loss_fn.function

            def forward(params: Params, buffers: Params, batch: Batch) -> Any:
                return function(params, buffers, batch)

            run = compiled(forward, self._how)

            def gathered(params: Params, buffers: Params, batch: Batch) -> Any:
                beside = wholes(buffers)
                loss, aux = loss_and_aux(run(wholes(params), beside, batch), beside)
                return loss, aux._replace(buffers=kept(aux.buffers, beside, buffers))

            @contextmanager
            def differentiating(params: Params, *given: Any) -> Iterator[Any]:
                with unmixed(params) if loss_fn.differentiating else nullcontext():
                    yield gathered(params, *given)

            self._made[id(chosen)] = replace(
                loss_fn, function=gathered, differentiating=differentiating
            )
        found: Loss = self._made[id(chosen)]
        return found

    def optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Return the optimizer with its update compiled, once."""

        def update(params: Any, grads: Any, opt_state: Any, lr: Any) -> Any:
            return optimizer.update(params, grads, opt_state, lr)

        if "optimizer" not in self._made:
            self._made["optimizer"] = compiled(update, self._how)
        return optimizer._replace(update=self._made["optimizer"])


def _with_own_code(function: Any) -> FunctionType:
    """Copy a function. Dynamo keeps graphs, and counts them, by their code objects."""
    copy = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
