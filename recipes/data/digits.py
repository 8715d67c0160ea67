"""The handwritten digits that scikit-learn ships: 1,797 images of 8 x 8 pixels.

scikit-learn itself takes a second to import, which is a third of a short command. So its
file is read here, and divided as `sklearn.model_selection.train_test_split` divides it.
"""

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recipes.errors import DataError

FILE = "datasets/data/digits.csv.gz"
SHARE = 0.2  # of the images, that test
CLASSES = tuple("0123456789")
GREYS = 16  # above black

Integers = np.ndarray[Any, np.dtype[np.integer[Any]]]


def read() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images and labels, then those for testing; NCHW uint8 and N int64.

    Raises:
        DataError: scikit-learn is not there, or has no such file.
    """
    found = importlib.util.find_spec("sklearn")
    if found is None or found.origin is None:
        raise DataError("expected scikit-learn, which brings the digits, and found none")
    try:
        table = np.loadtxt(Path(found.origin).parent / FILE, delimiter=",")
    except OSError as error:
        raise DataError(f"cannot read scikit-learn's digits: {error}") from error
    images = torch.from_numpy(table[:, :-1]).reshape(-1, 1, 8, 8)
    images = (images * 255 / GREYS).round().to(torch.uint8)
    labels = torch.from_numpy(table[:, -1]).long()
    # One split for every seed: a test set that moved with the seed would add its spread.
    count = math.ceil(SHARE * len(labels))
    parts = split(labels.numpy(), count, np.random.RandomState(0))
    train, test = map(torch.from_numpy, parts)
    return images[train], labels[train], images[test], labels[test]


def split(
    labels: Integers, count: int, generator: np.random.RandomState
) -> tuple[Integers, Integers]:
    """Return the places of those to train with and of `count` to test, in random order.

    Each class has its share of both, as with scikit-learn's `stratify`, whose order of
    random numbers this follows.
    """
    sizes = np.bincount(labels)
    others = len(labels) - count
    shares = _rounded(sizes / len(labels) * others, others, generator)
    parts: tuple[list[Integers], list[Integers]] = [], []
    for label, share in enumerate(shares):
        places = np.flatnonzero(labels == label)[generator.permutation(sizes[label])]
        parts[0].append(places[:share])
        parts[1].append(places[share:])
    train, test = (generator.permutation(np.concatenate(part)) for part in parts)
    return train, test


def _rounded(shares: Any, total: int, generator: np.random.RandomState) -> Integers:
    """Return integers that add up to `total`: the largest remainders become one more.

    Among equal remainders chance decides.
    """
    whole: Integers = np.floor(shares).astype(int)
    remainders = shares - whole
    for value in np.unique(remainders)[::-1]:
        if not (left := total - whole.sum()):
            break
        equal = np.flatnonzero(remainders == value)
        whole[generator.choice(equal, min(len(equal), left), replace=False)] += 1
    return whole
