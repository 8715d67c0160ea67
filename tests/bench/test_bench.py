"""The benchmarks run, refuse to time what computes something else, and go on."""

import json
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from itertools import combinations

import pytest
import torch

import samfn
from bench import candidates, cost, measure, scaling
from bench.candidates import Samfn
from bench.gpu import cases as gpu_cases
from bench.gpu import together
from bench.gpu.checks import one_rank
from bench.gpu.report import read, report
from bench.gpu.setup import SMOKE
from bench.gpu.speed import agrees, peak
from bench.networks import Network, Transformer, build
from bench.peers import SEVERAL, installed, peers
from tests import ROOT, commands
from tests.ranks import on_ranks


def bench(module, *args, cwd):
    result = commands.run("-m", f"bench.{module}", *args, cwd=cwd)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_everything_a_gpu_must_show_runs_on_a_cpu_and_goes_on_where_it_stopped(tmp_path):
    lines = tmp_path / "out" / "smoke.jsonl"
    options = ("--smoke", "--output", lines.parent, "--report", tmp_path)
    stopped = bench("gpu", *options, "--minutes", 0, cwd=tmp_path)
    assert "not run yet, start again to go on: peak, convolutions, checks" in stopped
    assert not lines.exists()
    bench("gpu", *options, "--minutes", 60, cwd=tmp_path)
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert {row["case"] for row in rows} == gpu_cases.cases(SMOKE).keys()
    assert not [row for row in rows if "failed" in row]
    assert all(row["passed"] for row in rows if "passed" in row)
    before = lines.read_text()
    bench("gpu", *options, cwd=tmp_path)
    assert lines.read_text() == before
    (report,) = tmp_path.glob("smoke_*.md")
    assert "| R1  | SAM / SGD step, mlp-small" in report.read_text()


@pytest.mark.slow
def test_steps_are_timed_beside_their_peers(tmp_path):
    lines = tmp_path / "lines.jsonl"
    options = ("--case", "mlp-small:8:float32", "--seconds", 0.1, "--output", lines)
    printed = bench("cost", "steps", *options, cwd=tmp_path)
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    names = {row["candidate"] for row in rows}
    assert {"samfn eager", "samfn compiled", "overwriting untuned", "SGD eager"} <= names
    assert ("optax.contrib.sam jitted" in names) == installed("optax")
    assert all(row["ms"] > 0 and row["apart"] < 0.05 for row in rows)
    assert printed.count('"case": "mlp-small:8:float32"') == len(rows)
    assert "| samfn compiled " in printed
    assert "## In short" in printed


@pytest.mark.slow
def test_methods_are_timed_and_their_memory_measured_beside_sgd(tmp_path):
    lines = tmp_path / "lines.jsonl"
    options = ("--case", "mlp-small:4:float32", "--seconds", 0, "--output", lines)
    bench("cost", "methods", *options, "--method", "looksam(k=2)", cwd=tmp_path)
    plain, method = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [plain["method"], plain["of SGD"]] == ["SGD", 1]
    assert method["method"] == "looksam(k=2)"
    assert all(row[name] > 0 for row in (plain, method) for name in ("ms", "of SGD"))
    assert "peak MiB" in plain.keys() & method.keys()


@pytest.fixture
def uncompiled(monkeypatch):
    def eagerly(**given):
        return partial(samfn.sam_update, **given)

    monkeypatch.setattr(samfn, "compile_update", eagerly)


def test_a_method_costs_its_mean_step_over_the_one_of_sgd_before_it(
    uncompiled, monkeypatch
):
    found = {
        "SGD": [1.0, 2.0, 3.0],
        "SGD before looksam(k=2)": [1.0, 2.0, 4.0],
        # Two steps, as it takes two to come round.
        "looksam(k=2)": [3.0, 6.0, 16.0],
    }
    timed = []

    def interleaved(turns, *, seconds):
        timed.extend(turns)
        return found

    monkeypatch.setattr(cost.measure, "interleaved", interleaved)
    monkeypatch.setattr(cost.Methods, "memory", lambda *_: 3 * 2**20)
    plain, method = cost.Methods(method=("looksam(k=2)",)).rows("mlp-small:4:float32")
    assert timed == list(found)
    assert [plain["of SGD"], method["of SGD"], method["ms"]] == [1, 1.5, 3000]
    assert [plain["peak MiB"], method["peak MiB"]] == [3, 3]


def test_what_the_recipe_cannot_name_is_a_step_of_its_own(uncompiled):
    names = ("SGD", "muon", "sam", "ascent_on(sam)", "on_loss(sam)")
    ends = []
    for name in names:
        stepper = cost.Stepper(build("mlp-small", 4), "float32", name)
        stepper.step()
        ends.append(torch.cat([w.flatten() for w in stepper._state.params.values()]))
    for one, other in combinations(ends, 2):
        assert not torch.equal(one, other)


@pytest.mark.slow
def test_compiling_is_faster_with_a_full_cache_than_with_an_empty_one(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_VEC_ISA_OK", "0")  # And nothing is probed before.
    cold, warm = cost.Compiling().cold_and_warm("mlp-small:4:float32", "one gradient")
    assert 0 < warm < cold


@pytest.mark.slow
def test_one_rank_takes_the_steps_of_none_also_of_weights_that_are_channels_last():
    """Where convolutions are; the step of DTensors, and samfn.SAM on `fully_shard`."""
    setup = SMOKE._replace(networks={"small": "convolution-small"}, steps=3)
    compiled, sharded = one_rank(setup)
    assert compiled["placement"] == "sharded"
    assert sharded["placement"] == "fully_shard, samfn.SAM"
    for row in (compiled, sharded):
        assert row["passed"]
        assert row["distance over way"] < 1e-3


def peak_of_64_mebibytes():
    held = []

    def step():
        held.append(torch.ones(64, 2**18).sum())  # 64 MiB, and gone

    return measure.peak_memory(step)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_step_is_at_least_what_it_allocates():
    # In a process that has freed none before, which a step could take again.
    assert on_ranks(1, peak_of_64_mebibytes)[0] > 0.9 * 2**26


def test_another_computation_is_not_timed(monkeypatch):
    network = build("mlp", 16)

    def wrong(network, dtype, *, sam):
        made = peers(network, dtype, sam=sam)
        return {"overwriting eager": made["SGD eager"]} if not sam else {}

    monkeypatch.setattr(candidates, "peers", wrong)
    wanted = ("samfn eager", "overwriting eager", "samfn SGD eager")
    found = candidates.candidates(network, "float32", only=wanted)
    assert [c.name for c in found] == [
        "samfn eager",
        "samfn SGD eager",
        "overwriting eager",
    ]

    def wronger(network, dtype, *, sam):
        return {"overwriting eager": peers(network, dtype, sam=False)["SGD eager"]}

    monkeypatch.setattr(candidates, "peers", wronger)
    with pytest.raises(AssertionError, match=r"overwriting eager is 0\.\d+ away"):
        candidates.candidates(network, "float32", only=wanted)


class Toy(cost.Cost):
    """How long nothing takes."""

    def rows(self, case):
        return [{"candidate": f"of {case}", **measure.milliseconds([1.0, 3.0, 2.0])}]


def test_what_a_step_costs_is_printed_and_reported(tmp_path, capsys):
    lines, report = tmp_path / "lines.jsonl", tmp_path / "report.md"
    cost.main(Toy(case=("a", "b"), output=lines, report=report))
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [(row["case"], row["ms"]) for row in rows] == [("a", 2e3), ("b", 2e3)]
    text = report.read_text()
    assert text.startswith("# What a step costs: toy\n\nHow long nothing takes.\n")
    assert "## b\n\n| candidate | ms   | q20  | q80  |\n" in text
    assert f"torch {torch.__version__}, Python" in text
    assert "```\npython -m bench.cost" in text
    assert "| of b      | 2000 | 1400 | 2600 |" in capsys.readouterr().out


def test_ratios_are_of_the_same_round():
    # The medians are 4 and 3.
    assert measure.ratios([1.0, 9.0, 4.0], [1.0, 3.0, 4.0])["median"] == 1


@pytest.mark.parametrize("case", ["mlp", "mlp:16", "mlp:16:int8", "mlp:x:bf16"])
def test_a_case_names_network_batch_and_precision(case):
    with pytest.raises(SystemExit, match="expected NETWORK:BATCH:PRECISION, got 'mlp"):
        cost.load(case)


def test_candidates_take_turns():
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = measure.interleaved(steps, seconds=0, rounds=3)
    assert [len(values) for values in times.values()] == [3, 3]
    turns = [name for i, name in enumerate(calls) if not i or calls[i - 1] != name]
    assert turns[-6:] == [*"ababab"]


def test_distance_is_relative_to_the_way():
    start, a, b = ({"w": torch.tensor([x])} for x in (1.0, 3.0, 4.0))
    assert measure.distance(start, b, a) == pytest.approx(1 / 3)
    nan = {"w": torch.tensor([float("nan")])}
    assert measure.distance(start, nan, a) == float("inf")


def test_a_convolution_counts_two_operations_for_a_multiply_add():
    model = torch.nn.Conv2d(3, 5, 3, padding=1)
    images = torch.randn(2, 3, 8, 8)
    assert measure.forward_operations(model, images) == 2 * 2 * 3 * 5 * 9 * 64


def test_a_failed_case_is_recorded_and_the_others_run(tmp_path, monkeypatch):
    def failing(setup):
        raise RuntimeError("no such kernel")

    both = {"bad": failing, "peak": peak}
    monkeypatch.setattr(gpu_cases, "cases", lambda setup: both)
    path = tmp_path / "lines.jsonl"
    gpu_cases.run_cases(SMOKE, path, float("inf"), both)
    bad, good = read(path)
    assert bad["failed"] == "RuntimeError: no such kernel"
    assert good["TFLOP/s"] > 0
    assert "no such kernel" in report(read(path), SMOKE)


def test_cases_side_by_side_measure_one_after_another(tmp_path):
    lines = tmp_path / "smoke.jsonl"
    own = ("--smoke", "--together", 60, "--output", tmp_path, "--report", tmp_path)
    wanted = ("--case", "data path", "--case", "peak", "--case", "convolutions")
    bench("gpu", *own, *wanted, cwd=tmp_path)
    assert {row["case"] for row in read(lines)} == {"data path", "peak", "convolutions"}
    before = lines.read_text()
    assert "not run yet" not in bench("gpu", *own, *wanted, cwd=tmp_path)
    assert lines.read_text() == before
    result = commands.run("-m", "bench.gpu", "--smoke", "--case", "pique", cwd=tmp_path)
    assert result.returncode == 1
    assert "--case: expected one of ['peak', " in result.stderr


def test_a_turn_begins_when_all_are_ready_and_no_other_has_one(tmp_path):
    order = []

    def measured(name):
        with together.turn(tmp_path, name):
            order.append(f"{name} begins")
            time.sleep(0.2)
            order.append(f"{name} ends")

    threads = [threading.Thread(target=measured, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    assert not order
    (tmp_path / "go").touch()
    for thread in threads:
        thread.join()
    first, second = order[0][0], order[2][0]
    assert order == [
        f"{first} begins",
        f"{first} ends",
        f"{second} begins",
        f"{second} ends",
    ]


def test_in_bf16_what_is_as_far_from_float32_as_eager_samfn_agrees():
    def found(name, apart, far):
        return candidates.Candidate(name, None, 0.0, apart, far, 0)

    eager, slow = found("samfn eager", 0.0, 0.4), found("samfn SGD eager", 0.0, 0.1)
    others = (eager, slow)
    assert agrees(found("samfn compiled", 0.1, 0.9), others, "bf16")
    assert agrees(found("samfn compiled", 0.4, 0.45), others, "bf16")
    assert not agrees(found("samfn compiled", 0.4, 0.55), others, "bf16")
    assert not agrees(found("samfn SGD compiled", 0.4, 0.45), others, "bf16")
    assert not agrees(found("samfn compiled", 0.1, float("nan")), others, "float32")


def small_transformer():
    model = Transformer(layers=1, width=8, length=5, vocabulary=7)
    tokens = torch.randint(7, (2, 5))
    return Network("transformer", model, tokens, torch.randint(7, (10,)))


def apart_by_jax(make, sam, steps):
    """Return how far JAX is from the eager step after four steps, also in statistics."""
    from bench.peers_of_jax import Optax

    torch.manual_seed(0)
    network = make()
    eager = Samfn(network, None, 0.05 if sam else 0.0, None)
    start = eager.weights()
    for _ in range(4):
        eager.step()
    other = Optax(network, sam=sam, steps=steps)
    for _ in range(4 // steps):
        other.step()
    away = [measure.distance(start, other.weights(), eager.weights())]
    for name, found in other._stats.items():
        expected = eager._state.buffers[name]
        difference = (torch.tensor(found.tolist()) - expected).norm()
        away.append(float(difference / expected.norm()))
    return max(away)


@pytest.mark.parametrize(
    ("make", "sam", "steps"),
    [
        (partial(build, "mlp-small", 4), True, 1),
        (partial(build, "mlp-small", 4), False, 2),
        (small_transformer, True, 2),
        (partial(build, "wrn-10-1 8x8", 4), True, 2),
    ],
    ids=["mlp", "mlp by SGD", "transformer", "wrn"],
)
def test_what_jax_compiles_trains_alike(make, sam, steps):
    pytest.importorskip("optax")
    # In a process of its own: JAX starts threads, after which none should be forked.
    assert on_ranks(1, apart_by_jax, make, sam, steps)[0] < 1e-5


@pytest.mark.slow
def test_a_call_of_several_steps_is_held_against_as_many(monkeypatch):
    monkeypatch.setitem(SEVERAL, "mlp-small", (3,))
    network = build("mlp-small", 4)
    name = "samfn compiled, 3 steps a call"
    one, several = candidates.candidates(network, "float32", only=("samfn eager", name))
    assert [c.runner.steps for c in (one, several)] == [1, 3]
    assert several.name == name
    assert several.apart < 1e-5


def test_the_summary_says_how_many_times_as_fast_as_each_peer_a_step_is():
    times = {
        "samfn eager": 3.0,
        "samfn compiled": 1.0,
        "samfn compiled, 4 steps a call": 0.9,
        "samfn compiled, 8 steps a call": 0.5,
        "overwriting eager": 2.5,
        "pytorch_optimizer eager": 4.0,
        "pytorch_optimizer compiled model": 3.5,
        "optax.contrib.sam jitted": 0.8,
        "optax.contrib.sam jitted, 4 steps a call": 0.7,
        "optax.contrib.sam jitted, 8 steps a call": 0.6,
        "samfn SGD compiled": 0.4,
        "SGD eager": 0.3,
        "SGD optax jitted": 0.2,
    }
    rows = [{"candidate": n, "ms": 2 * t, "of samfn": t} for n, t in times.items()]
    assert cost.short("mlp:16:float32", rows) == {
        "network": "mlp",
        "batch": "16",
        "precision": "float32",
        "compiled ms": 2,
        "pytorch_optimizer": 3.5,
        "fastest PyTorch peer": 2.5,
        "optax under JAX": 0.8,
        "both, several steps a call": pytest.approx(1.2),
        "SAM / SGD": 2.5,
        "eager samfn / pytorch_optimizer": 0.75,
    }
    without = [row for row in rows if "optax" not in row["candidate"]]
    short = cost.short("mlp:16:bf16", without)
    assert short["optax under JAX"] == short["both, several steps a call"] == "–"


def test_a_flat_buffer_trains_alike():
    network = build("mlp", 4)
    start = Samfn(network, None, 0.05, None).weights()
    plain, flat = (Samfn(network, None, 0.05, None, flat=flat) for flat in (False, True))
    for runner in (plain, flat):
        runner.step()
    assert measure.distance(start, flat.weights(), plain.weights()) < 1e-5


def test_what_checkpoints_cost_is_measured(tmp_path):
    report = tmp_path / "report.md"
    options = ("--model", "10-1", "--rounds", "2", "--batch", "2", "--report", report)
    out = bench("checkpoints", *options, cwd=tmp_path)
    assert "WRN-10-1" in out
    assert "| samfn.restore" in report.read_text()
    assert "--rounds 2" in report.read_text()


def test_faults_are_reported(tmp_path):
    report = tmp_path / "report.md"
    options = ("--only", "F4", "F3", "--share", "0.1", "--report", report)
    out = bench("faults", *options, cwd=tmp_path)
    assert "F4 | disk full from a random byte on | 5 | 0 |" in out
    rows = [line for line in report.read_text().splitlines() if line.startswith("| F")]
    assert len(rows) == 2


def test_a_line_is_found_from_messages_that_lie_on_it():
    line = scaling.Line(latency=2e-4, bandwidth=5e8)
    found = scaling.fit(scaling.SIZES, [line(size) for size in scaling.SIZES])
    assert found.latency == pytest.approx(line.latency)
    assert found.bandwidth == pytest.approx(line.bandwidth)


def timed_step(step, seconds):
    about = {"mode": "eager", "step": step, "seconds": {"median": seconds}}
    return about | {"ranks": 2, "parameters": 1e6, "buffers": 0, "tensors": 1}


def test_a_step_is_the_sum_of_what_it_is_made_of_and_the_model_knows_its_messages():
    kinds = (scaling.WHOLE, scaling.ALONE, scaling.BESIDE, "replica", "global")
    rows = [*map(timed_step, kinds, (1.0, 0.6, 0.7, 0.78, 0.85))]
    lines = {("all-reduce", 2): scaling.Line(latency=0.01, bandwidth=1e8)}
    replica, both = scaling.account(rows, lines)
    parts = [replica[key] for key in ("shared out", "does not shrink", "cores", "messages")]
    assert parts == pytest.approx([500, 100, 100, 80])
    assert replica["ms"] == pytest.approx(sum(parts))
    assert both["messages"] == pytest.approx(150)
    assert both["most lost to"] == "messages"
    assert replica["messages, model"] == pytest.approx(10 + 40, rel=1e-3)
    assert both["messages, model"] == pytest.approx(2 * (10 + 40), rel=1e-3)
    assert replica["ms, model"] == pytest.approx(650, rel=1e-3)


def scaled(options):
    return {name: worker(options) for name, worker in scaling.WORKERS.items()}


def test_what_ranks_take_is_measured_and_reported(monkeypatch, tmp_path, capsys):
    report, lines = tmp_path / "report.md", tmp_path / "lines.jsonl"
    options = scaling.Options(
        case=("mlp:8",), mode=("eager",), rounds=2, held="mlp", held_by=(1, 2)
    )
    placed = replace(options, placement=scaling.PLACEMENTS)
    found = {count: on_ranks(count, scaled, placed)[0] for count in (1, 2)}

    def started(worker, ranks, options, *more):
        return [measure.environment() | row for row in found[ranks][worker]]

    monkeypatch.setattr(scaling, "started", started)
    scaling.main(replace(options, report=report, output=lines))
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert len(rows) == 6 + 3 * len(scaling.SIZES) + 2 * 2
    assert all(row["seconds"]["median"] > 0 for row in rows if "seconds" in row)
    held = {(row["placement"], row["ranks"]): row for row in rows if "state" in row}
    whole = held["global", 1]["state"]
    assert held["global", 2]["state"] == whole
    assert held["sharded", 2]["state"] == pytest.approx(whole / 2, rel=0.01)
    for row in held.values():  # Beside the model's there are a few counters.
        assert row["state"] == pytest.approx(row["state, model"], rel=0.01)
    # Old state and new one, gradients and copies of them: all of it is shared out.
    parts, one = (held[name, n]["tensors"] for name, n in (("sharded", 2), ("global", 1)))
    assert 2 * whole < one
    assert parts < 0.6 * one
    text = report.read_text()
    assert text in capsys.readouterr().out
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len(tables) == (2 + 6) + (2 + 3) + (2 + len(scaling.SIZES)) + (2 + 3) + (2 + 4)


def test_ranks_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(SystemExit, match="2 ranks do not divide the batch"):
        scaling.main(scaling.Options(case=("mlp:7",)))


@pytest.mark.slow
def test_scaling_starts_its_own_ranks(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    rows = scaling.started("memory", 2, scaling.Options(held="mlp", rounds=2))
    assert [(row["placement"], row["ranks"]) for row in rows] == [
        ("global", 2),
        ("sharded", 2),
    ]
    assert ", 1 thread (" in rows[0]["device"]
