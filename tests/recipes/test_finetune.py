"""Networks of torchvision on images of one's own, by one command."""

import hashlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from recipes import cifar_wrn, landscape
from recipes.data import download
from recipes.data.sources import load
from recipes.errors import ConfigError
from recipes.finetune import main
from recipes.models import networks
from recipes.settings.resolve import configure
from recipes.settings.saved import read_toml
from recipes.terminal.console import Display
from recipes.train import batches, pretrained
from recipes.train.build import assemble, read_data
from recipes.train.directory import RunDirectory
from samfn.modules import state_dict, trained
from tests.recipes.test_recipe import equal, rows, stop_after, tensors, without_times

TINY = "shufflenet_v2_x0_5"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Return a folder of photographs, of different sizes, of what is blue or red."""
    root = tmp_path_factory.mktemp("images")
    source = torch.Generator().manual_seed(0)
    for split, count in (("train", 24), ("test", 6)):
        for name, colour in (("blue", (0, 0, 200)), ("red", (200, 0, 0))):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                noise = torch.randint(-40, 40, (32 + index, 40, 3), generator=source)
                pixels = (torch.tensor(colour) + noise).clamp(0, 255).to(torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Return a file of weights of a network for 1,000 classes."""
    path = tmp_path_factory.mktemp("weights") / "published.pth"
    torch.manual_seed(5)
    model = networks.make(TINY, 1000, shape=(3, 32, 32))
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.mul_(torch.rand_like(buffer) + 0.5)
    torch.save(model.state_dict(), path)
    return path


def flags(images, *more):
    small = ["--image-size", "32", "--batch-size", "16", "--warmup-epochs", "0"]
    return ["--data-dir", str(images), *small, *map(str, more)]


@pytest.fixture(scope="module")
def learned(images, tmp_path_factory):
    run = tmp_path_factory.mktemp("learned") / "run"
    new = ["--weights", "none", "--epochs", "2", "--output", run]
    assert main(flags(images, *new)) == 0
    return run


def test_what_differs_in_colour_is_told_apart(learned):
    first, last = rows(learned)
    assert last["train_loss"] < first["train_loss"] / 2
    # Six steps are too few for the averages of statistics that testing takes.
    assert last["train_accuracy"] > 75
    assert read_toml(learned / "config.toml")["model"] == "resnet18"


def test_either_command_goes_on_and_names_itself(learned, capsys):
    said = []
    for command in (main, cifar_wrn.main):
        assert command(["--eval-only", "--resume", str(learned)]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    best = max(rows(learned), key=lambda row: row["test_accuracy"])
    found = f"epoch {best['epoch']}: test accuracy {best['test_accuracy']:.2f} %, loss"
    assert found in said[0]
    assert cifar_wrn.main(["--resume", str(learned)]) == 0
    assert set(re.findall(r"recipes\.\w+", capsys.readouterr().out)) == {
        "recipes.cifar_wrn"
    }


def test_the_landscape_is_drawn(learned, tmp_path):
    few = ["--points", "5", "--images", "4", "--output", str(tmp_path)]
    assert landscape.main([str(learned), *few]) == 0
    assert (tmp_path / "surfaces.png").exists()


def started(images, *more):
    """Return a task, and the state that it begins with."""
    config = configure(flags(images, "--model", TINY, *more), base="finetune")
    task, state = assemble(config, read_data(config, lambda items, *_: items, print))
    return task, state, pretrained.begin(task, state, Display())


def test_a_file_gives_the_outputs_that_its_weights_have(images, tmp_path, capsys):
    torch.manual_seed(3)
    model = networks.make(TINY, 2, shape=(3, 32, 32))
    save_file(model.state_dict(), tmp_path / "file.safetensors")
    half = {name: leaf.half() for name, leaf in model.state_dict().items()}
    torch.save(model.state_dict(), tmp_path / "file.pth")
    torch.save(half, tmp_path / "half.pth")
    inputs = torch.randn(4, 3, 32, 32)
    expected = model.eval()(inputs)
    for name in ("file.safetensors", "file.pth"):
        task, fresh, state = started(images, "--weights", tmp_path / name)
        found = trained(task.model, state.params, state.buffers)(inputs)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        before = trained(task.model, fresh.params, fresh.buffers)(inputs)
        assert not torch.allclose(before, expected)
        assert "338 of 338 tensors from " in capsys.readouterr().out.replace("\n", " ")
    _, fresh, state = started(images, "--weights", tmp_path / "half.pth")
    assert all(leaf.dtype is fresh.params[n].dtype for n, leaf in state.params.items())


def test_a_head_of_other_classes_starts_anew_and_nothing_else(images, published, capsys):
    task, fresh, state = started(images, "--weights", published)
    given = torch.load(published, weights_only=True)
    for name, leaf in state_dict(task.model, state.params, state.buffers).items():
        own = fresh.params if name.startswith("fc.") else given
        assert torch.equal(leaf, own[name]), name
    said = f"weights: 336 of 338 tensors from {published}; fc.weight, fc.bias start anew"
    assert said in capsys.readouterr().out.replace("\n", " ")


def test_images_are_normalised_as_they_were_for_the_weights(images, published):
    imagenet = networks.photographs(TINY)
    task, *_ = started(images, "--weights", published)
    assert task.mean.tolist() == pytest.approx(imagenet.mean)
    assert task.std.tolist() == pytest.approx(imagenet.std)
    task, *_ = started(images, "--weights", "none")
    red, green, blue = task.mean.tolist()
    assert red == pytest.approx(blue, abs=0.02)
    assert green < 0.1 < 0.3 < red < 0.5


@pytest.fixture(scope="module")
def probe(images, published, tmp_path_factory):
    """Train the last layer alone."""
    run = tmp_path_factory.mktemp("probe") / "run"
    head = ["--model", TINY, "--weights", published, "--freeze", "--rho", "0.3"]
    assert main(flags(images, *head, "--epochs", "2", "--lr", "0.5", "--output", run)) == 0
    return run


def test_frozen_weights_and_statistics_stay_and_the_head_is_perturbed(
    probe, published, images
):
    given = torch.load(published, weights_only=True)
    model = load_file(probe / "model.safetensors")
    assert model["fc.weight"].shape == (2, 1024)
    assert equal(*({n: t[n] for n in t if n[:2] != "fc"} for t in (model, given)))
    saved = tensors(probe)
    assert [n for n in saved if n.startswith("params/")] == [
        "params/fc.bias",
        "params/fc.weight",
    ]
    for row in rows(probe):
        assert row["perturbation_norm"] == pytest.approx(0.3, rel=1e-4)
    # A layer on fixed features: their weights are its logits' only ones.
    assert rows(probe)[-1]["train_loss"] < rows(probe)[0]["train_loss"]


@pytest.fixture(scope="module")
def whole(images, published, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    assert train(images, published, run) == 0
    return run


def train(images, file, run):
    return main(flags(images, *short(file), "--output", run))


def short(file):
    return ["--model", TINY, "--weights", str(file), "--epochs", "2"]


@pytest.mark.parametrize("steps", [2, 4])
def test_a_run_goes_on_bit_for_bit_and_needs_the_file_no_more(
    images, published, whole, tmp_path, monkeypatch, capsys, steps
):
    file, run = tmp_path / "file.pth", tmp_path / "run"
    file.write_bytes(published.read_bytes())

    def start(run):
        return train(images, file, run)

    assert stop_after(steps, run, monkeypatch, start=start) == 130
    assert f"{main.__module__} --resume {run}" in capsys.readouterr().out.replace("\n", "")
    file.unlink()
    assert cifar_wrn.main(["--resume", str(run)]) == 0
    assert equal(tensors(whole), tensors(run))
    assert without_times(whole) == without_times(run)


def test_a_run_without_a_checkpoint_begins_again_with_the_file(
    images, published, whole, tmp_path, capsys
):
    file, run = tmp_path / "file.pth", tmp_path / "run"
    file.write_bytes(published.read_bytes())
    config = configure(flags(images, *short(file)), base="finetune")
    with RunDirectory.create(run, config):
        pass
    assert main(["--resume", str(run)]) == 0
    assert equal(tensors(whole), tensors(run))
    file.unlink()
    with RunDirectory.create(tmp_path / "other", config):
        pass
    assert main(["--resume", str(tmp_path / "other")]) == 2
    assert f"cannot read {file}: No such file" in capsys.readouterr().err


def test_weights_and_what_is_frozen_cannot_change(probe, published, capsys, monkeypatch):
    for change in (["--weights", "none", "--no-freeze"], ["--no-freeze"]):
        assert main(["--resume", str(probe), *change]) == 2
        assert "no run can go on so: freeze was True" in capsys.readouterr().err
    monkeypatch.chdir(published.parent)
    assert main(["--resume", str(probe), "--weights", published.name]) == 0


def changed(state, **changes):
    return {n: t for n, t in ({**state, **changes}).items() if t is not None}


WRONG = {
    "it lacks conv1.0.weight$": lambda s: changed(s, **{"conv1.0.weight": None}),
    "it has unknown more$": lambda s: changed(s, more=torch.ones(1)),
    r"conv1.0.weight is \(24, 1, 3, 3\), and \(24, 3, 3, 3\) here": lambda s: changed(
        s, **{"conv1.0.weight": torch.ones(24, 1, 3, 3)}
    ),
    r"it lacks conv1.0.weight, .* and \d+ more": lambda s: {"fc.weight": s["fc.weight"]},
    "expected a state dict .* got a list": lambda s: [*s.values()],
    "tensors by name, got a dict as 'model'": lambda s: {"model": dict(s), "epoch": 3},
}


@pytest.mark.parametrize("message", WRONG)
def test_weights_of_another_network_are_refused(published, tmp_path, message):
    state, path = torch.load(published, weights_only=True), tmp_path / "wrong.pth"
    torch.save(WRONG[message](state), path)
    with pytest.raises(ConfigError, match=f"^--weights: .*{message}"):
        pretrained.fit(state, pretrained.read(path), ["fc.weight", "fc.bias"], path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_weights_that_are_not_finite_are_refused_where_they_are_taken(published, value):
    own = torch.load(published, weights_only=True)
    odd = torch.full_like(own["conv1.0.weight"], value, dtype=torch.float64)
    head = {"fc.weight": torch.full((1, 1), torch.nan)}  # It starts anew.
    given = changed(own, **{"conv1.0.weight": odd}, **head)
    with pytest.raises(ConfigError, match=r"inf or NaN, as numbers here: conv1.0.weight$"):
        pretrained.fit(own, given, ["fc.weight", "fc.bias"], published)
    assert pretrained.fit(own, changed(own, **head), ["fc.weight", "fc.bias"], published)


def test_the_kind_of_a_file_is_told_by_its_name_in_any_case(tmp_path):
    save_file({"weight": torch.ones(2)}, tmp_path / "A.SAFETENSORS")
    assert pretrained.read(tmp_path / "A.SAFETENSORS")["weight"].tolist() == [1, 1]


class Running:
    """What would run code when it is read."""

    def __reduce__(self):
        return Path.touch, (Path("was-run"),)


def test_what_could_run_code_is_refused_before_a_run_begins(
    images, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    torch.save({"fc.weight": Running()}, "wrong.pth")
    given = ["--model", TINY, "--weights", "wrong.pth", "--output", "run"]
    assert main(flags(images, *given)) == 2
    assert "damaged or holds more than tensors, which could" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["wrong.pth"]


def test_damaged_files_are_refused(tmp_path, published):
    for name in ("a.pth", "a.safetensors"):
        (tmp_path / name).write_bytes(published.read_bytes()[:5000])
        with pytest.raises(ConfigError, match=f"--weights: .*{name}"):
            pretrained.read(tmp_path / name)
    with pytest.raises(ConfigError, match=r"cannot read .*absent.pth: No such file"):
        pretrained.read(tmp_path / "absent.pth")


def test_counters_that_old_files_lack_are_not_missed(images, published, tmp_path, capsys):
    state = torch.load(published, weights_only=True)
    old = {n: t for n, t in state.items() if not n.endswith("num_batches_tracked")}
    assert len(old) < len(state)
    torch.save(old, tmp_path / "old.pth")
    _, _, state = started(images, "--weights", tmp_path / "old.pth")
    assert state.buffers["conv1.1.num_batches_tracked"] == 0
    assert "336 of 338 tensors" in capsys.readouterr().out.replace("\n", " ")


OLD = {
    "densenet121": lambda n: re.sub(r"(denselayer.*)(norm|conv)([12])\.", r"\1\2.\3.", n),
    "vit_b_32": lambda n: n.replace("mlp.0.", "mlp.linear_1.").replace(
        "p.3.", "p.linear_2."
    ),
}


@pytest.mark.parametrize("name", OLD)
def test_names_of_old_files_become_those_of_today(name):
    with torch.device("meta"):
        own = networks.make(name, 2, shape=(3, 32, 32)).state_dict()
    old = {OLD[name](n): leaf for n, leaf in own.items()}
    assert len(old.keys() - own.keys()) > 40
    for given in (old, own):
        assert pretrained.rename(given, ()).keys() == own.keys()


@pytest.mark.parametrize("name", networks.AUXILIARY)
def test_heads_that_are_left_out_are_not_unknown(name):
    from torchvision.models import get_model

    with torch.device("meta"):
        full = get_model(name, aux_logits=True, init_weights=True, num_classes=2)
        own = networks.make(name, 2, shape=(3, 96, 96), pretrained=True).state_dict()
    assert full.state_dict().keys() > own.keys()
    dropped = networks.AUXILIARY[name]
    assert pretrained.rename(full.state_dict(), dropped).keys() == own.keys()


@pytest.fixture
def offered(published, tmp_path, monkeypatch):
    """Let torchvision offer a file that is nowhere; return it, and where it may be."""
    content = published.read_bytes()
    name = f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    found = SimpleNamespace(
        url=f"https://127.0.0.1:9/{name}",
        meta={"_file_size": round(len(content) / 2**20, 3)},
        transforms=networks.published(TINY).transforms,
    )
    monkeypatch.setattr(networks, "published", lambda model: found)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    ours = tmp_path / "cache" / "samfn" / "weights" / name
    theirs = tmp_path / "cache" / "torch" / "hub" / "checkpoints" / name
    for path in (ours, theirs):
        path.parent.mkdir(parents=True)
    return content, ours, theirs


def test_published_weights_are_taken_where_they_were_downloaded(offered):
    content, ours, theirs = offered
    for path in (ours, theirs):
        path.write_bytes(content)
        assert pretrained.fetch("net", Display()) == path


def test_without_a_network_it_is_said_how_to_bring_the_file(
    images, offered, tmp_path, capsys
):
    content, ours, theirs = offered
    for path in (ours, theirs):
        path.write_bytes(content[:-1] + b"x")  # not what the name says
    run = tmp_path / "run"
    assert main(flags(images, "--model", TINY, "--output", run)) == 2
    shown = capsys.readouterr()
    address = r"error --weights: cannot download https://127.0.0.1:9/net-\w{8}.pth: "
    assert re.search(rf"{address}.*, and give it by --weights FILE$", shown.err.strip())
    assert f"MiB, weights of {TINY}" in shown.out
    assert not run.exists()
    ours.write_bytes(content)
    _, _, state = started(images)
    given = torch.load(ours, weights_only=True)
    assert torch.equal(state.params["conv1.0.weight"], given["conv1.0.weight"])


def test_what_is_downloaded_is_verified_by_its_name_and_size(offered, monkeypatch):
    content, ours, _ = offered
    asked = []

    def arrive(url, path, **known):
        asked.append((url, known))
        path.write_bytes(content)

    monkeypatch.setattr(pretrained, "download", arrive)
    for _ in range(2):  # once alone
        assert pretrained.fetch("net", Display()) == ours
    begins = hashlib.sha256(content).hexdigest()[:8]
    ((url, known),) = asked
    assert url == f"https://127.0.0.1:9/{ours.name}"
    assert known["sha256"] == begins
    # Half of the last digit of the size, which is in MiB.
    assert abs(known["size"] - len(content)) <= 0.0005 * 2**20 < known["slack"] < 2000


def test_the_preset_takes_the_size_that_the_weights_are_for(images):
    def side(*more, base="finetune"):
        config = configure(["--data-dir", str(images), *more], base=base)
        return config.preset, config.model, config.images.image_size, config.network.weights

    assert side() == ("finetune", "resnet18", 224, "default")
    assert side("--model", "efficientnet_b1")[2] == 240
    assert side("--image-size", "64")[2] == 64
    assert side("--image-size", "None")[2] is None
    vit = side("--model", "vit_b_16", base="auto")
    assert vit == ("finetune", "vit_b_16", 224, "default")
    wide = side("--model", "wrn-10-1", "--weights", "none")
    assert wide == ("finetune", "wrn-10-1", None, "none")
    digits = configure(["--data", "digits", "--weights", "none"], base="finetune")
    assert digits.images.image_size is None  # They are not resized.


def test_what_is_wrong_with_the_name_comes_first(capsys):
    for command in (main, cifar_wrn.main):
        assert command(["--model", "resnt18"]) == 2
        assert "close to it: resnet18, " in capsys.readouterr().err


def test_a_folder_is_asked_for(capsys):
    assert main([]) == 2
    assert "--data-dir: expected the directory of your images" in capsys.readouterr().err


def test_grey_images_are_refused(capsys):
    assert main(["--data", "digits", "--weights", "none"]) == 2
    assert "resnet18 takes no images of 8x8 with 1 channel" in capsys.readouterr().err


def test_the_help_is_that_of_the_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert "usage: python -m recipes.finetune " in out
    assert "(default: resnet18)" in " ".join(out.replace("│", " ").split())


def test_batches_of_large_images_are_made_few_at_a_time(monkeypatch):
    config = configure(["--data", "digits", "--batch-size", "40"])
    task, _ = assemble(config, load("digits"))
    made = []
    real = batches.augment.random_crop_flip

    def counted(images, *args, **options):
        made.append(len(images))
        return real(images, *args, **options)

    monkeypatch.setattr(batches.augment, "random_crop_flip", counted)
    assert len([*batches.augmented(task, 0)]) == 35
    assert made == [640, 640, 120]
    made.clear()
    monkeypatch.setattr(batches, "CHUNK_VALUES", 3 * 40 * 64 + 1)
    all_of_them = [*batches.augmented(task, 0)]
    assert made == [120] * 11 + [80]
    for start in (1, 17, 34):
        rest = [*batches.augmented(task, 0, start)]
        for one, other in zip(rest, all_of_them[start:], strict=True):
            assert torch.equal(one[0], other[0])
            assert torch.equal(one[1], other[1])
    monkeypatch.setattr(batches, "CHUNK_VALUES", 1)
    assert len([*batches.augmented(task, 0)]) == 35


def test_random_parts_are_taken_where_they_are_asked_for():
    still = ["--data", "digits", "--crop-padding", "0", "--no-flip"]
    first = []
    for scale in ("1", "0.3"):
        task, _ = assemble(configure([*still, "--crop-scale", scale]), load("digits"))
        first.append(next(batches.augmented(task, 0)))
    images = task.train_images[batches.order(task, 0)[0]]
    plain = batches.augment.normalise(images, task.mean, task.std)
    assert torch.equal(first[0][0], plain)
    assert not torch.equal(first[1][0], plain)
    assert torch.equal(first[0][1], first[1][1])


def test_fewer_large_images_are_evaluated_at_once():
    for side, count in ((8, 500), (32, 500), (224, 55), (4000, 1)):
        assert batches.eval_batch(torch.empty(1, 3, side, side, device="meta")) == count
