"""The compiled step: the same arithmetic as `samfn.sam_update`, compiled.

What a step computes is `samfn.step.take_step`, whatever runs it; this decides what is
compiled, and where the results are kept.
"""

import importlib.util
import logging
import traceback
import warnings
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import disable_saved_tensors_hooks

from samfn.compiled.cuda_graph import CudaGraphed, StaticState, in_place_of
from samfn.compiled.guards import with_own_guards
from samfn.compiled.passes import CompiledPasses, compiled
from samfn.compiled.plan import (
    Dials,
    Parts,
    Plan,
    Step,
    candidates,
    choose,
    missing_compiler,
)
from samfn.compiled.several import in_turn, require_dials, require_stacked, with_zeros
from samfn.descend import Optimizer
from samfn.gradient import Evaluate, evaluator
from samfn.loss import LossFn, as_loss
from samfn.methods import sam
from samfn.methods.base import Method
from samfn.step import Metrics, TrainState, require_state, take_step
from samfn.storage.randomness import random_state, set_random_state
from samfn.support import checks
from samfn.support.batches import rows_of
from samfn.support.nested import remembered
from samfn.tree import Batch

RECOMPUTES = "one graph cannot hold what is computed again (gradient checkpointing)"


def compile_update(
    *,
    loss_fn: LossFn,
    optimizer: Optimizer,
    method: Method = sam(),
    plan: Plan = "auto",
    cuda_graph: bool | None = None,
    backend: str = "inductor",
    options: Mapping[str, Any] | None = None,
    steps: int | None = None,
) -> "CompiledUpdate":
    """Return the step of `samfn.sam_update`, compiled at its first call.

    The result is called as `step(state, batch, rho=0.05, lr=lr)` and gives the new state
    and the metrics, equal to those of `sam_update` within rounding. It donates `state`:
    use the new one only. On a GPU the state stays where it is, in memory that the step
    made for itself, and is updated in place; on a CPU new tensors are faster.

    Numbers and tensors as dials change without recompiling; so do batches of equal shapes.
    Layers or hooks that the model is given between two steps make it compile anew.
    The number 0 as `rho` has a graph of its own, with one pass; so has each kind of step of
    a method as `looksam`. Where nothing can be compiled, a warning says why, and the step
    is that of `sam_update`; so it is for single steps, as of the ninth shape of a batch.

    Args:
        loss_fn: (params, buffers, batch) -> loss or (loss, Aux), as `supervised` makes.
        optimizer: the one that the state was made with.
        method: the one that the state was made with. What it watches, and what ranks
            exchange, is in the same graph.
        plan: what is compiled. "whole": the step as one graph. "gradient": one pass,
            called twice, while the rest of the step runs as it is; half the time to
            compile. "loss": the loss function, whose graph autograd goes back through, as
            for gradient checkpointing, which the others cannot hold. "auto" takes
            "gradient" on a CPU where a pass has more than 1e10 operations, and for methods
            that do not trace; otherwise "whole"; and what comes next in this list where
            that cannot be compiled.
        cuda_graph: record the step as a CUDA graph, and replay it. None does so on a GPU
            where the method traces.
        backend: of `torch.compile`. "aot_eager" runs the graphs with PyTorch's own kernels,
            as to find out whether a difference is the compiler's.
        options: of the backend, instead of those chosen here.
        steps: how many of them a call takes, one after the other. Every tensor of the batch
            has them as its first dimension, as `torch.stack` makes it; `rho` and `lr` are
            one value for all of them, or a sequence or 1-d tensor of one for each; the
            metrics are stacked. What a call costs beside its arithmetic is paid once for
            all of them, and the time to compile grows with them. None takes one, of a batch
            as it is.

    Raises:
        TypeError, ValueError: when called, as `sam_update`; or the plan is "whole", and the
            method does not trace; or what is given is not for so many steps.
        torch._dynamo.exc.InvalidBackend: when called; there is no such backend.

    Example::

        step = samfn.compile_update(loss_fn=loss_fn, optimizer=optimizer)
        for batch in batches:
            state, metrics = step(state, batch, rho=0.05, lr=0.1)
    """
    how: Any = {"plan": plan, "cuda_graph": cuda_graph}
    how |= {"backend": backend, "options": options, "steps": steps}
    return CompiledUpdate(loss_fn, optimizer, method, **how)


class CompiledUpdate:
    """A compiled step; see `compile_update`."""

    def __init__(
        self,
        loss_fn: LossFn,
        optimizer: Optimizer,
        method: Method,
        *,
        plan: Plan,
        cuda_graph: bool | None,
        backend: str,
        options: Mapping[str, Any] | None,
        steps: int | None,
    ) -> None:
        if steps is not None:
            checks.require_count("steps", steps)
        self._loss_fn, self._optimizer, self._method = loss_fn, optimizer, method
        self._wanted, self._cuda_graph = plan, cuda_graph
        self._backend, self._options, self._steps = backend, options, steps
        self._runs: dict[Hashable, Step] = {}
        self._passes: CompiledPasses | None = None
        self._owned: StaticState | None = None
        self._last: TrainState | None = None
        self._standing: list[object] = []
        self._step = 0
        self._dials: dict[str, tuple[Any, Dials]] = {}
        self._warned = False
        self.plan: Parts | Literal["eager"] | None = None
        """What runs; None until the first call."""

    def __call__(
        self,
        state: TrainState,
        batch: Batch,
        *,
        rho: float | Tensor | Iterable[float | Tensor] = 0.05,
        lr: float | Tensor | Iterable[float | Tensor],
    ) -> tuple[TrainState, Metrics]:
        """Take the step; `state` is the one that the one before returned, or a new one."""
        rho = require_dials("rho", rho, self._steps)
        lr = require_dials("lr", lr, self._steps)
        if self._steps is not None:
            require_stacked(batch, self._steps)
        # No guard of a graph looks at hooks, nor at what was frozen.
        standing = self._now_standing()
        if state is not self._last or standing != self._standing:
            given: Any = {"loss_fn": self._loss_fn, "optimizer": self._optimizer}
            require_state(state, **given, method=self._method)
        if standing != self._standing:
            self._standing, self.plan = standing, None
            self._runs, self._passes, self._owned = {}, None, None
        dials = self._dial("rho", rho, state), self._dial("lr", lr, state)
        method_kind = self._method.kind
        # The number is read from a new state, and counted from there: a GPU does not wait.
        if method_kind is not None and state is not self._last:
            self._step = int(state.step)
        numbers = range(self._step, self._step + (self._steps or 1))
        kinds = tuple(method_kind(n) if method_kind else None for n in numbers)
        kind = kinds if self._steps else kinds[0]
        # A caller's grad mode would trigger another compilation.
        with torch.no_grad(), _hooks_as_they_are():
            if kind in self._runs:
                result = self._take(kind, state, batch, *dials)
            else:
                result = self._start(kind, state, batch, *dials)
                self._standing = self._now_standing()
        self._last = result[0]
        self._step += len(kinds)
        return result

    def _now_standing(self) -> list[object]:
        losses = self._loss_fn, *self._method.losses
        return [as_loss(one).standing() for one in losses]

    def _dial(self, name: str, value: Dials, state: TrainState) -> Dials:
        """Return tensors, since numbers would be compiled into the graph; and 0 as rho."""
        weight = next(iter(state.params.values()))
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if isinstance(value, Tensor):
            return value.to(weight.device, dtype)
        wanted = value, dtype, weight.device
        if self._dials.get(name, (None, None))[0] != wanted:
            tensor = torch.tensor(value, dtype=dtype, device=weight.device)
            dials = with_zeros(value, tensor) if name == "rho" else tensor
            self._dials[name] = wanted, dials
        return self._dials[name][1]

    def _take(
        self, kind: Hashable, state: TrainState, batch: Batch, *dials: Dials
    ) -> tuple[TrainState, Metrics]:
        """Take a step of a kind that was taken before, maybe of another shape."""
        try:
            with _hooks_as_they_are():
                return self._runs[kind](state, batch, *dials)
        except Exception as error:
            if not _is_of_the_compiler(error):
                raise
            reason = _reason(error)
        result = self._eager(kind)(state, batch, *dials)
        self._warn(f"samfn takes a step uncompiled: {reason}")
        return result

    def _start(
        self, kind: Hashable, state: TrainState, batch: Batch, *dials: Dials
    ) -> tuple[TrainState, Metrics]:
        """Take the first step of a kind, with the first plan that can be compiled."""
        device = state.step.device
        eager: Step = self._eager(kind)
        if not (reason := missing_compiler(device, self._backend)) and self.plan != "eager":
            if device.type == "cpu":
                _import_quietly()
            random, put_back = random_state(), remembered(as_loss(self._loss_fn).function)
            for number, (plan, how) in enumerate(self._plans(state, batch)):
                try:
                    run = self._compile(plan, how, device, kind)
                except OSError as error:  # There is no place for what is compiled.
                    reason = _reason(error)
                    break
                found, reason = _attempt(run, plan, state, batch, *dials)
                if found is not None:
                    self._runs[kind], self.plan = run, plan
                    return found
                set_random_state(random)
                put_back()
                if not number:  # What is the caller's mistake is told by the caller's code.
                    eager(state, batch, *dials)
                    set_random_state(random)
                    put_back()
        if self.plan != "eager":
            self._warn(f"samfn goes on uncompiled: {reason}")
        self._runs[kind], self.plan = eager, "eager"
        return eager(state, batch, *dials)

    def _plans(
        self, state: TrainState, batch: Batch
    ) -> Iterator[tuple[Parts, Mapping[str, Any]]]:
        """Yield what to try, the fastest first."""
        if self.plan in ("whole", "gradient", "loss"):
            first: Parts = self.plan
        else:
            one = batch if self._steps is None else rows_of(batch, 0)
            first = choose(self._wanted, self._loss_fn, self._method, state, one)
        last = first if self._wanted != "auto" else "loss"
        order: tuple[Parts, ...] = ("whole", "gradient", "loss")
        for plan in order[order.index(first) : order.index(last) + 1]:
            for how in candidates(self._backend, self._options, plan, state):
                yield plan, how

    def _warn(self, message: str) -> None:
        if not self._warned:
            warnings.warn(message, RuntimeWarning, stacklevel=4)
        self._warned = True

    def _eager(
        self,
        kind: Any,
        passes: Evaluate | None = None,
        optimizer: Optimizer | None = None,
    ) -> Step:
        run = passes or evaluator(self._loss_fn)
        optimizer, method = optimizer or self._optimizer, self._method
        weigh = as_loss(self._loss_fn).weigh

        def step(
            state: TrainState,
            batch: Batch,
            rho: float | Tensor,
            lr: float | Tensor,
            kind: Hashable = kind,
        ) -> tuple[TrainState, Metrics]:
            how: Any = {"rho": rho, "lr": lr, "kind": kind, "weigh": weigh}
            return take_step(state, batch, run, optimizer, method, **how)

        return step if self._steps is None else in_turn(step, kind)

    def _compile(
        self,
        plan: Parts,
        how: Mapping[str, Any],
        device: torch.device,
        kind: Hashable,
    ) -> Step:
        # To count operations, PyTorch hooked all modules.
        self._standing = self._now_standing()
        how = with_own_guards(how, lambda: self._standing)
        if self._passes is None or self._passes.plan != plan:
            self._passes = CompiledPasses(self._loss_fn, how, plan)
        if device.type != "cuda":
            if plan != "whole":
                return self._eager(kind, self._passes)
            whole: Step = compiled(self._eager(kind), how)
            return whole
        if plan == "whole":
            in_place = compiled(in_place_of(self._eager(kind)), how)
        else:
            # Uncompiled, torch.optim's kernels would wait to read lr from the GPU.
            optimizer = self._passes.optimizer(self._optimizer)
            in_place = in_place_of(self._eager(kind, self._passes, optimizer))
        if self._owned is None:
            records = self._cuda_graph or (self._cuda_graph is None and self._method.traces)
            self._owned = CudaGraphed() if records else StaticState()
        return partial(self._owned, in_place)


def _attempt(
    run: Step, plan: Parts, state: TrainState, batch: Batch, *dials: Dials
) -> tuple[tuple[TrainState, Metrics] | None, str]:
    """Return what a step gives that was not compiled before, or None and why not."""
    forbidden = nullcontext() if plan == "loss" else disable_saved_tensors_hooks(RECOMPUTES)
    try:
        with _hooks_as_they_are(), forbidden:
            return run(state, batch, *dials), ""
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return None, _reason(error)


@contextmanager
def _hooks_as_they_are() -> Iterator[None]:
    """Leave hooks of saved tensors allowed, or forbidden, as they were.

    A compilation of torch.func that fails leaves them forbidden for the whole process, and
    each call of one that does not leaves them as they were when it was traced.
    """
    told = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()
    try:
        yield
    finally:
        if told is None:
            torch._C._autograd._saved_tensors_hooks_enable()
        else:
            torch._C._autograd._saved_tensors_hooks_disable(told)


def _is_of_the_compiler(error: Exception) -> bool:
    # By name: they have no class in common, and take a second to import.
    return type(error).__module__.startswith(("torch._dynamo.", "torch._inductor."))


def _reason(error: BaseException) -> str:
    """Return in one line why something was not compiled."""
    said, *_ = str(error.__cause__ or error).partition("from user code:")
    lines = [line.strip() for line in said.split("\n")]
    told = [line for line in lines if line and not line.endswith("raised:")]
    reason = told[0] if told else type(error).__name__
    frames = traceback.extract_tb((error.__cause__ or error).__traceback__)
    if not reason.removesuffix(":").isidentifier() or not frames:
        return reason
    where = "/".join(Path(frames[-1].filename).parts[-3:])  # of an assertion without words
    return f"{reason.removesuffix(':')} at {where}:{frames[-1].lineno}"


def _import_quietly() -> None:
    # At import it warns of a CUDA toolkit without a GPU, which nobody on a CPU asked for.
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    importlib.import_module("torch.utils.cpp_extension")
    logger.setLevel(level)
