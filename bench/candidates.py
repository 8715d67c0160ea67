"""Ways to take the same step: samfn's own, its rejected designs, and the peers."""

import math
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import samfn
from bench import measure
from bench.networks import LR, MOMENTUM, RHO, WEIGHT_DECAY, Network
from bench.peers import SEVERAL, peers
from samfn.compiled.cuda_graph import in_place_of
from samfn.compiled.plan import LEAN
from samfn.loss import Aux, LossFn
from samfn.step import take_step

DTYPES = {"float32": None, "bf16": torch.bfloat16}
# How far two trainings of three calls may be apart, relative to the way that they went. In
# float64 they agree to 1e-10 (tests/samfn/compiled/test_step.py). In float32 rounding takes
# a wide residual network 0.02 away, as does another memory layout; plain SGD is 0.27 away.
TOLERANCE = {"float32": 0.05, "bf16": 0.2}


class Samfn:
    """A state, and the function that takes its next step."""

    def __init__(
        self,
        network: Network,
        dtype: torch.dtype | None,
        rho: float,
        make: Callable[..., Any] | None,
        *,
        flat: bool = False,
        steps: int = 1,
    ) -> None:
        self.steps = steps
        params, buffers = samfn.split(network.model)
        loss_fn: LossFn = samfn.supervised(network.model, F.cross_entropy, dtype=dtype)
        self._shapes = {name: w.shape for name, w in params.items()}
        if flat:
            loss_fn, params = flattened(loss_fn, params), {"all": _joined(params)}
        optimizer = samfn.sgd(MOMENTUM, weight_decay=WEIGHT_DECAY)
        common: Any = {"loss_fn": loss_fn, "optimizer": optimizer}
        self._state = samfn.init(params, buffers, optimizer=optimizer)
        self._update: Any = make(**common) if make else None
        self._eager, self._rho = common, rho
        batch = network.inputs, network.targets
        self._batch = (
            batch if steps == 1 else tuple(torch.stack([x] * steps) for x in batch)
        )

    def step(self) -> None:
        """Take the steps of a call."""
        dials: Any = {"rho": self._rho, "lr": LR}
        if self._update is None:
            result = samfn.sam_update(self._state, self._batch, **self._eager, **dials)
        else:
            result = self._update(self._state, self._batch, **dials)
        self._state = result[0]

    def weights(self) -> dict[str, Tensor]:
        """Return the parameters."""
        params = dict(self._state.params)
        return params if "all" not in params else _parted(params["all"], self._shapes)


class Gradient:
    """A compiled gradient alone, without a step."""

    def __init__(self, network: Network, dtype: torch.dtype | None) -> None:
        loss_fn = samfn.supervised(network.model, F.cross_entropy, dtype=dtype)
        batch = network.inputs, network.targets

        def evaluate(params: Any, buffers: Any) -> Any:
            return samfn.evaluate(loss_fn, params, buffers, batch)

        self._split = samfn.split(network.model)
        self._evaluate = torch.compile(evaluate, fullgraph=True, dynamic=False)

    def step(self) -> None:
        """Compute the gradient."""
        with torch.no_grad():
            self._evaluate(*self._split)


class Candidate(NamedTuple):
    """One way to take a step, made and warmed up."""

    name: str
    runner: Any
    """Has `step()`, the number of `steps` in a call of it, and `weights()`."""
    first_call_seconds: float
    apart: float
    """From eager samfn after three calls, relative to the way that it went."""
    from_float32: float
    """From eager samfn in float32 likewise; nan where all are in float32."""
    bytes: int
    """Reserved on the GPU for it at its peak; 0 on a CPU."""


def compiled(**settings: Any) -> Callable[..., Any]:
    """Return what makes a compiled step with these settings of `compile_update`."""
    return lambda **common: samfn.compile_update(**common, **settings)


def in_place(**common: Any) -> Any:
    """Make a whole graph that writes the new state over the old one, on any device."""
    optimizer, method = common["optimizer"], samfn.sam()

    evaluate = partial(samfn.evaluate, common["loss_fn"])

    def plain(state: Any, batch: Any, rho: Any, lr: Any) -> Any:
        return take_step(state, batch, evaluate, optimizer, method, rho=rho, lr=lr)

    run: Any = torch.compile(in_place_of(plain), fullgraph=True, dynamic=False)

    def step(state: Any, batch: Any, *, rho: float, lr: float) -> Any:
        with torch.no_grad():
            return state, run(state, batch, torch.tensor(rho), torch.tensor(lr))

    return step


def flattened(loss_fn: LossFn, params: Mapping[str, Tensor]) -> LossFn:
    """Return the loss as a function of one tensor that holds all parameters."""
    shapes = {name: w.shape for name, w in params.items()}

    def flat(
        params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], batch: Any
    ) -> tuple[Tensor, Aux]:
        result: Any = loss_fn(_parted(params["all"], shapes), buffers, batch)
        return result  # type: ignore[no-any-return]

    return flat


def samfn_runners(
    network: Network, dtype: torch.dtype | None, *, sam: bool, designs: bool = False
) -> dict[str, Callable[[], Any]]:
    """Return what makes each way of samfn, by name; with `designs`, the rejected ones."""
    rho = RHO if sam else 0.0
    kind = "samfn" if sam else "samfn SGD"

    def of(make: Callable[..., Any] | None, flat: bool = False) -> Callable[[], Any]:
        return lambda: Samfn(network, dtype, rho, make, flat=flat)

    made = {f"{kind} eager": of(None), f"{kind} compiled": of(compiled())}
    for steps in SEVERAL.get(network.name, ()):
        made[f"{kind} compiled, {steps} steps a call"] = partial(
            Samfn, network, dtype, rho, compiled(steps=steps), steps=steps
        )
    if designs:
        made |= {
            f"{kind} whole": of(compiled(plan="whole")),
            f"{kind} gradient": of(compiled(plan="gradient")),
            f"{kind} whole, called from Python": of(compiled(plan="whole", options=LEAN)),
            f"{kind} whole, default options": of(compiled(plan="whole", options={})),
            f"{kind} whole, in place": of(in_place),
            f"{kind} whole, flat buffer": of(compiled(plan="whole"), flat=True),
            f"{kind} whole, max-autotune": of(
                compiled(plan="whole", options=LEAN | {"max_autotune": True})
            ),
        }
    return made


def candidates(
    network: Network,
    precision: str,
    *,
    designs: bool = False,
    only: Collection[str] | None = None,
    tolerance: float | None = None,
) -> list[Candidate]:
    """Make every candidate, and check that they agree with eager samfn in three calls.

    Args:
        network: what they train.
        precision: a key of `DTYPES`.
        designs: take the designs of the compiled step instead of the peers.
        only: names to make; None is all. "samfn eager" must be one, and "samfn SGD eager"
            where there is another that takes a step of SGD.
        tolerance: how far they may be apart; None is that of `TOLERANCE`.

    Raises:
        AssertionError: one of them computes something else.
    """
    dtype = DTYPES[precision]
    found = []
    for sam in (True, False):
        made = samfn_runners(network, dtype, sam=sam, designs=designs and sam)
        if not designs:
            made |= peers(network, dtype, sam=sam)
        if only is not None:
            made = {name: make for name, make in made.items() if name in only}
        start = samfn.split(network.model)[0]
        reached: dict[int, dict[str, Tensor]] = {}  # by the first of them: steps -> weights
        full = partial(Samfn, network, None, RHO if sam else 0.0, None)
        exact: dict[int, dict[str, Tensor]] = {}  # by eager samfn in float32
        for name, make in made.items():
            before = measure.start_of_peak()
            runner, seconds = started(make)
            runner.step()
            runner.step()
            taken = measure.reserved_at_peak() - before
            count = 3 * runner.steps
            if not reached:
                reached[count] = runner.weights()
            elif count not in reached:
                reached[count] = _trained(next(iter(made.values())), count)
            if dtype is not None and count not in exact:
                exact[count] = _trained(full, count)
            weights = runner.weights()
            apart = measure.distance(start, weights, reached[count])
            beside = exact.get(count)
            rounded = measure.distance(start, beside, weights) if beside else math.nan
            # Untuned peers compute in float32 whatever the others do.
            allowed = TOLERANCE["bf16" if "untuned" in name else precision]
            assert apart < (tolerance or allowed), (
                f"{name} is {apart:.2g} away from {next(iter(made))}"
            )
            found.append(Candidate(name, runner, seconds, apart, rounded, taken))
    return found


def _trained(make: Callable[[], Any], steps: int) -> dict[str, Tensor]:
    """Return the weights after so many steps of what takes one in a call."""
    runner = make()
    for _ in range(steps):
        runner.step()
    weights: dict[str, Tensor] = runner.weights()
    return weights


def started(make: Callable[[], Any]) -> tuple[Any, float]:
    """Make a runner and take its first step; return it and the seconds that took."""
    measure.synchronize()
    begun = time.perf_counter()
    runner = make()
    runner.step()
    measure.synchronize()
    return runner, time.perf_counter() - begun


def _joined(params: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([w.reshape(-1) for w in params.values()])


def _parted(flat: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    sizes = [shape.numel() for shape in shapes.values()]
    parts: tuple[Tensor, ...] = torch.split(flat, sizes)
    return {
        name: part.view(shape)
        for part, (name, shape) in zip(parts, shapes.items(), strict=True)
    }
