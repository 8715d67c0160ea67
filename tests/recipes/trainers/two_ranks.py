"""Two processes in which every trainer trains, forked from one that has imported them."""

import os
import tempfile
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import torch.distributed as dist

from tests import commands
from tests.ranks import on_ranks

PACKAGES = {
    "in_accelerate": ["accelerate"],
    "in_hugging_face": ["accelerate", "transformers"],
    "in_lightning": ["lightning"],
    "in_timm": ["timm"],
    "in_skorch": ["skorch"],  # It has no ranks of its own.
}
TRAINERS = [name for name in [*PACKAGES][:-1] if all(map(find_spec, PACKAGES[name]))]


@cache
def found():
    """Return the outcomes of all trainers on two ranks, by row and column."""
    context = commands.context()
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=fork, args=(there,))
    process.start()
    there.close()
    try:
        return here.recv()
    finally:
        process.join()


def fork(pipe):
    for name in TRAINERS:  # Once, and not in both.
        import_module(f"tests.recipes.trainers.{name}")
    first, second = on_ranks(2, train, context=get_context("fork"))
    assert first == second
    pipe.send(first)


def as_of_torchrun():
    """Say in the environment what torchrun would."""
    rank = str(dist.get_rank())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": "0"}
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def train():
    as_of_torchrun()
    return {
        (row, column): outcome(cell)
        for name in TRAINERS
        for row, cells in import_module(f"tests.recipes.trainers.{name}").CELLS.items()
        for column, cell in cells.items()
        if column.startswith("two ranks")
    }


def outcome(cell):
    """Return the weights that a cell comes to, as a list, or what an error says."""
    with tempfile.TemporaryDirectory() as directory:
        try:
            return cell.found(Path(directory)).tolist()
        except RuntimeError as error:
            return str(error)
