"""What outlives a process: checkpoints, exported models, files that are whole or absent."""

from samfn.storage.checkpoint import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointFormatError,
    CheckpointWriteError,
    restore,
    save,
)
from samfn.storage.checkpoints import Checkpoints, Found
from samfn.storage.export import ExportError, export_program, export_weights
from samfn.storage.files import InUseError, held
from samfn.storage.randomness import random_state, set_random_state

__all__ = [
    "CheckpointCorruptError",
    "CheckpointError",
    "CheckpointFormatError",
    "CheckpointWriteError",
    "Checkpoints",
    "ExportError",
    "Found",
    "InUseError",
    "export_program",
    "export_weights",
    "held",
    "random_state",
    "restore",
    "save",
    "set_random_state",
]
