"""The site of `.github/docs`: no reference and no link in it leads nowhere."""

import subprocess
import sys
from importlib import import_module

import pytest

from tests import ROOT

for package in ("sphinx", "furo", "myst_parser"):
    pytest.importorskip(package)


@pytest.mark.slow
def test_every_reference_of_the_site_is_resolved(tmp_path):
    """All pages are read and linked; what only changes how they look is left out."""
    options = ["-b", "dummy", "-W", "--keep-going", "-q", "-c", ".github/docs"]
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, "-d", tmp_path / "read", ".", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr


@pytest.mark.parametrize(
    ("formula", "shown"),
    [
        ("w + rho g / ||g||", r"w+\frac{\rho g}{\left\lVert g\right\rVert }"),
        ("u_i v_i ** 2", "u_{i}v_{i}^{2}"),
        ("g . F^-1 g", r"g\cdot F^{-1}g"),
        ("w - lr a / (1 - a) (b + c)", r"w-\frac{\mathrm{lr}\,a}{1-a}(b+c)"),
    ],
)
def test_a_formula_is_set_as_it_is_read(formula, shown, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / ".github/docs")
    to_rest = import_module("formulas").to_rest
    assert to_rest(formula) == rf":math:`\displaystyle {shown}`"


def test_words_beside_a_formula_stay_words(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / ".github/docs")
    to_rest = import_module("formulas").to_rest
    said = to_rest("T = |w| + eta where `adapts` holds, else 1")
    assert said.endswith(r"where `adapts` holds, else :math:`\displaystyle 1`")
