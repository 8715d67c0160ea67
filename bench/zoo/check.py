"""Three ways to take a step, and the Hessian, held against the plain way on a copy."""

import hashlib
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import samfn
from bench.zoo.habits import Case
from samfn.gradient import evaluate
from samfn.measure.curvature import hessian_product

RHO, LR, STEPS = 0.1, 0.1, 3
BACKEND = "inductor"
# Relative to how far training went; to the product itself for that with the Hessian.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-3}
# Of a network that computes some of it in float32, as norms do, a graph rounds otherwise.
ROUNDED = 1e-5
# So does this kernel, whose 1/6 is 0.1666666716: a graph is nearer to what is right.
IN_FLOAT32 = torch.ops.aten.hardsigmoid_backward.default
# Where rounding otherwise leads further away, so many times as far is no fault.
CHAOS = 10.0
LARGE = 1_000_000  # entries
PRODUCT = {torch.float64: 1e-4, torch.float32: 5e-2}


class Seen(NamedTuple):
    """State after three steps, and what they returned."""

    losses: list[Tensor]
    outputs: Any
    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    random: Tensor
    unused: bool = False
    """Whether the loss of a pass did not depend on some parameter."""


class Problem:
    """A network and its batch, the same each time that they are made."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.model = case.make()
        if case.dtype is not None:
            _cast(self.model, case.dtype)
        self.batch = case.inputs(), case.targets()
        if case.dtype is torch.float32:
            self.batch = pytree.tree_map_only(Tensor, _narrow, self.batch)
        self.criterion = case.criterion(self.model)

    def loss(self) -> tuple[Tensor, Any]:
        """Return the loss as a plain loop computes it, and the outputs."""
        inputs, targets = pytree.tree_map_only(Tensor, torch.clone, self.batch)
        outputs = self.model(*inputs if type(inputs) is tuple else (inputs,))
        return self.criterion(outputs, targets), outputs


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():  # `to` would take complex numbers for real ones.
            tensor.data = tensor.data.to(dtype)


def _narrow(leaf: Tensor) -> Tensor:
    return leaf.float() if leaf.is_floating_point() else leaf


def plain_loop(
    case: Case,
    *,
    unused: bool,
    nudge: float = 0.0,
    around: AbstractContextManager[Any] | None = None,
) -> Seen:
    """Train by writing to the weights and putting them back, BatchNorm by one pass.

    A parameter that the loss does not depend on has gradient zero if `unused`, and so
    decays; otherwise it has no gradient, as in most loops. Gradients are longer by the
    share `nudge` than they are, where the perturbation's length is computed. The context
    `around` is that of training, not of making the model.
    """
    problem = Problem(case)
    with around or nullcontext():
        return _trained(case, problem, unused, nudge)


def _trained(case: Case, problem: Problem, unused: bool, nudge: float) -> Seen:
    model = problem.model
    trained = [p for p in model.parameters() if p.requires_grad]
    given: Any = case.momentum
    optimizer = torch.optim.SGD(trained, LR, **given)
    losses, outputs, reached = [], None, True
    for step in range(STEPS):
        torch.manual_seed(step)
        start = _buffers(model)
        loss, outputs = problem.loss()
        left = _buffers(model)
        grads = _grads(loss, trained)
        losses.append(loss.detach())
        squares = [g.abs().double().square().sum() for g in grads if g is not None]
        length = torch.stack(squares).sum().sqrt() * (1 + nudge)
        before = [p.detach().clone() for p in trained]
        with torch.no_grad():
            for p, grad in zip(trained, grads, strict=True):
                if grad is not None:
                    p.add_(grad * (RHO / length).to(p.dtype))
        _put(model, start)
        for p, grad in zip(trained, _grads(problem.loss()[0], trained), strict=True):
            reached = reached and grad is not None
            p.grad = torch.zeros_like(p) if grad is None and unused else grad
        with torch.no_grad():
            for p, old in zip(trained, before, strict=True):
                p.copy_(old)
        _put(model, left)
        optimizer.step()
    random = torch.get_rng_state()
    return Seen(losses, _detached(outputs), *samfn.split(model), random, not reached)


def _grads(loss: Tensor, trained: list[nn.Parameter]) -> list[Tensor | None]:
    for p in trained:
        p.grad = None
    torch.autograd.backward(loss)
    sparse = [p for p in trained if p.grad is not None and p.grad.is_sparse]
    for p in sparse:
        p.grad = p.grad.to_dense() if p.grad is not None else None
    return [p.grad for p in trained]


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


def _put(model: nn.Module, buffers: dict[str, Tensor]) -> None:
    for name, buffer in buffers.items():
        path, _, attribute = name.rpartition(".")
        model.get_submodule(path)._buffers[attribute] = buffer.clone()


def _detached(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, torch.detach, tree)


def functional(
    case: Case, problem: Problem, *, compiled: bool, by_func: bool = False
) -> tuple[Seen, str]:
    """Train by `sam_update`, or by the step of `compile_update`; return also its plan.

    Args:
        case: what is trained.
        problem: of the case.
        compiled: by the step of `compile_update`.
        by_func: differentiate by torch.func, as a graph does, and not by autograd.
    """
    loss_fn = samfn.supervised(problem.model, problem.criterion)
    if by_func:
        loss_fn = samfn.Loss(loss_fn.function, loss_fn.check)
    momentum: Any = case.momentum
    optimizer = samfn.sgd(**momentum)
    state = samfn.init(*samfn.split(problem.model), optimizer=optimizer)
    given: Any = {"loss_fn": loss_fn, "optimizer": optimizer}
    step: Any = partial(samfn.sam_update, **given)
    if compiled:
        # Otherwise graphs draw other random numbers than PyTorch does.
        torch._inductor.config.fallback_random = True
        step = samfn.compile_update(**given, backend=BACKEND)
    losses, outputs = [], None
    for number in range(STEPS):
        torch.manual_seed(number)
        state, metrics = step(state, problem.batch, rho=RHO, lr=LR)
        losses.append(metrics.loss)
        outputs = metrics.outputs
    found = Seen(
        losses, outputs, {**state.params}, {**state.buffers}, torch.get_rng_state()
    )
    return found, step.plan if compiled else "eager"


def drop_in(case: Case, problem: Problem) -> Seen:
    """Train by `samfn.SAM`, whose user looks after the buffers."""
    model = problem.model
    trained = [p for p in model.parameters() if p.requires_grad]
    momentum: Any = case.momentum
    optimizer = samfn.SAM(trained, torch.optim.SGD, rho=RHO, lr=LR, **momentum)
    losses, outputs = [], None
    for step in range(STEPS):
        torch.manual_seed(step)
        start = _buffers(model)
        loss, outputs = problem.loss()
        left = _buffers(model)
        torch.autograd.backward(loss)
        losses.append(loss.detach())
        optimizer.first_step(zero_grad=True)
        _put(model, start)
        torch.autograd.backward(problem.loss()[0])
        _put(model, left)
        optimizer.second_step(zero_grad=True)
    return Seen(losses, _detached(outputs), *samfn.split(model), torch.get_rng_state())


def hessian(case: Case, problem: Problem) -> float:
    """Return how far a product with the Hessian is from a difference of gradients.

    The best of several differences counts: a short one, or one to a single side, crosses
    no kink of a ReLU, where the second derivative is not what differences see, and of a
    network that computes parts in float32, whatever it is asked, only a long one is more
    than noise.
    """
    loss_fn = samfn.supervised(problem.model, problem.criterion)
    params, buffers = samfn.split(problem.model)
    params = {name: w + 0.01 * torch.randn_like(w) for name, w in params.items()}
    direction = {name: torch.randn_like(w) for name, w in params.items()}
    direction = samfn.tree.scale(direction, samfn.norm(params) / samfn.norm(direction))
    batch = problem.batch
    torch.manual_seed(0)
    product = hessian_product(loss_fn, params, buffers, batch, direction)

    def slope(step: float) -> dict[str, Tensor]:
        there = samfn.tree.add_scaled(params, step, direction)
        torch.manual_seed(0)
        return evaluate(loss_fn, there, buffers, batch).grads

    def distance(later: dict[str, Tensor], earlier: dict[str, Tensor], way: float) -> float:
        difference = samfn.tree.scale(samfn.tree.subtract(later, earlier), 1 / way)
        away = samfn.norm(samfn.tree.subtract(product, difference))
        return float(away / (samfn.norm(difference) + 1e-12))

    here, found = slope(0.0), []
    for h in (1e-9, 1e-7, 1e-5, 1e-3, 4e-3):
        ahead, behind = slope(h), slope(-h)
        found.append(distance(ahead, behind, 2 * h))
        found += [distance(ahead, here, h), distance(here, behind, h)]
        if min(found) <= PRODUCT[torch.float64]:
            break
    return min(found)


def apart(found: Seen, expected: Seen, start: dict[str, Tensor]) -> float:
    """Return how far two trainings are from each other, relative to how far they went."""
    went = samfn.norm(samfn.tree.subtract(expected.params, start))
    away = [samfn.norm(samfn.tree.subtract(found.params, expected.params)) / went]
    pairs = [
        *zip(found.losses, expected.losses, strict=True),
        *((found.buffers[name], b) for name, b in expected.buffers.items()),
        *zip(
            *(pytree.tree_leaves(seen.outputs) for seen in (found, expected)), strict=True
        ),
    ]
    for new, old in pairs:
        if isinstance(old, Tensor):
            if new.shape != old.shape or new.dtype != old.dtype:
                return float("inf")
            if old.numel():
                scale = old.abs().double().max().clamp(min=1e-3)
                away.append((new - old).abs().double().max() / scale)
    worst = float(torch.stack([value.double().cpu() for value in away]).max())
    return worst if worst == worst else float("inf")


class Fingerprint:
    """Contents of a model and a batch, to the bit, and the objects that hold them."""

    def __init__(self, problem: Problem) -> None:
        self._problem, self._before = problem, self._taken(problem)

    @staticmethod
    def _taken(problem: Problem) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, module in problem.model.named_modules():
            for kind in ("_parameters", "_buffers", "_modules"):
                for key, value in getattr(module, kind).items():
                    copied = _content(value) if isinstance(value, Tensor) else None
                    found[f"{name}.{key}"] = id(value), type(value), copied
        for index, leaf in enumerate(pytree.tree_leaves(problem.batch)):
            copied = leaf.clone() if isinstance(leaf, Tensor) else None
            found[f"batch {index}"] = id(leaf), type(leaf), copied
        return found

    def changes(self) -> list[str]:
        """Return the names of what is another object, or has other values."""
        after = self._taken(self._problem)
        return [
            name
            for name in {**self._before, **after}
            if not _same(self._before.get(name), after.get(name))
        ]


def _content(tensor: Tensor) -> Any:
    """Return a copy of a tensor, or the digest of one of which two would be too large."""
    if tensor.numel() <= LARGE or tensor.layout is not torch.strided:
        return tensor.detach().clone()
    content: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(content).digest()


def _same(before: Any, after: Any) -> bool:
    if before is None or after is None or before[:2] != after[:2]:
        return False
    if not (isinstance(before[2], Tensor) and isinstance(after[2], Tensor)):
        return type(before[2]) is type(after[2]) and bool(before[2] == after[2])
    return bool(before[2].shape == after[2].shape and _equal(before[2], after[2]))


def _equal(before: Tensor, after: Tensor) -> bool:
    return torch.equal(before.nan_to_num(7.0), after.nan_to_num(7.0))


def check(case: Case, *, compiled: bool = True, only: str = "") -> dict[str, str]:
    """Return a row of the table: for each way "exact", "refused: why", or what is wrong."""
    row = {"network": case.name}
    if only in ("", "Hessian"):  # Before there is more to hold.
        row["Hessian"] = _curved(case)
    if only == "Hessian":
        return row
    try:
        expected: Seen | None = plain_loop(case, unused=True)
    except Exception as error:
        expected = None
        row["plain"] = _said(error)
    usual = expected
    if expected is not None and expected.unused:
        usual = plain_loop(case, unused=False)
    ways: dict[str, Callable[[Problem], tuple[Seen, str]]] = {
        "eager": partial(functional, case, compiled=False),
        "compiled": partial(functional, case, compiled=True),
        "drop-in": lambda problem: (drop_in(case, problem), "drop-in"),
    }
    for way, train in ways.items():
        if only in ("", way) and (compiled or way != "compiled"):
            row[way] = _compared(case, way, train, usual if way == "drop-in" else expected)
    return row


def _compared(
    case: Case,
    way: str,
    train: Callable[[Problem], tuple[Seen, str]],
    expected: Seen | None,
) -> str:
    problem = Problem(case)
    before = Fingerprint(problem)
    try:
        start = samfn.split(problem.model)[0]
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found, plan = train(problem)
    except Exception as error:
        changed = before.changes() if way != "drop-in" else []
        return f"WRONG: changed {changed}" if changed else f"refused: {_said(error)}"
    if way != "drop-in" and (changed := before.changes()):
        return f"WRONG: changed {changed[:3]}"
    if expected is None:
        return "WRONG: a plain loop cannot"
    if not torch.equal(found.random, expected.random):
        return "WRONG: other random numbers"
    distance = apart(found, expected, start)
    tolerance = TOLERANCE[case.dtype or torch.float64]
    if way == "compiled" and distance > tolerance and _computes_in_float32(case):
        tolerance = max(tolerance, ROUNDED)
    drawn = not torch.equal(expected.random, _untouched())
    if way == "compiled" and distance > tolerance and drawn:
        # Of a tensor that lies otherwise in memory, torch.func draws another dropout mask.
        by_func, _ = functional(case, Problem(case), compiled=False, by_func=True)
        distance, plan = apart(found, by_func, start), f"{plan}, torch.func's masks"
    if distance > tolerance:
        tolerance = max(tolerance, CHAOS * _rounding(case, expected, start, way))
    if not distance <= tolerance:
        return f"WRONG: {distance:.1e} apart"
    eager = [str(w.message) for w in told if "uncompiled" in str(w.message)]
    return f"exact, {plan}" + (f" ({eager[0]})" if eager else "")


def _rounding(case: Case, expected: Seen, start: dict[str, Tensor], way: str) -> float:
    """Return how far from itself a plain loop ends whose norms are rounded otherwise.

    Up and down: where one of them meets a kink of the loss, the other may not. A graph
    rounds otherwise wherever it likes, so beside it all operations are.
    """
    eps = torch.finfo(case.dtype or torch.float64).eps
    found = []
    for seed, nudge in enumerate((eps, -eps)):
        around = _Rounded(seed) if way == "compiled" else None
        other = plain_loop(case, unused=way != "drop-in", nudge=nudge, around=around)
        found.append(apart(other, expected, start))
    return max(found)


class _Rounded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Moves what operations give by half of its last place: up, down or not at all."""

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._draws = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation."""
        found = operation(*args, **(kwargs or {}))
        schema = operation._schema
        if not any(each.alias_info for each in (*schema.arguments, *schema.returns)):
            for leaf in pytree.tree_leaves(found):
                if isinstance(leaf, Tensor) and leaf.is_floating_point():
                    way = torch.randint(-1, 2, leaf.shape, generator=self._draws)
                    leaf.add_(leaf * way * (torch.finfo(leaf.dtype).eps / 2))
        return found


def _untouched() -> Tensor:
    """Return the state of random numbers in the last step, before any was drawn."""
    return torch.Generator().manual_seed(STEPS - 1).get_state()


class _Float32(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes whether operations compute in float32."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = False

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation."""
        found = operation(*args, **(kwargs or {}))
        self.seen = self.seen or operation is IN_FLOAT32
        for leaf in pytree.tree_leaves(found):
            if isinstance(leaf, Tensor) and leaf.dtype is torch.float32:
                self.seen = True
        return found


def _computes_in_float32(case: Case) -> bool:
    problem, noted = Problem(case), _Float32()
    with noted:
        torch.autograd.backward(problem.loss()[0])
    return noted.seen


def _curved(case: Case) -> str:
    if case.dtype is torch.float32:  # Its differences would be noise.
        case = case._replace(dtype=torch.float64)
    problem = Problem(case)
    problem.model.eval()
    before = Fingerprint(problem)
    try:
        distance = hessian(case, problem)
    except Exception as error:
        changed = before.changes()
        return f"WRONG: changed {changed[:3]}" if changed else f"refused: {_said(error)}"
    if changed := before.changes():
        return f"WRONG: changed {changed[:3]}"
    tolerance = PRODUCT[case.dtype or torch.float32]
    return "exact" if distance <= tolerance else f"WRONG: {distance:.1e} apart"


def _said(error: Exception) -> str:
    first = str(error).strip().split("\n", 1)[0]
    return f"{type(error).__name__}: {first}"
