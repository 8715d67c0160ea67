"""Trainers that may be missing, and what they say that is an error elsewhere."""

import logging
import warnings
from importlib.util import find_spec

import pytest

FILES = {
    "lightning": ["test_lightning.py", "test_examples.py"],
    "transformers": ["test_hugging_face.py", "test_fully_sharded.py", "test_examples.py"],
    "accelerate": [
        "test_hugging_face.py",
        "test_accelerated.py",
        "test_fully_sharded.py",
        "test_examples.py",
    ],
    "timm": ["test_timm.py", "test_examples.py"],
    "skorch": ["test_examples.py"],
}
collect_ignore = [
    file for package, files in FILES.items() if not find_spec(package) for file in files
]
WARNINGS = (r"`isinstance\(treespec, LeafSpec\)` is deprecated",)


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message)
