"""Networks trained by skorch, for the table."""

import torch
from skorch import NeuralNetClassifier
from skorch.callbacks import GradientNormClipping, LRScheduler
from torch import nn

import samfn
from tests.recipes.trainers import by_hand


def net(epochs=by_hand.EPOCHS, clip=None):
    schedule = LRScheduler(torch.optim.lr_scheduler.ExponentialLR, gamma=by_hand.GAMMA)
    schedule.set_params(step_every="batch")
    clipping = [GradientNormClipping(clip)] if clip else []
    return NeuralNetClassifier(
        by_hand.network,
        criterion=nn.CrossEntropyLoss,
        optimizer=samfn.SAM,
        optimizer__base_optimizer=torch.optim.SGD,
        optimizer__rho=by_hand.RHO,
        optimizer__momentum=by_hand.MOMENTUM,
        lr=by_hand.LR,
        batch_size=by_hand.BATCH,
        max_epochs=epochs,
        callbacks=[schedule, *clipping],
        iterator_train__shuffle=False,
        train_split=None,
        verbose=0,
    )


def run(column, directory):
    if column == "resume":
        return resumed(directory)
    clip = by_hand.CLIP if column == "clipping" else None
    return by_hand.flat(net(clip=clip).fit(*by_hand.table()).module_)


def resumed(directory):
    files = {name: str(directory / name) for name in ("f_params", "f_optimizer")}
    net(1).fit(*by_hand.table()).save_params(**files)
    again = net(1).initialize()
    again.load_params(**files)
    found = by_hand.flat(again.partial_fit(*by_hand.table()).module_)
    assert torch.equal(found, by_hand.flat(net().fit(*by_hand.table()).module_))
    return found


HAS = ("plain", "clipping", "resume")  # The others are not its own.
found = by_hand.cells(run)
CELLS = {"skorch, `samfn.SAM`": {name: found[name] for name in HAS}}
