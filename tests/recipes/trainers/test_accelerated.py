"""SAM in loops written with accelerate: errors, and what a closure does there."""

import pytest
import torch

from tests.recipes.trainers import by_hand
from tests.recipes.trainers.in_accelerate import Run


class Alone(Run):
    def step(self, batch):
        self.accelerator.backward(by_hand.cross_entropy(self.model, batch))
        self.optimizer.step()
        self.optimizer.zero_grad()


class Forgetful(Run):
    """Takes the passes by itself, but keeps nothing."""

    def step(self, batch):
        self.accelerator.backward(by_hand.cross_entropy(self.model, batch))
        self.optimizer.optimizer.first_step(zero_grad=True)
        self.accelerator.backward(by_hand.cross_entropy(self.model, batch))
        self.optimizer.step()
        self.optimizer.zero_grad()


class Closed(Run):
    calls = 0

    def step(self, batch):
        def closure():
            self.calls += 1
            self.optimizer.zero_grad()
            loss = by_hand.cross_entropy(self.model, batch)
            self.accelerator.backward(loss)
            return loss

        self.optimizer.step(closure)
        self.scheduler.step()


def test_one_pass_is_an_error():
    with pytest.raises(RuntimeError, match="call first_step, and backward again"):
        Alone().epochs()


def test_a_loop_that_keeps_nothing_is_an_error_where_it_accumulates():
    found = Forgetful().epochs(1).weights()
    expected = by_hand.train(by_hand.single(), epochs=1, gamma=1)
    assert (found - expected).abs().max() <= 2e-7
    match = "first_step was called twice: call second_step or keep_step"
    with pytest.raises(RuntimeError, match=match):
        Forgetful(gradient_accumulation_steps=2).epochs()


def test_a_closure_is_called_twice_and_not_at_all_where_accelerate_accumulates():
    made = Closed()
    expected = by_hand.train(by_hand.single())
    assert (made.epochs().weights() - expected).abs().max() <= 2e-7
    assert made.calls == 2 * 10
    made = Closed(gradient_accumulation_steps=2).epochs(1)
    assert made.calls == 2 * 3


@pytest.mark.parametrize("number", [1, 2, 3])
def test_weights_are_put_back_where_a_pass_fails(number):
    made = Run()
    calls = iter(range(10))

    def failing(*_):
        if next(calls) == number:
            raise KeyError("no such file")

    made.model.register_forward_pre_hook(failing)
    with pytest.raises(KeyError):
        made.epochs()
    expected = by_hand.train(by_hand.single()[: number // 2], epochs=1)
    torch.testing.assert_close(made.weights(), expected)


def test_saving_within_a_group_is_an_error(tmp_path):
    class Saving(Run):
        def step(self, batch):
            super().step(batch)
            self.accelerator.save_state(str(tmp_path))

    with pytest.raises(RuntimeError, match="gradients of 1 micro-batch are kept"):
        Saving(gradient_accumulation_steps=2).epochs()
