"""What the settings say of a step: its loss, optimizer and method, and its two dials."""

from functools import partial

import torch
from torch.nn import functional as F

import samfn
from recipes.errors import ConfigError
from recipes.models import airbench
from recipes.settings import method_expression
from recipes.settings.config import Config
from recipes.settings.groups import DTYPES, Descent
from samfn import schedules
from samfn.loss import LossFn
from samfn.step import require_bounded


def ingredients(
    config: Config, model: torch.nn.Module, steps_per_epoch: int
) -> tuple[LossFn, samfn.Optimizer, samfn.Method]:
    """Return the loss, the optimizer and the method of a run on one device.

    Raises:
        ConfigError: the method moves weights past what bounds the optimizer.
    """
    descent, whitened = config.descent, config.network.whitening_epochs
    loss_fn, optimizer = _loss_fn(config, model), _optimizer(descent, model)
    method = _method(config, model, config.epochs * steps_per_epoch)
    if whitened is not None:
        ends = whitened * steps_per_epoch
        optimizer = samfn.frozen_after(optimizer, ends, [airbench.WHITENING_BIAS])
    try:
        require_bounded(optimizer, method.beside)
    except ValueError as error:
        raise ConfigError(f"--clip-norm: {error}") from error
    return loss_fn, optimizer, method


def lr_of(config: Config, steps_per_epoch: int) -> schedules.Schedule:
    """Return the learning rate over time."""
    lr, steps, how = config.lr, config.epochs * steps_per_epoch, config.learning_rate
    match how.schedule:
        case "cosine":
            schedule = schedules.cosine(lr, steps, how.lr_final)
        case "polynomial":
            schedule = schedules.polynomial(lr, steps, final=how.lr_final)
        case "one-cycle":
            schedule = schedules.one_cycle(lr, steps)
        case "warm-restarts":
            period = how.restart_epochs * steps_per_epoch
            schedule = schedules.warm_restarts(lr, period, how.restart_growth, how.lr_final)
        case "step" if how.milestones is not None:
            milestones = [epoch * steps_per_epoch for epoch in how.milestones]
            schedule = schedules.multi_step(lr, milestones, how.step_factor)
        case "step":
            schedule = schedules.step_decay(lr, steps, factor=how.step_factor)
        case "wsd":
            schedule = schedules.stable_decay(lr, steps, how.cooldown, how.lr_final)
        case "triangle":
            ends = how.rise_from * lr, how.fall_to * lr
            schedule = schedules.triangle(lr, steps, how.rise, *ends)
        case "constant":
            schedule = schedules.constant(lr)
    return schedules.warmup(schedule, round(how.warmup_epochs * steps_per_epoch))


def rho_of(config: Config, lr: schedules.Schedule, steps: int) -> schedules.Schedule:
    """Return the radius over time; the number 0, and one pass a step, where it is 0."""
    rho, how = config.rho, config.perturbation
    if rho == 0 or how.rho_schedule == "constant":
        schedule = schedules.constant(rho)
    elif how.rho_schedule == "linear":
        schedule = schedules.linear(rho, how.rho_final, steps)
    else:
        schedule = schedules.proportional(
            lr, lr_max=config.lr, peak=rho, final=how.rho_final
        )
    return schedule if how.sam_last == 1 else schedules.tail(schedule, steps, how.sam_last)


def counts_epochs(config: Config) -> bool:
    """Return whether any step depends on how many epochs the whole run has."""
    rates, how = config.learning_rate, config.perturbation
    ends = rates.schedule not in ("constant", "warm-restarts") and rates.milestones is None
    return (
        ends
        or how.rho_schedule == "linear"
        or how.sam_last < 1
        or config.average.lookahead is not None
        or config.selection.select != "all"  # The last epoch has no scan.
        or method_expression.counts_steps(config.method)
    )


def _loss_fn(config: Config, model: torch.nn.Module) -> LossFn:
    descent, dtype = config.descent, DTYPES[config.arithmetic.precision]
    smoothing = descent.label_smoothing
    criterion = partial(F.cross_entropy, label_smoothing=smoothing, reduction="none")
    loss_fn: LossFn = samfn.supervised(model, criterion, dtype=dtype)
    if descent.decay_in_loss:
        spared = _spared(descent, model)
        loss_fn = samfn.l2_regularized(loss_fn, descent.weight_decay, without=spared)
    return loss_fn


def _optimizer(descent: Descent, model: torch.nn.Module) -> samfn.Optimizer:
    if descent.optimizer == "muon":
        return _clipped(descent, _muon(descent, model))
    if descent.optimizer == "sgd":
        make = partial(samfn.sgd, descent.momentum, descent.nesterov)
    else:
        makers = {"adam": samfn.adam, "adamw": samfn.adamw, "nadam": samfn.nadam}
        first, second = descent.betas
        make = partial(makers[descent.optimizer], (first, second))
    decay = 0.0 if descent.decay_in_loss else descent.weight_decay
    factor = descent.norm_bias_lr
    quick = {*_norm_biases(model)} if factor != 1 else set()
    spared = {*_spared(descent, model)} if decay else set()
    own = 0.0 if quick <= spared else decay / factor
    groups = (
        (spared - quick, make(weight_decay=0.0)),
        (quick, samfn.scaled_lr(make(weight_decay=own), factor)),
    )
    optimizer, apart = make(weight_decay=decay), [group for group in groups if group[0]]
    return _clipped(descent, samfn.grouped(optimizer, *apart) if apart else optimizer)


def _muon(descent: Descent, model: torch.nn.Module) -> samfn.Optimizer:
    """Return Muon for the hidden layers and AdamW for the rest, with one learning rate."""
    decay = 0.0 if descent.decay_in_loss else descent.weight_decay
    first, second = descent.betas
    spared, rest = {*_spared(descent, model)}, _not_hidden(model)
    groups = (
        (rest - spared, samfn.adamw((first, second), weight_decay=decay)),
        (rest & spared, samfn.adamw((first, second), weight_decay=0.0)),
    )
    optimizer = samfn.muon(weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    return samfn.grouped(optimizer, *(group for group in groups if group[0]))


def _clipped(descent: Descent, optimizer: samfn.Optimizer) -> samfn.Optimizer:
    if descent.clip_norm is None:
        return optimizer
    return samfn.clipped(optimizer, descent.clip_norm)


def _norm_biases(model: torch.nn.Module) -> tuple[str, ...]:
    return tuple(n for n in samfn.norm_parameters(model) if n.endswith(".bias"))


def _not_hidden(model: torch.nn.Module) -> set[str]:
    """Return the names of vectors, tokens, embeddings and the layer of the outputs."""
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    embeddings = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    apart = {id(layer.weight) for layer in layers[-1:] + embeddings}
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and (parameter.ndim not in (2, 4) or id(parameter) in apart)
    }


def _spared(descent: Descent, model: torch.nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters that weight decay leaves alone."""
    return () if descent.decay_norm else samfn.no_decay_parameters(model)


def _method(config: Config, model: torch.nn.Module, steps: int) -> samfn.Method:
    names = samfn.norm_parameters(model)
    method = method_expression.parse(config.method, steps=steps, norm_layers=names)
    if config.perturbation.same_dropout:
        method = samfn.same_randomness(method)
    return samfn.loss_scaled(method) if config.arithmetic.precision == "fp16" else method
