"""Each way to get SAM wrong makes the tests that pin it down fail."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PERTURB, UPDATE = "tests/test_perturb.py", "tests/test_update.py"
METHODS = "tests/test_methods.py"

# Name -> file, the right line, a wrong one, and the tests that tell them apart.
MUTANTS = {
    "no normalisation": (
        "perturb.py",
        "rho / length, 0.0)",
        "rho, 0.0)",
        PERTURB,
    ),
    "norm of each tensor": (
        "perturb.py",
        "return tree.add_scaled(params, rate(tree.norm(grads), rho), grads)",
        "return {n: tree.add_scaled({n: w}, rate(tree.norm({n: grads[n]}), rho),"
        " {n: grads[n]})[n] for n, w in params.items()}",
        PERTURB,
    ),
    "wrong sign": (
        "perturb.py",
        "rate(tree.norm(grads), rho), grads)",
        "-rate(tree.norm(grads), rho), grads)",
        PERTURB,
    ),
    "no guard at zero": (
        "perturb.py",
        "torch.where(length > smallest, rho / length, 0.0)",
        "rho / length",
        PERTURB,
    ),
    "guard by adding 1e-6": (
        "perturb.py",
        "torch.where(length > smallest, rho / length, 0.0)",
        "rho / (length + 1e-6)",
        PERTURB,
    ),
    "sum of absolute values": (
        "tree.py",
        "torch._foreach_norm(leaves, 2, dtype=dtype)",
        "torch._foreach_norm(leaves, 1, dtype=dtype)",
        PERTURB,
    ),
    "in place": (
        "tree.py",
        "torch._foreach_add(*_aligned(left, right))",
        "[a.add_(b) for a, b in zip(*_aligned(left, right), strict=True)]",
        PERTURB,
    ),
    "statistics counted twice": (
        "method.py",
        "worst = evaluate(perturbed, point.buffers, point.batch)",
        "worst = evaluate(perturbed, clean.buffers, point.batch);"
        " clean = clean._replace(buffers=worst.buffers)",
        UPDATE,
    ),
    "loss of the perturbed pass": (
        "method.py",
        "seen = Descent(worst.grads, clean, worst.loss, length)",
        "seen = Descent(worst.grads, clean._replace(loss=worst.loss), worst.loss, length)",
        UPDATE,
    ),
    "gradient of the clean pass": (
        "method.py",
        "seen = Descent(worst.grads, clean,",
        "seen = Descent(clean.grads, clean,",
        UPDATE,
    ),
    "descent from the perturbed weights": (
        "method.py",
        "worst = evaluate(perturbed, point.buffers, point.batch)",
        "worst = evaluate(perturbed, point.buffers, point.batch);"
        " [point.params[n].copy_(w) for n, w in perturbed.items()]",
        UPDATE,
    ),
    "the orthogonal part of another gradient": (
        "methods.py",
        "_orthogonal(worst, clean)",
        "_orthogonal(clean, worst)",
        METHODS,
    ),
    "the mean is updated before it is subtracted": (
        "methods.py",
        'direction = tree.add_scaled(grads, -sigma, memory["mean"])',
        "direction = tree.add_scaled(grads, -sigma,"
        ' _averaged(memory, grads, 1 - decay)["mean"])',
        METHODS,
    ),
    "momentum the other way": (
        "methods.py",
        "tree.scale(velocity, -1.0)",
        "tree.scale(velocity, 1.0)",
        METHODS,
    ),
    "sharpness beside the optimizer is not looked at": (
        "update.py",
        "looked_at.append(tree.norm(seen.beside))",
        "pass",
        "tests/test_realities.py",
    ),
    "a step that is not finite is taken": (
        "update.py",
        "params=tree.select(finite, new_params, params)",
        "params=new_params",
        UPDATE,
    ),
    "a file is not synced": (
        "files.py",
        "        sync(temporary)\n",
        "",
        "tests/test_files.py",
    ),
    "a directory is not synced": (
        "files.py",
        "        sync(path.parent)\n",
        "",
        "tests/test_files.py",
    ),
    "the digest is not looked at": (
        "tensorfile.py",
        "if found != expected:",
        'if found == "":',
        "tests/test_tensorfile.py",
    ),
    "dtypes are not in the digest": (
        "tensorfile.py",
        "[str(tensor.dtype), [*tensor.shape], found]",
        "[[*tensor.shape], found]",
        "tests/test_tensorfile.py",
    ),
    "names may stand twice": (
        "tensorfile.py",
        "if len(found) < len(pairs):",
        "if False:",
        "tests/test_tensorfile.py",
    ),
    "the best goes with the old": (
        "checkpoint.py",
        ", *(p for name in names for p in self.best(name))}",
        "}",
        "tests/test_checkpoint.py",
    ),
    "states that are not finite are kept": (
        "checkpoint.py",
        "        _require_finite(state)\n",
        "",
        "tests/test_checkpoint.py",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_the_tests_kill_the_mutant(tmp_path, name):
    file, right, wrong, tests = MUTANTS[name]
    shutil.copytree(ROOT, tmp_path / "copy", ignore=shutil.ignore_patterns(".*", "runs"))
    path = tmp_path / "copy" / "samfn" / file
    source = path.read_text()
    assert source.count(right) == 1
    path.write_text(source.replace(right, wrong))
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-n0", "-p", "no:cacheprovider", tests],
        cwd=tmp_path / "copy",
        env=os.environ | {"PYTHONPATH": str(tmp_path / "copy")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1, result.stdout
    assert "1 failed" in result.stdout
