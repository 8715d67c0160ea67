"""The compiled step gives what the eager one gives, from graphs that are made once."""

import math
import os
import re
import subprocess
import sys
from collections import UserDict
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.utils import get_code
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import samfn
from bench.networks import build
from recipes.models.wide_resnet import GlobalMean
from samfn.compiled import operations, passes
from samfn.compiled import step as step_module
from samfn.compiled.plan import choose
from tests.reference import batches, small_network

OPTIMIZER = samfn.sgd(0.9, nesterov=True, weight_decay=5e-4)

OLD = torch.__version__ < "2.12"

# Takes a sixth of the time. What graphs there are, and when, does not depend on it.
CAPTURED = {"backend": "aot_eager"}


def task(model, method=None, **settings):
    """Return a state, its compiled step and its eager one."""
    method = method or samfn.sam()
    common = {
        "loss_fn": samfn.supervised(model, F.cross_entropy),
        "optimizer": OPTIMIZER,
        "method": method,
    }
    state = samfn.init(*samfn.split(model), optimizer=OPTIMIZER, method=method)

    def eager(state, batch, **dials):
        return samfn.sam_update(state, batch, **common, **dials)

    return state, samfn.compile_update(**common, **settings), eager


def tiny():
    """Return a network that compiles fast, for the batches of `small_network`."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(32, 7)).double()


def tiny_with_statistics():
    return nn.Sequential(*tiny(), nn.BatchNorm1d(7)).double()


def graphs():
    return counters["stats"]["unique_graphs"]


def dials(step):
    """Return numbers and tensors in turn, never the same twice."""
    rho, lr = 0.01 * (step + 1), 0.1 / (step + 1)
    if step % 2:
        return {"rho": torch.tensor(rho), "lr": torch.tensor(lr, dtype=torch.float64)}
    return {"rho": rho, "lr": lr}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "make", "how"),
    [("whole", tiny_with_statistics, {}), ("gradient", small_network, CAPTURED)],
)
def test_two_epochs_are_those_of_the_eager_step_from_one_graph(plan, make, how):
    model = make()
    state, step, eager = task(model, plan=plan, **how)
    other = state
    counters.clear()
    for epoch in range(2):
        for index, batch in enumerate(batches(4)):
            state, metrics = step(state, batch, **dials(4 * epoch + index))
            other, expected = eager(other, batch, **dials(4 * epoch + index))
            # A tensor of float32 holds rho to 6e-8.
            assert_close(metrics, expected, rtol=1e-6, atol=1e-8)
        model.eval()  # Evaluation in between, as a user does it.
        with torch.no_grad():
            samfn.supervised(model, F.cross_entropy)(*state[:2], batches(1)[0])
        model.train()
    assert_close(state, other, rtol=1e-6, atol=1e-8)
    assert step.plan == plan
    assert graphs() == 1


@pytest.mark.slow
def test_the_number_zero_as_rho_is_one_pass_and_one_more_graph():
    state, step, eager = task(tiny_with_statistics(), plan="whole", **CAPTURED)
    batch = batches(1)[0]
    counters.clear()
    for _ in range(2):
        assert_close(
            step(state, batch, rho=0, lr=0.1),
            eager(state, batch, rho=0, lr=0.1),
            rtol=1e-10,
            atol=1e-12,
        )
        step(state, batch, rho=0.1, lr=0.1)
    assert graphs() == 2


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["whole", "gradient"])
def test_a_schedule_of_rho_through_zero_makes_its_graphs_once(plan):
    state, step, eager = task(tiny(), plan=plan, **CAPTURED)
    rho, other, made = samfn.schedules.linear(0.1, 0.0, 2), state, []
    counters.clear()
    for batch, number in zip(batches(6), (0, 1, 2, 3, 1, 2), strict=True):
        state, metrics = step(state, batch, rho=rho(number), lr=0.1)
        other, expected = eager(other, batch, rho=rho(number), lr=0.1)
        assert_close((state, metrics), (other, expected), rtol=1e-7, atol=1e-9)
        assert (metrics.perturbation_norm == 0) == (number >= 2)
        made.append(graphs())
    assert made == ([1, 1, 2, 2, 2, 2] if plan == "whole" else [1] * 6)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["whole", "gradient"])
def test_each_kind_of_step_has_its_graph_and_none_is_made_again(plan):
    method = samfn.looksam(2)
    state, step, eager = task(tiny(), method, plan=plan, **CAPTURED)
    other = state
    counters.clear()
    made = []
    for batch in batches(6):
        state, metrics = step(state, batch, rho=0.1, lr=0.1)
        other, expected = eager(other, batch, rho=0.1, lr=0.1)
        assert_close((state, metrics), (other, expected), rtol=1e-7, atol=1e-9)
        made.append(graphs())
    assert made == ([1, 2, 2, 2, 2, 2] if plan == "whole" else [1] * 6)
    # Another state, somewhere else on its way: the kinds follow its own count.
    state, _ = step(other, batches(1)[0], rho=0.1, lr=0.1)
    other, _ = eager(other, batches(1)[0], rho=0.1, lr=0.1)
    assert_close(state, other, rtol=1e-7, atol=1e-9)


@pytest.mark.slow
def test_a_step_that_failed_does_not_count_as_one():
    state, step, eager = task(tiny(), samfn.looksam(2), plan="gradient", **CAPTURED)
    batch = batches(1)[0]
    first, _ = step(state, batch, lr=0.1)
    with pytest.raises(Exception, match=r"size|shape"):
        step(first, (batch[0][:, :1, :1], batch[1]), lr=0.1)
    found, expected = step(first, batch, lr=0.1), eager(first, batch, lr=0.1)
    assert_close(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.slow
def test_kinds_of_steps_share_the_state_in_place():
    # What a GPU does, run on a CPU.
    method = samfn.every(samfn.sam(), 2)
    state, compiler, eager = task(tiny(), method, cuda_graph=False)
    cuda = torch.device("cuda")
    steps = [
        compiler._compile("gradient", CAPTURED, cuda, method.kind(kind)) for kind in (0, 1)
    ]
    rho, lr = torch.tensor(0.1), torch.tensor(0.2)
    own = other = state
    with torch.no_grad():
        for number, batch in enumerate(batches(4)):
            own, metrics = steps[number % 2](own, batch, rho, lr)
            other, expected = eager(other, batch, rho=rho, lr=lr)
            assert_close((own, metrics), (other, expected), rtol=1e-9, atol=1e-11)
            assert own is compiler._owned._state


def test_a_method_that_does_not_trace_is_no_whole_graph():
    state, step, _ = task(tiny(), samfn.ae_sam(9), plan="whole")
    with pytest.raises(ValueError, match="does not trace: expected plan"):
        step(state, batches(1)[0], lr=0.1)


@pytest.mark.slow
def test_a_gate_decides_in_between_compiled_passes():
    state, step, eager = task(tiny(), samfn.ae_sam(6), **CAPTURED)
    other, lengths = state, set()
    for batch in batches(6):
        state, metrics = step(state, batch, rho=0.1, lr=0.1)
        other, expected = eager(other, batch, rho=0.1, lr=0.1)
        assert_close((state, metrics), (other, expected), rtol=1e-7, atol=1e-9)
        lengths.add(metrics.perturbation_norm.item() > 0)
    assert step.plan == "gradient"
    assert lengths == {True, False}


@pytest.mark.slow
def test_a_smaller_batch_has_a_graph_of_its_own():
    state, step, eager = task(tiny_with_statistics(), plan="gradient", **CAPTURED)
    batch = batches(1)[0]
    counters.clear()
    for size in (8, 4, 8, 4):
        part = tuple(x[:size] for x in batch)
        got, expected = (f(state, part, rho=0.1, lr=0.1) for f in (step, eager))
        assert_close(got, expected, rtol=1e-10, atol=1e-12)
    assert graphs() == 2


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["whole", "gradient"])
def test_the_step_in_place_keeps_its_addresses_and_leaves_other_states_alone(plan):
    # What a GPU records, run on a CPU.
    state, compiler, eager = task(tiny_with_statistics(), cuda_graph=False)
    step = compiler._compile(plan, CAPTURED, torch.device("cuda"), None)
    start = pytree.tree_map(torch.clone, state)
    rho, lr = torch.tensor(0.1), torch.tensor(0.2)
    own, other, places = state, state, set()
    counters.clear()
    with torch.no_grad():
        for batch in batches(3):
            own, metrics = step(own, batch, rho, lr)
            other, expected = eager(other, batch, rho=rho, lr=lr)
            assert_close((own, metrics), (other, expected), rtol=1e-9, atol=1e-11)
            places.add(tuple(x.data_ptr() for x in pytree.tree_leaves(own)))
        assert len(places) == 1
        assert_close(state, start, rtol=0, atol=0)
        again, _ = step(state, batches(1)[0], rho, lr)
    assert again is own
    first, _ = eager(state, batches(1)[0], rho=rho, lr=lr)
    assert_close(again, first, rtol=1e-9, atol=1e-11)
    assert graphs() == {"whole": 1, "gradient": 2}[plan]  # A pass, and the descent.


def generated(step, *given):
    """Return the code of a step, which is not compiled any further."""

    def call():
        with pytest.warns(RuntimeWarning, match="uncompiled"):  # The code is not run.
            step(*given, rho=0.05, lr=0.1)

    # Who compiles the same later must not find it so.
    uncached = torch._inductor.config.patch(fx_graph_cache=False)
    with uncached, torch._functorch.config.patch(enable_autograd_cache=False):
        return get_code(call)


def copies(memory_format):
    """Return the kernels that change the layout of what a convolution takes or gives."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, bias=False),
        GlobalMean(),  # To flatten is another layout.
        nn.Linear(16, 5),
    ).to(memory_format=memory_format)
    images = torch.randn(8, 3, 4, 4).contiguous(memory_format=memory_format)
    state, step, _ = task(model, plan="whole", options={})
    batch = images, torch.randint(5, (8,))
    code = generated(step, state, batch)
    assert "extern_kernels.convolution" in code[0]
    # torch 2.11 also names what computes a gradient after the convolution that takes it.
    pattern = r"convolution(?!_backward)" if OLD else "convolution"
    return [
        name
        for name in re.findall(r"(cpp_fused_\w*) =", code[0])
        if re.search(pattern, name)
    ]


@pytest.mark.slow
def test_channels_last_needs_no_copy_for_another_layout():
    assert copies(torch.channels_last) == []
    assert copies(torch.contiguous_format)  # This is how such copies would show.


@pytest.mark.slow
def test_one_mask_for_both_passes_compiles_but_for_the_mask():
    model = nn.Sequential(nn.Linear(6, 64), nn.Dropout(0.5), nn.Linear(64, 3))
    state, step, _ = task(model, samfn.same_randomness(samfn.sam()), **CAPTURED)
    batch = torch.randn(8, 6), torch.randint(3, (8,))
    _, metrics = step(state, batch, rho=1e-12, lr=0.1)
    assert step.plan == "gradient"
    assert_close(metrics.perturbed_loss, metrics.loss)  # Other masks, another loss.
    _, again = step(state, batch, rho=1e-12, lr=0.1)
    assert again.loss != metrics.loss


@pytest.mark.slow
def test_bf16_keeps_weights_and_perturbation_in_float32():
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()
    model = nn.Sequential(*layers, nn.Linear(64, 3))
    batch = batches(1, torch.float32)[0]
    state, _, eager = task(model)
    full, _ = eager(state, batch, rho=0.05, lr=0.1)
    loss_fn = samfn.supervised(model, F.cross_entropy, dtype=torch.bfloat16)
    step = samfn.compile_update(loss_fn=loss_fn, optimizer=OPTIMIZER)
    half, metrics = step(state, batch, rho=0.05, lr=0.1)
    assert_close(metrics.perturbation_norm, torch.tensor(0.05))
    assert metrics.outputs.dtype is torch.bfloat16
    assert {w.dtype for w in half.params.values()} == {torch.float32}
    assert_close(dict(half.params), dict(full.params), rtol=0.1, atol=5e-3)
    assert not torch.equal(half.params["4.weight"], full.params["4.weight"])


def test_without_a_compiler_it_says_so_and_takes_the_eager_step(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    state, step, eager = task(small_network())
    batch = batches(1)[0]
    with pytest.warns(RuntimeWarning, match=r"found no C\+\+ compiler \(no-such-comp"):
        got = step(state, batch, rho=0.1, lr=0.1)
    assert step.plan == "eager"
    assert_close(got, eager(state, batch, rho=torch.tensor(0.1), lr=0.1))
    step(got[0], batch, rho=0.1, lr=0.1)  # Says it once.


def test_what_the_compiler_cannot_do_is_said_and_done_without_it(monkeypatch, tmp_path):
    refusing = tmp_path / "c++"
    refusing.write_text("#!/bin/sh\necho 'c++: no such feature' >&2\nexit 1\n")
    refusing.chmod(0o755)
    monkeypatch.setenv("CXX", str(refusing))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    state, step, eager = task(tiny(), plan="gradient")
    batch = batches(1)[0]
    patched = torch._inductor.config.patch({"cpp.cxx": (None, str(refusing))})
    with patched, pytest.warns(RuntimeWarning, match="samfn goes on uncompiled: .*"):
        got = step(state, batch, rho=torch.tensor(0.1), lr=0.1)
    assert_close(got, eager(state, batch, rho=torch.tensor(0.1), lr=0.1))


NOWHERE = """
import sys, warnings
import torch, samfn
warnings.simplefilter("ignore")
warnings.filterwarnings("error", message="samfn goes on uncompiled")
model = torch.nn.Linear(3, 2)
given = {"loss_fn": samfn.supervised(model, torch.nn.functional.cross_entropy)}
given |= {"optimizer": samfn.sgd()}
state = samfn.init(*samfn.split(model), optimizer=given["optimizer"])
batch = torch.randn(8, 3), torch.randint(2, (8,))
step = samfn.compile_update(**given)
try:
    step(state, batch, lr=0.1)
except RuntimeWarning as warning:
    print(warning)
warnings.simplefilter("ignore")
found = step(state, batch, lr=0.1)
expected = samfn.sam_update(state, batch, **given, lr=0.1)
torch.testing.assert_close(found, expected, rtol=0, atol=0)
print(step.plan)
"""


def test_where_nothing_can_be_written_a_step_is_taken_uncompiled(tmp_path):
    (tmp_path / "file").touch()
    place = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "file")}
    run = [sys.executable, "-c", NOWHERE]
    done = subprocess.run(
        run, env=os.environ | place, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said, plan = done.stdout.splitlines()
    assert said.startswith("samfn goes on uncompiled: ")
    assert str(tmp_path / "file") in said
    assert plan == "eager"


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (
            "\n\nfrom user code:\n  File ...",
            "AssertionError",
        ),  # of Dynamo, which says no more
        ("no such feature\n\nfrom user code:\n", "no such feature"),
        ("backend raised:\nCppCompileError: c++", "CppCompileError: c++"),
    ],
)
def test_the_reason_is_what_is_wrong_and_not_where(said, reason):
    assert step_module._reason(AssertionError(said)) == reason


@pytest.mark.parametrize("said", ["", "AssertionError:", "AssertionError: \n"])
def test_the_reason_of_an_assertion_without_words_is_where_it_is(said):
    with pytest.raises(AssertionError) as caught:
        raise AssertionError(said)
    found = step_module._reason(caught.value)
    assert re.fullmatch(r"AssertionError at samfn/compiled/test_step\.py:\d+", found)


def test_a_backend_that_does_not_exist_is_an_error():
    state, step, _ = task(tiny(), plan="gradient", backend="indoctor")
    with pytest.raises(Exception, match="indoctor"):
        step(state, batches(1)[0], lr=0.1)


def test_operations_are_those_of_the_formula():
    # Six times the multiply-adds of a forward pass, but for the images' own gradient.
    network = build("wrn-16-2", 2)
    state, _, _ = task(network.model)
    loss_fn = samfn.supervised(network.model, F.cross_entropy)
    found = operations(loss_fn, state, (network.inputs, network.targets))
    assert found == pytest.approx(2 * 6 * 0.1011e9, rel=0.01)


@pytest.mark.parametrize(
    ("name", "batch", "plan"),
    [("wrn-16-2", 64, "gradient"), ("wrn-10-1 8x8", 16, "whole"), ("mlp", 16, "whole")],
)
def test_where_arithmetic_rules_only_the_gradient_is_compiled(name, batch, plan):
    network = build(name, batch)
    state, _, _ = task(network.model)
    loss_fn = samfn.supervised(network.model, F.cross_entropy)
    batch = network.inputs, network.targets
    assert choose("auto", loss_fn, samfn.sam(), state, batch) == plan


@pytest.mark.parametrize(
    ("edit", "dials", "message"),
    [
        (lambda s: s, {"rho": -1.0, "lr": 0.1}, "rho must be finite and at least 0"),
        (lambda s: s, {"lr": torch.tensor(math.nan)}, "lr must be finite and at least 0"),
        (lambda s: s, {"lr": torch.ones(2)}, r"lr must be a number or a 0-d tensor, got"),
        (lambda s: s._replace(params={}), {"lr": 0.1}, "params must hold at least one"),
        (lambda s: s._replace(buffers={}), {"lr": 0.1}, "buffers must have the same names"),
        (lambda s: s._replace(opt_state={}), {"lr": 0.1}, "made by another optimizer"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_compiled(edit, dials, message):
    state, step, _ = task(small_network())
    counters.clear()
    with pytest.raises(ValueError, match=message):
        step(edit(state), batches(1)[0], **dials)
    assert graphs() == 0


class Remembers(nn.Module):
    """Keeps what it saw last, in no buffer."""

    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Linear(4, 3), None

    def forward(self, x):
        self.last = self.layer(x) if self.last is None else self.last + self.layer(x)
        return self.last


def test_an_estimate_leaves_nothing_in_the_model():
    model = Remembers()
    state, _, _ = task(model)
    loss_fn = samfn.supervised(model, F.cross_entropy)
    batch = torch.randn(2, 4), torch.tensor([0, 1])
    random = torch.get_rng_state()
    assert operations(loss_fn, state, batch) == 2 * 2 * 2 * 4 * 3
    assert model.last is None
    assert torch.equal(torch.get_rng_state(), random)


def test_an_estimate_that_fails_ends_no_run():
    class Undecided(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum().item() < 1e9 else x

    model = Undecided(4, 3)
    state, _, _ = task(model)
    loss_fn = samfn.supervised(model, F.cross_entropy)
    batch = torch.randn(2, 4), torch.tensor([0, 1])
    assert choose("auto", loss_fn, samfn.sam(), state, batch) == "whole"


@pytest.mark.slow
@torch._dynamo.config.patch(recompile_limit=2)
def test_the_ninth_shape_of_a_batch_is_a_step_of_its_own():
    state, step, eager = task(tiny(), plan="gradient", **CAPTURED)
    batch = batches(1)[0]
    parts = [tuple(x[:size] for x in batch) for size in (2, 3, 4, 5)]
    with pytest.warns(RuntimeWarning, match="takes a step uncompiled") as told:
        found = [step(state, part, rho=0.1, lr=0.1) for part in parts]
    assert len(told) == 1
    assert step.plan == "gradient"
    expected = [eager(state, part, rho=0.1, lr=0.1) for part in parts]
    assert_close(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.slow
def test_a_shape_that_no_graph_holds_leaves_hooks_of_saved_tensors_allowed():
    class Recomputing(nn.Linear):
        def forward(self, x):
            if len(x) < 3:
                return super().forward(x)
            return checkpoint(super().forward, x, use_reentrant=False)

    state, step, eager = task(Recomputing(4, 3), plan="gradient", **CAPTURED)
    two, three = [(torch.randn(n, 4), torch.arange(n)) for n in (2, 3)]
    state, _ = step(state, two, rho=0.1, lr=0.1)
    assert step.plan == "gradient"
    # PyTorch 2.11 does compile it.
    uncompiled = pytest.warns(RuntimeWarning, match="takes a step uncompiled")
    with nullcontext() if OLD else uncompiled:
        found = step(state, three, rho=0.1, lr=0.1)
    with saved_tensors_hooks(lambda x: x, lambda x: x):
        expected = eager(state, three, rho=0.1, lr=0.1)
    assert_close(found, expected, rtol=1e-7, atol=1e-9)


@pytest.fixture
def traced(monkeypatch):
    """Let graphs be run as they were traced, which takes no compiler."""
    how = {"fullgraph": True, "dynamic": False, "backend": "eager"}

    def trace(function, options):
        return torch.compile(passes._with_own_code(function), **how)

    for module in (passes, step_module):
        monkeypatch.setattr(module, "compiled", trace)


def test_steps_leave_hooks_of_saved_tensors_allowed(traced):
    state, step, _ = task(nn.Linear(4, 3), plan="whole")
    for _ in range(3):
        state, _ = step(state, (torch.randn(3, 4), torch.arange(3)), rho=0.1, lr=0.1)
        with saved_tensors_hooks(lambda x: x, lambda x: x):
            pass
    assert step.plan == "whole"


def test_steps_of_one_loss_function_do_not_compile_each_other_anew(traced):
    model = tiny()
    state, step, _ = task(model, plan="gradient")
    loss_fn = step._loss_fn
    other = samfn.compile_update(loss_fn=loss_fn, optimizer=OPTIMIZER, plan="gradient")
    made = []
    for batch in batches(3):
        counters.clear()
        state, _ = other(step(state, batch, lr=0.1)[0], batch, lr=0.1)
        made.append(graphs())
    assert made == [2, 0, 0]


def replace_layer(model):
    torch.manual_seed(7)
    model[1] = nn.Linear(32, 7).double()


@pytest.fixture
def hooked_everywhere():
    handles = []
    register = nn.modules.module.register_module_forward_hook
    yield lambda model: handles.append(register(lambda module, given, y: y * 0.5))
    for handle in handles:
        handle.remove()


CHANGES = {
    "forward hook": lambda m: m[1].register_forward_hook(lambda *given: given[-1] * 2),
    "hook before": lambda m: m[1].register_forward_pre_hook(lambda _, x: (x[0] * 2,)),
    "hook of a gradient": lambda m: m[1].bias.register_hook(lambda grad: grad * 3),
    "another layer": replace_layer,
    "hook everywhere": None,
}


@pytest.mark.filterwarnings("ignore:samfn goes on uncompiled")
@pytest.mark.parametrize("name", CHANGES)
def test_a_compiled_step_sees_what_a_model_was_given_since(name, traced, hooked_everywhere):
    model = tiny()
    state, step, eager = task(model, plan="gradient")
    state, _ = step(state, batches(2)[0], rho=0.1, lr=0.1)
    before, _ = eager(state, batches(2)[1], rho=0.1, lr=0.1)
    (CHANGES[name] or hooked_everywhere)(model)
    found = step(state, batches(2)[1], rho=0.1, lr=0.1)
    expected = eager(state, batches(2)[1], rho=0.1, lr=0.1)
    assert_close(found, expected, rtol=1e-7, atol=1e-9)
    assert torch.equal(before.params["1.bias"], expected[0].params["1.bias"]) == (
        name == "another layer"  # With the weights of the state, as the one before.
    )


@pytest.mark.parametrize("combine", [samfn.ascent_on, samfn.on_loss])
def test_a_compiled_step_sees_what_the_model_of_another_loss_was_given_since(
    combine, traced
):
    model, other = tiny(), tiny()
    method = combine(samfn.sam(), samfn.supervised(other, F.cross_entropy))
    state, step, eager = task(model, method, plan="gradient")
    state, _ = step(state, batches(2)[0], rho=0.1, lr=0.1)
    before, _ = eager(state, batches(2)[1], rho=0.1, lr=0.1)
    other[1].register_forward_hook(lambda *given: given[-1] * torch.arange(7))
    found = step(state, batches(2)[1], rho=0.1, lr=0.1)
    expected = eager(state, batches(2)[1], rho=0.1, lr=0.1)
    assert_close(found, expected, rtol=1e-7, atol=1e-9)
    assert not torch.equal(before.params["1.weight"], expected[0].params["1.weight"])


def test_what_is_frozen_between_compiled_steps_is_an_error(traced):
    model = tiny()
    state, step, _ = task(model, plan="gradient")
    state, _ = step(state, batches(1)[0], lr=0.1)
    model[1].bias.requires_grad_(False)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"1.bias is frozen in the model and trained"):
            step(state, batches(1)[0], lr=0.1)
    other = samfn.init(*samfn.split(model), optimizer=OPTIMIZER)
    other, _ = step(other, batches(1)[0], lr=0.1)
    assert "1.bias" in other.buffers
    model[1].bias.requires_grad_(True)
    assert step(state, batches(1)[0], lr=0.1)[1].finite


@pytest.mark.filterwarnings("ignore:samfn goes on uncompiled")
@pytest.mark.parametrize("breaks", [False, True])
def test_what_counts_passes_counts_each_once_from_the_first_step_on(breaks, traced):
    class Counting(nn.Linear):
        passes = 0

        def forward(self, x):
            self.passes += 1
            return super().forward(x)

    class Criterion:
        number, kept = 0, []

        def __call__(self, outputs, targets):
            self.kept.append(1)
            Criterion.number += 1
            if breaks:
                print(end="")
            return F.cross_entropy(outputs, targets)

    model, criterion = Counting(4, 3), Criterion()
    loss_fn, counted = samfn.supervised(model, criterion), []
    state = samfn.init(*samfn.split(model), optimizer=OPTIMIZER)
    step = samfn.compile_update(loss_fn=loss_fn, optimizer=OPTIMIZER)
    for _ in range(2):
        state, _ = step(state, (torch.randn(2, 4), torch.tensor([0, 1])), lr=0.1)
        counted.append((model.passes, criterion.number, len(criterion.kept)))
    # PyTorch 2.11 has no graph of a count that forward keeps.
    assert step.plan == ("eager" if breaks or OLD else "whole")
    assert counted == [(2, 2, 2), (4, 4, 4)]


class Encoding(UserDict):
    """A mapping of a kind that trees of PyTorch do not know, as of tokenizers."""


@pytest.mark.parametrize("plan", ["whole", "gradient", "loss"])
def test_keyword_arguments_in_any_mapping_are_compiled(plan, traced):
    class Scaled(nn.Linear):
        def forward(self, x, by):
            return super().forward(x) * by

    state, step, eager = task(Scaled(4, 3), plan=plan)
    named = Encoding(x=torch.randn(2, 4), by=torch.randn(2, 1))
    batch = named, torch.tensor([0, 1])
    assert_close(step(state, batch, lr=0.1), eager(state, batch, lr=0.1))
    assert step.plan == plan


def test_a_loss_function_is_given_the_mapping_that_a_step_was_given(traced):
    def loss_fn(params, buffers, batch):
        return (batch.data["x"] @ params["w"]).square().mean()

    given = {"loss_fn": loss_fn, "optimizer": OPTIMIZER}
    state = samfn.init({"w": torch.ones(4)}, {}, optimizer=OPTIMIZER)
    batch = Encoding(x=torch.randn(2, 4))
    expected = samfn.sam_update(state, batch, **given, lr=0.1)
    assert_close(samfn.compile_update(**given)(state, batch, lr=0.1), expected)


@pytest.mark.filterwarnings("ignore:samfn goes on uncompiled")
@pytest.mark.parametrize("puts", [True, False])
def test_what_forward_puts_into_a_batch_a_compiled_pass_does_not_find(puts, traced):
    class Shifting(nn.Linear):
        def forward(self, data):
            shifted = data["x"] - 1
            if puts:
                data["x"] = shifted
            return super().forward(shifted)

    state, step, eager = task(Shifting(4, 3), plan="gradient")
    batch = (Encoding(x=torch.randn(2, 4)),), torch.tensor([0, 1])
    inputs = batch[0][0]["x"]
    found, expected = step(state, batch, lr=0.1), eager(state, batch, lr=0.1)
    assert_close(found, expected)
    assert step.plan == ("eager" if puts else "gradient")
    assert batch[0][0]["x"] is inputs
