import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from recipes.data import digits
from recipes.errors import DataError


def test_digits_are_read_and_divided_as_scikit_learn_does():
    theirs = load_digits()
    assert tuple(map(str, theirs.target_names)) == digits.CLASSES
    options = {"test_size": digits.SHARE, "stratify": theirs.target, "random_state": 0}
    parts = train_test_split(theirs.images, theirs.target, **options)
    train, test, train_labels, test_labels = map(torch.as_tensor, parts)
    found = digits.read()
    assert [part.dtype for part in found] == [torch.uint8, torch.int64] * 2
    assert torch.equal(found[0], (train * 255 / 16).round().to(torch.uint8)[:, None])
    assert torch.equal(found[1], train_labels)
    assert torch.equal(found[2], (test * 255 / 16).round().to(torch.uint8)[:, None])
    assert torch.equal(found[3], test_labels)


def test_of_equal_remainders_chance_decides():
    labels = np.arange(4).repeat(5)
    found = set()
    for seed in range(20):
        train, test = digits.split(labels, 6, np.random.RandomState(seed))
        assert sorted([*train, *test]) == [*range(20)]
        counts = np.bincount(labels[test])
        assert sorted(counts) == [1, 1, 2, 2]
        found.add(tuple(counts))
    assert len(found) > 3


def test_it_is_said_what_is_missing(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(digits, "FILE", "datasets/data/absent.csv.gz")
        with pytest.raises(DataError, match=r"cannot read scikit-learn's digits: .*absent"):
            digits.read()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="expected scikit-learn, which brings the digits"):
        digits.read()
