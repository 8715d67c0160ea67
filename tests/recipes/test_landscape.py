"""The command that draws the loss around what runs have learned."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from mpl_toolkits.mplot3d import Axes3D
from torch.testing import assert_close

import samfn
from recipes import landscape as recipe
from recipes import plots
from recipes.data.sources import load
from recipes.settings.resolve import configure
from recipes.settings.saved import of_run
from recipes.study import runs as solutions
from recipes.terminal.console import Display
from recipes.train.build import assemble
from recipes.train.directory import RunDirectory
from samfn.measure.landscape import Line, Plane, line

ONE = torch.zeros(1)  # a batch of one example, for losses that read none

FAST = ["--points", "5", "--images", "40"]


@pytest.fixture(scope="module")
def runs(trained, tmp_path_factory):
    """Return copies of the two runs, which no test here changes."""
    folder = tmp_path_factory.mktemp("landscape")
    return tuple(shutil.copytree(trained / name, folder / name) for name in ("sgd", "sam"))


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
        "low": Plane(at, at, bowl + 0.01, None, 0.0),
        "high": Plane(at, at, 10 * bowl + 1, None, 0.0),
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
    plane = Plane(at, at2, at[:, None] + 0 * at2, None, 0.0)
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
        plane = Plane(at, at, shown, None, 0.0)
        plots.surfaces({name: plane}, {name: ""}, tmp_path / "surfaces.png", "")
        line_ = Line(at, shown[:, 0], None)
        plots.lines({name: line_, "b": line_}, line_, tmp_path / "lines.png", "")
    assert solutions.numbers(torch.tensor([[1.5, math.nan], [math.inf, -math.inf]])) == [
        [1.5, "nan"],
        ["inf", "-inf"],
    ]
    assert np.array([1.5, "nan", "-inf"], dtype=float)[2] == -math.inf


def test_lists_of_numbers_are_lines_and_texts_are_kept(tmp_path):
    for names in (["a  b"], ["a  b", "c [ d\n  e"]):
        settings = recipe.Settings(runs=tuple(names))
        recipe.write(tmp_path / "x.json", "", settings, [], Line(ONE, ONE, None))
        text = (tmp_path / "x.json").read_text()
        assert json.loads(text)["settings"]["runs"] == names
        assert '"at": [ 0.0 ],' in text


NAMES = [
    (["--rho 0", "--rho 0.1"], ["SGD", "sam, rho 0.1"]),
    (["--rho 0 --seed 1", "--rho 0"], ["SGD, seed 1", "SGD, seed 0"]),
    (["--rho 0 --lr 0.3", "--rho 0"], ["a", "b"]),
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
    return configure(["--data", "digits", *flags.split()])


WRONG = [
    (["absent"], "cannot read absent/config.toml"),
    (["RUN", "--points", "6"], "--points: expected an odd number from 5 to 999, got 6"),
    (["RUN", "--points", "3"], "--points: expected an odd number from 5 to 999, got 3"),
    (["RUN", "--points", "99999999999"], "--points: expected an odd number from 5 to 999"),
    (["RUN", "--span", "0"], "--span: expected a finite number above 0, got 0.0"),
    (["RUN", "--rho", "inf"], "--rho: expected a finite number above 0, got inf"),
    (["RUN", "--images", "0"], "--images: expected at least 1, got 0"),
    (["RUN", "RUN/../sgd"], "expected different runs, got"),
    (["RUN", "--device", "nowhere"], "--device: 'nowhere' cannot be used"),
    (["RUN", "--output", "RUN/config.toml"], "--output: cannot write"),
    (["RUN/config.toml"], "expected the directory of a run, or one of its checkpoints"),
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
