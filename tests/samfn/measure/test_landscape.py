"""Loss landscapes in closed form, directions filter by filter, and pictures of runs."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from mpl_toolkits.mplot3d import Axes3D
from torch.nn import functional as F
from torch.testing import assert_close

import samfn
from recipes import landscape as recipe
from recipes import plots
from recipes.cifar_wrn import main as train
from recipes.data.sources import load
from recipes.settings.config import of_run, parse
from recipes.study import runs as solutions
from recipes.terminal.console import Display
from recipes.train.build import assemble
from recipes.train.directory import RunDirectory
from samfn import tree
from samfn.measure.landscape import ascent, between, filter_normalised, line, plane
from tests.reference import batches, small_network
from tests.strategies import params_and_grads

COORDINATES = [-1.5, 0.0, 0.25, 2.0]
ONE = torch.zeros(1)  # a batch of one example, for losses that read none


def quadratic(params, buffers, batch):
    """Return half of the sum of curvature times squared weight."""
    return (buffers["curvature"] * params["w"].square()).sum() / 2


W = {"w": torch.tensor([1.0, -2.0, 0.5]).double()}
CURVATURE = {"curvature": torch.tensor([3.0, 1.0, -2.0]).double()}


def drawn(seed, params=None, **options):
    source = torch.Generator().manual_seed(seed)
    return filter_normalised(params or network()[0], source, **options)


def network(dtype=torch.float64):
    """Return parameters, buffers, loss and data of a network in evaluation mode."""
    model = small_network(dtype)
    samfn_loss = samfn.supervised(model, F.cross_entropy)
    state = samfn.split(model)
    for batch in batches(3, dtype):  # so that the statistics are not those of the start
        state = state[0], samfn_loss(*state, batch)[1].buffers
    model.eval()
    return *state, samfn_loss, batches(3, dtype)


@given(params_and_grads(), st.floats(-10, 10))
def test_a_line_through_a_quadratic_is_a_parabola(trees, a):
    params, direction = trees

    def loss_fn(params, buffers, batch):
        return samfn.norm(params).square()

    found = line(params, {}, ONE, direction, [a, 0.0], loss_fn=loss_fn)
    parts = [tree.dot(params, params), 2 * a * tree.dot(params, direction)]
    expected = sum(parts) + a * a * tree.dot(direction, direction)
    scale = tree.dot(params, params) + a * a * tree.dot(direction, direction)
    assert_close(found.loss[0] / scale, expected / scale, rtol=0, atol=1e-12)
    assert found.at.tolist() == [a, 0.0]


def test_a_plane_has_the_first_coordinate_in_its_rows():
    first = {"w": torch.tensor([1.0, 0.0, 0.0]).double()}
    second = {"w": torch.tensor([0.0, 1.0, 1.0]).double()}
    at, at2 = COORDINATES, [-1.0, 0.0, 3.0]
    found = plane(W, CURVATURE, ONE, (first, second), at, at2, loss_fn=quadratic)
    expected = [
        [(3 * (1 + a) ** 2 + (-2 + b) ** 2 - 2 * (0.5 + b) ** 2) / 2 for b in at2]
        for a in at
    ]
    assert_close(found.loss, torch.tensor(expected).double())
    assert (found.at.tolist(), found.at2.tolist()) == (at, at2)
    assert found.cosine == 0
    assert found.accuracy is None


def test_a_line_is_the_axis_of_a_plane_and_its_origin_the_solution_bit_for_bit():
    params, buffers, loss_fn, data = network()
    directions = drawn(0), drawn(1)
    given = params, buffers, data
    grid = plane(*given, directions, COORDINATES, [0.0, 1.0], loss_fn=loss_fn)
    axis = line(*given, directions[0], COORDINATES, loss_fn=loss_fn)
    assert_close((axis.loss, axis.accuracy), (grid.loss[:, 0], grid.accuracy[:, 0]))
    here = [loss_fn(params, buffers, batch)[0].item() for batch in data]
    assert axis.loss[1] == sum(8 * loss for loss in here) / 24


def test_the_cosine_is_that_of_the_angle():
    first, second = {"w": torch.tensor([2.0, 0.0, 0])}, {"w": torch.tensor([1.0, 1, 0])}
    params = {"w": torch.ones(3), "v": torch.ones(1)}
    loss_fn = lambda params, buffers, batch: params["w"].sum()  # noqa: E731
    for pair, cosine in (
        ((first, second), 0.5**0.5),
        ((first, {"w": -second["w"]}), -(0.5**0.5)),
        ((first, {"v": torch.ones(1)}), 0.0),
        ((first, {**second, "v": torch.full((1,), 2**0.5)}), 0.5),
    ):
        found = plane(params, {}, ONE, pair, [0.0], [0.0], loss_fn=loss_fn)
        assert found.cosine == pytest.approx(cosine)
    zero = {"w": torch.zeros(3)}
    found = plane(params, {}, ONE, (first, zero), [0.0], [0.0], loss_fn=loss_fn)
    assert math.isnan(found.cosine)


def test_what_a_direction_does_not_name_stays_and_buffers_may_move():
    direction = {"curvature": torch.tensor([1.0, 0.0, 0.0]).double()}
    found = line(W, CURVATURE, ONE, direction, COORDINATES, loss_fn=quadratic)
    at_w = quadratic(W, CURVATURE, ONE)
    assert_close(found.loss, at_w + torch.tensor(COORDINATES).double() / 2)


def test_means_are_of_examples_and_begin_anew_at_every_point():
    data = [torch.tensor([[1.0], [2.0], [6.0]]), torch.tensor([[11.0]])]
    means = line(
        {"w": torch.tensor([1.0])},
        {},
        data,
        {"w": torch.tensor([1.0])},
        [0.0, 1.0, 0.0],
        loss_fn=lambda params, buffers, batch: (batch * params["w"]).mean(),
    )
    assert means.loss.tolist() == [5.0, 10.0, 5.0]  # and not (3 + 11) / 2 = 7


def scores_are(params, buffers, batch):
    """Return as scores of two classes the inputs and w."""
    scores = torch.stack([batch[0], params["w"].expand_as(batch[0])], 1)
    return scores.mean(), samfn.Aux(scores, buffers)


def test_accuracy_is_in_percent_of_all_examples():
    data = [(torch.tensor([1.0, 1, -1]), torch.tensor([0, 1, 1])), (-ONE, ONE.long())]
    way = {"w": torch.tensor(1.0)}
    found = line(
        {"w": torch.tensor(-5.0)}, {}, data, way, [0.0, 5.0, 10.0], loss_fn=scores_are
    )
    # All are taken for class 0; then those that are above 0; then none.
    assert found.accuracy.tolist() == [50.0, 75.0, 50.0]


def test_scores_that_are_none_are_wrong_and_losses_stay_what_they_are():
    inputs = torch.tensor([1.0, 1.0])
    way = {"w": torch.tensor(1.0)}
    found = line(
        {"w": torch.tensor(torch.inf)},
        {},
        (inputs, torch.tensor([1, 0])),
        way,
        [0.0],
        loss_fn=scores_are,
    )
    assert found.loss.tolist() == [math.inf]
    assert found.accuracy.tolist() == [50.0]
    nan = line(
        {"w": torch.tensor(torch.nan)},
        {},
        (inputs, torch.tensor([1, 1])),
        way,
        [0.0],
        loss_fn=scores_are,
    )
    assert math.isnan(nan.loss)
    assert nan.accuracy.tolist() == [0.0]


@pytest.mark.parametrize(
    ("outputs", "labels"),
    [
        (None, torch.zeros(2).long()),
        (torch.zeros(2, 3), torch.zeros(2)),
        (torch.zeros(2, 1), torch.zeros(2).long()),
        (torch.zeros(2), torch.zeros(2).long()),
        (torch.zeros(2, 3, 4), torch.zeros(2).long()),
        (torch.zeros(2, 3), torch.zeros(2, 3).long()),
    ],
)
def test_there_is_no_accuracy_where_nothing_is_classified(outputs, labels):
    def loss_fn(params, buffers, batch):
        return params["w"].sum(), samfn.Aux(outputs, buffers)

    found = line(W, {}, (torch.zeros(2), labels), W, [0.0], loss_fn=loss_fn)
    assert found.accuracy is None


def test_every_filter_of_a_direction_is_as_long_as_that_of_the_weights():
    for dtype in (torch.float32, torch.float64):
        params, *_ = network(dtype)
        direction = drawn(0, params)
        assert {name: (d.shape, d.dtype) for name, d in direction.items()} == {
            name: (w.shape, w.dtype) for name, w in params.items()
        }
        for name in ("0.weight", "3.weight", "7.weight"):
            lengths, expected = (
                torch.stack([f.norm() for f in t[name]]) for t in (direction, params)
            )
            assert_close(lengths, expected, rtol=1e-6, atol=0)


def test_filters_may_be_counted_across_as_ml_cvnets_does():
    params, *_ = network()
    direction = drawn(0, params, over=(0,))
    for name in ("0.weight", "7.weight"):
        assert_close(direction[name].norm(dim=0), params[name].norm(dim=0))


def test_biases_and_normalisation_do_not_move():
    direction = drawn(0)
    for name in ("0.bias", "1.weight", "1.bias", "7.bias"):
        assert not direction[name].any()


def test_a_filter_of_zeros_stays_zero_and_a_filter_may_have_one_entry():
    params = {"w": torch.tensor([[1.0, 2.0], [0.0, 0.0]]), "v": torch.tensor([[-3.0]])}
    direction = drawn(0, params)
    assert direction["w"][0].norm() == pytest.approx(5**0.5)
    assert direction["w"][1].tolist() == [0.0, 0.0]
    assert direction["v"].abs().tolist() == [[3.0]]


def test_a_direction_depends_on_seed_and_shapes_and_not_on_order_or_layout():
    params, *_ = network(torch.float32)
    direction = drawn(0, params)
    turned = {name: params[name] for name in reversed(params)}
    turned["3.weight"] = params["3.weight"].to(memory_format=torch.channels_last)
    again = drawn(0, turned)
    assert_close({n: again[n] for n in params}, direction, rtol=1e-6, atol=0)
    assert again["3.weight"].is_contiguous(memory_format=torch.channels_last)
    doubled = drawn(0, tree.scale(params, 2.0))
    assert_close(doubled, tree.scale(direction, 2.0))
    wide = drawn(0, {name: w.double() for name, w in params.items()})
    assert_close({n: d.float() for n, d in wide.items()}, direction)
    assert not torch.allclose(drawn(1, params)["0.weight"], direction["0.weight"])


def test_a_generator_that_is_not_on_the_cpu_is_refused():
    class Elsewhere:
        device = torch.device("cuda")

    with pytest.raises(ValueError, match="must be on the CPU, got one on cuda"):
        filter_normalised(W, Elsewhere())


def test_between_two_solutions_all_that_is_floating_point_moves():
    params, buffers, loss_fn, data = network()
    moved = tree.add(params, drawn(0))
    others = {
        name: leaf * 2 + 1 if leaf.is_floating_point() else leaf + 7
        for name, leaf in buffers.items()
    }
    way = between(params | buffers, moved | others)
    assert way.keys() == params.keys() | {n for n in buffers if "running" in n}
    found = line(params, buffers, data, way, [0.0, 0.5, 1.0], loss_fn=loss_fn)
    for index, (p, b) in enumerate(((params, buffers), (moved, others))):
        losses = [loss_fn(p, b, batch)[0] for batch in data]
        assert_close(found.loss[2 * index], torch.stack(losses).mean())
    still = line(params, buffers, data, between(params, moved), [1.0], loss_fn=loss_fn)
    losses = [loss_fn(moved, buffers, batch)[0] for batch in data]
    assert_close(still.loss[0], torch.stack(losses).mean())
    with pytest.raises(ValueError, match="start and end must have the same names"):
        between(params, buffers)


def test_the_ascent_is_that_of_sam_for_all_examples_as_one_batch():
    params, buffers, loss_fn, data = network()
    uneven = [data[0], tuple(part[:3] for part in data[1])]
    whole = tuple(torch.cat(parts) for parts in zip(*uneven, strict=True))
    grads = samfn.loss.evaluate(loss_fn, params, buffers, whole).grads
    step = tree.subtract(samfn.perturb(params, grads, 1.0), params)
    assert_close(ascent(params, buffers, uneven, loss_fn=loss_fn), step)
    assert_close(ascent(params, buffers, whole, loss_fn=loss_fn), step)


def test_a_zero_gradient_leads_nowhere():
    flat = lambda params, buffers, batch: 0 * params["w"].sum()  # noqa: E731
    assert not ascent(W, {}, ONE, loss_fn=flat)["w"].any()


def test_nothing_that_was_given_changes():
    params, buffers, loss_fn, data = network()
    ways = drawn(0), between(params | buffers, params | buffers)
    given = [params, buffers, *ways]
    before = [
        {n: (leaf, leaf.data_ptr(), leaf.clone()) for n, leaf in t.items()} for t in given
    ]
    model = loss_fn.function.__self__._model
    weights = {name: leaf.clone() for name, leaf in model.state_dict().items()}
    plane(params, buffers, data, ways, COORDINATES, [-1.0, 1.0], loss_fn=loss_fn)
    ascent(params, buffers, data, loss_fn=loss_fn)
    for tree_, kept in zip(given, before, strict=True):
        assert tree_.keys() == kept.keys()
        for name, (leaf, address, copy) in kept.items():
            assert tree_[name] is leaf
            assert leaf.data_ptr() == address
            assert torch.equal(leaf, copy)
    for name, leaf in model.state_dict().items():
        assert torch.equal(leaf, weights[name])


def test_what_is_evaluated_shares_no_memory_with_what_was_given_and_has_no_graph():
    seen = []

    def loss_fn(params, buffers, batch):
        w = params["w"]
        seen.append((w.data_ptr(), w.requires_grad, torch.is_grad_enabled()))
        return w.sum()

    direction = {"w": W["w"].clone().requires_grad_()}
    found = line(W, {}, [ONE, ONE], direction, COORDINATES, loss_fn=loss_fn)
    assert len(seen) == 8
    ((address, *graph),) = set(seen)  # One copy, written to again and again.
    assert address not in {W["w"].data_ptr(), direction["w"].data_ptr()}
    assert graph == [False, False]
    assert not found.loss.requires_grad


def test_progress_is_told_after_every_point():
    told = []
    loss_fn = lambda params, buffers, batch: told.append("loss") or params["w"].sum()  # noqa: E731
    line(W, {}, ONE, W, [0.0, 1.0], loss_fn=loss_fn, progress=lambda *at: told.append(at))
    assert told == ["loss", (1, 2), "loss", (2, 2)]
    told.clear()
    plane(
        W,
        {},
        ONE,
        (W, W),
        [0.0],
        [0.0, 1.0, 2.0],
        loss_fn=quadratic_of_one,
        progress=lambda *at: told.append(at),
    )
    assert told == [(1, 3), (2, 3), (3, 3)]


def quadratic_of_one(params, buffers, batch):
    return params["w"].square().sum()


def test_a_loader_is_gone_through_at_every_point():
    data = torch.utils.data.TensorDataset(torch.arange(5.0)[:, None])
    loader = torch.utils.data.DataLoader(data, batch_size=2, shuffle=True)
    found = line(
        {"w": torch.ones(1)},
        {},
        loader,
        {"w": torch.ones(1)},
        [0.0, 1.0, 2.0],
        loss_fn=lambda params, buffers, batch: (params["w"] * batch[0]).mean(),
    )
    assert_close(found.loss, torch.tensor([2.0, 4.0, 6.0]).double())


@pytest.mark.parametrize("one", [torch.ones(2), (torch.ones(2),), {"x": torch.ones(2)}])
def test_a_tuple_tensor_or_mapping_is_one_batch(one):
    seen = []

    def loss_fn(params, buffers, batch):
        seen.append(batch)
        return params["w"].sum()

    line(W, {}, one, W, [0.0], loss_fn=loss_fn)
    assert seen == [one] or seen[0] is one


BAD_INPUTS = [
    ({"batches": iter([ONE])}, TypeError, "be gone through again.* got list_iterator"),
    ({"batches": (x for x in [ONE])}, TypeError, "got generator"),
    ({"batches": 3}, TypeError, "got int"),
    ({"batches": []}, ValueError, "at least one example, got none"),
    (
        {"batches": [(ONE, torch.ones(2))]},
        ValueError,
        r"one length.* \(1,\), \(2,\)",
    ),
    ({"direction": {}}, ValueError, r"must name params or buffers, got \[\]"),
    ({"direction": {"x": ONE}}, ValueError, r"must name params or buffers, got \['x'\]"),
    (
        {"direction": {"w": ONE.double()}},
        ValueError,
        r"direction .* w: \(3,\) against \(1,\)",
    ),
    ({"direction": {"w": torch.ones(3)}}, ValueError, "float64 against torch.float32"),
    ({"direction": {"count": ONE.long()}}, ValueError, r"can move, not \['count'\]"),
    ({"direction": W["w"]}, TypeError, "a direction must map names to tensors"),
    ({"at": []}, ValueError, "at must be a list of finite numbers"),
    ({"at": [0.0, math.nan]}, ValueError, "at must be a list of finite numbers"),
    ({"at": [[0.0]]}, ValueError, "at must be a list of finite numbers"),
    ({"params": {"w": W["w"].long()}}, ValueError, "params must be floating point"),
    ({"buffers": W}, ValueError, r"must not share names, both hold \['w'\]"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_INPUTS)
def test_bad_input_says_what_came(change, error, message):
    given = {"params": W, "buffers": {**CURVATURE, "count": ONE.long()}}
    given |= {"batches": ONE, "direction": W, "at": [0.0]} | change
    with pytest.raises(error, match=message):
        line(**given, loss_fn=quadratic)


def test_a_state_that_shares_its_memory_with_the_model_is_refused():
    _, buffers, loss_fn, data = network()
    own = {
        name: w.detach() for name, w in loss_fn.function.__self__._model.named_parameters()
    }
    for evaluated in (
        lambda: line(own, buffers, data, own, [0.0], loss_fn=loss_fn),
        lambda: ascent(own, buffers, data, loss_fn=loss_fn),
    ):
        with pytest.raises(ValueError, match="shares its memory with the model"):
            evaluated()


FAST = ["--points", "5", "--images", "40"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of one network on the digits, of two epochs each."""
    folder = tmp_path_factory.mktemp("runs")
    small = ["--data", "digits", "--model", "wrn-10-1", "--batch-size", "256"]
    small += ["--epochs", "2"]
    for name, rho in (("sgd", "0"), ("sam", "0.2")):
        assert train([*small, "--rho", rho, "--output", str(folder / name)]) == 0
    return folder / "sgd", folder / "sam"


def test_the_command_leaves_data_and_pictures_beside_the_first_run(runs, capsys):
    assert recipe.main([*map(str, runs), *FAST]) == 0
    folder = runs[0].parent / "landscape"
    assert {path.name for path in folder.iterdir()} == {
        "landscape.json",
        "surfaces.png",
        "lines.png",
    }
    for name in ("surfaces", "lines"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "evaluating 77 points, each on 40 training images" in out
    assert f"{folder / 'surfaces.png'}, {folder / 'lines.png'}" in out
    text = (folder / "landscape.json").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    for run, name in zip(found["runs"], ("SGD", "sam, rho 0.2"), strict=True):
        assert run["name"] == name
        assert f"{name}  " in out
        assert f"mean rise within 0.5 {run['rise']:.3g}" in out
        assert run["plane"]["at"] == run["plane"]["at2"] == [-1.0, -0.5, 0.0, 0.5, 1.0]
        loss, accuracy = (np.array(run["plane"][key]) for key in ("loss", "accuracy"))
        assert loss.shape == accuracy.shape == (5, 5)
        near = loss[2, 1:4].sum() + loss[1, 2] + loss[3, 2]
        assert run["rise"] == pytest.approx(near / 5 - loss[2, 2], rel=1e-5)
        assert run["ascent"]["at"] == pytest.approx(np.linspace(0, 0.5, 9))
        assert run["ascent"]["loss"][0] == loss[2, 2]
        assert run["ascent"]["loss"][-1] > loss[2, 2]
        assert abs(run["plane"]["cosine"]) < 0.05
    ends = [found["between"]["loss"][end] for end in (0, -1)]
    middles = [run["plane"]["loss"][2][2] for run in found["runs"]]
    assert ends == pytest.approx(middles, rel=1e-4)
    assert found["settings"]["seed"] == 0
    assert found["runs"][1]["config"]["rho"] == 0.2


def settings_of(path, **options):
    return recipe.Settings(runs=(path,), **{"points": 5, "images": 40} | options)


def solution_of(path, **options):
    """Read what a run has learned."""
    return solutions.read(path, settings_of(path, **options), Display())


def around(path, **options):
    """Return the loss in the plane around what a run has learned."""
    solution = solution_of(path, **options)
    told = lambda done, total: None  # noqa: E731
    return recipe.around(solution, settings_of(path, **options), told).plane


def test_the_loss_at_the_solution_is_what_the_run_recorded(runs):
    for path in runs:
        best = max(RunDirectory(path).rows(), key=lambda row: row["test_accuracy"])
        solution = solution_of(path, split="test", images=1000)
        found = line(
            solution.params,
            solution.buffers,
            solution.batches(100),
            solution.params,
            [0.0],
            loss_fn=solution.loss_fn,
        )
        assert (solution.epoch, len(solution.labels)) == (best["epoch"], 360)
        assert found.loss.item() == pytest.approx(best["test_loss"], rel=1e-5)
        # Other batches round otherwise, and an image may be on the border.
        assert found.accuracy.item() == pytest.approx(best["test_accuracy"], abs=0.6)


def test_training_images_are_those_trained_on_with_their_labels(runs):
    solution = solution_of(runs[0], images=2000)
    assert len(solution.labels) == 1437
    assert solution.images.mean().item() == pytest.approx(0, abs=1e-4)
    few = solution_of(runs[0], images=40)
    assert torch.equal(few.labels, solution.labels[:40])
    assert not torch.equal(few.labels, solution_of(runs[0], images=40, seed=1).labels)


def test_a_checkpoint_or_the_last_one_can_be_drawn(runs):
    (first, last) = RunDirectory(runs[0]).checkpoints().paths()
    both = solutions.named([solution_of(first), solution_of(last)])
    assert [solution.epoch for solution in both] == [1, 2]
    assert [solution.name for solution in both] == ["sgd, epoch 1", "sgd, epoch 2"]
    newest = solution_of(runs[0], last=True)
    assert newest.epoch == 2
    assert_close(newest.params, both[1].params, rtol=0, atol=0)


def test_the_best_epoch_is_drawn_and_not_the_last(runs, tmp_path):
    run = RunDirectory(runs[0])
    (first, last) = run.checkpoints().paths()
    copy = RunDirectory(tmp_path)
    (tmp_path / "config.toml").write_bytes((run.path / "config.toml").read_bytes())
    checkpoints = copy.checkpoints()
    for path, score in ((first, 2.0), (last, 1.0)):
        state, metadata = samfn.restore(path, like=fresh(run.path))
        checkpoints.save(state, **metadata | {"score": score})
    assert solution_of(tmp_path).epoch == 1
    assert solution_of(tmp_path, last=True).epoch == 2


def fresh(run):
    """Return a state of a run as it began."""
    config = of_run(run)
    return assemble(config, load("digits"))[1]


def test_the_seed_decides_directions_and_images(runs):
    planes = [around(runs[0], seed=seed) for seed in (1, 1, 2)]
    assert_close(planes[0], planes[1], rtol=0, atol=0)
    assert not torch.allclose(planes[0].loss, planes[2].loss)
    assert planes[0].cosine != planes[2].cosine


def test_there_is_no_line_between_different_networks_or_images(runs, capsys):
    one = solution_of(runs[0])
    other = one._replace(labels=one.labels.flip(0))
    explored, way = recipe.explore([one, other], settings_of(runs[0]), Display())
    assert (len(explored), way) == (2, None)
    assert "no line between the two" in capsys.readouterr().out
    assert recipe.same_task(one, solution_of(runs[1]))
    for changed in (
        other,
        one._replace(images=one.images + 1),
        one._replace(params={**one.params, "more": ONE}),
        one._replace(params={**one.params, "head.weight": ONE}),
    ):
        assert not recipe.same_task(one, changed)


def test_all_runs_are_drawn_on_one_scale(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots.plt, "close", figures.append)
    at = torch.linspace(-1, 1, 5).double()
    bowl = at[:, None].square() + at.square()
    planes = {
        "low": plots.Plane(at, at, bowl + 0.01, None, 0.0),
        "high": plots.Plane(at, at, 10 * bowl + 1, None, 0.0),
    }
    notes = dict.fromkeys(planes, "")
    plots.surfaces(planes, notes, tmp_path / "surfaces.png", "")
    contours = [axes for axes in figures[0].axes if axes.name == "rectilinear"][:2]
    surfaces = [axes for axes in figures[0].axes if axes.name == "3d"]
    fills = [axes.collections[0] for axes in contours]
    limits = [
        *(fill.get_clim() for fill in fills),
        *(axes.collections[0].get_clim() for axes in surfaces),
        *(axes.get_zlim() for axes in surfaces),
    ]
    assert len(limits) == 6
    assert limits[1:4] == limits[:3]
    assert limits[4] == limits[5]
    assert list(fills[0].levels) == list(fills[1].levels)
    assert 10 ** fills[0].levels[0] <= 0.01
    assert 10 ** fills[0].levels[-1] >= 21


def test_rows_of_a_plane_are_drawn_along_the_first_axis(tmp_path, monkeypatch):
    seen = {}
    for axes, kind in ((Axes, "contourf"), (Axes3D, "plot_surface")):

        def record(self, *args, real=axes.__dict__[kind], kind=kind, **options):
            seen[kind] = args[:3]
            return real(self, *args, **options)

        monkeypatch.setattr(axes, kind, record)
    at, at2 = torch.linspace(1, 2, 5).double(), torch.linspace(0, 2, 3).double()
    plane = plots.Plane(at, at2, at[:, None] + 0 * at2, None, 0.0)
    plots.surfaces({"x": plane}, {"x": ""}, tmp_path / "surfaces.png", "")
    x, y, z = seen["contourf"]  # Its rows are those of the picture.
    assert torch.equal(x, at)
    assert torch.equal(y, at2)
    assert torch.equal(z, at.expand(3, 5))
    x, y, z = seen["plot_surface"]
    assert np.array_equal(x, z)
    assert np.array_equal(y, at2.expand(5, 3))


@pytest.mark.parametrize(
    ("losses", "logarithmic", "low", "high"),
    [
        ([1.0, 2.0], False, 1.0, 2.0),
        ([0.01, 2.0], True, 0.01, 2.0),
        ([0.0, 2.0], True, 2e-6, 2.0),  # a loss of 0 is drawn at the bottom
        ([-1.0, 200.0], False, -1.0, 200.0),
        ([1.0, math.inf, math.nan, 2.0], False, 1.0, 2.0),
        ([math.nan], False, 1.0, 1.0),
        ([3.0, 3.0], False, 3.0, 3.0),
        ([0.0], False, 0.0, 0.0),
    ],
)
def test_a_scale_holds_what_is_finite_and_is_logarithmic_where_losses_differ_widely(
    losses, logarithmic, low, high
):
    losses = torch.tensor(losses).double()
    scale = plots.Scale.of([losses[:1], losses[1:]])
    assert scale.logarithmic == logarithmic
    heights = scale.heights(torch.tensor([low, high]).double())
    assert scale.levels[0] <= heights[0] <= heights[1] <= scale.levels[-1]
    labels = [float(scale.label(level)) for level in scale.levels]
    assert labels == sorted(set(labels))
    assert len(labels) < 30
    shown = scale.heights(losses)
    assert torch.equal(shown.isnan(), ~losses.isfinite())
    assert float(scale.label(heights[1].item())) == pytest.approx(high)


def test_what_is_not_finite_is_drawn_as_missing_and_names_are_no_formulas(tmp_path):
    at = torch.linspace(-1, 1, 5).double()
    loss = at[:, None].square() + at.square()
    loss[0, 0], loss[4] = math.inf, math.nan
    name = "$[bold]\\x\x1b\udc80$_{"
    for shown in (loss, loss * math.nan):
        plane = plots.Plane(at, at, shown, None, 0.0)
        plots.surfaces({name: plane}, {name: ""}, tmp_path / "surfaces.png", "")
        line_ = plots.Line(at, shown[:, 0], None)
        plots.lines({name: line_, "b": line_}, line_, tmp_path / "lines.png", "")
    assert solutions.numbers(torch.tensor([[1.5, math.nan], [math.inf, -math.inf]])) == [
        [1.5, "nan"],
        ["inf", "-inf"],
    ]
    assert np.array([1.5, "nan", "-inf"], dtype=float)[2] == -math.inf


def test_lists_of_numbers_are_lines_and_texts_are_kept(tmp_path):
    for names in (["a  b"], ["a  b", "c [ d\n  e"]):
        settings = recipe.Settings(runs=tuple(names))
        recipe.write(tmp_path / "x.json", settings, [], plots.Line(ONE, ONE, None))
        text = (tmp_path / "x.json").read_text()
        assert json.loads(text)["settings"]["runs"] == names
        assert '"at": [ 0.0 ],' in text


NAMES = [
    (["--rho 0", "--rho 0.1"], ["SGD", "sam, rho 0.1"]),
    (["--rho 0 --seed 1", "--rho 0"], ["SGD, seed 1", "SGD, seed 0"]),
    (["--rho 0 --lr 0.2", "--rho 0"], ["a", "b"]),
]


@pytest.mark.parametrize(("flags", "names"), NAMES)
def test_names_are_the_shortest_that_differ(tmp_path, flags, names):
    found = [
        solutions.Solution(
            "", tmp_path / path, recipe_config(line_), 0, {}, {}, None, ONE, ONE
        )
        for path, line_ in zip("ab", flags, strict=True)
    ]
    assert [solution.name for solution in solutions.named(found)] == names
    same = [found[0], found[0]._replace(epoch=3)]
    named = [solution.name for solution in solutions.named(same)]
    assert named == ["a, epoch 0", "a, epoch 3"]


def recipe_config(flags):
    return parse(["--data", "digits", *flags.split()])


WRONG = [
    (["absent"], "cannot read absent/config.toml"),
    (["RUN", "--points", "6"], "--points: expected an odd number of at least 5, got 6"),
    (["RUN", "--points", "3"], "--points: expected an odd number of at least 5, got 3"),
    (["RUN", "--span", "0"], "--span: expected a finite number above 0, got 0.0"),
    (["RUN", "--rho", "inf"], "--rho: expected a finite number above 0, got inf"),
    (["RUN", "--images", "0"], "--images: expected at least 1, got 0"),
    (["RUN", "RUN/../sgd"], "expected different runs, got"),
    (["RUN", "--device", "nowhere"], "--device: 'nowhere' cannot be used"),
    (["RUN", "--output", "RUN/config.toml"], "--output: cannot write"),
    (["RUN/config.toml"], "cannot read"),
    (["RUN/checkpoints/damaged"], "checkpoints/damaged is no safetensors file"),
]


@pytest.mark.parametrize(("flags", "message"), WRONG)
def test_wrong_input_ends_with_its_code(runs, capsys, flags, message):
    (runs[0] / "checkpoints" / "damaged").write_text("x")
    assert recipe.main([flag.replace("RUN", str(runs[0])) for flag in flags]) == 2
    assert message in capsys.readouterr().err


def test_a_directory_without_checkpoints_is_refused(tmp_path, capsys):
    with RunDirectory.create(tmp_path / "run", recipe_config("")):
        pass
    assert recipe.main([str(tmp_path / "run")]) == 2
    assert "holds no checkpoint of a whole epoch" in capsys.readouterr().err


def test_what_cannot_be_written_ends_with_its_code(runs, tmp_path, capsys):
    (tmp_path / "landscape.json").mkdir()
    assert recipe.main([str(runs[0]), *FAST, "--output", str(tmp_path)]) == 5
    assert f"cannot write {tmp_path}" in capsys.readouterr().err
