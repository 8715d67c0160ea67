"""What trainers say that is no fault of ours, and is an error elsewhere."""

import logging
import warnings

import pytest

WARNINGS = (r"`isinstance\(treespec, LeafSpec\)` is deprecated",)


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message)
