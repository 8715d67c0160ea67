"""Text as tokens: a file, or what every Python ships, in sequences of one length."""

import importlib
import inspect
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recipes.errors import DataError
from samfn.storage import files

ENGLISH = "pydoc_data.topics"  # the reference of the language, by topics
MODULES = ("argparse", "dataclasses", "difflib", "textwrap")


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8."""

    vocabulary = 256

    def __call__(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        return [*text.encode("utf-8", "replace")]


class Sequences(NamedTuple):
    """Tokens to train on, and to test on, shape (sequences, tokens)."""

    train: Tensor
    test: Tensor


def english() -> str:
    """Return the reference of Python's language, which every Python has."""
    topics: dict[str, str] = importlib.import_module(ENGLISH).topics
    return "\n".join(topics.values())


def source_code() -> str:
    """Return the source code of some of Python's modules."""
    return "\n".join(inspect.getsource(importlib.import_module(name)) for name in MODULES)


def read(path: Path) -> str:
    """Return the text of a file.

    Raises:
        DataError: it cannot be read, or is no UTF-8.
    """
    try:
        return files.read_text(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8: {error}") from error


def sequences(
    text: str, tokenize: Any, length: int, *, most: int | None = None, test: float = 0.1
) -> Sequences:
    """Cut a text into sequences, of which the last share is for the test.

    Args:
        text: at least twenty sequences long.
        tokenize: text -> tokens.
        length: of a sequence, in tokens.
        most: sequences to train on, the first ones. None is all.
        test: share of the sequences, at the end of the text.

    Raises:
        DataError: the text is too short.
    """
    tokens = torch.tensor(tokenize(text), dtype=torch.long)
    cut = tokens[: len(tokens) // length * length].view(-1, length)
    if len(cut) < 20:
        raise DataError(
            f"expected a text of at least 20 sequences of {length} tokens, got"
            f" {len(tokens)} tokens"
        )
    held_out = round(test * len(cut))
    return Sequences(cut[:-held_out][:most].clone(), cut[-held_out:].clone())
