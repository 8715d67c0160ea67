import random

import numpy
import pytest
import torch

import samfn


def draw():
    return torch.rand(3).tolist(), random.random(), numpy.random.rand(), random.gauss(0, 1)


def test_generators_go_on_where_they_were_even_through_a_file(tmp_path):
    state = samfn.init({"w": torch.ones(1)}, {}, optimizer=samfn.sgd())
    draw()
    path = tmp_path / "state.safetensors"
    samfn.save(path, state, random=samfn.random_state(), epoch=3)
    expected = [draw() for _ in range(3)]
    _, metadata = samfn.restore(path, like=state)
    assert [draw() for _ in range(3)] != expected
    samfn.set_random_state(metadata["random"])
    assert [draw() for _ in range(3)] == expected


def test_states_of_another_machine_are_refused():
    states = samfn.random_state()
    with pytest.raises(ValueError, match=r"expected the states of .*got .*cuda:9"):
        samfn.set_random_state({**states, "cuda:9": states["torch"]})


def wrong(states):
    yield from ({**states, name: torch.ones(3, dtype=torch.uint8)} for name in states)
    for text in ('["x"]', "[3, [1], null]", "[3, 4, 5]", '["MT19937", [1], 0, 0, 0.0]'):
        junk = torch.tensor(list(text.encode()), dtype=torch.uint8)
        yield from ({**states, name: junk} for name in ("python", "numpy"))


def test_states_that_are_none_change_no_generator():
    for states in wrong(samfn.random_state()):
        before = samfn.random_state()
        with pytest.raises(ValueError, match="expected states of generators, got others"):
            samfn.set_random_state(states)
        after = samfn.random_state()
        assert all(torch.equal(before[name], after[name]) for name in before)
    for states in (None, "abc", [1]):
        with pytest.raises(TypeError, match="expected states of generators by their names"):
            samfn.set_random_state(states)
