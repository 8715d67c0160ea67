"""A monitored run: what its rows and pictures say of each layer; and averages of runs."""

import json

import pytest
import torch
from safetensors.torch import load_file

import samfn
from recipes import plots
from recipes.cifar_wrn import main
from recipes.train.layers import WHAT, LayerMeter, alarms
from samfn.methods.watched import Layers

RUN = ["--data", "digits", "--model", "wrn-10-1", "--batch-size", "128", "--no-flip"]


def metrics(scale, finite=True):
    values = [scale * torch.tensor([3.0, 4.0]) for _ in range(4)]
    layers = Layers(*values, torch.tensor([0.5, 0.1]), torch.tensor(0.2))
    one = torch.tensor(1.0)
    return samfn.Metrics(one, None, one, one, one, one, torch.tensor(finite), layers)


def test_layers_are_averaged_over_the_steps_that_were_taken():
    meter, params = LayerMeter(2, torch.device("cpu")), {"a": None, "b": None}
    meter.add(metrics(1.0))
    meter.add(metrics(float("nan"), finite=False))
    meter.add(metrics(3.0))
    assert meter.gradient().tolist() == [6.0, 8.0]
    row = meter.row(params)
    assert row["layers"]["update"] == {"a": 6.0, "b": 8.0}
    assert row["layers"]["cosine"] == pytest.approx({"a": 0.5, "b": 0.1})
    assert row["update_to_weight"] == 1.0
    assert row["gradient_cosine"] == pytest.approx(0.2)


def test_an_interrupted_epoch_is_averaged_whole():
    whole, first = (LayerMeter(2, torch.device("cpu")) for _ in range(2))
    for meter in (whole, first):
        meter.add(metrics(1.0))
    second = LayerMeter(2, torch.device("cpu"))
    second.sums = first.sums.clone()
    for meter in (whole, second):
        meter.add(metrics(2.0))
    assert torch.equal(whole.means(), second.means())


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_monitored_run_tells_of_each_layer_and_of_all(tmp_path, monkeypatch):
    drawn, real = [], plots.layers
    monkeypatch.setattr(plots, "layers", lambda *a: (drawn.append(a[0]), real(*a)))
    run = tmp_path / "run"
    assert main([*RUN, "--epochs", "2", "--monitor", "--output", str(run)]) == 0
    names = [*load_file(run / "model.safetensors")]
    for row in rows(run):
        for what, values in row["layers"].items():
            assert {*values} <= {*names}, what
            assert len(values) == 25
        # The norm of each step's whole gradient, on average, is what is logged anyway.
        together = torch.tensor([*row["layers"]["perturbation"].values()]).norm()
        assert together <= row["perturbation_norm"] * 1.0001 + 1e-9
        assert together == pytest.approx(row["perturbation_norm"], rel=0.05)
        assert 0 < row["update_to_weight"] < 1
        assert 0 < row["gradient_cosine"] <= 1
    assert drawn == [rows(run)]
    assert (run / "layers.png").read_bytes().startswith(b"\x89PNG")


def test_layers_of_another_network_are_not_drawn(tmp_path):
    def row(epoch, *names):
        layers = {what: dict.fromkeys(names, 0.5) for what in WHAT}
        return {"epoch": epoch, "layers": layers}

    same, pictures = [row(epoch, "a", "b") for epoch in (2, 3)], []
    for drawn in ([row(1, "other"), *same], same):
        plots.layers(drawn, tmp_path / "layers.png", "")
        pictures.append((tmp_path / "layers.png").read_bytes())
    assert pictures[0] == pictures[1]


def test_a_layer_whose_gradient_vanishes_is_named(tmp_path, capsys):
    # With a classifier of zeros, nothing before it has a gradient in the first step.
    flags = ["--zero-head", "--epochs", "1", "--batch-size", "1400", "--monitor"]
    assert main([*RUN, *flags, "--output", str(tmp_path / "run")]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "epoch 1: stem.weight: vanishing gradient, norm 0" in said
    assert "20 more" in said


def test_the_average_of_the_best_has_statistics_of_its_own(tmp_path, capsys):
    run = tmp_path / "run"
    flags = [*RUN, "--epochs", "4", "--average-best", "2", "--output", str(run)]
    assert main(flags) == 0
    said = " ".join(capsys.readouterr().out.split())
    scores = {row["epoch"]: row["test_accuracy"] for row in rows(run)}
    best = sorted(sorted(scores, key=lambda epoch: -scores[epoch])[:2])
    assert f"of epochs {best[0]}, {best[1]} " in said
    states = [
        load_file(run / "checkpoints" / f"step_{11 * e:09d}.safetensors") for e in best
    ]
    average = load_file(run / "average.safetensors")
    for name, value in average.items():
        if f"params/{name}" in states[0]:
            mean = sum(state[f"params/{name}"].double() for state in states) / 2
            assert torch.equal(value, mean.float())
        elif name.endswith("running_var"):
            mean = sum(state[f"buffers/{name}"] for state in states) / 2
            assert not torch.allclose(value, mean, rtol=1e-3)


def names(count):
    return {f"layer{i}": torch.zeros(4) for i in range(count)}


def test_a_layer_far_below_the_median_vanishes_and_one_that_grew_explodes():
    params = {**names(4), "wide": torch.zeros(10_000)}
    before = torch.tensor([1.0, 1.0, 1.0, 1.0, 50.0])
    now = torch.tensor([1.0, 1.0, 4e-7, 101.0, 50.0])
    found = alarms(params, now, before)
    assert [(a.name, a.kind) for a in found] == [
        ("layer2", "vanishing"),
        ("layer3", "exploding"),
    ]
    assert str(found[0]).startswith("layer2: vanishing gradient, norm 4e-07")
    assert str(found[1]) == "layer3: exploding gradient, norm 101, it was 1"


def test_what_vanishes_is_judged_by_the_size_of_a_layer():
    # 1e-4 over 10^8 entries is far less for each than over 4.
    params = {**names(4), "wide": torch.empty(10**8, device="meta")}
    gradient = torch.tensor([1.0, 1.0, 1.0, 1e-4, 1e-4])
    assert [a.name for a in alarms(params, gradient)] == ["wide"]


def test_what_is_not_finite_explodes_and_without_a_past_nothing_else_does():
    gradient = torch.tensor([float("nan"), 1e9, 1.0, 1.0])
    assert [a.name for a in alarms(names(4), gradient)] == ["layer0"]
    assert alarms(names(2), torch.tensor([5.0, 5.0]), torch.zeros(2)) == []


def test_a_gradient_of_zero_vanishes_even_where_all_do():
    found = alarms(names(3), torch.zeros(3))
    assert [a.kind for a in found] == ["vanishing"] * 3


def test_alarms_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"before must have the shape \(2,\), got \(3,\)"):
        alarms(names(2), torch.ones(2), torch.ones(3))
