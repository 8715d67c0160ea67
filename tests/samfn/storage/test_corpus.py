"""Files that older versions wrote keep loading.

`python -m tests.samfn.storage.test_corpus` adds some.

Each holds its own expectation, as metadata: inputs, the outputs that the weights gave, and
the loss of the next step.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import samfn
from tests import ROOT

CORPUS = ROOT / "tests" / "corpus"
CASES = {
    "sam_sgd": (samfn.sam, samfn.sgd),
    "asam_adamw": (samfn.asam, samfn.adamw),
    "looksam_nadam": (lambda: samfn.looksam(3), samfn.nadam),
    "scaled_vasso_clipped": (
        lambda: samfn.loss_scaled(samfn.vasso()),
        lambda: samfn.clipped(samfn.sgd(nesterov=True), 1.0),
    ),
    "every_momentum_adagrad": (
        lambda: samfn.every(samfn.momentum_sam(), 2),
        samfn.adagrad,
    ),
}
FILES = sorted(CORPUS.glob("*.safetensors"))


def parts(case):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    method, optimizer = (make() for make in CASES[case])
    loss_fn = samfn.supervised(model, F.cross_entropy)
    state = samfn.init(*samfn.split(model), optimizer=optimizer, method=method)
    common = {"loss_fn": loss_fn, "optimizer": optimizer, "method": method}
    return model, state, common


def outputs(model, state, inputs):
    samfn.load(model, state.params, state.buffers)
    with torch.no_grad():
        return model.eval()(inputs)


def write(case):
    """Add a file of this version."""
    model, state, common = parts(case)
    inputs, targets = torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 1, 0])
    for _ in range(4):
        state, _ = samfn.sam_update(state, (inputs, targets), **common, lr=0.05)
    _, metrics = samfn.sam_update(state, (inputs, targets), **common, lr=0.05)
    expected = {"outputs": outputs(model, state, inputs), "loss": metrics.loss}
    batch = {"inputs": inputs, "targets": targets}
    path = CORPUS / f"format{samfn.storage.encoding.FORMAT}_{case}.safetensors"
    samfn.save(path, state, batch=batch, expected=expected, epoch=4)


def test_every_case_of_this_format_is_kept():
    names = {path.stem for path in FILES}
    assert {f"format{samfn.storage.encoding.FORMAT}_{case}" for case in CASES} <= names
    assert sum(path.stat().st_size for path in FILES) < 100_000


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_that_was_written_once_loads_and_goes_on(path):
    case = path.stem.partition("_")[2]
    model, like, common = parts(case)
    state, metadata = samfn.restore(path, like=like)
    assert metadata["epoch"] == state.step == 4
    batch, expected = metadata["batch"], metadata["expected"]
    inputs, targets = batch["inputs"], batch["targets"]
    # Other processors and versions of PyTorch round in their own ways.
    close = {"rtol": 1e-5, "atol": 1e-6}
    found = outputs(model, state, inputs)
    torch.testing.assert_close(found, expected["outputs"], **close)
    model.train()
    new, metrics = samfn.sam_update(state, (inputs, targets), **common, lr=0.05)
    torch.testing.assert_close(metrics.loss, expected["loss"], **close)
    assert new.step == 5


if __name__ == "__main__":
    for name in CASES:
        write(name)
