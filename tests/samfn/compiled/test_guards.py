"""A step is compiled anew for all that its graph takes for granted."""

from contextlib import ExitStack
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.overrides import BaseTorchFunctionMode
from torch.testing import assert_close

import samfn
from samfn.compiled import guards
from samfn.compiled import step as step_module
from samfn.compiled.guards import with_own_guards

FACTOR = 1.0
OPTIMIZER = samfn.sgd(0.9, weight_decay=5e-4)


class Scaled(nn.Module):
    """Reads attributes and a global variable, and is called with a number."""

    slope = 1.0

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        self.statistics = nn.BatchNorm1d(3)
        self.alpha, self.table = 1.0, {"shift": 0.0}

    def forward(self, x, power):
        y = self.layers(x.flatten(1).to(self.layers[0].bias.dtype))
        y = y * (self.alpha * self.slope * FACTOR) + self.table["shift"]
        return self.statistics(y**power)


class Weighted:
    """A criterion that reads an attribute."""

    weight = 1.0

    def __call__(self, outputs, targets):
        return F.cross_entropy(outputs, targets) * self.weight


class Case:
    """A step that was compiled, its eager twin, and what both are called with."""

    def __init__(self, plan):
        torch.manual_seed(0)
        self.model, self.criterion = Scaled(), Weighted()
        loss_fn = samfn.supervised(self.model, self.criterion)
        self.given = {"loss_fn": loss_fn, "optimizer": OPTIMIZER}
        self.step = samfn.compile_update(**self.given, plan=plan, backend="eager")
        self.images, self.targets = torch.randn(4, 2, 2), torch.tensor([0, 1, 2, 0])
        self.start()

    def start(self):
        self.call_with(self.images, 1, self.targets)
        self.state = samfn.init(*samfn.split(self.model), optimizer=OPTIMIZER)

    def makes_a_graph(self):
        """Take a step like its twin, and tell whether it was compiled."""
        before = counters["stats"]["unique_graphs"]
        dials = {"rho": torch.tensor(0.1), "lr": torch.tensor(0.1)}
        expected = samfn.sam_update(self.state, self.batch, **self.given, **dials)
        found = self.step(self.state, self.batch, **dials)
        assert_close(found, expected, rtol=1e-5, atol=1e-6)
        self.state = found[0]
        return counters["stats"]["unique_graphs"] > before

    def edit(self, name, change):
        self.state.params[name] = change(self.state.params[name])

    def call_with(self, x, power=1, targets=None):
        self.batch = (x, power), self.targets if targets is None else targets


def put(owner, name, value):
    """Return what sets an attribute of a part of a case, and puts back what it was."""

    def change(case, undo):
        held = owner(case)
        undo.callback(setattr, held, name, getattr(held, name))
        setattr(held, name, value)

    return change


def call(function, new, old):
    """Return what changes a setting of the process, until the end."""

    def change(case, undo):
        undo.callback(function, old)
        function(new)

    return change


def evaluation(case, undo):
    undo.callback(case.model.train)
    case.model.eval()


def global_variable(case, undo):
    undo.callback(globals().update, FACTOR=FACTOR)
    globals().update(FACTOR=0.5)


def cast(case, undo):
    undo.callback(case.model.float)
    case.model.double()
    case.start()


def other_memory(case, undo):
    weight = case.state.params["layers.2.weight"]
    weight.data = weight.t().contiguous().t()


def value_in_a_table(case, undo):
    undo.callback(case.model.table.update, shift=0.0)
    case.model.table.update(shift=3.0)


def hook(case, undo):
    hooked = case.model.layers[1].register_forward_hook(lambda *given: given[-1] * 2)
    undo.callback(hooked.remove)


CHANGES = {
    "the mode": evaluation,
    "an attribute": put(lambda case: case.model, "alpha", 0.5),
    "an attribute of a class": put(lambda case: Scaled, "slope", 0.5),
    "an attribute of a layer": put(lambda case: case.model.statistics, "eps", 0.5),
    "an attribute of the criterion": put(lambda case: case.criterion, "weight", 0.5),
    "a table": put(lambda case: case.model, "table", {"shift": 2.0}),
    "a value in a table": value_in_a_table,
    "a global variable": global_variable,
    "a method": put(lambda case: case.model.layers[1], "forward", torch.sigmoid),
    "a function": put(lambda case: F, "cross_entropy", F.multi_margin_loss),
    "a layer": put(lambda case: case.model.layers, "1", nn.ReLU()),
    "a hook": hook,
    "a number in the batch": lambda case, undo: case.call_with(case.images, 2),
    "the length of the batch": lambda case, undo: case.call_with(
        case.images[1:], targets=case.targets[1:]
    ),
    "the shape of the inputs": lambda case, undo: case.call_with(case.images.flatten(1)),
    "the strides of the inputs": lambda case, undo: case.call_with(case.images.mT),
    "the dtype of the inputs": lambda case, undo: case.call_with(case.images.double()),
    "inputs that require grad": lambda case, undo: case.call_with(
        case.images.clone().requires_grad_()
    ),
    "a class of tensors": lambda case, undo: case.call_with(
        nn.Parameter(case.images, requires_grad=False)
    ),
    "a parameter of other strides": lambda case, undo: case.edit(
        "layers.0.weight", lambda weight: weight.t().contiguous().t()
    ),
    "a parameter's memory": other_memory,
    "a state of another dtype": cast,
    "autocast": lambda case, undo: undo.enter_context(torch.autocast("cpu")),
    "a mode of functions": lambda case, undo: undo.enter_context(BaseTorchFunctionMode()),
    "the default dtype": call(torch.set_default_dtype, torch.float64, torch.float32),
    "determinism": call(torch.use_deterministic_algorithms, True, False),
    "threads": call(torch.set_num_threads, 3, torch.get_num_threads()),
}


# Where the gradient alone is compiled, one of each thing that a graph can be guarded by.
OF_A_GRADIENT = (
    *("the mode", "an attribute", "an attribute of the criterion", "a global variable"),
    *("a layer", "a hook", "the length of the batch", "the dtype of the inputs"),
    *("a parameter of other strides", "a state of another dtype", "autocast", "threads"),
)
CASES = [("whole", name) for name in CHANGES] + [("gradient", n) for n in OF_A_GRADIENT]


@pytest.fixture(scope="module")
def case(request):
    with torch._dynamo.config.patch(recompile_limit=100):
        yield Case(request.param)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "name"), CASES, indirect=["case"])
def test_a_step_is_compiled_anew_after_a_change_of(name, case):
    case.start()
    case.makes_a_graph()  # Here, or for the change before.
    assert not case.makes_a_graph()
    with ExitStack() as undo:
        CHANGES[name](case, undo)
        assert case.makes_a_graph()
        assert not case.makes_a_graph()


@pytest.mark.slow
def test_guards_of_samfn_itself_are_left_out_and_those_of_users_are_not():
    case, names = Case("whole"), {}
    loss_fn = case.given["loss_fn"]
    options = with_own_guards({}, lambda: [loss_fn.standing()])["options"]

    def watching(guards):
        kept = options["guard_filter_fn"](guards)
        for guard, stays in zip(guards, kept, strict=True):
            names.setdefault(stays, set()).add(guard.name)
        return kept

    how = {"backend": "eager", "options": {"guard_filter_fn": watching}}
    case.step = samfn.compile_update(**case.given, plan="whole", **how)
    case.makes_a_graph()
    assert any("take_step" in name for name in names[False])
    assert any("_lender.places" in name for name in names[False])
    assert any("alpha" in name for name in names[True])
    assert any("state.params" in name for name in names[True])
    assert not any("FACTOR" in name or "alpha" in name for name in names[False])
    # Nobody compares the notes of a loss function that is not asked.
    others = with_own_guards({}, list)["options"]["guard_filter_fn"]
    names.clear()
    options["guard_filter_fn"] = others
    case.step = samfn.compile_update(**case.given, plan="whole", **how)
    case.makes_a_graph()
    assert any("take_step" in name for name in names[False])
    assert not any("_lender.places" in name for name in names[False])


def test_functions_of_pytorch_that_samfn_names_keep_their_guards():
    class Guard(NamedTuple):
        name: str
        value: object = torch.sqrt
        guard_type: str = "ID_MATCH"
        is_global: bool = True

    keep = with_own_guards({}, list)["options"]["guard_filter_fn"]
    own = "G['__import_samfn_dot_tree']"
    found = keep(
        [Guard(f"{own}.norm"), Guard(f"{own}.torch.sqrt"), Guard("G['take_step']")]
    )
    assert found == [False, True, False]


@pytest.mark.slow
def test_a_compiled_step_leaves_out_its_own_guards(monkeypatch):
    seen = []

    def watching(guard):
        seen.append(of_code(guard))
        return seen[-1]

    of_code = guards._is_of_code
    monkeypatch.setattr(guards, "_is_of_code", watching)
    Case("whole").makes_a_graph()
    assert True in seen
    assert False in seen


@pytest.mark.filterwarnings("ignore:samfn goes on uncompiled")
def test_a_dial_that_was_kept_is_made_anew_for_weights_of_another_dtype(monkeypatch):
    monkeypatch.setattr(step_module, "missing_compiler", lambda *given: "found none")

    def loss_fn(params, buffers, batch):
        return (params["w"] * batch).sum()

    step = samfn.compile_update(loss_fn=loss_fn, optimizer=samfn.sgd())
    for dtype in (torch.float32, torch.float64):
        start = {"w": torch.zeros(2, dtype=dtype)}
        state = samfn.init(start, {}, optimizer=samfn.sgd())
        state, _ = step(state, torch.ones(2, dtype=dtype), lr=0.1)
        assert_close(state.params["w"], torch.full((2,), -0.1, dtype=dtype), rtol=0, atol=0)
