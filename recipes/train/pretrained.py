"""The first weights of a run: new ones, torchvision's published ones, or those of a file.

No file that is read can run code: safetensors holds tensors alone, and of a pickled file
PyTorch's restricted reader takes tensors and plain containers, and refuses the rest.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

import samfn
from recipes.data import augment
from recipes.data.download import DownloadError, download
from recipes.data.sources import user_cache
from recipes.errors import ConfigError
from recipes.models import airbench, networks
from recipes.settings.config import Config
from recipes.settings.resolve import WEIGHTS
from recipes.terminal.console import Display
from recipes.train.build import Task, generator
from samfn.storage import files, tensorfile

# What torchvision's older files call the tensors of today's networks: its densenet.py and
# vision_transformer.py rename them when they load.
RENAMED = (
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\."), r"\1\2."),
    (re.compile(r"\.mlp\.linear_1\."), ".mlp.0."),
    (re.compile(r"\.mlp\.linear_2\."), ".mlp.3."),
)
# Counts the batches of BatchNorm; files from before PyTorch 0.4.1 lack it, and with a
# momentum that is a number nothing reads it.
COUNTER = "num_batches_tracked"
WHITENED = 5000  # training images, as in github.com/KellerJordan/cifar10-airbench
NAMED = 5  # tensors that a message names at most


def begin(task: Task, state: samfn.TrainState, display: Display) -> samfn.TrainState:
    """Return the state that a run starts from, with the weights that --weights names.

    Without any, airbench's filter is fitted to some of the training images.

    Raises:
        ConfigError: there are none, or they do not fit the network beyond its last layer.
    """
    config = task.config
    if config.network.weights == "none":
        return whitened(task, state) if networks.is_airbench(config.model) else state
    path = Path(config.network.weights)
    if config.network.weights == "default":
        path = fetch(config.model, display)
    given = rename(read(path), networks.AUXILIARY.get(config.model, ()))
    head = networks.head_of(task.model)
    fitting = fit(task.model.state_dict(), given, head, path)
    display.say(told(task.model.state_dict(), fitting, path))
    return state._replace(
        params=filled(state.params, fitting), buffers=filled(state.buffers, fitting)
    )


def digest(config: Config) -> str | None:
    """Return the SHA-256 of the file that --weights names, if there is one."""
    path = Path(config.network.weights)
    if config.network.weights in WEIGHTS or not path.is_file():
        return None
    return sha256(path)


def whitened(task: Task, state: samfn.TrainState) -> samfn.TrainState:
    """Return the state with the filter that whitens training images, drawn by the seed."""
    source = generator(task.config.seed, "whitening")
    some = torch.randperm(len(task.train_labels), generator=source)[:WHITENED]
    images = task.train_images[some.to(task.device)]
    filters = airbench.whitening(augment.normalise(images, task.mean, task.std))
    return state._replace(buffers=filled(state.buffers, {airbench.WHITENING: filters}))


def read(path: Path) -> dict[str, Tensor]:
    """Read names and tensors from a file, on the CPU; nothing in it is run.

    Raises:
        ConfigError: it cannot be read, or holds anything else.
    """
    try:
        if path.suffix.lower() == ".safetensors":
            return tensorfile.read(path, foreign=True)[0]
        with files.open_regular(path) as file:
            found = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ConfigError(f"--weights: cannot read {path}: {error.strerror}") from error
    except tensorfile.CorruptError as error:
        raise ConfigError(f"--weights: {error}") from error
    except Exception as error:  # PyTorch raises anything at damaged files.
        raise ConfigError(
            f"--weights: {path} is damaged or holds more than tensors, which could run"
            " code; expected what torch.save(model.state_dict(), ...) writes"
        ) from error
    if not isinstance(found, Mapping) or not found:
        raise ConfigError(f"--weights: expected a state dict in {path}, got {kind(found)}")
    if others := [name for name, value in found.items() if not isinstance(value, Tensor)]:
        raise ConfigError(
            f"--weights: expected a state dict in {path}, tensors by name, got"
            f" {kind(found[others[0]])} as {others[0]!r}"
        )
    for name, tensor in found.items():
        if not isinstance(name, str):
            raise ConfigError(
                f"--weights: expected a state dict in {path}, tensors by name, got the name"
                f" {name!r}"
            )
        if odd := _oddity(tensor):
            raise ConfigError(
                f"--weights: expected plain tensors in {path}, got a {odd} one as {name!r}"
            )
    return {name: tensor.detach() for name, tensor in found.items()}


def _oddity(tensor: Tensor) -> str | None:
    """Return what makes of a tensor more or less than numbers at places; None of others."""
    if tensor.is_meta:
        return "meta"
    if tensor.is_quantized:
        return "quantised"
    if tensor.is_nested:
        return "nested"
    return None if tensor.layout is torch.strided else str(tensor.layout)


def rename(given: Mapping[str, Tensor], dropped: tuple[str, ...]) -> dict[str, Tensor]:
    """Return tensors by their names of today, without those that begin with `dropped`."""
    found = {}
    for name, tensor in given.items():
        if not name.startswith(dropped):
            for pattern, today in RENAMED:
                name = pattern.sub(today, name)
            found[name] = tensor
    return found


def fit(
    own: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    head: Iterable[str],
    path: Path,
) -> dict[str, Tensor]:
    """Return the tensors that a network takes over.

    Args:
        own: the network's state dict.
        given: what a file holds, by today's names.
        head: names of its last layer, which may be missing or of another shape.
        path: the file.

    Raises:
        ConfigError: another tensor is missing, unknown, or of another shape; or one holds
            what is no finite number in the network's precision.
    """
    body = own.keys() - {*head}
    missing = [n for n in own if n in body - given.keys() and not n.endswith(COUNTER)]
    misfits = [n for n in own if n in given and own[n].shape != given[n].shape]
    wrong = [
        f"{name} is {tuple(given[name].shape)}, and {tuple(own[name].shape)} here"
        for name in misfits
        if name in body
    ]
    wrong += [
        f"{name} is of {given[name].dtype}, and of {own[name].dtype} here"
        for name in own
        if name in given.keys() - {*misfits}
        and (own[name].is_floating_point() or given[name].is_complex())
        and not given[name].is_floating_point()
    ]
    for problem, names in (
        ("lacks", missing),
        ("has unknown", [name for name in given if name not in own]),
        ("does not fit:", wrong),
    ):
        if names:
            raise ConfigError(
                f"--weights: {path} is of another network: it {problem} {listed(names)}"
            )
    fitting = {n: given[n] for n in own if n in given.keys() - {*misfits}}
    if bad := [n for n in fitting if not fitting[n].to(own[n].dtype).isfinite().all()]:
        raise ConfigError(
            f"--weights: {path} holds inf or NaN, as numbers here: {listed(bad)}"
        )
    return fitting


def told(own: Mapping[str, Tensor], fitting: Mapping[str, Tensor], path: Path) -> str:
    """Return in a sentence what a network takes over, and what it does not."""
    new = [n for n in own if n not in fitting and not n.endswith(COUNTER)]
    count = f"{len(own) - len(new)} of {len(own)} tensors from {path}"
    return f"weights: {count}" + (f"; {listed(new)} start anew" if new else "")


def filled(tree: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with the values of those given, laid out and where they were."""
    return {
        name: torch.empty_like(leaf).copy_(given[name]) if name in given else leaf
        for name, leaf in tree.items()
    }


def fetch(model: str, display: Display) -> Path:
    """Return the file of torchvision's weights of a network, downloaded once.

    A file that torchvision itself has downloaded is taken. Its name ends with the first
    digits of its SHA-256, eight or more, which are verified.

    Raises:
        ConfigError: they are not here, and cannot be downloaded.
    """
    published = networks.published(model)
    name = str(published.url).rpartition("/")[2]
    begins = name.removesuffix(".pth").rpartition("-")[2]
    theirs = Path(os.environ.get("TORCH_HOME") or user_cache().with_name("torch"))
    if is_whole(theirs / "hub" / "checkpoints" / name, begins):
        return theirs / "hub" / "checkpoints" / name
    folder = user_cache() / "weights"
    size = published.meta["_file_size"]  # MiB, to three digits
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with files.held(folder, wait=True, tell=display.warn):
            files.sweep(folder)
            if not is_whole(folder / name, begins):
                with display.waiting(f"downloading {size:,.0f} MiB, weights of {model}"):
                    download(
                        published.url,
                        folder / name,
                        sha256=begins,
                        size=round(size * 2**20),
                        slack=1024,
                    )
    except (DownloadError, OSError) as error:
        raise ConfigError(
            f"--weights: {error}; where there is a network, get that file, and give it by"
            " --weights FILE"
        ) from error
    return folder / name


def is_whole(path: Path, begins: str) -> bool:
    """Return whether there is a file whose SHA-256 begins so."""
    if not path.is_file():
        return False
    return sha256(path).startswith(begins)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def listed(names: list[str]) -> str:
    """Return names, of many only the first."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def kind(value: object) -> str:
    """Return what a value is, in words."""
    return f"a {type(value).__name__}"
