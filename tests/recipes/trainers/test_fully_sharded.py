"""SAM in trainers whose models FSDP2 has cut: all ranks share a perturbation."""

from functools import cache

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import DistributedType, PartialState
from accelerate.utils import GradientAccumulationPlugin

import samfn
from tests.ranks import on_ranks
from tests.recipes.trainers import by_hand, in_accelerate, in_hugging_face, two_ranks

TWICE = by_hand.pairs(by_hand.single())
BY_HAND = {
    "plain": {"steps": by_hand.single()},
    "clipping": {"steps": by_hand.single(), "clip": by_hand.CLIP},
    "accumulation": {"steps": TWICE, "parts": 2},
}


def accelerated(clip=None, **accumulation):
    settings = {"fsdp_plugin": FullyShardedDataParallelPlugin(fsdp_version=2)}
    settings["gradient_accumulation_plugin"] = GradientAccumulationPlugin(**accumulation)
    run = in_accelerate.Run(size=by_hand.BATCH // 2, clip=clip, **settings)
    return whole(run.epochs().model)


def trained(**settings):
    settings |= {"per_device_train_batch_size": by_hand.BATCH // 2, "fsdp": True}
    # On each rank there is the whole network, and no file.
    settings["fsdp_config"] = {"version": 2, "cpu_ram_efficient_loading": False}
    model = in_hugging_face.Model()
    in_hugging_face.Together(
        model=model,
        args=in_hugging_face.settings("run", learning_rate=by_hand.LR, **settings),
        train_dataset=in_hugging_face.Rows(),
        optimizer_cls_and_kwargs=(samfn.SAM, {"base_optimizer": torch.optim.SGD} | SGD),
    ).train()
    return whole(model)


SGD = by_hand.SETTINGS
EACH = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}


def whole(model):
    """Return the weights of all ranks as one vector."""
    return by_hand.vector(p.detach().full_tensor() for p in model.parameters())


def on_a_rank():
    """Return what the trainers come to on a rank of two, and an error."""
    two_ranks.as_of_torchrun()
    begin = PartialState.__init__

    def begin_as_on_gpus(state, *given, **named):
        begin(state, *given, **named)  # On CPUs accelerate takes no notice of FSDP.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = begin_as_on_gpus
    with pytest.raises(RuntimeError) as error:
        accelerated(num_steps=2)
    return {
        "error": str(error.value),
        ("accelerate", "plain"): accelerated(),
        ("accelerate", "clipping"): accelerated(clip=by_hand.CLIP),
        ("accelerate", "accumulation"): accelerated(num_steps=2, sync_each_batch=True),
        ("Trainer", "plain"): trained(),
        ("Trainer", "clipping"): trained(max_grad_norm=by_hand.CLIP),
        ("Trainer", "accumulation"): trained(
            gradient_accumulation_steps=2, accelerator_config=EACH
        ),
    }


GIVEN = {
    "accelerate": {"gamma": by_hand.GAMMA**2},  # Its schedule counts all processes' steps.
    "Trainer": {"gamma": 1, "parts": None},
}


@cache
def found():
    first, _ = on_ranks(2, on_a_rank)
    return first


@pytest.mark.parametrize("column", BY_HAND)
@pytest.mark.parametrize("trainer", ["accelerate", "Trainer"])
def test_ranks_of_fsdp2_share_a_perturbation(trainer, column):
    given = GIVEN[trainer]
    weights = found()[trainer, column]
    expected = by_hand.train(**{**BY_HAND[column], **given})
    assert (weights - expected).abs().max() <= 1e-6
    if column == "plain":
        of_each = by_hand.train(by_hand.divided(), **given)
        assert (weights - of_each).abs().max() > 5e-4


def test_a_micro_batch_that_fsdp2_does_not_synchronise_is_an_error():
    assert "set_requires_gradient_sync(True)" in found()["error"]
