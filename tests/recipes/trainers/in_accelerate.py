"""Networks trained in a loop that is written with accelerate, for the table."""

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch.utils.data import DataLoader, TensorDataset

import samfn
from recipes.trainers.accelerated import two_passes
from tests.recipes.trainers import by_hand


def accelerator(**settings):
    """Return an accelerator that shares no settings with those of other tests."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accelerator(cpu=True, **settings)


class Run:
    """A loop and what it holds."""

    def __init__(self, size=by_hand.BATCH, clip=None, **settings):
        self.accelerator, self.clip = accelerator(**settings), clip
        model = by_hand.network()
        optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, **by_hand.SETTINGS)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, by_hand.GAMMA)
        rows = DataLoader(TensorDataset(*by_hand.table()), batch_size=size)
        made = self.accelerator.prepare(model, optimizer, rows, scheduler)
        self.model, self.optimizer, self.rows, self.scheduler = made

    def epochs(self, count=by_hand.EPOCHS):
        for _ in range(count):
            for batch in self.rows:
                with self.accelerator.accumulate(self.model):
                    self.step(batch)
        return self

    def step(self, batch):
        inputs, targets = batch

        def loss():
            return torch.nn.functional.cross_entropy(self.model(inputs), targets)

        two_passes(self.accelerator, self.model, self.optimizer, loss)
        if self.clip and self.accelerator.sync_gradients:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()

    def weights(self):
        return by_hand.flat(self.model)


SETTINGS = {
    "accumulation": {"gradient_accumulation_steps": 2},
    "clipping": {"clip": by_hand.CLIP},
    "bf16": {"mixed_precision": "bf16"},
    "two ranks": {"size": by_hand.BATCH // 2},
}
SETTINGS["two ranks, accumulation"] = SETTINGS["accumulation"] | SETTINGS["two ranks"]


def run(column, directory):
    if column == "resume":
        return resumed(directory)
    return Run(**SETTINGS.get(column, {})).epochs().weights()


def resumed(directory):
    Run().epochs(1).accelerator.save_state(str(directory))
    again = Run()
    again.accelerator.load_state(str(directory))
    found = again.epochs(1).weights()
    assert torch.equal(found, Run().epochs().weights())
    return found


# The schedule that accelerate has prepared goes on by a step for each process.
cells = by_hand.cells(run, parts=2, gamma=by_hand.GAMMA**2)
CELLS = {"accelerate, `two_passes`": cells}
