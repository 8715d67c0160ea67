"""The recipe for language models: adapters, what is perturbed, and what a run leaves."""

import contextlib
import copy
import json
import math
import shutil

import pytest
import torch

import samfn
from recipes import errors, finetune_text
from recipes.data import text
from recipes.finetune_text import main, tune
from recipes.models import language
from recipes.terminal.console import Display
from recipes.terminal.signals import Signals
from recipes.text.settings import Settings, opened
from recipes.text.task import batch_of
from recipes.text.training import Meter
from samfn import InUseError
from samfn.gradient import Pass
from samfn.methods.base import Point
from samfn.storage import tensorfile
from samfn.training.loop import Step

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
SMALL = {"epochs": 2, "sequences": 16, "batch_size": 4, "length": 16, "rank": 2}
FLAGS = [part for n, v in SMALL.items() for part in (f"--{n.replace('_', '-')}", str(v))]
COSTS = {"seconds", "peak_mebibytes"}
LEFT = {"config.toml", "metrics.jsonl", "curves.png", "checkpoints", "model.safetensors"}


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(language, "STEPS", 2)
    monkeypatch.setattr(text, "MODULES", ("textwrap",))


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Return the directory of a run that was trained to its end."""
    run = tmp_path_factory.mktemp("text") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language, "STEPS", 2)
        patch.setattr(text, "MODULES", ("textwrap",))
        assert main([*FLAGS, "--output", str(run)]) == 0
    return run


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_every_run_leaves_and_adapters_that_peft_reads(ran):
    assert LEFT | {"base", "adapter"} <= {path.name for path in ran.iterdir()}
    rows = rows_of(ran)
    assert [row["epoch"] for row in rows] == [1, 2]
    base = transformers.AutoModelForCausalLM.from_pretrained(ran / "base")
    model = peft.PeftModel.from_pretrained(base, ran / "adapter").eval()
    cut = text.sequences(text.source_code(), text.Bytes(), 16, most=16).test
    with torch.no_grad():
        loss = model(input_ids=cut, labels=cut).loss
    assert loss.item() == pytest.approx(rows[-1]["test_loss"], rel=1e-5)
    own = tensorfile.read(ran / "model.safetensors")[0]
    assert own.keys() == model.state_dict().keys()


def test_a_run_says_from_which_step_on_it_perturbs(tmp_path, capsys):
    flags = [*FLAGS, "--sam-last", "0.5", "--output", str(tmp_path / "run")]
    assert main(flags) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("from step 5 of 8 on, 50% of the steps") == 2  # First and last.


def test_the_same_command_shows_the_end_of_a_run_and_others_are_refused(ran, capsys):
    before = (ran / "metrics.jsonl").read_text()
    assert main([*FLAGS, "--output", str(ran)]) == 0
    assert "going on after 8 of 8 steps" in capsys.readouterr().out
    assert (ran / "metrics.jsonl").read_text() == before
    flags = [*FLAGS, "--rho", "0.1", "--output", str(ran)]
    assert main(flags) == errors.WRONG_INPUT
    assert "rho was 0.05, is now 0.1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("perturb", "stop"), [("merged", 3), ("noise", 3), ("adapters", 4)]
)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path, perturb, stop, monkeypatch):
    def run(name, stop=None):
        settings = Settings(**SMALL, perturb=perturb, output=tmp_path / name)
        signals, called = Signals(), Meter.__call__

        def count(self, event):
            if isinstance(event, Step) and event.training.step == stop:
                signals.stop = 2
            called(self, event)

        with monkeypatch.context() as patch:
            patch.setattr(Meter, "__call__", count)
            return tune(settings, Display(), signals)

    assert run("whole") == 0
    assert run("parts", stop=stop) == 130
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    assert run("parts") == 0
    whole, parts = (
        tensorfile.read(tmp_path / name / "model.safetensors")[0]
        for name in ("whole", "parts")
    )
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())
    kept = [
        [
            {k: v for k, v in row.items() if k not in COSTS}
            for row in rows_of(tmp_path / name)
        ]
        for name in ("whole", "parts")
    ]
    assert kept[0] == kept[1]


def test_a_run_goes_on_with_no_other_text_than_it_was_begun_with(tmp_path, capsys):
    file, run = tmp_path / "text.txt", tmp_path / "run"
    file.write_text("one and another " * 40)
    flags = [*FLAGS, "--text", str(file), "--output", str(run)]
    assert main(flags) == 0
    assert main(flags) == 0
    file.write_text("one and a third " * 40)
    assert main(flags) == errors.WRONG_INPUT
    told = " ".join(capsys.readouterr().err.split())
    assert "--text: the run was begun with other tokens" in told


@pytest.mark.parametrize(
    "wrong",
    [
        ("--text", "absent.txt"),
        ("--length", "1500"),
        ("--length", "10000"),
        ("--batch-size", "99"),
        ("--model", "./absent"),
    ],
)
def test_a_run_that_is_refused_occupies_no_directory(tmp_path, monkeypatch, wrong):
    monkeypatch.chdir(tmp_path)
    for output in ([], ["--output", "runs/run"]):
        assert main([*FLAGS, *wrong, *output]) == errors.WRONG_INPUT
        assert not [*(tmp_path / "runs").iterdir()]


def test_a_directory_that_was_there_or_that_another_begins_in_is_not_removed(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new"):
        settings = Settings(output=tmp_path / name)
        with contextlib.suppress(errors.ConfigError), opened(settings):
            with pytest.raises(InUseError), opened(settings):
                pass
            assert (tmp_path / name).is_dir()
            raise errors.ConfigError("refused")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.fixture
def run(ran, tmp_path):
    """Return a copy of the run, to write into."""
    return shutil.copytree(ran, tmp_path / "run")


def again(run, *flags):
    """Give the command of the run again."""
    return main([*FLAGS, *flags, "--output", str(run)])


@pytest.mark.parametrize(
    "text",
    [None, "", "{\nnull\n", '{"epoch": 1}\n{"epoch": 2, "test_loss": "x"}\n', "cut"],
)
def test_epochs_that_are_lost_or_edited_are_those_of_the_checkpoints(ran, run, text):
    file, before = run / "metrics.jsonl", rows_of(ran)
    whole = file.read_text()
    file.unlink()
    if text is not None:
        file.write_text(whole[:-30] if text == "cut" else text)
    assert again(run) == 0
    assert rows_of(run) == before
    (run / "metrics.jsonl").write_text(whole.replace('"test_loss": ', '"test_loss": 1'))
    assert again(run) == 0
    assert rows_of(run) == before


def test_without_checkpoints_each_epoch_is_trained_and_recorded_once(ran, run):
    shutil.rmtree(run / "checkpoints")
    assert again(run) == 0
    kept = [{k: v for k, v in row.items() if k not in COSTS} for row in rows_of(run)]
    assert kept == [{k: v for k, v in r.items() if k not in COSTS} for r in rows_of(ran)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda texts: texts.pop("progress"),
            "a checkpoint is not of this run: 'progress'",
        ),
        (
            lambda texts: texts.update(progress="[]"),
            "a checkpoint is not of this run: list",
        ),
        (lambda texts: texts.update(progress='{"epoch": 9, "batch": 0}'), "has taken 8 st"),
        (lambda texts: texts.update({"samfn.format": "3"}), "this samfn reads format 2"),
        (lambda texts: texts.update({"memory.settings": '"x"'}), "expected settings"),
        (lambda texts: texts.update({"memory.text": '"x"'}), "begun with other tokens"),
    ],
)
def test_a_checkpoint_of_another_run_is_wrong_input(run, capsys, change, message):
    newest = sorted(run.glob("checkpoints/*"))[-1]
    tensors, texts = tensorfile.read(newest)
    change(texts)
    tensorfile.write(newest, tensors, texts)
    before = (run / "metrics.jsonl").read_bytes()
    assert again(run) == errors.WRONG_INPUT
    assert message in " ".join(capsys.readouterr().err.split())
    assert (run / "metrics.jsonl").read_bytes() == before


def test_settings_edited_in_both_places_are_not_believed(run, capsys):
    file = run / "config.toml"
    file.write_text(file.read_text().replace("lr = 0.002", "lr = 0.5"))
    assert again(run, "--lr", "0.5") == errors.WRONG_INPUT
    assert '"lr": 0.5' in " ".join(capsys.readouterr().err.split())


def test_a_base_that_was_changed_is_not_believed(run, capsys):
    file = run / "base" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-50] ^= 1
    file.write_bytes(content)
    assert again(run) == errors.WRONG_INPUT
    told = " ".join(capsys.readouterr().err.split())
    assert "--model: the run was begun with another model" in told
    (run / "base" / "config.json").write_text('{"model_type": "llama", "hidden_size": "x"}')
    assert again(run) == errors.WRONG_INPUT
    assert "--model: cannot read" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("change", [{"rms_norm_eps": 1.0}, {"hidden_act": "gelu"}])
def test_a_base_that_computes_otherwise_is_not_believed(run, capsys, change):
    file = run / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert again(run) == errors.WRONG_INPUT
    told = " ".join(capsys.readouterr().err.split())
    assert "another model: its config.json differs" in told


def test_a_run_of_another_version_of_transformers_goes_on(run, monkeypatch):
    monkeypatch.setattr("transformers.configuration_utils.__version__", "99.0")
    assert again(run) == 0


def test_settings_of_adapters_are_those_of_the_run(run):
    file = run / "adapter" / "adapter_config.json"
    before = json.loads(file.read_text())
    moved = before | {"base_model_name_or_path": "elsewhere"}
    moved["target_modules"] = [*reversed(before["target_modules"])]
    file.write_text(json.dumps(moved))
    assert again(run) == 0
    assert json.loads(file.read_text()) == moved
    for said in (json.dumps(before | {"lora_alpha": 400}), "[]", "{", '{"r": 2}'):
        file.write_text(said)
        assert again(run) == 0
        assert json.loads(file.read_text())["lora_alpha"] == before["lora_alpha"]
    assert len([*run.glob("adapter.superseded*")]) == 4


def test_epochs_that_somebody_spoils_while_a_run_trains_are_left_out(run, monkeypatch):
    def spoil(*args):
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"epoch": 1}\n{"epoch": 99, "test_loss": "x"}\n')
        return True

    monkeypatch.setattr(finetune_text, "train", spoil)
    assert again(run) == 0


def test_adapters_are_those_of_the_run_and_others_are_set_aside(ran, run):
    name = "adapter/adapter_model.safetensors"
    (run / name).write_bytes(b"other")
    assert again(run) == 0
    assert (run / name).read_bytes() == (ran / name).read_bytes()
    assert (run / "adapter.superseded/adapter_model.safetensors").read_bytes() == b"other"
    shutil.rmtree(run / "adapter")
    (run / "adapter").mkdir()
    assert again(run) == 0
    assert again(run) == 0
    assert (run / name).read_bytes() == (ran / name).read_bytes()
    found = {path.name for path in run.glob("*adapter*")}
    assert found == {"adapter", "adapter.superseded", "adapter.superseded.1"}


def problem(perturb):
    """Return a model with adapters that are not 0, its pairs, s, and a batch."""
    torch.manual_seed(0)
    model, pairs, scale = language.adapted(language.tiny(), 2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
            if perturb == "merged" and name in pairs:
                p.requires_grad_(True)
    tokens = torch.randint(256, (4, 12))
    return model, pairs, scale, batch_of(tokens)


@pytest.mark.parametrize("perturb", ["adapters", "merged"])
def test_the_functional_form_and_the_drop_in_agree(perturb):
    model, pairs, _, batch = problem(perturb)
    base, method = samfn.adamw(weight_decay=0.0), samfn.sam()
    if perturb == "merged":
        base = samfn.grouped(base, ([*pairs], language.STILL))
        method = samfn.on_parameters(method, [*pairs])
    given = {"loss_fn": samfn.supervised(model), "optimizer": base, "method": method}
    state = samfn.init(*samfn.split(model), optimizer=base, method=method)
    other = copy.deepcopy(model)
    named = {n: p for n, p in other.named_parameters() if p.requires_grad}
    groups = [{"params": [p for n, p in named.items() if n not in pairs]}]
    if perturb == "merged":  # They are perturbed, and stay.
        groups.append({"params": [named[n] for n in pairs], "lr": 0.0})
    optimizer = samfn.SAM(groups, torch.optim.AdamW, rho=0.5, lr=1e-2, weight_decay=0.0)
    before = {name: w.clone() for name, w in state.params.items()}
    for _ in range(3):
        state, metrics = samfn.sam_update(state, batch, rho=0.5, lr=1e-2, **given)
        other(**batch).loss.backward()
        if perturb == "merged":  # The slope of the adapters is no part of the ascent.
            for p in groups[0]["params"]:
                p.grad = None
        optimizer.first_step(zero_grad=True)
        other(**batch).loss.backward()
        optimizer.second_step(zero_grad=True)
    assert float(metrics.perturbation_norm) == pytest.approx(0.5, rel=1e-5)
    for name, w in state.params.items():
        torch.testing.assert_close(named[name].detach(), w, rtol=0, atol=2e-5)
        assert torch.equal(w, before[name]) == (name in pairs)


def test_noise_on_merged_weights_is_as_long_as_their_rows_and_leaves_them():
    model, pairs, scale, batch = problem("noise")
    base, method = samfn.adamw(weight_decay=0.0), language.merged_noise(pairs, scale)
    given = {"loss_fn": samfn.supervised(model), "optimizer": base, "method": method}
    state = samfn.init(*samfn.split(model), optimizer=base, method=method)
    torch.manual_seed(5)
    new, metrics = samfn.sam_update(state, batch, rho=0.3, lr=1e-2, **given)
    assert all(torch.equal(new.buffers[n], b) for n, b in state.buffers.items())
    torch.manual_seed(5)
    squares = 0.0
    noisy = copy.deepcopy(model)
    named = dict(noisy.named_parameters())
    for name, (a, b) in pairs.items():
        merged = named[name] + scale * named[b] @ named[a]
        each = merged.square().mean(1, keepdim=True).sqrt()
        noise = 0.3 * each.detach() * torch.randn_like(merged)
        named[name].data += noise
        squares += float(noise.square().sum())
    assert float(metrics.perturbation_norm) == pytest.approx(math.sqrt(squares), rel=1e-5)
    loss = noisy(**batch).loss
    assert loss.item() == pytest.approx(metrics.loss.item(), rel=1e-6)
    optimizer = torch.optim.AdamW([*noisy.parameters()], lr=1e-2, weight_decay=0.0)
    loss.backward()
    optimizer.step()
    for name, w in new.params.items():
        torch.testing.assert_close(named[name].detach(), w, rtol=0, atol=2e-5)


def test_noise_has_the_rows_of_outputs_also_where_a_weight_has_them_as_columns():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2)
    model, pairs, scale = language.adapted(transformers.GPT2LMHeadModel(config), 2)
    flipped = language.transposed(model, pairs)
    assert flipped == {*pairs}
    (square,) = (name for name in pairs if "attn.c_proj" in name)
    weights = dict(model.named_parameters())
    weights[square].data[:, 1:] = 0  # What all outputs but the first are made of.
    method = language.merged_noise({square: pairs[square]}, scale, flipped)
    point = Point(*samfn.split(model), {}, 1.0, ())
    given = []

    def evaluate(params, buffers, batch, **how):
        given.append(buffers[square] - weights[square].detach())
        return Pass(torch.zeros(()), None, buffers, {"a": torch.ones(())})

    method.descent(evaluate, point, {})
    assert given[0][:, 0].norm() > 0
    assert torch.equal(given[0][:, 1:], torch.zeros(8, 7))


@pytest.fixture
def small_gpt(tmp_path):
    config = transformers.GPT2Config(
        vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=16
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt")
    return tmp_path / "gpt"


def test_a_model_that_cannot_read_the_text_is_wrong_input(small_gpt, capsys):
    given = [*FLAGS, "--model", str(small_gpt), "--output", str(small_gpt.parent / "run")]
    assert main(given) == errors.WRONG_INPUT
    assert "makes no tokens of the text" in " ".join(capsys.readouterr().err.split())
    model = language.load(str(small_gpt))
    with pytest.raises(errors.ConfigError, match="--length: expected at most the 16"):
        language.require_readable(model, torch.zeros(2, 17, dtype=torch.long))
    with pytest.raises(errors.ConfigError, match="gave token 11, and the model has 11"):
        language.require_readable(model, torch.full((2, 16), 11))
    (small_gpt / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(errors.ConfigError, match="--model: "):
        language.load(str(small_gpt))


def test_the_base_of_a_run_reads_bytes_and_a_run_is_no_model(ran, tmp_path, capsys):
    tokens = language.tokenizer(str(ran / "base"))
    assert tokens("é") == text.Bytes()("é")
    flags = ["--model", str(ran), "--output", str(tmp_path / "x")]
    assert main([*FLAGS, *flags]) == errors.WRONG_INPUT
    told = f"--model: cannot read the tokenizer of {ran}: a directory must have its files"
    assert told in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("text", ["a = = 1", f"a = {'9' * 5000}", f"a = {'[' * 5000}"])
def test_settings_that_are_damaged_are_wrong_input(tmp_path, capsys, text):
    (tmp_path / "config.toml").write_text(text)
    assert main([*FLAGS, "--output", str(tmp_path)]) == errors.WRONG_INPUT
    assert "has no settings of a run" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--text", "no-such"], "cannot read no-such"),
        (["--text", __file__, "--length", "4000"], "at least 20 sequences of 4000"),
        (["--model", "./no-such"], "--model: "),
        (["--rho", "-1"], "--rho: expected a finite number of at least 0, got -1"),
        (["--rank", str(2**62)], "--rank: expected 1 to 10000, got"),
        (["--batch-size", "17"], "--batch-size: expected at most the 16"),
        (["--output", "\udcff"], "--output: expected a name in UTF-8"),
    ],
)
def test_wrong_input_ends_with_its_code(tmp_path, capsys, flags, message):
    code = main([*FLAGS, "--output", str(tmp_path / "run"), *flags])
    assert code == errors.WRONG_INPUT
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_directory_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "letter").write_text("mine")
    assert main([*FLAGS, "--output", str(tmp_path)]) == errors.WRONG_INPUT
    assert "holds letter" in " ".join(capsys.readouterr().err.split())
    assert {path.name for path in tmp_path.iterdir()} <= {"letter", ".samfn.lock"}
