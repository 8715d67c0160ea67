import dataclasses
import json
import tomllib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recipes.errors import ConfigError
from recipes.roles import EXACT, KEPT, Role
from recipes.settings import resolve
from recipes.settings.command_line import parse
from recipes.settings.config import SETTINGS, Config, differing, of_roles, plain_values
from recipes.settings.presets import FAST, PRESETS
from recipes.settings.resolve import choose_device, configure, require_same_settings
from recipes.settings.saved import read_toml, run_of, to_toml
from recipes.terminal.hardware import emulated
from tests import ROOT

DIGITS = ["--data", "digits"]
BEST = str(choose_device("auto"))
RESOLVED = {"device": BEST, "precision": "float32" if BEST == "cpu" else "bf16"}

# One value for every field that differs from its default, as flags write it.
FLAGS = {
    # These five, and three below, have tests of their own.
    "preset": None,
    "config": None,
    "data": None,
    "data_dir": None,
    "allow_modified_data": (None, True),
    "image_size": None,
    "label_noise": ("0.4", 0.4),
    "validation": ("0.1", 0.1),
    "noisy_validation": (None, True),
    "views": ("6", 6),
    "crop_scale": ("0.5", 0.5),
    "crop_padding": ("2", 2),
    "padding": ("reflect", "reflect"),
    "flip": (None, False),
    "alternate_flip": (None, True),
    "cutout": ("16", 16),
    "policy": ("autoaugment", "autoaugment"),
    "mixup_alpha": ("0.2", 0.2),
    "cutmix_alpha": ("1", 1.0),
    "model": ("wrn-28-10", "wrn-28-10"),
    "weights": (__file__, str(Path(__file__).resolve())),
    "freeze": (None, True),
    "layout": ("davda54", "davda54"),
    "zero_head": (None, True),
    "dropout": ("0.3", 0.3),
    "widths": ("4 8 8", (4, 8, 8)),
    "whitening_epochs": ("3", 3),
    "method": ("asam", "asam"),
    "rho": ("0.2", 0.2),
    "rho_schedule": ("linear", "linear"),
    "rho_final": ("0.01", 0.01),
    "sam_last": ("0.3", 0.3),
    "same_dropout": (None, True),
    "epochs": ("7", 7),
    "batch_size": ("64", 64),
    "optimizer": ("adamw", "adamw"),
    "lr": ("0.05", 0.05),
    "momentum": ("0.8", 0.8),
    "nesterov": (None, True),
    "betas": ("0.8 0.98", (0.8, 0.98)),
    "weight_decay": ("0.001", 0.001),
    "decay_norm": (None, False),
    "decay_in_loss": (None, True),
    "norm_bias_lr": ("64", 64.0),
    "clip_norm": ("5", 5.0),
    "label_smoothing": ("0.1", 0.1),
    "schedule": ("step", "step"),
    "lr_final": ("0.01", 0.01),
    "rise_from": ("0.1", 0.1),
    "fall_to": ("0.1", 0.1),
    "rise": ("0.1", 0.1),
    "milestones": ("60 120", (60, 120)),
    "step_factor": ("0.1", 0.1),
    "restart_epochs": ("5", 5),
    "restart_growth": ("3", 3),
    "cooldown": ("0.3", 0.3),
    "warmup_epochs": ("2.5", 2.5),
    "ema_decay": ("0.9", 0.9),
    "ema_start": ("0.5", 0.5),
    "ema_copy": ("1", 1),
    "patience": ("3", 3),
    "lookahead": ("0.95", 0.95),
    "lookahead_every": ("3", 3),
    "average_best": ("3", 3),
    "select": ("loss", "loss"),
    "select_every": ("2", 2),
    "select_with": ("average", "average"),
    "select_share": ("0.3", 0.3),
    "easy_confidence": ("0.9", 0.9),
    "easy_scans": ("3", 3),
    "easy_replay": ("0", 0.0),
    "precision": ("bf16", "bf16"),
    "max_skipped": ("3", 3),
    "device": ("cpu:0", "cpu:0"),
    "placement": ("global", "global"),
    "sync_batch_norm": (None, True),
    "timeout": ("30", 30.0),
    "compile": ("no", "no"),
    "deterministic": (None, True),
    "seed": ("3", 3),
    "monitor": (None, True),
    "save_steps": ("5", 5),
    "on_write_error": ("warn", "warn"),
    "output": ("out", Path("out")),
    "resume": None,
    "auto_resume": (None, True),
    "resume_override": (None, True),
    "log": ("tensorboard", ("tensorboard",)),
    "export": (None, True),
    "eval_only": None,
    "dry_run": (None, True),
}


# What a flag would be refused without, or would change beside its field.
NEEDS = {
    "device": ["--precision", "float32"],
    "noisy_validation": ["--validation", "0.1"],
    "ema_start": ["--ema-decay", "0.9"],
    "ema_copy": ["--ema-decay", "0.9"],
    "rho_final": ["--rho-schedule", "linear"],
    "betas": ["--optimizer", "nadam"],
    "lr_final": ["--schedule", "warm-restarts"],
    "rise_from": ["--schedule", "triangle"],
    "fall_to": ["--schedule", "triangle"],
    "rise": ["--schedule", "triangle"],
    "lookahead_every": ["--lookahead", "0.9"],
    "widths": ["--model", "airbench95"],
    "whitening_epochs": ["--model", "airbench95"],
    "milestones": ["--schedule", "step"],
    "step_factor": ["--schedule", "step"],
    "restart_epochs": ["--schedule", "warm-restarts"],
    "restart_growth": ["--schedule", "warm-restarts"],
    "cooldown": ["--schedule", "wsd"],
    "auto_resume": ["--output", "no-such-run"],
    "select_every": ["--select", "sharpness"],
    "select_with": ["--select", "loss", "--ema-decay", "0.9"],
    "select_share": ["--select", "loss"],
    "easy_confidence": ["--select", "easy-skipped"],
    "easy_scans": ["--select", "easy-skipped"],
    "easy_replay": ["--select", "easy-skipped"],
    "freeze": ["--weights", __file__],
    "same_dropout": ["--dropout", "0.3"],
}


def test_every_field_is_covered_here():
    assert FLAGS.keys() == SETTINGS.keys()


def test_every_setting_has_a_role():
    roles = {
        role: {name for name, found in SETTINGS.items() if found.role is role}
        for role in Role
    }
    assert {*SETTINGS} == set().union(*roles.values())
    result = roles.pop(Role.RESULT)
    assert {"rho", "momentum", "epochs", "patience", "precision", "monitor"} <= result
    assert {role.name: " ".join(sorted(names)) for role, names in roles.items()} == {
        "ONE_RUN": "auto_resume dry_run eval_only output resume resume_override",
        "CALL": "config export timeout",
        "FREE": "allow_modified_data average_best data_dir device log max_skipped"
        " on_write_error preset save_steps",
        "ROUNDING": "compile",
        "FIXED": "batch_size data freeze image_size label_noise layout model"
        " noisy_validation seed validation weights widths",
    }


@pytest.mark.parametrize("role", Role)
def test_a_role_decides_what_matters(role):
    name = next(name for name, found in SETTINGS.items() if found.role is role)
    before = plain_values(Config())
    now = before | {name: "other"}
    decides = role in (Role.RESULT, Role.FIXED)
    assert differing(before, now) == ({name: (before[name], "other")} if decides else {})
    exact = decides or role is Role.ROUNDING
    assert [*differing(before, now, EXACT)] == [name] * exact
    kept = role not in (Role.ONE_RUN, Role.CALL)
    assert (name in of_roles(before, KEPT)) == kept


def test_images_that_are_too_small_are_refused(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
    with pytest.raises(ConfigError, match="--image-size: expected at least 4 pixels"):
        configure(["--data-dir", str(tmp_path), "--image-size", "3"])


@pytest.mark.parametrize("name", [name for name, value in FLAGS.items() if value])
def test_every_flag_sets_its_field_and_no_other(name):
    text, expected = FLAGS[name]
    base = ["--preset", "none", *DIGITS]
    base += NEEDS.get(name, [])
    flag = name.replace("_", "-")
    if text is None:
        args = [f"--{flag}" if expected else f"--no-{flag}"]
    else:
        args = [f"--{flag}", *text.split()]
    given, before = configure([*base, *args]), configure(base)
    assert given.flat()[name] == expected
    assert given.replace(**{name: before.flat()[name]}) == before


def test_without_preset_the_defaults_are_those_of_the_class():
    expected = Config.of({"preset": "none", "data": "digits"} | RESOLVED)
    assert configure(["--preset", "none", *DIGITS]) == expected


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_set_what_they_say_and_flags_override_them(preset):
    config = configure(["--preset", preset, "--seed", "9", *DIGITS])
    values, fast = PRESETS[preset], preset in FAST and not emulated(torch.bfloat16, BEST)
    # Without CIFAR and network, the images are digits whatever the preset.
    resolved = {"preset": preset, "seed": 9, "data": "digits"}
    expected = values | resolved | RESOLVED | ({"precision": "bf16"} if fast else {})
    assert config == Config.of(expected)
    assert configure(["--preset", preset, "--epochs", "3", *DIGITS]).epochs == 3


def test_presets_are_the_published_settings():
    foret, foret100 = (
        configure(["--preset", p]) for p in ("foret2021", "foret2021-cifar100")
    )
    shared = ("wrn-28-10", 200, 256, 0.1, 5e-4, "cosine")
    for config in (foret, foret100):
        assert shared == (
            config.model,
            config.epochs,
            config.batch_size,
            config.lr,
            config.descent.weight_decay,
            config.learning_rate.schedule,
        )
    assert (foret.rho, foret100.rho, foret100.data) == (0.05, 0.1, "cifar100")
    assert foret.descent.nesterov
    assert foret.descent.clip_norm == 5.0
    sairam = configure(["--preset", "sairam"])
    assert (sairam.model, sairam.epochs, sairam.batch_size) == ("wrn-28-10", 200, 128)
    assert (sairam.lr, sairam.rho, sairam.augmentation.cutout) == (0.1, 0.05, 0)
    descent, rates = sairam.descent, sairam.learning_rate
    assert (descent.momentum, descent.weight_decay) == (0.9, 5e-4)
    assert (descent.label_smoothing, descent.nesterov) == (0.0, False)
    assert (rates.schedule, rates.lr_final) == ("cosine", 0.0)
    davda, adaptive = (configure(["--preset", p]) for p in ("davda54", "davda54-adaptive"))
    assert (davda.method, davda.rho) == ("sam", 0.05)
    assert (adaptive.method, adaptive.rho) == ("asam(0.0, adapts=everything)", 2.0)
    for config in (davda, adaptive):
        assert (config.network.layout, config.augmentation.cutout) == ("davda54", 16)
        assert config.learning_rate.schedule == "step"
        # 0.1 / 9 for each of nine wrong classes is his 0.1 spread over them.
        assert config.descent.label_smoothing / 10 == pytest.approx(0.1 / 9)


def test_digits_on_their_own_take_the_preset_for_digits():
    assert configure(DIGITS).preset == "digits"


def test_a_cpu_takes_the_small_presets_for_images(tmp_path, monkeypatch):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
    config = configure(["--data-dir", str(tmp_path), "--device", "cpu"])
    assert config.preset == "small-wrn"
    assert config.model == PRESETS["small-wrn"]["model"]
    assert config.epochs == 5
    monkeypatch.setattr(
        resolve, "choose_source", lambda *_, check: (check("cifar10") and "cifar10", "")
    )
    assert configure(["--device", "cpu"]).model == "airbench94"
    named = configure(["--device", "cpu", "--model", "wrn-16-2"])
    assert (named.preset, named.epochs) == ("small-wrn", 5)


def test_a_network_that_is_named_decides_on_the_preset(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
    on_a_cpu = ["--data-dir", str(tmp_path), "--device", "cpu", "--model"]
    presets = {"airbench95": "airbench95", "wrn-10-2": "small-wrn", "resnet18": "finetune"}
    for model, preset in presets.items():
        assert configure([*on_a_cpu, model]).preset == preset
    assert configure([*on_a_cpu, "wrn-10-2"]) == configure(
        [*on_a_cpu, "wrn-10-2", "--preset", "small-wrn"]
    )


def test_presets_of_airbench_have_its_numbers_for_the_mean_of_a_batch(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
    # Its learning rate and decay: 11.5 over 1 + 1 / (1 - momentum), and 0.0153 over 11.5.
    published = {"94": (11.5, 0.0153), "95": (10.0, 0.0153), "96": (9.0, 0.012)}
    for name, (lr, decay) in published.items():
        flags = ["--data-dir", str(tmp_path), "--preset", f"airbench{name}"]
        config = configure([*flags, "--device", "cpu"])
        assert config.model == f"airbench{name}"
        assert config.lr == pytest.approx(lr / (1 + 1 / 0.15))
        assert config.lr * config.descent.weight_decay == pytest.approx(
            decay / (1 + 1 / 0.15)
        )
        assert config.arithmetic.precision == (
            "float32" if emulated(torch.bfloat16, "cpu") else "bf16"
        )
    assert config.learning_rate.fall_to == 0
    # What an optimizer does not read of a preset is left out, and what is asked for is not.
    muon = configure([*flags, "--optimizer", "muon", "--lr", "0.01"])
    assert muon.descent.nesterov is False
    assert (muon.descent.norm_bias_lr, muon.descent.label_smoothing) == (1.0, 0.2)
    with pytest.raises(ConfigError, match="--momentum: expected --optimizer sgd"):
        configure([*flags, "--optimizer", "muon", "--momentum", "0.85"])


@pytest.mark.parametrize(("emulates", "expected"), [(True, "float32"), (False, "bf16")])
def test_where_a_cpu_has_instructions_airbench_takes_them(
    tmp_path, monkeypatch, emulates, expected
):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
    monkeypatch.setattr(resolve, "emulated", lambda dtype, device: emulates and bool(dtype))
    flags = ["--data-dir", str(tmp_path), "--device", "cpu", "--preset"]
    found = {p: configure([*flags, p]).arithmetic.precision for p in ("small", "none")}
    assert found == {"small": expected, "none": "float32"}


def test_a_file_overrides_the_preset_and_flags_override_the_file(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('data = "digits"\nepochs = 7\nlr = 1\nmodel = "wrn-16-1"\n')
    config = configure(["--config", str(file), "--epochs", "8"])
    assert (config.preset, config.batch_size) == ("digits", 64)
    assert (config.epochs, config.lr, config.model) == (8, 1, "wrn-16-1")


paths = st.text(
    st.characters(codec="utf-8", exclude_characters="\0", exclude_categories=["Cs"]),
    min_size=1,
).map(Path)


@given(
    st.builds(
        lambda **values: Config().replace(**values),
        data_dir=st.none() | paths,
        clip_norm=st.none() | st.floats(1e-9, 1e9),
        lr=st.floats(1e-9, 1e9),
        rho=st.floats(0, 1e9),
        seed=st.integers(-(2**63), 2**63 - 1),
        flip=st.booleans(),
        image_size=st.none() | st.integers(4, 999),
        milestones=st.none() | st.lists(st.integers(1, 999)).map(tuple),
        method=st.sampled_from(["sam", "asam(eta=0.1)", "every(gsam, 5)"]),
        log=st.sampled_from([(), ("wandb",), ("trackio", "tensorboard")]),
    )
)
def test_what_is_written_is_read_back(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("toml") / "c.toml"
    path.write_text(to_toml(config))
    assert Config.of(read_toml(path)) == dataclasses.replace(config, preset="none")
    tomllib.loads(path.read_text(encoding="utf-8"))


def test_milestones_pass_through_files_checkpoints_and_flags(tmp_path):
    flags = ["--schedule", "step", "--milestones", "1", "2", "--epochs", "3"]
    config = configure([*DIGITS, *flags])
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config))
    assert (
        configure(["--config", str(path), "--milestones", "None"]).learning_rate.milestones
        is None
    )
    resumed = configure(["--resume", str(tmp_path)])
    assert resumed.learning_rate.milestones == config.learning_rate.milestones == (1, 2)
    # As a checkpoint's JSON gives them back.
    before = json.loads(json.dumps(plain_values(resumed)))
    require_same_settings(before, resumed)
    other = resumed.replace(milestones=(1,))
    with pytest.raises(ConfigError, match=r"milestones was \[1, 2\], is now \[1\]"):
        require_same_settings(before, other)


def test_a_file_of_an_older_version_is_read():
    expected = Config.of(
        PRESETS["digits"]
        | {"preset": "none", "precision": "float32", "device": "cpu", "schedule": "step"}
        | {"epochs": 80, "lr": 0.1}  # The preset's then.
        | {"milestones": (10, 20), "ema_decay": 0.9, "log": ("tensorboard",)}
    )
    found = read_toml(ROOT / "tests" / "corpus" / "config_2026-11-26.toml")
    assert Config.of(found) == expected


def test_settings_of_one_call_are_not_written(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(
        to_toml(Config().replace(output=tmp_path, resume=tmp_path, dry_run=True))
    )
    assert Config.of(read_toml(path)) == Config(preset="none")


def test_equal_numbers_are_one_text_however_they_are_written(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("rho = 0\nlr = 1\nbetas = [0, 0.99]\nema_decay = -0.0\n")
    expected = {"rho": 0.0, "lr": 1.0, "betas": (0.0, 0.99), "ema_decay": 0.0}
    assert repr(read_toml(file)) == repr(expected)
    flags = ["--rho", "-0.0", "--lr", "1", "--betas", "-0.0", "0.99", "--ema-decay", "-0.0"]
    values = parse(flags).values
    assert repr({name: values[name] for name in expected}) == repr(expected)


# Flags of before, one that needs them, what takes its need away, and its default.
LEAVING = [
    ("--select loss", "--select-every 1", "--select all", 5),
    ("--ema-decay 0.9", "--ema-start 1", "--ema-decay None", 0.0),
    ("--momentum 0.8", "--nesterov", "--momentum 0", False),
    ("--flip", "--alternate-flip", "--no-flip", False),
    ("--schedule step", "--step-factor 0.1", "--schedule wsd", 0.2),
]


@pytest.mark.parametrize(("before", "needing", "flags", "default"), LEAVING)
@pytest.mark.parametrize("how", ["--config", "--resume"])
def test_what_flags_leave_unread_is_left_out_unless_they_ask_for_it(
    tmp_path, how, before, needing, flags, default
):
    file, (flag, *_) = tmp_path / "config.toml", needing.split()
    file.write_text(to_toml(configure([*DIGITS, *before.split(), *needing.split()])))
    given = [how, str(file if how == "--config" else tmp_path), *flags.split()]
    given += ["--resume-override"] * (how == "--resume")
    found = configure(given).flat()
    assert found[flag.removeprefix("--").replace("-", "_")] == default
    with pytest.raises(ConfigError, match=f"{flag}: expected"):
        configure([*given, *needing.split()])


def test_a_file_is_checked_with_the_flags_that_complete_it(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("warmup_epochs = 100\n")
    config = configure([*DIGITS, "--config", str(file), "--epochs", "200"])
    assert (config.learning_rate.warmup_epochs, config.epochs) == (100, 200)
    with pytest.raises(ConfigError, match="--warmup-epochs: expected 0 to all epochs"):
        configure([*DIGITS, "--config", str(file)])


def test_settings_are_resolved(tmp_path):
    said = []
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
    config = configure(["--data-dir", str(tmp_path / "train" / "..")], said.append)
    assert (config.data, config.data_dir) == ("folder", tmp_path)
    assert config.device == BEST
    assert said == [f"images in the class folders of {tmp_path}"]
    config = configure([], said.append)
    assert (config.data, config.data_dir, config.preset) == ("digits", None, "digits")
    assert "no network" in said[1]


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.toml").write_text(to_toml(configure([*DIGITS, "--epochs", "3"])))
    return ["--resume", str(tmp_path)]


def test_a_run_is_resumed_with_its_own_settings(run):
    expected = configure([*DIGITS, "--epochs", "3"])
    resumed = configure(run)
    assert resumed.resume == Path(run[1])
    assert dataclasses.replace(resumed, resume=None, preset="digits") == expected
    assert configure([*run, "--epochs", "3"]) == resumed
    assert configure([*run, "--eval-only"]).call.eval_only


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--lr 0.3 --rho 0.5",
            "other settings: lr was 0.2, is now 0.3; rho was 0.05, is now 0.5; --resume-o",
        ),
        (
            "--mixup-alpha 1 --policy autoaugment --rho-schedule linear",
            "mixup_alpha was 0.0, is now 1.0; policy was 'none', .*; rho_schedule was",
        ),
        (
            "--batch-size 5 --seed 5 --lr 0.3 --resume-override",
            "no run can go on so: batch_size was 64, is now 5; seed was 0, is now 5$",
        ),
        ("--preset small", "--preset: a run is resumed with its own, drop it"),
        ("--config c.toml", "--config: a run is resumed with its own, drop it"),
        ("--output out", "--output: a run is resumed with its own, drop it"),
    ],
)
def test_a_run_is_not_resumed_with_other_settings(run, flags, message):
    with pytest.raises(ConfigError, match=message):
        configure([*run, *flags.split()])


def test_what_does_not_change_the_steps_is_free_and_the_rest_is_overridden(run):
    free = ["--save-steps", "3", "--max-skipped", "7", "--on-write-error", "warn"]
    free += ["--log", "tensorboard"]
    assert configure([*run, *free]).recording.log == ("tensorboard",)
    assert configure([*run, "--lr", "0.3", "--resume-override"]).lr == 0.3


@pytest.fixture
def again(tmp_path):
    """Return a command, after it was given once, whatever it said, and its directory."""
    run, file = tmp_path / "run", tmp_path / "file.toml"
    file.write_text('preset = "digits"\ndata = "auto"\ncrop_padding = 2\n')
    command = ["--auto-resume", "--output", str(run), "--config", str(file)]
    command += ["--epochs", "3", "--compile", "auto", "--precision", "auto"]
    config = configure(command)
    assert (config.resume, config.output, config.data) == (None, run, "digits")
    run.mkdir()
    # As a run writes it, which has decided whether it compiles.
    written = to_toml(config.replace(compile="no"))
    (run / "config.toml").write_text(written)
    return command, run, written


def test_a_command_that_resumes_by_itself_can_be_given_again(again):
    command, run, written = again
    for flags in ([], ["--preset", "digits"], ["--data", "digits"], ["--device", "auto"]):
        config = configure([*command, *flags])
        assert config.resume == run
        assert to_toml(config) == written
    # What a preset names counts as if it were said.
    with pytest.raises(ConfigError, match="model was 'wrn-10-1', is now 'wrn-16-8'"):
        configure([*command, "--preset", "davda54"])
    assert (
        configure(
            [*command, "--preset", "digits", "--max-skipped", "9"]
        ).stopping.max_skipped
        == 9
    )


def test_a_command_that_resumes_by_itself_keeps_the_rules_of_resuming(again):
    command, run, _ = again
    with pytest.raises(ConfigError, match=r"other settings: lr was 0\.2, is now 0\.3"):
        configure([*command, "--lr", "0.3"])
    assert configure([*command, "--lr", "0.3", "--resume-override"]).lr == 0.3
    with pytest.raises(ConfigError, match="go on so: seed was 0, is now 5"):
        configure([*command, "--seed", "5", "--resume-override"])
    with pytest.raises(ConfigError, match="expected --output with it, and no --resume"):
        configure([*command, "--resume", str(run)])
    with pytest.raises(ConfigError, match=r"--auto-resume: expected --output with it$"):
        configure(["--auto-resume"])


def test_where_nothing_compiles_a_command_can_still_be_given_again(again, monkeypatch):
    command, _, written = again
    with pytest.raises(ConfigError, match="compile was 'no', is now 'yes'"):
        configure([*command, "--compile", "yes", "--device", "cpu"])
    monkeypatch.setenv("CXX", "no-such-compiler")
    config = configure([*command, "--compile", "yes", "--device", "cpu"])
    assert config.arithmetic.compile == tomllib.loads(written)["compile"] == "no"


def test_a_directory_of_images_stays_the_same_from_wherever_a_run_goes_on(
    tmp_path, monkeypatch
):
    for split in ("train", "test"):
        (tmp_path / "images" / split).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    command = ["--data-dir", "images", "--output", "run", "--auto-resume"]
    (tmp_path / "run").mkdir()
    written = to_toml(configure(command).replace(compile="no"))
    (tmp_path / "run" / "config.toml").write_text(written)
    assert to_toml(configure(command)) == written
    resumed = configure(["--resume", "run", "--data-dir", "images"])
    assert resumed.data_dir == tmp_path / "images"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch = 3", r"unknown settings: epoch; close to epoch: epochs"),
        ('epochs = "3"', r"epochs cannot be '3', expected int"),
        ("epochs = true", "epochs cannot be True"),
        ("flip = 1", "flip cannot be 1, expected bool"),
        ('log = "wandb"', "log cannot be 'wandb', expected a list of 'ten"),
        ('log = ["w"]', r"log cannot be \['w'\], expected a list of 'tensor"),
        ("method = 3", "method cannot be 3, expected str"),
        ('policy = "cutout"', "policy cannot be 'cutout', expected 'none' or 'autoa"),
        ("betas = [0.9]", "--betas: expected two numbers from 0 to below 1, got"),
        ("milestones = [1.5]", r"cannot be \[1.5\], expected a list of int$"),
        ("milestones = [true]", r"milestones cannot be \[True\]"),
        ("milestones = 60", "milestones cannot be 60"),
        ("epochs = ", "is no TOML"),
        (f"epochs = {'9' * 5000}", "is no TOML"),
        ('resume = "run"', "unknown settings: resume"),
        ('config = "c.toml"', "unknown settings: config$"),
        ("dry_run = true", "unknown settings: dry_run"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path, text, message):
    file = tmp_path / "c.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        configure(["--config", str(file)])


def test_a_checkpoint_is_of_its_run_from_wherever_one_looks(tmp_path, monkeypatch):
    run, folder = tmp_path / "run", tmp_path / "run" / "checkpoints"
    (folder / "below").mkdir(parents=True)
    (folder / "step_1").touch()
    for where, path in (
        (tmp_path, "run/checkpoints/step_1"),
        (run, "checkpoints/step_1"),
        (folder, "step_1"),
        (folder / "below", "../step_1"),
    ):
        monkeypatch.chdir(where)
        assert run_of(Path(path)).samefile(run), path


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*absent.toml: No such file"):
        configure(["--config", str(tmp_path / "absent.toml")])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--preset best", "--preset: expected auto or one of .*davda54.* got 'best'"),
        ("--rho -0.1", "--rho: expected a finite number of at least 0, got -0.1"),
        ("--rho nan", "--rho: .* got nan"),
        ("--lr 0", "--lr: expected a finite number above 0, got 0.0"),
        ("--epochs 0", "--epochs: expected at least 1, got 0"),
        ("--batch-size 1", "--batch-size: expected at least 2, got 1"),
        ("--label-noise 1.5", "--label-noise: expected 0 to 1, got 1.5"),
        ("--validation 1", "--validation: expected 0 to below 1, got 1.0"),
        ("--dropout 1", "--dropout: expected 0 to below 1"),
        ("--label-smoothing -1", "--label-smoothing: expected 0 to below 1"),
        ("--momentum 1", "--momentum: expected 0 to below 1"),
        ("--momentum 0 --nesterov", "--nesterov: expected momentum with it"),
        ("--optimizer adam --momentum 0.8", "--momentum: expected --optimizer sgd with it"),
        ("--optimizer adamw --nesterov", "--nesterov: expected --optimizer sgd with it"),
        ("--betas 0.8 0.9", "--betas: expected --optimizer adam or adamw or nadam or muon"),
        ("--optimizer adam --betas 0.8", "--betas: expected two numbers from 0 to below"),
        ("--optimizer adam --betas 0.8 1", "--betas: expected two numbers from 0 to below"),
        ("--weight-decay -1", "--weight-decay: expected a finite number of at least 0"),
        ("--average-best 1", "--average-best: expected at least 2, or None, got 1"),
        (
            "--select sharpness --rho 0",
            "--select: expected --rho above 0, and --sam-last 1",
        ),
        (
            "--select sharpness --sam-last 0.5",
            "--select: expected --rho above 0, and --sam-last 1",
        ),
        ("--cooldown 0.3", "--cooldown: expected --schedule wsd with it"),
        ("--sam-last 0", "--sam-last: expected above 0 to 1, got 0"),
        ("--select loss --select-with average", "--select-with: expected --ema-decay"),
        ("--select loss --select-every 0", "--select-every: expected at least 1, got 0"),
        ("--select loss --select-share 0", "--select-share: expected above 0 to 1, got 0"),
        ("--select-share 0.3", "--select-share: expected --select loss or sharpness with"),
        ("--select loss --easy-scans 3", "--easy-scans: expected --select easy-skipped"),
        ("--select easy-skipped --easy-scans 128", "--easy-scans: expected 1 to 127"),
        ("--select easy-skipped --easy-replay 1", "--easy-replay: expected 0 to below 1"),
        ("--easy-confidence 2", "--easy-confidence: expected above 0 to 1, got 2.0"),
        ("--clip-norm 0", "--clip-norm: expected a number above 0, or None, got 0.0"),
        ("--crop-padding -1", "--crop-padding: expected at least 0 pixels"),
        ("--cutout -1", "--cutout: expected at least 0 pixels"),
        ("--mixup-alpha -1", "--mixup-alpha: expected a finite number of at least 0"),
        ("--cutmix-alpha inf", "--cutmix-alpha: expected a finite number of at least 0"),
        ("--rho-final -1 --rho-schedule linear", "--rho-final: expected a finite number"),
        ("--rho-final 0.1", "--rho-final: expected --rho-schedule linear or proportional"),
        ("--lr-final 0.3", "--lr-final: expected 0 to --lr, got 0.3"),
        ("--lr-final nan", "--lr-final: expected 0 to --lr, got nan"),
        (
            "--lr-final 0.01 --schedule step",
            "--lr-final: expected --schedule cosine or pol",
        ),
        ("--step-factor 0.1", "--step-factor: expected --schedule step with it, got 0.1"),
        ("--step-factor 0 --schedule step", "--step-factor: expected above 0 to 1, got 0"),
        ("--restart-epochs 3", "--restart-epochs: expected --schedule warm-restarts with"),
        ("--restart-growth 3", "--restart-growth: expected --schedule warm-restarts with"),
        ("--schedule warm-restarts --restart-epochs 0", "--restart-epochs: .* least 1"),
        ("--milestones 2", "--milestones: expected --schedule step with it"),
        ("--schedule step --milestones 2 2", r"rising epochs .* got \(2, 2\)"),
        ("--schedule step --milestones 0 2", r"rising epochs .* got \(0, 2\)"),
        ("--schedule step --milestones 80", r"below --epochs, .* got \(80,\)"),
        ("--image-size 9", "--image-size: only folders are resized, not digits"),
        ("--data-dir here", "--data-dir: digits come with scikit-learn"),
        ("--warmup-epochs 999", "--warmup-epochs: expected 0 to all epochs"),
        ("--ema-decay 0.9 --ema-start 16", "--ema-start: expected 0 to below all epochs"),
        ("--ema-decay 0.9 --ema-copy 17", "--ema-copy: expected at most all epochs, or No"),
        ("--same-dropout", "--same-dropout: expected --dropout above 0 with it, got True"),
        ("--eval-only", "--eval-only: expected --resume with it"),
        ("--model wrn-12-1", "--model: depth must be 10, 16"),
        ("--model resnt18", "--model: .*, got 'resnt18'; close to it: resnet18, "),
        ("--model zzz", "--model: .*, as wrn-28-10, .* as resnet18, got 'zzz'$"),
        ("--model resnet18 --layout davda54", "--layout: expected --model wrn-<depth>"),
        ("--model resnet18 --zero-head", "--zero-head: expected --model wrn-<depth>"),
        ("--model resnet18 --dropout 0.1", "--dropout: expected --model wrn-<depth>"),
        ("--weights default", "--weights: expected none or a file, but for torchvision"),
        ("--weights defualt", "--weights: .* got .*/defualt; close to it: default"),
        ("--freeze", "--freeze: expected --weights with it, got True"),
        ("--widths 4 4 4", "--widths: expected --model airbench94, 95 or 96 with it, got"),
        ("--model airbench94 --widths 4 4", "--widths: expected three numbers from 1 to"),
        ("--model airbench95 --dropout 0.1", "--dropout: expected --model wrn-<depth>"),
        ("--whitening-epochs 3", "--whitening-epochs: expected --model airbench94, 95"),
        ("--norm-bias-lr 0", "--norm-bias-lr: expected a finite number above 0, got 0"),
        ("--norm-bias-lr 8 --decay-in-loss", "--norm-bias-lr: expected 1 with --decay-in"),
        ("--norm-bias-lr 8 --optimizer muon", "--norm-bias-lr: expected --optimizer sgd"),
        ("--rise-from 0.1", "--rise-from: expected --schedule triangle with it, got 0.1"),
        ("--schedule triangle --rise-from 0", "--rise-from: expected above 0 to 1, got 0"),
        ("--schedule triangle --fall-to 1", "--fall-to: expected 0 to below 1, got 1.0"),
        ("--schedule triangle --rise 1", "--rise: expected 0 to below 1, got 1.0"),
        ("--lookahead 1", "--lookahead: expected 0 to below 1, or None, got 1.0"),
        ("--lookahead-every 3", "--lookahead-every: expected --lookahead with it, got 3"),
        ("--lookahead 0.9 --select loss", "--lookahead: expected --select all with it"),
        ("--alternate-flip", "--alternate-flip: expected --flip with it"),
        ("--crop-padding 0 --padding reflect", "--padding: expected --crop-padding with"),
        ("--crop-scale 0", "--crop-scale: expected above 0 to 1, got 0.0"),
        ("--device gpu", "--device: 'gpu' cannot be used"),
        ("--lr 1e308", r"--lr: .* size of 1\.2e-38 to 1e\+12, .* got 1e\+308"),
        ("--weight-decay 1e13", "--weight-decay: expected a size of .* got 10000000"),
        ("--mixup-alpha 5e-324", "--mixup-alpha: expected a size of .* got 5e-324"),
        ("--optimizer adam --betas 1e-99 0", r"--betas: .* got \(1e-99, 0\.0\)"),
        (f"--model airbench94 --widths {2**63} 1 1", "--widths: .* at most 64 bits, got"),
        ("--timeout 1e10", "--timeout: expected above 0 to 1e9, got"),
        ("--placement part", "--placement: expected replica, group:n, .* got 'part'"),
        ("--placement hsdp", "--placement: expected replica, .* got 'hsdp'"),
        ("--placement hsdp:0", "--placement: expected replica, .* got 'hsdp:0'"),
    ],
)
def test_values_out_of_range_say_what_was_expected(flags, message):
    with pytest.raises(ConfigError, match=message):
        configure([*DIGITS, *flags.split()])


def test_unknown_flags_end_with_the_usage_code():
    with pytest.raises(SystemExit) as ended:
        configure(["--roh", "0.1"])
    assert ended.value.code == 2
