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
from recipes.models import networks
from recipes.settings.config import Config
from recipes.settings.groups import DTYPES
from recipes.train.compiling import decide
from recipes.train.step import ingredients, lr_of, rho_of
from samfn import distributed, schedules
from samfn.compiled import operations
from samfn.gradient import evaluate
from samfn.loss import Aux, LossFn
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
    classes: tuple[str, ...]
    """Their names, by the place of each in the outputs."""
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
    digest, device = fingerprint(dataset), torch.device(config.device)
    _choose_kernels(config.arithmetic.deterministic, device)
    dataset, chosen_by, test = _splits(config, dataset)
    per_epoch = _steps_per_epoch(config, dataset)
    _require_room(config.augmentation, dataset)
    mean, std = _normalisation(config, dataset)
    model = _model(config, dataset).to(device).to(memory_format=torch.channels_last)
    loss_fn, optimizer, method = ingredients(config, model, per_epoch)
    state = _initial(model, optimizer, method)
    sharing, mesh = _sharing(config, device)
    if config.recording.monitor:
        method = samfn.watched(method)
    if sharing is not None and mesh is None:
        method = distributed.placed(method, config.ranks.placement)
    make: dict[str, Any] = {"loss_fn": loss_fn, "optimizer": optimizer, "method": method}
    lr = lr_of(config, per_epoch)
    rho = rho_of(config, lr, config.epochs * per_epoch)

    def find_nonfinite(state: samfn.TrainState, batch: Any) -> str | None:
        given: Any = {"loss_fn": loss_fn, "method": method}
        return samfn.find_nonfinite(state, batch, **given, rho=rho(int(state.step) - 1))

    def work() -> int:
        return operations(loss_fn, state, _first_batch(config, dataset, device))

    compiles, why = decide(config, config.epochs * per_epoch, device, work)
    eval_fn = samfn.supervised(
        model,
        partial(F.cross_entropy, reduction="none"),
        dtype=DTYPES[config.arithmetic.precision],
    )
    task = Task(
        config=config.replace(compile="yes" if compiles else "no"),
        device=device,
        model=model,
        train_images=dataset.train_images.to(device),
        train_labels=dataset.train_labels.to(device),
        chosen_by=_to(chosen_by, device),
        test=_to(test, device),
        mean=mean.to(device),
        std=std.to(device),
        eval_fn=eval_fn,
        views_fn=_by_views(eval_fn, config.images.views),
        update=(samfn.compile_update if compiles else _eagerly)(**make),
        find_nonfinite=find_nonfinite,
        sharing=sharing,
        mesh=mesh,
        compiling=why,
        lr=lr,
        rho=rho,
        classes=dataset.classes,
        steps_per_epoch=per_epoch,
        fingerprint=digest,
    )
    return task, state


def _eagerly(**make: Any) -> Update:
    return partial(samfn.sam_update, **make)


def _steps_per_epoch(config: Config, dataset: Dataset) -> int:
    images = len(dataset.train_labels)
    if images < config.batch_size:
        raise ConfigError(
            f"--batch-size: expected at most the {images} training images, got"
            f" {config.batch_size}"
        )
    return images // config.batch_size


def _initial(
    model: torch.nn.Module, optimizer: samfn.Optimizer, method: samfn.Method
) -> samfn.TrainState:
    params, buffers = samfn.split(model)
    try:
        return samfn.init(params, buffers, optimizer=optimizer, method=method)
    except ValueError as error:  # It names parameters that the network does not have.
        raise ConfigError(f"--method: {error}") from error


def _first_batch(
    config: Config, dataset: Dataset, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return a batch of this rank's size."""
    some = slice(config.batch_size)
    whole = dataset.train_images[some], dataset.train_labels[some]
    images, labels = distributed.share(whole)
    return images.to(device).float(), labels.to(device)


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
        own, spread = statistics(dataset.train_images)
        # A channel that never varies is only centred.
        return own, torch.where(spread > 0, spread, 1.0)
    _, mean, std = networks.photographs(config.model)
    return torch.tensor(mean), torch.tensor(std)


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
