"""The examples of recipes/trainers/README.md are run."""

import re

import pytest
import torch

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
