"""What the READMEs say is run: examples, commands, links, tables and their numbers."""

import json
import os
import re
import runpy
import shlex
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
import torch

import bench.cost
import samfn
from bench.cost import METHODS
from bench.faults.rows import ROWS
from recipes.data.sources import load
from recipes.models import language, networks
from recipes.settings.method_expression import MAKERS
from recipes.settings.presets import PRESETS
from recipes.settings.resolve import configure
from recipes.study.grid import split
from tests import ROOT
from tests.recipes.data.test_sources import make_folder

LINK = re.compile(r"\]\(([^)#\s]+)(#[^)]*)?\)")


def from_root(page):
    """Return the text of a page, with its links as seen from the root."""

    def rebased(link):
        path = link[1] if link[1].startswith("http") else page.parent / link[1]
        return f"]({os.path.relpath(path, ROOT) if path is not link[1] else path})"

    return LINK.sub(rebased, page.read_text())


FOLDERS = ("samfn", "recipes", "bench", "tests", ".github")
PAGES = {
    str(page.relative_to(ROOT)): from_root(page)
    for pattern in ("README.md", *(f"{folder}/**/*.md" for folder in FOLDERS))
    for page in sorted(ROOT.glob(pattern))
    if "results" not in page.parts
}
FRONT = PAGES["README.md"]
README = "\n".join(PAGES.values())
FLOWING = " ".join(README.split())
# Commands of many runs, and flags with which they are few.
STUDIES = {
    "recipes.sweep": ["--rhos", "0", "0.1", "--seeds", "1"],
    "recipes.label_noise": ["--noise", "0.4", "--seeds", "1"],
    "recipes.arms": ["--seeds", "1"],
}
SHORT = ["--epochs", "1", "--batch-size", "256"]
COMMAND = re.compile(r"python -m recipes\.\w+[^`#\n]*")


def blocks(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def recipe_commands():
    return sorted({match.strip() for match in COMMAND.findall(README)})


def test_the_front_page_is_one_screen_and_a_half():
    assert len(FRONT.splitlines()) <= 120


def test_four_lines_are_the_step_and_the_loop_is_short():
    four, loop = blocks("python", FRONT)
    scope = {}
    exec(four, scope)
    _, core = four.rsplit("\n\n", 1)
    assert len(core.splitlines()) == 4
    model = scope["model"]  # of which nothing was written
    state = samfn.init(*samfn.split(model), optimizer=scope["optimizer"])
    given = {"loss_fn": scope["loss_fn"], "optimizer": scope["optimizer"]}
    state, _ = samfn.sam_update(state, scope["batch"], rho=0.05, lr=0.1, **given)
    for name, weight in state.params.items():
        assert torch.equal(weight, scope["params"][name])
    assert len([line for line in loop.splitlines() if line.strip()]) <= 15
    exec(loop, scope := {})
    assert scope["metrics"].loss < 0.65  # A guess has 0.69; seeds end at 0.13 to 0.60.
    assert scope["state"].step == 100


def weights(scope):
    """Return what an example trained."""
    return (
        scope["state"].params.values() if "state" in scope else scope["model"].parameters()
    )


def test_every_further_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Those of the trainers are run where the trainers are imported anyway.
    pages = ("README.md", "recipes/trainers/README.md", "recipes/README.md")
    elsewhere = {each for page in pages for each in blocks("python", PAGES[page])}
    further = [each for each in blocks("python") if each not in elsewhere]
    assert further
    for example in further:
        scope = {}
        exec(example, scope)
        assert torch.isfinite(next(iter(weights(scope)))).all()


def test_the_model_of_a_run_is_used_with_what_its_file_says(tmp_path):
    flags = ["--data", "digits", *SHORT, "--compile", "no", "--export"]
    run([*flags, "--output", str(tmp_path / "run")])
    (example,) = blocks("python", PAGES["recipes/README.md"])
    data = load("digits", None)
    scope = {"images": data.test_images}
    exec(example.replace("runs/NAME", str(tmp_path / "run")), scope)
    right = [
        name == data.classes[label]
        for name, label in zip(scope["names"], data.test_labels, strict=True)
    ]
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert 100 * sum(right) / len(right) == pytest.approx(row["test_accuracy"], abs=1e-4)


def test_the_two_commands_are_on_the_first_screen():
    first = "\n".join(FRONT.splitlines()[:40])
    assert 'pip install -e ".[recipes]" && python -m recipes.cifar_wrn --rho 0.05' in first
    assert 'pip install -e ".[test]" && pytest' in first


def test_ci_runs_the_test_command():
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    assert 'pip install -q -e ".[test]"' in script
    assert "pytest" in script


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a directory of runs of one epoch, by the names that the README uses."""
    folder = tmp_path_factory.mktemp("trained")
    for name, rho in (("SGD", "0"), ("SAM", "0.05"), ("NAME", "0.1")):
        flags = ["--data", "digits", *SHORT, "--rho", rho]
        run([*flags, "--output", str(folder / name)])
    return folder


# What makes the commands fast that read runs, and what they leave.
LEFT = {
    "recipes.landscape": ("--points 5 --images 40", "runs/landscape/surfaces.png"),
    "recipes.sharpness": ("--images 40 --iterations 2", "runs/*/sharpness.json"),
    "recipes.compare": ("--images 40 --iterations 2", "runs/compare/compare.md"),
}


@pytest.mark.parametrize("command", recipe_commands())
def test_commands_of_the_recipe_run(command, tmp_path, monkeypatch, capsys, trained):
    monkeypatch.chdir(tmp_path)
    module, *args = shlex.split(command)[2:]
    # Only sizes, and the names of what a reader has, differ from what is written.
    names = {"runs/SGD", "runs/SAM", "runs/NAME"} & {*args}
    for name in names:
        shutil.copytree(trained / name.removeprefix("runs/"), name)
    if module in LEFT:
        fast, left = LEFT[module]
        run([*args, *fast.split()], module)
        found = [path for path in tmp_path.glob(left) if path.stat().st_size]
        assert len(found) == (len(names) if "*" in left else 1)
        return
    if module == "recipes.finetune":  # without a network
        make_folder(tmp_path / "my-images", sizes=((40, 36), (33, 50)))
        state = networks.make("resnet18", 9, shape=(3, 32, 32)).state_dict()
        torch.save(state, tmp_path / "resnet18.pth")
        args += ["--weights", "resnet18.pth", "--image-size", "32", "--dry-run"]
        run([*args, "--batch-size", "4"], module)
        out = " ".join(capsys.readouterr().out.split())
        assert "120 of 122 tensors" in out
        assert "fc.weight, fc.bias start anew" in out
        assert "dry run: one step taken" in out
        return
    if module == "recipes.finetune_text":
        monkeypatch.setattr(language, "STEPS", 1)
        if "my-model" in args:
            import transformers

            model = language.tiny()
            model.resize_token_embeddings(384)
            model.save_pretrained("my-model")
            transformers.ByT5Tokenizer().save_pretrained("my-model")
            (tmp_path / "my-text").write_text("to be, or not to be, " * 40)
        run([*args, "--sequences", "8", "--length", "8", "--epochs", "1"], module)
        assert len([*tmp_path.glob("runs/*/adapter")]) == 1
        return
    if module in STUDIES:
        own, flags = split(args)
        flags += ["--data", "digits", *SHORT]
        run([*own, *STUDIES[module], "--", *flags], module)
        assert len([*tmp_path.glob("runs/*/*.png")]) == 1
        return
    networks_of = {"foret2021": "wrn-28-10", "airbench94": "airbench94"}
    if slow := networks_of.keys() & {*args}:  # hours, or days: only that it is understood
        assert configure(args).model == networks_of[slow.pop()]
        return
    if "my-images" in args:
        make_folder(tmp_path / "my-images", sizes=((16, 16),))
        args += ["--batch-size", "4", "--epochs", "1"]
    elif "--resume" not in args:
        args += SHORT
    run(args if "--resume" in args else [*args, "--output", "out"])


def run(args, module="recipes.cifar_wrn"):
    """Do what `python -m` does with a module, but for starting Python and torch."""
    path = ROOT / Path(*module.split(".")).with_suffix(".py")
    argv = mock.patch.object(sys, "argv", [str(path), *args])
    with argv, pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert not ended.value.code


def test_every_folder_is_on_a_page_and_every_file_of_the_algorithm_on_the_front():
    for folder in ("samfn", "recipes", "bench"):
        page = PAGES[f"{folder}/README.md"]
        for path in sorted((ROOT / folder).iterdir()):
            if path.name not in ("README.md", "__init__.py", "py.typed", "__pycache__"):
                assert path.stem in page, f"{path} is not on its folder's page"
    for name in (
        "tree.py",
        "loss.py",
        "gradient.py",
        "perturb.py",
        "methods/",
        "descend.py",
        "step.py",
    ):
        assert f"samfn/{name}" in FRONT


def test_every_command_is_there():
    named = re.findall(r"python -m ((?:recipes|bench)\.\w+(?:\.\w+)*)(?: (\w+))?", README)
    assert ("bench.cost", "methods") in named
    for module, part in named:
        assert find_spec(module), module
        if module == "bench.cost":
            assert issubclass(getattr(bench.cost, part.capitalize()), bench.cost.Cost)


def test_every_link_leads_somewhere():
    for name, text in PAGES.items():
        for target, _ in LINK.findall(text):
            there = target.startswith("http") or (ROOT / target).exists()
            assert there, f"{name}: {target}"


def test_every_anchor_is_a_heading():
    for page in map(ROOT.joinpath, PAGES):
        for path, anchor in re.findall(r"\]\(([^)#\s]*)#([^)]+)\)", page.read_text()):
            if path.startswith("http"):
                continue
            there = page.parent / path if path else page
            there = there / "README.md" if there.is_dir() else there
            heads = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            names = [re.sub(r"[^\w -]", "", head.lower()) for head in heads]
            assert anchor in [name.replace(" ", "-") for name in names], f"{page}: {anchor}"


def test_every_preset_is_explained():
    for preset in PRESETS.keys() - {"none"}:
        assert f"`{preset}`" in README


def reports(kind):
    """Return the text of the reports that the README links to, of those called so."""
    names = re.findall(rf"\((bench/results/{kind}_[\w.-]+\.md)\)", README)
    return {name: (ROOT / name).read_text() for name in names}


def test_speeds_are_those_of_the_report():
    ((name, text),) = reports("steps").items()
    rows = [line for line in text.split("## ")[1].splitlines() if line.startswith("|")]
    assert len(rows) == 9
    for row in (rows[0], *rows[2:]):
        assert re.sub(" +", " ", row) in README, f"{name}: {row}"


def test_accuracies_are_those_of_the_reports():
    found = reports("digits") | reports("cifar10") | reports("label_noise_cifar10")
    found |= reports("few_images_cifar10")
    assert len(found) == 5
    for path, text in found.items():
        (heads,) = (cells(line) for line in text.splitlines() if "| last epoch" in line)
        last, best = (
            next(i for i, head in enumerate(heads) if head.startswith(f"{which} epoch"))
            for which in ("last", "best")
        )
        lines = text[text.index("| last epoch") :].split("\n\n")[0].splitlines()[2:4]
        assert len(lines) == 2  # SGD and SAM; other ways are on the report alone.
        for row in map(cells, lines):
            assert f"| {row[last]} | {row[best]} |" in README, f"{path}: {row}"


# Methods of two gradients of the whole batch whose other arithmetic is next to nothing.
WHOLE = {
    *("sam", "asam", "fisher_sam", "gsam", "wsam", "ssam", "awp", "usam", "unified_sam"),
    *("le_sam", "light_sam", "sagm", "friendly_sam", "vasso"),
}


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_every_method_has_a_row_with_its_measured_cost():
    ((_, text),) = reports("methods_cost").items()
    lines = [cells(line) for line in text.splitlines() if line.startswith("| ")]
    time, memory = lines[0].index("of SGD"), lines[0].index("peak MiB")
    costs = {line[0]: (float(line[time]), float(line[memory])) for line in lines[2:]}
    _, least = costs.pop("SGD")
    table = PAGES["samfn/methods/README.md"].splitlines()
    rows = {line.split("`")[1].partition("(")[0]: line for line in table if "| `" in line}
    assert rows.keys() == MAKERS.keys()
    assert {*costs} == {*METHODS}
    for method, (seconds, bytes_) in costs.items():
        row = cells(rows[method.partition("(")[0]])
        assert f"{seconds:.2f}" in row[3], method
        assert f"{bytes_ / least:.2f}" in row[4], method
    whole = {seconds for name, (seconds, _) in costs.items() if name in WHOLE}
    low, high = re.search(r"between (\S+) and (\S+) here", text).groups()
    assert (f"{min(whole):.2f}", f"{max(whole):.2f}") == (low, high)


def table_of(text):
    """Return the rows of all tables in a text, by their first cell."""
    lines = [cells(line) for line in text.splitlines() if line.startswith("| ")]
    return {line[0]: line for line in lines}


def test_every_fault_has_a_row_with_its_trials_and_no_failure():
    ((_, text),) = reports("faults").items()
    found = {name: row for name, row in table_of(text).items() if name.startswith("F")}
    assert [*found] == [row.name for row in ROWS]
    rows = table_of(PAGES["bench/faults/README.md"])
    for name, (_, fault, trials, failures, *_) in found.items():
        assert failures == "0"
        assert [fault, trials, failures] == [rows[name][1], *rows[name][3:]]
    least = {"F1": 50, "F2": 200, "F4": 50, "F6": 10_000, "F9": 60, "F20": 20}
    for name, count in (least | {"F12": 200, "F16": 40}).items():
        assert int(found[name][2].replace(",", "")) >= count
    ((_, text),) = reports("soak").items()
    trials = int(table_of(text)["soak"][2])
    assert f"{trials} faults" in FLOWING
    assert trials > 300
    assert int(re.search(r"(\d+) min, ", text)[1]) >= 60
    assert float(re.search(r"memory ([+-][\d.]+)%", text)[1]) < 1


def test_what_checkpoints_cost_is_that_of_the_report():
    ((_, text),) = reports("checkpoints").items()
    rows = table_of(text)
    costs = [float(rows[name][4]) for name in ("samfn.save", "samfn.restore")]
    said = re.search(r"takes ([\d.]+) times as long .*? restoring ([\d.]+) times", FLOWING)
    assert [float(said[1]), float(said[2])] == costs


LAST = "sam, last 30 %"


def test_the_comparisons_of_methods_are_of_all_that_are_one():
    page = PAGES["samfn/methods/README.md"]
    later = re.search(r"Not compared on\s+CIFAR-10: ([^.]*)\.", page)
    missing = set(re.findall(r"`(\w+)`", later[1]))
    for name, expected in (("methods_digits", set()), ("methods_cifar10", missing)):
        (text,) = reports(name).values()
        rows = [line for line in map(cells, text.splitlines()) if line]
        arms = {line[0].partition("(")[0] for line in rows}
        same = {"accumulated", "same_randomness", "loss_scaled"}  # SAM's own step.
        assert MAKERS.keys() - same - arms == expected
        if not expected:  # What the page says of it.
            runs = [line for line in rows if len(line) > 5 and "±" in line[3]]
            ends = {line[0]: float(line[3].split()[0]) for line in runs}
            others = sorted(v for k, v in ends.items() if k not in ("SGD", "sam", LAST))
            found = [ends["SGD"], ends["sam"], ends[LAST], others[0], others[-1]]
            said = re.search(
                r"SGD ends at ([\d.]+) %, SAM at ([\d.]+), .*? at ([\d.]+), .*? at ([\d.]+)"
                r" to ([\d.]+)",
                " ".join(page.split()),
            )
            assert [*map(float, said.groups())] == [round(number, 1) for number in found]
            assert all(float(line[5]) < 0.02 for line in runs[1:])


def test_what_the_table_of_features_claims_is_tested():
    evidence = (ROOT / "bench/results/features_2026-11-21.md").read_text()
    named = re.findall(r"(tests/[\w/]+\.py)::(test_\w+)", evidence)
    assert len(named) > 80
    for module, test in named:
        source = (ROOT / module).read_text()
        assert f"def {test}(" in source, f"{module}: {test}"
    table = PAGES["bench/README.md"].split("## Beside others")[1].split("\n## ")[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    rows = [line.split(" | ") for line in lines if "**" not in line]
    assert {len(row) for row in rows} == {8}
    claims = [row for row in rows[2:] if row[1] != "–"]
    assert len(claims) > 35
    for name, own, *_ in claims:
        found = re.search(r"\((tests/[\w/]+\.py)\)$", own)
        assert found is not None, name
        assert (ROOT / found[1]).exists(), name
        assert f"- {name.removeprefix('| ')}: tests/" in evidence, name
