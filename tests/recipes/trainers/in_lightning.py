"""Networks trained by Lightning, for the table."""

from functools import partial

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, TensorDataset

import samfn
from recipes.trainers.lightning import SAMModule
from tests.recipes.trainers import by_hand


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = by_hand.network()

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        return torch.nn.functional.cross_entropy(self.network(inputs), targets)

    def configure_optimizers(self):
        optimizer = samfn.SAM(self.parameters(), torch.optim.SGD, **by_hand.SETTINGS)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, by_hand.GAMMA)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class WithMixin(SAMModule, Module):
    pass


class Manual(Module):
    parts, clip = 1, None

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer, loss_of = self.optimizers(), super().training_step
        self.manual_backward(loss_of(batch, batch_idx) / self.parts)
        optimizer.first_step(zero_grad=True)
        self.manual_backward(loss_of(batch, batch_idx) / self.parts)
        if (batch_idx + 1) % self.parts and not self.trainer.is_last_batch:
            optimizer.keep_step(zero_grad=True)
            return
        if self.clip:
            self.clip_gradients(optimizer, self.clip)
        optimizer.step()
        optimizer.zero_grad()
        self.lr_schedulers().step()


def trainer(**settings):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    quiet |= {"enable_model_summary": False, "accelerator": "cpu"}
    return pl.Trainer(**{"max_epochs": by_hand.EPOCHS, **quiet, **settings})


def fit(module, batch_size=by_hand.BATCH, checkpoint=None, **settings):
    made, rows = trainer(**settings), by_hand.table()
    if settings.get("devices"):
        steps = by_hand.divided()
        rows = by_hand.merge([step[dist.get_rank()] for step in steps])
    loader = DataLoader(TensorDataset(*rows), batch_size=batch_size)
    made.fit(module, loader, ckpt_path=checkpoint, weights_only=True)
    return made


def weights(kind, **settings):
    module = kind()
    fit(module, **settings)
    return by_hand.flat(module)


TWICE = {"accumulate_grad_batches": 2}
RANKS = {"strategy": "ddp", "devices": 2, "batch_size": by_hand.BATCH // 2}
RANKS |= {"use_distributed_sampler": False}  # It would shuffle.
SETTINGS = {
    "accumulation": TWICE,
    "clipping": {"gradient_clip_val": by_hand.CLIP},
    "bf16": {"precision": "bf16-mixed"},
    "two ranks": RANKS,
    "two ranks, accumulation": RANKS | TWICE,
}
# What a module does by itself, in manual optimization.
OWN = {"accumulation": {"parts": 2}, "clipping": {"clip": by_hand.CLIP}}
OWN["two ranks, accumulation"] = OWN["accumulation"]
INSTEAD = {"accumulation": "plain", "clipping": "plain"}
INSTEAD["two ranks, accumulation"] = "two ranks"


def run(kind, column, directory):
    if column == "resume":
        return resumed(kind, directory)
    return weights(kind, **SETTINGS.get(column, {}))


def run_manually(column, directory):
    kind = type("Manual", (Manual,), OWN.get(column, {}))
    return run(kind, INSTEAD.get(column, column), directory)


def resumed(kind, directory):
    fit(kind(), max_epochs=1).save_checkpoint(directory / "last.ckpt")
    found = weights(kind, checkpoint=directory / "last.ckpt")
    assert torch.equal(found, weights(kind))
    return found


CELLS = {
    "Lightning, automatic": by_hand.cells(partial(run, Module), parts=2, shared=True),
    "Lightning, automatic, `SAMModule`": by_hand.cells(partial(run, WithMixin), parts=2),
    "Lightning, manual": by_hand.cells(run_manually, parts=2, shared=True),
}
