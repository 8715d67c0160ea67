"""Every cell of the table in recipes/README.md, beside a loop by hand."""

import ast
import re
from importlib import import_module

import pytest
import torch

from tests import ROOT
from tests.recipes.trainers import by_hand, two_ranks

# By the first word of a trainer's rows.
MODULES = {
    "Lightning": "in_lightning",
    "Hugging": "in_hugging_face",
    "accelerate": "in_accelerate",
    "timm": "in_timm",
    "skorch": "in_skorch",
}
PAGE = (ROOT / "recipes" / "README.md").read_text()


def written():
    """Return the cells of the table that say something, by trainer and column."""
    table = re.search(r"^\| trainer \|.*?\n\n", PAGE, re.DOTALL | re.MULTILINE)[0].strip()
    lines = [line.strip("|").split("|") for line in table.splitlines()]
    (_, *columns), _, *rows = [[cell.strip() for cell in line] for line in lines]
    return {
        (row, column): text
        for row, *texts in rows
        for column, text in zip(columns, texts, strict=True)
        if text != "–"
    }


def cells_of(trainer):
    name = MODULES[re.match(r"\w+", trainer)[0]]
    for package in two_ranks.PACKAGES[name]:
        pytest.importorskip(package)
    return import_module(f"tests.recipes.trainers.{name}").CELLS


@pytest.mark.parametrize(("trainer", "column"), [*written()])
def test_trainers_take_the_steps_of_a_loop_by_hand(trainer, column):
    bound = written()[trainer, column]
    cell = cells_of(trainer)[trainer][column]
    if column.startswith("two ranks"):
        found = two_ranks.found()[trainer, column]
    else:
        found = two_ranks.outcome(cell)
    if bound == "error":
        assert "accumulated" in found
        return
    found = torch.tensor(found)
    difference = (found - by_hand.train(**cell.right)).abs().max()
    assert difference <= float(bound) <= 1e-6
    assert (found - by_hand.train(**cell.wrong)).abs().max() > 5e-4


@pytest.mark.parametrize("trainer", MODULES)
def test_the_table_leaves_nothing_out(trainer):
    columns = {column for _, column in written()}
    for row, cells in cells_of(trainer).items():
        assert {*cells} == {column for column in columns if (row, column) in written()}


@pytest.mark.parametrize("name", ["accelerated", "hugging_face", "lightning"])
def test_what_a_trainer_needs_is_fifteen_lines_at_most(name):
    text = (ROOT / "recipes" / "trainers" / f"{name}.py").read_text()
    lines = {n for n, line in enumerate(text.splitlines(), 1) if line.strip()}
    for node in ast.walk(ast.parse(text)):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text or isinstance(node, ast.Import | ast.ImportFrom):
            lines -= {*range(node.lineno, node.end_lineno + 1)}
    assert len(lines) <= 15
