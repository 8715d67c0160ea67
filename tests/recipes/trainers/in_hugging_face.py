"""Networks trained by the Trainer of transformers, for the table."""

from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import samfn
from recipes.trainers.hugging_face import SAMTrainer
from tests.recipes.trainers import by_hand


class Model(nn.Module):
    """A network that computes its own loss, as the Trainer expects it."""

    def __init__(self, network=None):
        super().__init__()
        self.network = network or by_hand.network()

    def forward(self, inputs, labels):
        outputs = self.network(inputs)
        return {"loss": nn.functional.cross_entropy(outputs, labels), "logits": outputs}


class Rows(Dataset):
    def __len__(self):
        return by_hand.ROWS

    def __getitem__(self, index):
        inputs, targets = by_hand.table()
        return {"inputs": inputs[index], "labels": targets[index]}


class Together(SAMTrainer, Trainer):
    pass


def settings(directory, **own):
    given = {
        "per_device_train_batch_size": by_hand.BATCH,
        "num_train_epochs": by_hand.EPOCHS,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(output_dir=str(directory), **{**given, **own})


def trainer(directory, model=None, kind=Together, **own):
    model = model or Model()
    optimizer = samfn.SAM(model.parameters(), torch.optim.SGD, **by_hand.SETTINGS)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: by_hand.GAMMA**n)
    return kind(
        model=model,
        args=settings(directory, **own),
        train_dataset=Rows(),
        optimizers=(optimizer, scheduler),
    )


def weights(directory, **own):
    model = Model()
    trainer(directory, model, **own).train()
    return by_hand.flat(model)


SETTINGS = {
    "accumulation": {"gradient_accumulation_steps": 2},
    "clipping": {"max_grad_norm": by_hand.CLIP},
    "bf16": {"bf16": True},
    "two ranks": {"per_device_train_batch_size": by_hand.BATCH // 2},
}
SETTINGS["two ranks, accumulation"] = SETTINGS["accumulation"] | SETTINGS["two ranks"]


def run(column, directory):
    if column == "resume":
        return resumed(directory)
    return weights(directory, **SETTINGS.get(column, {}))


def resumed(directory):
    straight = weights(directory, save_strategy="epoch")
    first, _ = sorted(Path(directory).iterdir(), key=lambda path: len(path.name))
    model = Model()
    trainer(directory, model).train(resume_from_checkpoint=str(first))
    assert torch.equal(by_hand.flat(model), straight)
    return straight


CELLS = {"Hugging Face Trainer, `SAMTrainer`": by_hand.cells(run)}
