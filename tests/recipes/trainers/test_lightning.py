"""SAM in Lightning where nothing is in the table: what else changes a step, and errors."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

import samfn
from tests.recipes.trainers import by_hand
from tests.recipes.trainers.in_lightning import Manual, Module, WithMixin, fit


class Hook(pl.Callback):
    """Calls a function once, in a hook, at a batch."""

    def __init__(self, name, function, batch=2):
        self.function, self.batch, self.seen = function, batch, 0
        setattr(self, name, self.call)

    def call(self, trainer, module, *_):
        self.seen += 1
        if self.seen == self.batch + 1:
            self.function(trainer, module)


def loop(module, backward, end):
    """Train a module in a plain loop, of calls of `backward` and of `end`."""
    (optimizer,), (schedule,) = module.configure_optimizers()
    for step in by_hand.single() * by_hand.EPOCHS:
        for number in (0, 1):
            backward(module, step[0])
            if number == 0:
                optimizer.first_step(zero_grad=True)
        end(module, optimizer)
        optimizer.zero_grad()
        schedule["scheduler"].step()
    return by_hand.flat(module)


def half():
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))


def test_fp16_is_the_scaled_loop():
    scaler = torch.amp.GradScaler("cpu")

    def backward(module, batch):
        with torch.autocast("cpu", torch.float16):
            loss = module.training_step(batch, 0)
        scaler.scale(loss).backward()

    def end(module, optimizer):
        scaler.step(optimizer)
        scaler.update()

    expected = loop(Module(), backward, end)
    module = WithMixin()
    fit(module, plugins=[half()])
    assert by_hand.flat(module).equal(expected)
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(WithMixin(), plugins=[half()], gradient_clip_val=1.0)


def test_fp16_without_the_mixin_is_an_error():
    with pytest.raises(RuntimeError, match="call first_step, and backward again"):
        fit(Module(), plugins=[half()])


def test_the_mixin_clips_the_second_gradient_alone():
    """By value it matters: the first would point elsewhere."""

    def backward(module, batch):
        module.training_step(batch, 0).backward()

    def end(module, optimizer):
        nn.utils.clip_grad_value_(module.parameters(), 0.01)
        optimizer.second_step()

    expected = loop(Module(), backward, end)
    by_value = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}
    found = {}
    for kind in (WithMixin, Module):
        module = found[kind] = kind()
        fit(module, **by_value)
    assert by_hand.flat(found[WithMixin]).equal(expected)
    assert (by_hand.flat(found[Module]) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_loss_may_come_in_a_dict_and_of_a_batch_alone(accumulate):
    class Dict(WithMixin):
        def training_step(self, batch):
            return {"loss": super().training_step(batch, None), "other": 1}

    weights = []
    for module in (Dict(), WithMixin()):
        fit(module, accumulate_grad_batches=accumulate)
        weights.append(by_hand.flat(module))
    assert weights[0].equal(weights[1])


@pytest.mark.parametrize("kind", [Module, WithMixin, Manual])
def test_a_module_that_is_fitted_again_begins_anew(kind):
    module, fresh = kind(), kind()
    fit(module)
    fresh.load_state_dict(module.state_dict())
    for each in (module, fresh):
        fit(each)
    assert by_hand.flat(module).equal(by_hand.flat(fresh))


@pytest.mark.parametrize("kind", [Module, WithMixin])
def test_a_checkpoint_between_the_passes_is_an_error_or_before_the_step(kind, tmp_path):
    def save(trainer, module):
        assert trainer.optimizers[0].perturbed
        trainer.save_checkpoint(tmp_path / "between.ckpt")

    # Lightning calls the hook in both passes, but for the mixin's first.
    hook = "on_before_optimizer_step"
    batch = 2 if kind is WithMixin else 5
    with pytest.raises(RuntimeError, match=r"perturbed.*optimizer.guard\(model\)"):
        fit(kind(), callbacks=[Hook(hook, save, batch)])

    class Guarded(kind):
        def configure_optimizers(self):
            made = super().configure_optimizers()
            made[0][0].guard(self)
            return made

    fit(Guarded(), callbacks=[Hook(hook, save, batch)])
    state = torch.load(tmp_path / "between.ckpt", weights_only=True)["state_dict"]
    expected = by_hand.train(by_hand.single()[:2], epochs=1)
    torch.testing.assert_close(by_hand.vector(state.values()), expected)


def test_a_checkpoint_within_a_group_is_an_error(tmp_path):
    def save(trainer, module):
        trainer.save_checkpoint(tmp_path / "within.ckpt")

    hook = Hook("on_train_batch_start", save, batch=1)
    with pytest.raises(RuntimeError, match=r"1 micro-batch are kept.*guard\(model\)"):
        fit(WithMixin(), callbacks=[hook], accumulate_grad_batches=2)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_weights_are_put_back_where_a_pass_fails(accumulate, number):
    class Failing(WithMixin):
        calls = 0

        def training_step(self, batch, batch_idx):
            if self.calls == number:
                raise KeyError("no such file")
            self.calls += 1
            return super().training_step(batch, batch_idx)

    module = Failing()
    with pytest.raises(KeyError):
        fit(module, accumulate_grad_batches=accumulate)
    steps = number // 2 // accumulate
    expected = by_hand.train(by_hand.single()[:steps], epochs=1)
    torch.testing.assert_close(by_hand.flat(module), expected)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_weights_are_put_back_where_it_ends_right_after_the_first_step(accumulate):
    class Interrupted(samfn.SAM):
        def first_step(self, zero_grad=False):
            super().first_step(zero_grad)
            raise KeyError("here")  # As Ctrl-C, at which Lightning ends the process.

    class Fails(WithMixin):
        def configure_optimizers(self):
            return Interrupted(self.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)

    module = Fails()
    before = by_hand.flat(module)
    with pytest.raises(KeyError, match="here"):
        fit(module, accumulate_grad_batches=accumulate)
    assert by_hand.flat(module).equal(before)


def test_a_mixin_that_comes_too_late_is_an_error():
    from recipes.trainers.lightning import SAMModule

    class Late(Module, SAMModule):
        pass

    with pytest.raises(RuntimeError, match="accumulated"):
        fit(Late(), accumulate_grad_batches=2)


def test_a_loss_that_is_logged_in_the_first_pass_alone():
    class Logging(WithMixin):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if not self.optimizers().perturbed:
                self.log("loss", loss, on_step=False, on_epoch=True)
            return loss

    module = Logging()
    made = fit(module, max_epochs=1, accumulate_grad_batches=5)
    losses = [by_hand.cross_entropy(by_hand.network(), b) for (b,) in by_hand.single()]
    assert made.callback_metrics["loss"] == pytest.approx(sum(losses).item() / 5)


def test_the_wrapper_of_lightning_is_the_optimizer():
    class Looking(Manual):
        def training_step(self, batch, batch_idx):
            wrapper = self.optimizers()
            assert isinstance(wrapper, samfn.SAM)
            assert wrapper.param_groups is wrapper.optimizer.param_groups
            before = by_hand.flat(self)
            self.manual_backward(Module.training_step(self, batch, batch_idx))
            wrapper.first_step(zero_grad=True)
            assert wrapper.optimizer.perturbed
            with wrapper.unperturbed():
                assert by_hand.flat(self).equal(before)
            assert not by_hand.flat(self).equal(before)
            wrapper.restore()
            assert not wrapper.optimizer.perturbed
            assert by_hand.flat(self).equal(before)
            wrapper.load_state_dict(wrapper.state_dict())
            assert vars(wrapper).keys() <= OWN

    OWN = {"_optimizer", "_strategy", "_on_before_step", "_on_after_step"}
    fit(Looking(), max_epochs=1)
