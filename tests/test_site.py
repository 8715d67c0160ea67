"""The site of `.github/docs`: no reference and no link in it leads nowhere."""

import subprocess
import sys
from importlib import import_module

import pytest

import samfn
from tests import ROOT

for package in ("sphinx", "furo", "myst_parser"):
    pytest.importorskip(package)


@pytest.fixture
def docs(monkeypatch):
    """Return a function that imports a module of the site's configuration."""
    monkeypatch.syspath_prepend(ROOT / ".github/docs")
    return import_module


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
def test_a_formula_is_set_as_it_is_read(formula, shown, docs):
    assert docs("formulas").to_rest(formula) == rf":math:`\displaystyle {shown}`"


def test_words_beside_a_formula_stay_words(docs):
    said = docs("formulas").to_rest("T = |w| + eta where `adapts` holds, else 1")
    assert said.endswith(r"where `adapts` holds, else :math:`\displaystyle 1`")


def test_every_readme_is_a_chapter_and_every_public_name_has_a_page(docs):
    pages = docs("pages")
    readmes = {
        str(page.relative_to(ROOT))
        for folder in ("samfn", "recipes", "bench", "tests")
        for page in ROOT.glob(f"{folder}/**/README.md")
    }
    assert readmes <= {*pages.READMES}
    defined = {name for name in vars(samfn) if pages.home_of(getattr(samfn, name))}
    assert {f"samfn.{name}" for name in defined} <= pages.PUBLIC.keys()
    assert {pages.path_of(home) for home in pages.HOMES} <= {*pages.found()}
