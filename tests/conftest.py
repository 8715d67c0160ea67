"""Settings for all tests: stricter than production, and repeatable."""

import pytest
import torch
from hypothesis import settings

# The first call of an operation takes longer than Hypothesis's deadline.
settings.register_profile("samfn", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("samfn")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
