"""SAM with timm's scaler, which calls backward and step by itself."""

import torch
from timm.utils import NativeScaler

from tests.recipes.trainers import by_hand
from tests.recipes.trainers.in_timm import Run, loss_of


class Scaled(Run):
    def __init__(self, **settings):
        super().__init__(**settings)
        self.scaler = NativeScaler("cpu")

    def passes(self, batch, is_last):
        loss = loss_of(self.model, batch)
        self.scaler(loss, self.optimizer, need_update=False)
        self.optimizer.first_step(zero_grad=True)
        loss = loss_of(self.model, batch)
        how = {"clip_grad": self.clip, "parameters": self.model.parameters()}
        self.scaler(loss, self.optimizer, **how)
        self.optimizer.zero_grad()
        self.average.update(self.network)
        self.updates += 1
        self.scheduler.step_update(self.updates)

    def descend(self):
        pass  # The scaler did.


def test_the_scaler_of_timm_takes_the_second_pass():
    found = Scaled(clip=by_hand.CLIP).epochs(by_hand.single()).weights()
    expected = Run(clip=by_hand.CLIP).epochs(by_hand.single()).weights()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
