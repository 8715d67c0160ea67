"""A network of timm, with timm's groups, schedule, clipping and average, for the table."""

from contextlib import nullcontext

import torch
from timm.models import VisionTransformer
from timm.optim import param_groups_layer_decay
from timm.scheduler import StepLRScheduler
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch.distributed import get_rank, is_initialized
from torch.nn.parallel import DistributedDataParallel

import samfn
from tests.recipes.trainers import by_hand

SHAPE = {"img_size": (2, 4), "patch_size": 2, "in_chans": 1, "num_classes": 3}
SHAPE |= {"embed_dim": 8, "depth": 2, "num_heads": 2}
DECAY = 0.8  # of the average


def network():
    torch.manual_seed(1)
    return VisionTransformer(**SHAPE)


def groups_of(model):
    return param_groups_layer_decay(model, weight_decay=0.1, layer_decay=0.5)


def loss_of(model, batch, bf16=False):
    inputs, targets = batch
    return by_hand.cross_entropy(model, (inputs.view(-1, 1, 2, 4), targets), bf16)


class Run:
    """A loop as a script of timm is written, and what it holds."""

    def __init__(self, parts=1, clip=None, bf16=False):
        self.parts, self.clip, self.bf16 = parts, clip, bf16
        self.network = self.model = network()
        groups = groups_of(self.network)
        self.optimizer = samfn.SAM(groups, torch.optim.SGD, **by_hand.SETTINGS)
        decay = {"decay_t": 1, "decay_rate": by_hand.GAMMA, "t_in_epochs": False}
        self.scheduler = StepLRScheduler(self.optimizer, **decay)
        self.average = ModelEmaV3(self.network, decay=DECAY)
        self.updates = 0
        if is_initialized():
            self.model = DistributedDataParallel(self.network)

    def epochs(self, steps, count=by_hand.EPOCHS):
        for step in steps * count:
            for number, batch in enumerate(step):
                self.passes(batch, is_last=number + 1 == len(step))
            self.descend()
        return self

    def passes(self, batch, is_last):
        with self.unsynchronised():
            (loss_of(self.model, batch, self.bf16) / self.parts).backward()
        self.optimizer.first_step(zero_grad=True)
        with nullcontext() if is_last else self.unsynchronised():
            (loss_of(self.model, batch, self.bf16) / self.parts).backward()
        if not is_last:
            self.optimizer.keep_step(zero_grad=True)

    def unsynchronised(self):
        return getattr(self.model, "no_sync", nullcontext)()

    def descend(self):
        if self.clip:
            dispatch_clip_grad(self.network.parameters(), self.clip)
        self.optimizer.second_step(zero_grad=True)
        self.average.update(self.network)
        self.updates += 1
        self.scheduler.step_update(self.updates)

    def weights(self):
        return torch.cat([by_hand.flat(self.network), by_hand.flat(self.average.module)])

    def state(self):
        parts = (self.network, self.optimizer, self.average, self.scheduler)
        return [part.state_dict() for part in parts], self.updates

    def load(self, state):
        states, self.updates = state
        parts = (self.network, self.optimizer, self.average, self.scheduler)
        for part, its in zip(parts, states, strict=True):
            part.load_state_dict(its)
        return self


SETTINGS = {
    "accumulation": {"parts": 2},
    "clipping": {"clip": by_hand.CLIP},
    "bf16": {"bf16": True},
    "two ranks, accumulation": {"parts": 2},
}


def run(column, directory):
    if column == "resume":
        return resumed(directory / "last.pt")
    steps = by_hand.single()
    if is_initialized():
        steps = [[step[get_rank()]] for step in by_hand.divided()]
    if column.endswith("accumulation"):
        steps = by_hand.pairs(steps)
    return Run(**SETTINGS.get(column, {})).epochs(steps).weights()


def resumed(path):
    torch.save(Run().epochs(by_hand.single(), 1).state(), path)
    again = Run().load(torch.load(path, weights_only=True))
    found = again.epochs(by_hand.single(), 1).weights()
    assert torch.equal(found, Run().epochs(by_hand.single()).weights())
    return found


def by_parameter(name):
    """Return a setting of timm's groups, in the order of the network's parameters."""
    model = network()
    values = {id(p): group[name] for group in groups_of(model) for p in group["params"]}
    return [values[id(p)] for p in model.parameters()]


OWN = {"scales": by_parameter("lr_scale"), "decays": by_parameter("weight_decay")}
OWN |= {"model": network(), "loss_of": loss_of, "average": DECAY}
CELLS = {"timm's parts, `samfn.SAM`": by_hand.cells(run, parts=2, **OWN)}
