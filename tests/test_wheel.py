"""The wheel holds the library alone, and takes a step in an empty environment."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest

from tests import ROOT

STEP = """
import samfn, torch
assert "site-packages" in samfn.__file__
for other in ("recipes", "bench", "tests"):
    try:
        __import__(other)
        raise SystemExit(f"{other} is installed")
    except ModuleNotFoundError:
        pass
loss_fn = lambda params, buffers, batch: (params["w"] - batch).square().sum()
optimizer = samfn.sgd()
state = samfn.init({"w": torch.zeros(2)}, {}, optimizer=optimizer)
given = {"loss_fn": loss_fn, "optimizer": optimizer}
state, metrics = samfn.sam_update(state, torch.ones(2), rho=0.0, lr=0.5, **given)
assert state.params["w"].tolist() == [1.0, 1.0] and metrics.finite
samfn.save("state.safetensors", state)
print("one step")
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Return a copy of what git would have of this tree, in a repository of its own."""
    copy = tmp_path_factory.mktemp("source") / "samfn"
    hidden = shutil.ignore_patterns(".git", "__pycache__", "*.egg-info", ".*_cache", "runs")
    shutil.copytree(ROOT, copy, ignore=hidden)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(copy)]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *command], check=True)
    return copy


@pytest.mark.slow
def test_the_wheel_is_the_library_and_takes_a_step_where_nothing_else_is(source, tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*build, str(source)], check=True)
    status = ["git", "-C", str(source), "status", "--porcelain"]
    assert subprocess.run(status, capture_output=True, text=True).stdout == ""
    (wheel,) = tmp_path.glob("samfn-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"samfn"}
    there = {str(p.relative_to(source)) for p in (source / "samfn").rglob("*.py")}
    assert there | {"samfn/py.typed"} <= {*names}

    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    (packages,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    install = [*pip, "install", "-q", "--no-deps", "--target", str(packages), str(wheel)]
    subprocess.run(install, check=True)
    # Its dependencies, which are large, are those of this environment.
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    ran = subprocess.run(
        [str(python), "-I", "-c", STEP], cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "one step\n"


@pytest.mark.slow
def test_importing_it_takes_little_beside_torch():
    code = """
import time
start = time.process_time()
import torch
torch_is_there = time.process_time()
import samfn
print((time.process_time() - start) / (torch_is_there - start))
"""
    ratios = []
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    for _ in range(4):  # The first may write bytecode.
        command = [sys.executable, "-c", code]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True)
        ratios.append(float(ran.stdout))
    assert min(ratios) <= 1.05
