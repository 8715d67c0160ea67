"""A run assembled: network, loss, optimizer, method, schedule and data."""

import hashlib
import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

import samfn
from recipes.data import augment
from recipes.data.sources import (
    Dataset,
    Say,
    Source,
    Track,
    corrupt_labels,
    fingerprint,
    hold_out,
    load,
    statistics,
)
from recipes.errors import ConfigError
from recipes.models import airbench, networks
from recipes.settings import method_expression
from recipes.settings.config import Config
from recipes.settings.groups import DTYPES, Descent
from recipes.train.compiling import decide
from samfn import distributed, schedules
from samfn.compiled import operations
from samfn.loss import Aux, LossFn, evaluate
from samfn.step import require_bounded
from samfn.tree import Params

Update = Callable[..., tuple[samfn.TrainState, samfn.Metrics]]
Read = Callable[[Config, Track, Say], Dataset]
"""As `read_data`."""


class Split(NamedTuple):
    """Images and labels that a model is evaluated on."""

    name: str
    images: Tensor
    labels: Tensor


class Task(NamedTuple):
    """Everything that a run needs and that no step changes."""

    config: Config
    device: torch.device
    model: torch.nn.Module
    train_images: Tensor
    train_labels: Tensor
    chosen_by: Split
    """The split that the best epoch is chosen by."""
    test: Split
    mean: Tensor
    std: Tensor
    eval_fn: LossFn
    """Of the images as they are."""
    views_fn: LossFn
    """Of the mean outputs of the views that an evaluation takes."""
    update: Update
    """(state, batch, rho=, lr=) -> (state, metrics), compiled or not."""
    find_nonfinite: Callable[[samfn.TrainState, Any], str | None]
    """(state, batch) of a step that was skipped -> what of it was not finite."""
    sharing: int | None
    """Ranks that share a perturbation; None where there is one process."""
    mesh: Any
    """The ranks that hold parts of a state, a `DeviceMesh`; None where each holds all."""
    compiling: str
    """Whether `update` is compiled, and why."""
    lr: schedules.Schedule
    rho: schedules.Schedule
    classes: int
    steps_per_epoch: int
    fingerprint: str
    """Digest of the data, before labels were corrupted or images held out."""


def read_data(config: Config, track: Track, warn: Say) -> Dataset:
    """Read the images that a configuration names; see `recipes.data.sources.load`."""
    return load(
        cast(Source, config.data),
        config.data_dir,
        image_size=config.images.image_size,
        modified=config.images.allow_modified_data,
        track=track,
        warn=warn,
    )


def assemble(config: Config, dataset: Dataset) -> tuple[Task, samfn.TrainState]:
    """Make of a configuration and its data all that training needs.

    Raises:
        ConfigError: the training set is smaller than a batch, or the network takes no
            such images.
        DataError: the validation set would be empty.
    """
    digest = fingerprint(dataset)
    device = torch.device(config.device)
    _choose_kernels(config.arithmetic.deterministic, device)
    dataset, chosen_by, test = _splits(config, dataset)
    steps_per_epoch = len(dataset.train_labels) // config.batch_size
    if not steps_per_epoch:
        raise ConfigError(
            f"--batch-size: expected at most the {len(dataset.train_labels)} training"
            f" images, got {config.batch_size}"
        )
    _require_room(config.augmentation, dataset)
    mean, std = _normalisation(config, dataset)
    model = _model(config, dataset).to(device).to(memory_format=torch.channels_last)
    steps = config.epochs * steps_per_epoch
    descent, whitened = config.descent, config.network.whitening_epochs
    optimizer, method = _optimizer(descent, model), _method(config, model, steps)
    if whitened is not None:
        ends = whitened * steps_per_epoch
        optimizer = samfn.frozen_after(optimizer, ends, [airbench.WHITENING_BIAS])
    try:
        require_bounded(optimizer, method.beside)
    except ValueError as error:
        raise ConfigError(f"--clip-norm: {error}") from error
    try:
        state = samfn.init(*samfn.split(model), optimizer=optimizer, method=method)
    except ValueError as error:  # It names parameters that the network does not have.
        raise ConfigError(f"--method: {error}") from error
    dtype = DTYPES[config.arithmetic.precision]
    loss_fn = _loss_fn(descent, model, dtype)
    sharing, mesh = _sharing(config, device)
    if config.recording.monitor:
        method = samfn.watched(method)
    if sharing is not None and mesh is None:
        method = distributed.placed(method, config.ranks.placement)
    make: dict[str, Any] = {"loss_fn": loss_fn, "optimizer": optimizer, "method": method}
    some = dataset.train_images[: config.batch_size], dataset.train_labels
    images, labels = distributed.share((some[0], some[1][: config.batch_size]))
    batch = images.to(device).float(), labels.to(device)
    lr = _lr(config, steps_per_epoch)
    rho = _rho(config, lr, steps)

    def find_nonfinite(state: samfn.TrainState, batch: Any) -> str | None:
        given: Any = {"loss_fn": loss_fn, "method": method}
        return samfn.find_nonfinite(state, batch, **given, rho=rho(int(state.step) - 1))

    eval_fn = samfn.supervised(
        model, partial(F.cross_entropy, reduction="none"), dtype=dtype
    )
    compiles, why = decide(config, steps, device, lambda: operations(loss_fn, state, batch))
    task = Task(
        config=config.replace(compile="yes" if compiles else "no"),
        device=device,
        model=model,
        train_images=dataset.train_images.to(device),
        train_labels=dataset.train_labels.to(device),
        chosen_by=_to(chosen_by, device),
        test=_to(test, device),
        # A channel that never varies is only centred.
        mean=mean.to(device),
        std=torch.where(std > 0, std, 1.0).to(device),
        eval_fn=eval_fn,
        views_fn=_by_views(eval_fn, config.images.views),
        update=samfn.compile_update(**make)
        if compiles
        else partial(samfn.sam_update, **make),
        find_nonfinite=find_nonfinite,
        sharing=sharing,
        mesh=mesh,
        compiling=why,
        lr=lr,
        rho=rho,
        classes=len(dataset.classes),
        steps_per_epoch=steps_per_epoch,
        fingerprint=digest,
    )
    return task, state


def placed(task: Task, whole: samfn.TrainState) -> samfn.TrainState:
    """Return what this rank keeps of a state."""
    if task.mesh is None:
        return whole
    kept: samfn.TrainState = distributed.shard(whole, task.mesh)
    return kept


def _splits(config: Config, dataset: Dataset) -> tuple[Dataset, Split, Split]:
    """Return the data to train on, the split that chooses epochs, and the test set."""
    test = chosen_by = Split("test", dataset.test_images, dataset.test_labels)
    how = config.images
    if how.noisy_validation:
        dataset = _mislabelled(config, dataset)
    if how.validation:
        source = generator(config.seed, "validation")
        dataset, images, labels = hold_out(dataset, how.validation, source)
        chosen_by = Split("validation", images, labels)
    if not how.noisy_validation:
        dataset = _mislabelled(config, dataset)
    return dataset, chosen_by, test


def _mislabelled(config: Config, dataset: Dataset) -> Dataset:
    """Return the data with wrong labels in the training set, if they are asked for."""
    if not (share := config.images.label_noise):
        return dataset
    source, count = generator(config.seed, "label noise"), len(dataset.classes)
    noisy = corrupt_labels(dataset.train_labels, count, share, source)
    return dataset._replace(train_labels=noisy)


def _require_room(how: augment.Augmentation, dataset: Dataset) -> None:
    """Raise unless images are large enough to be shifted, or reflected, so far."""
    side = min(dataset.train_images.shape[2:])
    most, why = side, ""
    if how.padding == "reflect":
        most, why = side - 1, ", which --padding reflects"
    if how.crop_padding > most:
        raise ConfigError(
            f"--crop-padding: expected at most {most}, images of {side} pixels a side{why},"
            f" got {how.crop_padding}"
        )


def _sharing(config: Config, device: torch.device) -> tuple[int | None, Any]:
    """Return how many ranks share a perturbation, if there are several, and `Task.mesh`.

    Raises:
        ConfigError: there is no such placement, or too little for each rank.
    """
    ranks, placement = distributed.size(), config.ranks.placement
    if ranks == 1:
        return None, None
    if config.batch_size < 2 * ranks:
        raise ConfigError(
            f"--batch-size: expected at least two images for each of the {ranks} ranks, got"
            f" {config.batch_size}"
        )
    if config.ranks.sync_batch_norm and config.batch_size % ranks:
        raise ConfigError(
            f"--batch-size: expected a multiple of the ranks, {ranks}, with"
            f" --sync-batch-norm, got {config.batch_size}"
        )
    kind, _, parts = placement.partition(":")
    try:
        if placement == "sharded" or (kind == "hsdp" and parts.isdecimal()):
            return ranks, distributed.mesh_of(device.type, int(parts) if parts else None)
        return distributed.sharing(placement), None
    except ValueError as error:
        others = 'a state in parts has "sharded" or "hsdp:n"'
        raise ConfigError(f"--placement: {error}; {others}") from error


def seed(*key: Any) -> int:
    """Return a seed that depends on `key` alone."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*key: Any, device: torch.device | str = "cpu") -> Generator:
    """Return a generator whose numbers depend on `key` alone."""
    return Generator(device).manual_seed(seed(*key))


def _choose_kernels(deterministic: bool, device: torch.device) -> None:
    """Let PyTorch take kernels that repeat their results, or else the fastest."""
    if deterministic:
        # cuBLAS reads it when it starts, with the first product of matrices.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if torch.are_deterministic_algorithms_enabled() != deterministic:
        torch.use_deterministic_algorithms(deterministic)  # Imports for seconds.
    if device.type == "cuda":  # Every batch has the same shape.
        torch.backends.cudnn.benchmark = not deterministic


def _model(config: Config, dataset: Dataset) -> torch.nn.Module:
    channels, height, width = dataset.train_images.shape[1:]
    torch.manual_seed(seed(config.seed, "model"))
    try:
        model = networks.make(
            config.model,
            len(dataset.classes),
            shape=(channels, height, width),
            dropout=config.network.dropout,
            zero_head=config.network.zero_head,
            layout=config.network.layout,
            widths=config.network.widths,
            pretrained=config.network.weights != "none",
        )
    except ValueError as error:
        raise ConfigError(f"--model: {error}") from error
    if config.network.freeze:
        networks.freeze(model)
    return distributed.synchronised(model) if config.ranks.sync_batch_norm else model


def _normalisation(config: Config, dataset: Dataset) -> tuple[Tensor, Tensor]:
    """Return the mean and deviation that a network's weights are for; else the data's."""
    if config.network.weights == "none" or not networks.is_published(config.model):
        return statistics(dataset.train_images)
    _, mean, std = networks.photographs(config.model)
    return torch.tensor(mean), torch.tensor(std)


def _loss_fn(descent: Descent, model: torch.nn.Module, dtype: torch.dtype | None) -> LossFn:
    smoothing = descent.label_smoothing
    criterion = partial(F.cross_entropy, label_smoothing=smoothing, reduction="none")
    loss_fn: LossFn = samfn.supervised(model, criterion, dtype=dtype)
    if descent.decay_in_loss:
        spared = _spared(descent, model)
        loss_fn = samfn.l2_regularized(loss_fn, descent.weight_decay, without=spared)
    return loss_fn


def _by_views(loss_fn: LossFn, count: int) -> LossFn:
    """Return the loss of the mean outputs of several views of each image."""
    if count == 1:
        return loss_fn

    def of_mean(
        params: Params, buffers: Params, batch: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Aux]:
        images, labels = batch
        found = [
            share * evaluate(loss_fn, params, buffers, (view, labels), wrt=()).outputs
            for share, view in augment.views(images, count)
        ]
        outputs = torch.stack(found).float().sum(0)
        return F.cross_entropy(outputs, labels), Aux(outputs, buffers)

    return of_mean


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


def _norm_biases(model: torch.nn.Module) -> tuple[str, ...]:
    return tuple(n for n in samfn.norm_parameters(model) if n.endswith(".bias"))


def _clipped(descent: Descent, optimizer: samfn.Optimizer) -> samfn.Optimizer:
    if descent.clip_norm is None:
        return optimizer
    return samfn.clipped(optimizer, descent.clip_norm)


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


def _lr(config: Config, steps_per_epoch: int) -> schedules.Schedule:
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


def _rho(config: Config, lr: schedules.Schedule, steps: int) -> schedules.Schedule:
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


def first_perturbed(task: Task) -> int:
    """Return the first step that perturbs the weights; behind the last one if none does.

    No step is looked at: there may be a great many.
    """
    steps = task.config.epochs * task.steps_per_epoch
    if task.config.rho == 0:
        return steps
    return schedules.tail_start(steps, task.config.perturbation.sam_last)


def _to(split: Split, device: torch.device) -> Split:
    return Split(split.name, split.images.to(device), split.labels.to(device))
