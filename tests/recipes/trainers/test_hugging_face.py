"""SAM in the Trainer of transformers: language models, what is saved when, and errors."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback

import samfn
from recipes.trainers.hugging_face import SAMTrainer
from tests.recipes.trainers import by_hand
from tests.recipes.trainers.in_hugging_face import Model, Together, settings, trainer


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_trainer_alone_is_an_error(accumulate, tmp_path):
    made = trainer(tmp_path, kind=Trainer, gradient_accumulation_steps=accumulate)
    with pytest.raises(RuntimeError, match="call first_step, and backward again"):
        made.train()


def test_a_mixin_that_comes_too_late_is_an_error(tmp_path):
    class Late(Trainer, SAMTrainer):
        pass

    with pytest.raises(RuntimeError, match="call first_step, and backward again"):
        trainer(tmp_path, kind=Late).train()


def language_model():
    torch.manual_seed(3)
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=11, **shape, **heads))


def texts():
    """Return tokens and labels, of which the padding is ignored: rows of any length."""
    source = torch.Generator().manual_seed(4)
    tokens = torch.randint(11, (by_hand.ROWS, 6), generator=source)
    lengths = torch.randint(2, 7, (by_hand.ROWS, 1), generator=source)
    return tokens, tokens.masked_fill(torch.arange(6) >= lengths, -100)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_language_model_has_the_mean_over_all_tokens_of_a_step(accumulate, tmp_path):
    tokens, labels = texts()
    rows = [{"input_ids": t, "labels": y} for t, y in zip(tokens, labels, strict=True)]
    model = language_model()
    own = {"gradient_accumulation_steps": accumulate, "num_train_epochs": 1}
    Together(
        model=model,
        args=settings(tmp_path, learning_rate=by_hand.LR, **own),
        train_dataset=rows,
        optimizer_cls_and_kwargs=(samfn.SAM, {"base_optimizer": torch.optim.SGD} | SGD),
    ).train()

    batches = [*zip(*(part.split(by_hand.BATCH) for part in (tokens, labels)), strict=True)]
    steps = [batches[at : at + accumulate] for at in range(0, len(batches), accumulate)]
    counts = [sum((y[:, 1:] != -100).sum() for _, y in step) for step in steps]
    steps = [
        [(x, y, count) for x, y in step] for step, count in zip(steps, counts, strict=True)
    ]
    given = {"parts": 1, "epochs": 1, "gamma": 1, "loss_of": of_tokens}
    expected = by_hand.train(steps, language_model(), **given)
    assert (by_hand.flat(model) - expected).abs().max() <= 1e-6


SGD = {"rho": by_hand.RHO, "lr": by_hand.LR, "momentum": by_hand.MOMENTUM}


def of_tokens(model, batch, bf16):
    tokens, labels, count = batch
    outputs = model(input_ids=tokens).logits[:, :-1].flatten(0, 1)
    targets = labels[:, 1:].flatten()
    return nn.functional.cross_entropy(outputs, targets, reduction="sum") / count


def test_weight_decay_is_in_the_groups_of_the_trainer(tmp_path):
    kwargs = {"base_optimizer": torch.optim.AdamW, "rho": 0.05, "lr": 0.01}
    made = Together(
        model=language_model(),
        args=settings(tmp_path, weight_decay=0.1),
        optimizer_cls_and_kwargs=(samfn.SAM, kwargs),
    )
    groups = made.create_optimizer().param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert isinstance(made.optimizer.base_optimizer, torch.optim.AdamW)


def test_a_resumed_run_has_the_same_dropout(tmp_path):
    def model():
        return Model(nn.Sequential(nn.Dropout(0.5), by_hand.network()))

    straight, resumed = model(), model()
    torch.manual_seed(5)
    trainer(tmp_path, straight, save_strategy="steps", save_steps=3).train()
    torch.manual_seed(6)
    made = trainer(tmp_path, resumed)
    made.train(resume_from_checkpoint=str(Path(tmp_path, "checkpoint-3")))
    assert by_hand.flat(straight).equal(by_hand.flat(resumed))


def test_training_twice_goes_on_with_the_momentum(tmp_path):
    model = Model()
    made = trainer(tmp_path, model, num_train_epochs=1)
    made.train()
    made.train()
    expected = by_hand.train(by_hand.single())
    assert (by_hand.flat(model) - expected).abs().max() <= 2e-7


class Saving(TrainerCallback):
    """Saves before the third step, as on a signal."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 2:
            assert self.trainer.optimizer.optimizer.perturbed
            self.trainer._save_checkpoint(self.trainer.model, trial=None)


@pytest.mark.parametrize("guarded", [False, True])
def test_a_checkpoint_between_the_passes_is_an_error_or_before_the_step(guarded, tmp_path):
    model, saving = Model(), Saving()
    made = saving.trainer = trainer(tmp_path, model)
    made.add_callback(saving)
    if not guarded:
        with pytest.raises(RuntimeError, match=r"perturbed.*optimizer.guard\(model\)"):
            made.train()
        return
    made.optimizer.guard(model)
    made.train()
    again = Model()
    trainer(tmp_path, again).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert by_hand.flat(again).equal(by_hand.flat(model))


def test_a_checkpoint_within_a_group_is_an_error(tmp_path):
    class Stopping(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = True

    accumulate = {"gradient_accumulation_steps": 2, "save_strategy": "epoch"}
    made = trainer(tmp_path, **accumulate)
    made.add_callback(Stopping())
    with pytest.raises(RuntimeError, match="gradients of 1 micro-batch are kept"):
        made.train()


@pytest.mark.parametrize("number", [1, 2, 3])
def test_weights_are_put_back_where_a_pass_fails(number, tmp_path):
    class Failing(Model):
        calls = 0

        def forward(self, inputs, labels):
            if self.calls == number:
                raise KeyError("no such file")
            self.calls += 1
            return super().forward(inputs, labels)

    model = Failing()
    with pytest.raises(KeyError):
        trainer(tmp_path, model).train()
    expected = by_hand.train(by_hand.single()[: number // 2], epochs=1)
    torch.testing.assert_close(by_hand.flat(model), expected)
