"""The compiled step: the one module that calls torch.compile or knows CUDA graphs.

What a step computes is `update.take_step`, whatever runs it; this decides what is
compiled, and where the results are kept.
"""

import importlib.util
import logging
import os
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from samfn import border, gradient
from samfn.descend import Optimizer
from samfn.distributed import Placement
from samfn.gradient import Loss, LossFn, as_loss
from samfn.lending import ImpureError
from samfn.method import Method
from samfn.methods import sam
from samfn.randomness import random_state, set_random_state
from samfn.tree import Batch, Params
from samfn.update import Metrics, TrainState, require_state, take_step

Parts = Literal["whole", "gradient", "loss"]
Plan = Literal["auto", "whole", "gradient", "loss"]
Step = Callable[
    [TrainState, Batch, "float | Tensor", "float | Tensor"], tuple[TrainState, Metrics]
]

# Above this many operations in one gradient, a CPU spends its time in them: one graph of
# the whole step is no faster then than one compiled gradient called twice, and takes about
# twice as long to compile. Measured in bench/results/; between 1e9 and 3e10 both will do.
ARITHMETIC = 1e10

# On a CPU. Dynamo's guards have checked what these asserts would check again, and waking a
# second thread takes as long as a loop over ten thousand numbers. Precompiled headers would
# stay below /tmp, under a name that everyone can guess, whatever the cache's directory.
LEAN = {
    "size_asserts": False,
    "alignment_asserts": False,
    "cpp.min_chunk_size": 16384,
    "cpp_cache_precompile_headers": False,
}
RECOMPUTES = "one graph cannot hold what is computed again (gradient checkpointing)"

# Calls the kernels from C++. On a GPU, a CUDA graph does away with the calls altogether.
FROM_CPP = {"cpp_wrapper": True}


def compile_update(
    *,
    loss_fn: LossFn,
    optimizer: Optimizer,
    method: Method = sam(),
    watch: bool = False,
    placement: Placement | None = None,
    plan: Plan = "auto",
    cuda_graph: bool | None = None,
    options: Mapping[str, Any] | None = None,
) -> "CompiledUpdate":
    """Return the step of `samfn.sam_update`, compiled at its first call.

    The result is called as `step(state, batch, rho=0.05, lr=lr)` and gives the new state
    and the metrics, equal to those of `sam_update` within rounding. It donates `state`:
    use the new one only. On a GPU the state stays where it is, in memory that the step
    made for itself, and is updated in place; on a CPU new tensors are faster.

    Numbers and tensors as dials change without recompiling; so do batches of equal shapes.
    The number 0 as `rho` has a graph of its own, with one pass; so has each kind of step of
    a method as `looksam`. Where nothing can be compiled, a warning says why, and the step
    is that of `sam_update`; so it is for single steps, as of the ninth shape of a batch.

    Args:
        loss_fn: (params, buffers, batch) -> loss or (loss, Aux), as `supervised` makes.
        optimizer: the one that the state was made with.
        method: the one that the state was made with.
        watch: measure each parameter too, in the same graph, as `Metrics.layers`.
        placement: of the perturbation on several devices, as for `sam_update`; what the
            ranks exchange is in the same graph.
        plan: what is compiled. "whole": the step as one graph. "gradient": one pass,
            called twice, while the rest of the step runs as it is; half the time to
            compile. "loss": the loss function, whose graph autograd goes back through, as
            for gradient checkpointing, which the others cannot hold. "auto" takes
            "gradient" on a CPU where a pass has more than 1e10 operations, and for methods
            that do not trace; otherwise "whole"; and what comes next in this list where
            that cannot be compiled.
        cuda_graph: record the step as a CUDA graph, and replay it. None does so on a GPU
            where the method traces.
        options: of `torch.compile`, instead of those chosen here.

    Raises:
        TypeError, ValueError: when called, as `sam_update`; or the plan is "whole", and the
            method does not trace.

    Example::

        step = samfn.compile_update(loss_fn=loss_fn, optimizer=optimizer)
        for batch in batches:
            state, metrics = step(state, batch, rho=0.05, lr=0.1)
    """
    how: Any = {"plan": plan, "cuda_graph": cuda_graph, "options": options}
    return CompiledUpdate(loss_fn, optimizer, method, watch, placement, **how)


class CompiledUpdate:
    """A compiled step; see `compile_update`."""

    def __init__(
        self,
        loss_fn: LossFn,
        optimizer: Optimizer,
        method: Method,
        watch: bool,
        placement: Placement | None,
        *,
        plan: Plan,
        cuda_graph: bool | None,
        options: Mapping[str, Any] | None,
    ) -> None:
        self._loss_fn, self._optimizer, self._method = loss_fn, optimizer, method
        self._watch, self._placement, self._wanted = watch, placement, plan
        self._cuda_graph, self._options = cuda_graph, options
        self._runs: dict[Hashable, Step] = {}
        self._passes: _Passes | None = None
        self._owned: _Owned | None = None
        self._last: TrainState | None = None
        self._step = 0
        self._dials: dict[str, tuple[float, Tensor]] = {}
        self._warned = False
        self.plan: Parts | Literal["eager"] | None = None
        """What runs; None until the first call."""

    def __call__(
        self,
        state: TrainState,
        batch: Batch,
        *,
        rho: float | Tensor = 0.05,
        lr: float | Tensor,
    ) -> tuple[TrainState, Metrics]:
        """Take one step; `state` is the one that the step before returned, or a new one."""
        rho, lr = border.require_dial("rho", rho), border.require_dial("lr", lr)
        if state is not self._last:
            given: Any = {"loss_fn": self._loss_fn, "optimizer": self._optimizer}
            require_state(state, **given, placement=self._placement)
        dials = self._dial("rho", rho, state), self._dial("lr", lr, state)
        method_kind = self._method.kind
        # The number is read from a new state, and counted from there: a GPU does not wait.
        if method_kind is not None and state is not self._last:
            self._step = int(state.step)
        kind = method_kind(self._step) if method_kind else None
        norms = self._placement.norms() if self._placement else nullcontext()
        with torch.no_grad(), norms:  # Also a caller's own mode would be another graph.
            if kind in self._runs:
                result = self._take(kind, state, batch, *dials)
            else:
                result = self._start(kind, state, batch, *dials)
        self._last = result[0]
        self._step += 1
        return result

    def _dial(self, name: str, value: float | Tensor, state: TrainState) -> float | Tensor:
        """Return a 0-d tensor, since a number would be compiled into the graph."""
        weight = next(iter(state.params.values()))
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if isinstance(value, Tensor):
            return value.to(weight.device, dtype)
        if name == "rho" and value == 0:
            return 0.0
        if self._dials.get(name, (None, None))[0] != value:
            tensor = torch.full((), value, dtype=dtype, device=weight.device)
            self._dials[name] = value, tensor
        return self._dials[name][1]

    def _take(
        self, kind: Hashable, state: TrainState, batch: Batch, *dials: float | Tensor
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
        self, kind: Hashable, state: TrainState, batch: Batch, *dials: float | Tensor
    ) -> tuple[TrainState, Metrics]:
        """Take the first step of a kind, with the first plan that can be compiled."""
        device = state.step.device
        eager: Step = self._eager(kind)
        result: tuple[TrainState, Metrics] | None = None
        if not (reason := missing_compiler(device)) and self.plan != "eager":
            if device.type == "cpu":
                _import_quietly()
            random = random_state()
            for plan, options in self._plans(state, batch, device):
                run = self._compile(plan, options, device, kind)
                found, reason = _attempt(run, plan, state, batch, *dials)
                if found is not None:
                    self._runs[kind], self.plan = run, plan
                    return found
                set_random_state(random)
                # What is the caller's mistake is told by the caller's code.
                if result is None:
                    result = eager(state, batch, *dials)
                    after = random_state()
                    set_random_state(random)
        if self.plan != "eager":
            self._warn(f"samfn goes on uncompiled: {reason}")
        self._runs[kind], self.plan = eager, "eager"
        if result is None:
            return eager(state, batch, *dials)
        set_random_state(after)
        return result

    def _plans(
        self, state: TrainState, batch: Batch, device: torch.device
    ) -> Iterator[tuple[Parts, Mapping[str, Any]]]:
        """Yield what to try, the fastest first."""
        if self.plan in ("whole", "gradient", "loss"):
            first: Parts = self.plan
        else:
            whole = self._placement.whole if self._placement else dict
            known = state._replace(params=whole(state.params))
            first = _choose(self._wanted, self._loss_fn, self._method, known, batch)
        last = first if self._wanted != "auto" else "loss"
        order: tuple[Parts, ...] = ("whole", "gradient", "loss")
        for plan in order[order.index(first) : order.index(last) + 1]:
            for options in _candidates(self._options, plan, device):
                yield plan, options

    def _warn(self, message: str) -> None:
        if not self._warned:
            warnings.warn(message, RuntimeWarning, stacklevel=4)
        self._warned = True

    def _eager(
        self,
        kind: Hashable,
        evaluate: gradient.Evaluate | None = None,
        optimizer: Optimizer | None = None,
    ) -> Step:
        evaluate = evaluate or partial(gradient.evaluate, self._loss_fn)
        optimizer, method = optimizer or self._optimizer, self._method
        how: Any = {"kind": kind, "watch": self._watch, "placement": self._placement}
        how["weigh"] = as_loss(self._loss_fn).weigh

        def step(
            state: TrainState, batch: Batch, rho: float | Tensor, lr: float | Tensor
        ) -> tuple[TrainState, Metrics]:
            return take_step(
                state, batch, evaluate, optimizer, method, rho=rho, lr=lr, **how
            )

        return step

    def _compile(
        self,
        plan: Parts,
        options: Mapping[str, Any],
        device: torch.device,
        kind: Hashable,
    ) -> Step:
        if self._passes is None or self._passes.plan != plan:
            self._passes = _Passes(self._loss_fn, options, plan)
        if device.type != "cuda":
            if plan != "whole":
                return self._eager(kind, self._passes)
            whole: Step = compiled(self._eager(kind), options)
            return whole
        if plan == "whole":
            in_place = compiled(in_place_of(self._eager(kind)), options)
        else:
            # Uncompiled, torch.optim's kernels would wait to read lr from the GPU.
            optimizer = self._passes.optimizer(self._optimizer)
            in_place = in_place_of(self._eager(kind, self._passes, optimizer))
        if self._owned is None:
            records = self._cuda_graph or (self._cuda_graph is None and self._method.traces)
            self._owned = _Recorded() if records else _Owned()
        return partial(self._owned, in_place)


def compiled(function: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    """Return a function as one graph for each shape of its arguments."""
    return torch.compile(
        _with_own_code(function), fullgraph=True, dynamic=False, options=dict(options)
    )


class _Passes:
    """A loss function, compiled once for each set of parameters that it is derived by."""

    def __init__(self, loss_fn: LossFn, options: Mapping[str, Any], plan: Parts) -> None:
        self._loss_fn, self._options, self.plan = loss_fn, options, plan
        self._made: dict[Any, Any] = {}

    def __call__(
        self,
        params: Params,
        buffers: Params,
        batch: Batch,
        *,
        wrt: Collection[str] | None = None,
        scale: Tensor | None = None,
    ) -> gradient.Pass:
        if self.plan == "loss":
            return gradient.evaluate(
                self._forward(), params, buffers, batch, wrt=wrt, scale=scale
            )
        key = wrt if wrt is None else tuple(wrt)
        if key not in self._made:

            def evaluate(
                params: Params, buffers: Params, batch: Batch, scale: Tensor | None
            ) -> gradient.Pass:
                return gradient.evaluate(
                    self._loss_fn, params, buffers, batch, wrt=key, scale=scale
                )

            self._made[key] = compiled(evaluate, self._options)
        result: gradient.Pass = self._made[key](params, buffers, batch, scale)
        return result

    def _forward(self) -> Loss:
        """Return the loss function with forward and backward pass compiled."""
        if "loss" not in self._made:
            function = as_loss(self._loss_fn).function

            def forward(params: Params, buffers: Params, batch: Batch) -> Any:
                return function(params, buffers, batch)

            run = compiled(forward, self._options)

            def differentiating(*given: Any) -> AbstractContextManager[Any]:
                return nullcontext(run(*given))

            self._made["loss"] = Loss(run, differentiating=differentiating)
        found: Loss = self._made["loss"]
        return found

    def optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Return the optimizer with its update compiled, once."""

        def update(params: Any, grads: Any, opt_state: Any, lr: Any) -> Any:
            return optimizer.update(params, grads, opt_state, lr)

        if "optimizer" not in self._made:
            self._made["optimizer"] = compiled(update, self._options)
        return optimizer._replace(update=self._made["optimizer"])


def missing_compiler(device: torch.device) -> str | None:
    """Return what torch.compile lacks on this machine, in a few words, or None."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "found no Triton"
        if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
            return "found no C compiler for Triton"
        return None
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        return f"found no C++ compiler ({compiler})"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "found no headers of Python (Python.h)"
    return None


def _attempt(
    run: Step, plan: Parts, state: TrainState, batch: Batch, *dials: float | Tensor
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

    A compilation of torch.func that fails leaves them forbidden for the whole process.
    """
    told = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()
    try:
        yield
    except Exception:
        if told is None:
            torch._C._autograd._saved_tensors_hooks_enable()
        else:
            torch._C._autograd._saved_tensors_hooks_disable(told)
        raise


def _is_of_the_compiler(error: Exception) -> bool:
    # By name: they have no class in common, and take a second to import.
    return type(error).__module__.startswith(("torch._dynamo.", "torch._inductor."))


def _reason(error: BaseException) -> str:
    """Return in one line why something was not compiled."""
    lines = [line.strip() for line in str(error.__cause__ or error).split("\n")]
    told = [line for line in lines if line and not line.endswith("raised:")]
    return told[0] if told else type(error).__name__


def _choose(
    wanted: Plan, loss_fn: LossFn, method: Method, state: TrainState, batch: Batch
) -> Parts:
    if wanted == "whole" and not method.traces:
        raise ValueError('this method does not trace: expected plan "gradient" or "auto"')
    if wanted != "auto":
        return wanted
    try:
        count = operations(loss_fn, state, batch)
    except (gradient.GradientError, ImpureError):
        raise
    except Exception:  # Whatever a model does that needs real values.
        count = 0
    if not method.traces:
        return "gradient"
    # On a GPU, one graph reads and writes every weight least often.
    few = state.step.device.type != "cpu" or count <= ARITHMETIC
    return "whole" if few else "gradient"


def operations(loss_fn: LossFn, state: TrainState, batch: Batch) -> int:
    """Count the floating-point operations of one gradient; nothing is computed.

    Those of matrix products, convolutions and attention count, as in
    `torch.utils.flop_counter`; a multiply-add is two.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    device = state.step.device

    def as_fake(leaf: Tensor) -> Tensor:
        with fake:  # What is spread over ranks is known by its shape alone.
            missing = leaf.device.type == "meta"
            return torch.empty_like(leaf, device=device) if missing else leaf

    given = dict(state.params), dict(state.buffers), batch
    arguments = pytree.tree_map_only(
        Tensor, lambda leaf: fake.from_tensor(as_fake(leaf)), given
    )
    with fake, FlopCounterMode(display=False) as counter:
        gradient.evaluate(loss_fn, *arguments)
    return int(counter.get_total_flops())


def in_place_of(step: Step) -> Callable[..., Metrics]:
    """Return the step that writes the new state over the old one."""

    def in_place(
        state: TrainState, batch: Batch, rho: float | Tensor, lr: float | Tensor
    ) -> Metrics:
        new, metrics = step(state, batch, rho, lr)
        _overwrite(state._asdict(), new._asdict())
        return metrics

    return in_place


class _Owned:
    """A step in place, on a state of its own that other states are copied into."""

    def __init__(self) -> None:
        self._state: TrainState | None = None

    def __call__(
        self,
        in_place: Callable[..., Metrics],
        state: TrainState,
        batch: Batch,
        rho: float | Tensor,
        lr: float | Tensor,
    ) -> tuple[TrainState, Metrics]:
        if self._state is None:
            self._state = _copy(state)
            for leaf in pytree.tree_leaves(self._state):
                # Tells Inductor's own CUDA graphs not to copy it in at every step.
                torch._dynamo.mark_static_address(leaf)
        elif state is not self._state:
            _overwrite(self._state._asdict(), state._asdict())
        return self._state, self._take(in_place, self._state, batch, rho, lr)

    def _take(
        self, in_place: Callable[..., Metrics], state: TrainState, *inputs: Any
    ) -> Metrics:
        return in_place(state, *inputs)


class _Recorded(_Owned):
    """A step in place as a CUDA graph: one launch, whatever it holds.

    A graph reads and writes fixed addresses: the state's own, and those of inputs that
    every step copies the batch and the dials to. It is recorded once for batches of a
    shape, and for a kind of step.
    """

    def __init__(self) -> None:
        super().__init__()
        self._graphs: dict[Any, tuple[torch.cuda.CUDAGraph, Any, Metrics]] = {}

    def _take(
        self, in_place: Callable[..., Metrics], state: TrainState, *inputs: Any
    ) -> Metrics:
        leaves, structure = pytree.tree_flatten(inputs)
        key = in_place, str(structure), tuple(map(_kind, leaves))
        with torch.cuda.device(state.step.device):
            if key not in self._graphs:
                self._graphs[key] = self._record(in_place, state, _copy(inputs))
            graph, own, metrics = self._graphs[key]
            for old, new in zip(pytree.tree_leaves(own), leaves, strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new, non_blocking=True)
            graph.replay()
        return Metrics(*_copy(tuple(metrics)))  # The next replay writes over them.

    def _record(
        self, in_place: Callable[..., Metrics], state: TrainState, inputs: Any
    ) -> tuple[torch.cuda.CUDAGraph, Any, Metrics]:
        before, random = _copy(state), torch.cuda.get_rng_state()
        here = torch.cuda.current_stream()
        aside: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(here)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(aside):
                for _ in range(3):  # Compiles, tunes, and makes the libraries' workspaces.
                    in_place(state, *inputs)
            here.wait_stream(aside)
            with torch.cuda.graph(graph):
                metrics = in_place(state, *inputs)
        finally:  # What cannot be recorded is taken eagerly, from where the step began.
            _overwrite(state._asdict(), before._asdict())
            torch.cuda.set_rng_state(random)
        return graph, inputs, metrics


def _candidates(
    options: Mapping[str, Any] | None, plan: Plan, device: torch.device
) -> list[Mapping[str, Any]]:
    """Return the options to try, the fastest first."""
    if options is not None:
        return [options]
    if device.type == "cpu" and plan == "whole":
        return [LEAN | FROM_CPP, LEAN]  # A few operations cannot be called from C++.
    return [LEAN if device.type == "cpu" else {}]


def _import_quietly() -> None:
    # At import it warns of a CUDA toolkit without a GPU, which nobody on a CPU asked for.
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    importlib.import_module("torch.utils.cpp_extension")
    logger.setLevel(level)


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


def _copy(values: Any) -> Any:
    return pytree.tree_map_only(Tensor, torch.clone, values)


def _overwrite(old: Any, new: Any) -> None:
    if isinstance(old, Mapping):
        for key in old:
            _overwrite(old[key], new[key])
    else:
        old.copy_(new)


def _kind(leaf: Any) -> Any:
    """Return what a graph depends on: of a tensor all but its values, else the value."""
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.stride(), leaf.device
    return leaf
