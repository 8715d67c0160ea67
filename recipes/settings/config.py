"""The settings of a run: a few that most people touch, and all others in groups."""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

from tyro.conf import arg

from recipes.data.augment import Augmentation
from recipes.data.sources import Images
from recipes.errors import ConfigError
from recipes.models import networks
from recipes.models.networks import Network
from recipes.roles import (
    ABOVE_0,
    DECIDING,
    FROM_0,
    Group,
    Role,
    Rule,
    at_least,
    require,
    setting,
)
from recipes.settings import method_expression
from recipes.settings.groups import (
    Arithmetic,
    Average,
    Call,
    Descent,
    LearningRate,
    Perturbation,
    Ranks,
    Recording,
    Selection,
    Stopping,
)

METHOD_HELP = (
    'Method that turns a batch into the descending gradient, as sam, "asam(eta=0.1)" or'
    f' "every(gsam, 5)": one of {", ".join(method_expression.MAKERS)}.'
)


@dataclass(frozen=True, kw_only=True)
class Config(Group, role=Role.RESULT):
    """Train a network for images with sharpness-aware minimisation."""

    data: Literal["auto", "cifar10", "cifar100", "folder", "digits"] = setting(
        "auto", role=Role.FIXED
    )
    """Images to train on. auto takes class folders or CIFAR-10 from --data-dir, else
    downloads CIFAR-10, else falls back on the digits that scikit-learn brings."""
    data_dir: Path | None = setting(None, role=Role.FREE)
    """Directory of train/<class>/* and test/<class>/* images, or of CIFAR. None is, for
    CIFAR, a directory in the user's cache."""
    model: str = setting("wrn-16-8", role=Role.FIXED)
    """Network: wrn-<depth>-<width>, airbench94, 95 or 96 for images from 9x9 pixels on, or
    one of torchvision's for classification, as resnet18, efficientnet_b0 or vit_b_16."""
    method: Annotated[str, arg(help=METHOD_HELP)] = "sam"
    rho: float = setting(0.05, FROM_0)
    """Radius of the perturbation. 0 is the plain optimizer, with one pass a step."""
    epochs: int = setting(200, at_least(1))
    """Passes over the training set."""
    batch_size: int = setting(128, at_least(2), role=Role.FIXED)
    """Examples in a step. A last, smaller batch of an epoch is left out."""
    lr: float = setting(0.1, ABOVE_0)
    """Peak learning rate."""
    seed: int = setting(0, role=Role.FIXED)
    """Seed of initialisation, data order, augmentation and label noise."""
    device: str = setting("auto", role=Role.FREE)
    """Device: cpu, cuda, cuda:1, ... auto takes a GPU if there is one."""
    preset: str = setting("auto", role=Role.FREE)
    """Named settings to start from: digits, digits-noise, small, small-wrn, airbench94,
    airbench95, airbench96, davda54, davda54-adaptive, sairam, foret2021,
    foret2021-cifar100, finetune, or none. auto takes finetune for networks of torchvision,
    digits for the digits, for airbench's networks those of their name, else davda54 on a
    GPU, and on a CPU small for CIFAR, small-wrn for your own images or where a WRN is
    named."""
    config: Path | None = setting(None, role=Role.CALL)
    """TOML file of settings. It overrides the preset, the command line overrides it."""
    output: Path | None = setting(None, role=Role.ONE_RUN)
    """Directory of the run, new or empty. None makes one below runs/."""
    resume: Path | None = setting(None, role=Role.ONE_RUN)
    """Directory of a run to go on with, exactly where it stopped, or one of its
    checkpoints."""

    images: Annotated[Images, arg(name="data")] = Images()
    augmentation: Augmentation = Augmentation()
    network: Network = Network()
    perturbation: Perturbation = Perturbation()
    descent: Annotated[Descent, arg(name="loss and optimizer")] = Descent()
    learning_rate: Annotated[LearningRate, arg(name="learning rate")] = LearningRate()
    average: Annotated[Average, arg(name="averaging")] = Average()
    selection: Selection = Selection()
    stopping: Stopping = Stopping()
    arithmetic: Arithmetic = Arithmetic()
    ranks: Annotated[Ranks, arg(name="multi-device")] = Ranks()
    recording: Recording = Recording()
    call: Annotated[Call, arg(name="resuming")] = Call()

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Config":
        """Return the settings with these values, by the names of their flags."""
        return cls().replace(**values)

    def replace(self, **changes: Any) -> "Config":
        """Return the settings with other values, by the names of their flags."""
        parts: dict[str, dict[str, Any]] = {}
        for name, value in changes.items():
            parts.setdefault(SETTINGS[name].group, {})[name] = value
        own = parts.pop("", {})
        groups = {
            group: dataclasses.replace(getattr(self, group), **values)
            for group, values in parts.items()
        }
        return dataclasses.replace(self, **own, **groups)

    def flat(self) -> dict[str, Any]:
        """Return all values, by the names of their flags."""
        return {
            name: getattr(getattr(self, found.group) if found.group else self, name)
            for name, found in SETTINGS.items()
        }

    def groups(self) -> list[Group]:
        """Return the settings, and their groups."""
        found = [getattr(self, field.name) for field in dataclasses.fields(self)]
        return [self, *(group for group in found if isinstance(group, Group))]

    def relations(self) -> Iterator[Rule]:
        """Yield what holds of values of several groups together."""
        rates, average = self.learning_rate, self.average
        yield "lr_final", 0 <= rates.lr_final <= self.lr, "0 to --lr"
        yield "warmup_epochs", 0 <= rates.warmup_epochs <= self.epochs, "0 to all epochs"
        marks = (0, *(rates.milestones or ()), self.epochs)
        rising = all(a < b for a, b in pairwise(marks))
        yield "milestones", rising, "rising epochs from 1 on, below --epochs, or None"
        begins = 0 <= average.ema_start < self.epochs
        yield "ema_start", begins, "0 to below all epochs"
        copies = (average.ema_copy or 0) <= self.epochs
        yield "ema_copy", copies, "at most all epochs, or None"
        yield "eval_only", bool(self.resume) or not self.call.eval_only, "--resume with it"
        how = self.selection
        perturbs = self.rho > 0 and self.perturbation.sam_last == 1
        steep = how.select != "sharpness" or perturbs
        yield "select", steep, "--rho above 0, and --sam-last 1, with it"
        whole = average.lookahead is None or how.select == "all"
        yield "lookahead", whole, "--select all with it"
        published = networks.is_published(self.model)
        known = self.network.weights != "default" or published
        yield "weights", known, "none or a file, but for torchvision's networks"

    def unread(self) -> Iterator[Rule]:
        """Yield that nothing is given which other groups leave unread."""
        yield from super().unread()
        averages = self.average.ema_decay is not None
        averaged = self.selection.select_with == "weights" or averages
        yield "select_with", averaged, "--ema-decay with it"
        network, wide = self.network, networks.is_wide(self.model)
        fast = networks.is_airbench(self.model)
        # Some of torchvision's networks have a dropout of their own.
        drops = network.dropout > 0 or not (wide or fast)
        masks = drops or not self.perturbation.same_dropout
        yield "same_dropout", masks, "--dropout above 0 with it"
        for kind, has, names in (
            ("wrn-<depth>-<width>", wide, ("layout", "zero_head", "dropout")),
            ("airbench94, 95 or 96", fast, ("widths", "whitening_epochs")),
        ):
            for name in names:
                plain = getattr(network, name) == getattr(Network, name)
                yield name, has or plain, f"--model {kind} with it"


def over(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is given over other settings, without what of these it leaves unread.

    What these did not read themselves stays, for `validate` to name.
    """
    left = _unread({**base, **given}) - _unread(base)
    return {**{n: v for n, v in base.items() if n not in left}, **given}


def _unread(values: Mapping[str, Any]) -> set[str]:
    rules = (rule for group in Config.of(values).groups() for rule in group.unread())
    return {name for name, is_read, _ in rules if not is_read}


class Setting(NamedTuple):
    """A setting but for its value."""

    group: str
    """The attribute of `Config` that holds it; "" is `Config` itself."""
    role: Role
    kind: Any
    """Its type."""
    default: Any


def _settings(cls: type[Group], group: str = "") -> Iterator[tuple[str, Setting]]:
    kinds = get_type_hints(cls)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if isinstance(field.default, Group):
            yield from _settings(type(field.default), field.name)
        else:
            role = field.metadata.get("role") or cls.role
            yield field.name, Setting(group, role, kinds[field.name], field.default)


SETTINGS = dict(_settings(Config))
"""All settings by the names of their flags, in the order of the help."""


def plain_values(config: Config) -> dict[str, Any]:
    """Return all settings by name, as JSON and TOML hold them: no paths, no tuples.

    Names of files are read as UTF-8 whatever the locale.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return list(value)
        if isinstance(value, Path | str):
            return os.fsencode(value).decode("utf-8", "surrogateescape")
        return value

    return {name: plain(value) for name, value in config.flat().items()}


def of_roles(
    values: Mapping[str, Any], roles: frozenset[Role] = DECIDING
) -> dict[str, Any]:
    """Return the settings that have one of these roles.

    Args:
        values: as `plain_values` gives them; settings of other versions are left out.
        roles: `KEPT`, `EXACT` or `DECIDING`.
    """
    return {n: v for n, v in values.items() if n in SETTINGS and SETTINGS[n].role in roles}


def differing(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    roles: frozenset[Role] = DECIDING,
) -> dict[str, tuple[Any, Any]]:
    """Return what differs between two runs that matters, both values by name.

    Settings that only one of the two has are of another version, and count as alike.

    Args:
        before: settings, as `plain_values` gives them.
        now: the same of the other run.
        roles: those that matter: `DECIDING` those that change the result, `EXACT` also
            those that only round.
    """
    names = sorted(of_roles(now, roles).keys() & before.keys())
    return {n: (before[n], now[n]) for n in names if before[n] != now[n]}


def changes(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    roles: frozenset[Role] = DECIDING,
) -> dict[str, str]:
    """Return what `differing` does, each in a few words."""
    return {
        name: f"{name} was {one!r}, is now {other!r}"
        for name, (one, other) in differing(before, now, roles).items()
    }


def validate(config: Config) -> None:
    """Raise unless every value is in its range, and one that is given is read.

    Not all that is read has an effect: studies let rho be 0 beside what shapes it.

    Raises:
        ConfigError: names the flag, what was expected and what came.
    """
    require_model(config.model)
    require(_rules(config), config.flat())
    try:
        method_expression.parse(config.method, steps=1, norm_layers=())
    except ValueError as error:
        raise ConfigError(f"--method: {error}") from error


def _rules(config: Config) -> Iterator[Rule]:
    for rules in ("ranges", "relations", "unread"):
        for group in config.groups():
            yield from getattr(group, rules)()


def require_model(name: str) -> None:
    """Raise unless there is a network of this name.

    Raises:
        ConfigError: says which names are close to it.
    """
    try:
        networks.require_known(name)
    except ValueError as error:
        raise ConfigError(f"--model: {error}") from error
