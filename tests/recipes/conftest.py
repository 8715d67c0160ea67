"""Runs that many tests read, trained once."""

import shutil

import pytest

from recipes.cifar_wrn import main as train

SMALL = ["--data", "digits", "--model", "wrn-10-1", "--batch-size", "256", "--epochs", "2"]
SMALL += ["--compile", "no"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Return a directory of two runs of two epochs on the digits, "sgd" and "sam"."""
    folder = tmp_path_factory.mktemp("runs")
    for name, rho in (("sgd", "0"), ("sam", "0.2")):
        assert train([*SMALL, "--rho", rho, "--output", str(folder / name)]) == 0
    return folder


@pytest.fixture
def runs(trained, tmp_path):
    """Return copies of the two runs, to write into."""
    return [shutil.copytree(trained / name, tmp_path / name) for name in ("sgd", "sam")]
