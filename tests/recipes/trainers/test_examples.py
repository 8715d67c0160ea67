"""The examples of recipes/trainers/README.md are run."""

import re

import pytest
import torch

import samfn
from recipes.trainers import sam_of
from recipes.trainers.accelerated import two_passes
from tests import ROOT
from tests.recipes.trainers.in_accelerate import accelerator

PAGE = (ROOT / "recipes" / "trainers" / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
IDS = ["Lightning", "Lightning, manual", "Hugging Face", "accelerate", "timm", "skorch"]


@pytest.mark.parametrize("example", EXAMPLES, ids=IDS)
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_examples_train(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    accelerator()  # Settings of the tests before are forgotten.
    exec(example, scope := {"__name__": "example"})
    assert all(torch.isfinite(p).all() for p in scope["model"].parameters())


class Wrapped:
    """What trainers put around an optimizer."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


def test_the_optimizer_of_a_trainer_has_to_be_samfn_sam():
    weights = [torch.nn.Parameter(torch.ones(2))]
    sam = samfn.SAM(weights, torch.optim.SGD, lr=0.1)
    assert sam_of(sam) is sam
    assert sam_of(Wrapped(sam)) is sam
    for other in (torch.optim.SGD(weights), Wrapped(torch.optim.SGD(weights))):
        with pytest.raises(TypeError, match=r"expected samfn\.SAM .* got SGD"):
            sam_of(other)
    with pytest.raises(TypeError, match=r"expected what accelerator\.prepare returns"):
        two_passes(None, None, sam, None)
