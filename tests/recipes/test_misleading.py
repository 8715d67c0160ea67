"""Data and weights that are not what they seem: no hang, and errors that say what it is."""

import hashlib
import json
import threading

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from recipes.cifar_wrn import main
from recipes.data import cifar, pictures, sources
from recipes.errors import ConfigError, DataError
from recipes.train import pretrained
from samfn.storage import tensorfile
from tests import commands
from tests.recipes.data.test_cifar import members, write
from tests.recipes.data.test_folders import equal
from tests.recipes.data.test_sources import make_folder, warned
from tests.samfn.storage.test_files import holding
from tests.special import SPECIAL, make_special

SMALL = ["--model", "wrn-10-1", "--batch-size", "2", "--epochs", "1", "--compile", "no"]


pytestmark = pytest.mark.usefixtures("no_hang")
FILES = SPECIAL[:3]  # which a name may have that a directory has not


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("name", ["train/cat/0.png", "test/dog/2.png"])
def test_a_pipe_in_place_of_a_picture_is_named(tmp_path, kind, name):
    root = make_folder(tmp_path)
    make_special(root / name, kind)
    message = rf"{name}: expected a regular file, got {kind}"
    with pytest.raises(DataError, match=message):
        sources.load("folder", root)


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_pipe_in_place_of_an_archive_is_named(tmp_path, kind):
    make_special(tmp_path / cifar.FORMS["cifar10"].archive, kind)
    expected = f"expected a regular file, got {kind}"
    for modified in (False, True):
        with pytest.raises(DataError, match=expected):
            sources.load("cifar10", tmp_path, modified=modified)


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("name", ["data_batch_1", "test_batch", "batches.meta"])
def test_a_pipe_in_place_of_labels_is_named(tmp_path, kind, name):
    folder = tmp_path / cifar.FORMS["cifar10"].pickles
    folder.mkdir()
    make_special(folder / name, kind)
    for other in ("data_batch_1", "test_batch", *(f"data_batch_{i}" for i in range(2, 6))):
        if not (folder / other).is_symlink() and not (folder / other).exists():
            (folder / other).write_bytes(b"\x80\x02.")
    message = f"expected a regular file, got {kind}"
    with pytest.raises(DataError, match=message):
        sources.load("cifar10", tmp_path, modified=True)


@pytest.mark.parametrize("kind", SPECIAL)
def test_in_place_of_a_cache_a_pipe_is_told_and_replaced(tmp_path, kind):
    root = make_folder(tmp_path)
    before = sources.load("folder", root)
    (cache,) = root.glob("samfn-*.safetensors")
    make_special(cache, kind)
    found, said = warned(root)
    assert equal(found, before)
    assert "reading the data again: " in said[0]
    assert kind in said[0]
    assert cache.is_file() == (kind != "a directory")


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_pipe_in_place_of_weights_is_named(tmp_path, kind, name, capsys):
    make_special(tmp_path / name, kind)
    with pytest.raises(ConfigError, match="expected a regular file, got"):
        pretrained.read(tmp_path / name)
    assert main(["--data", "digits", "--weights", str(tmp_path / name)]) == 2
    assert "--weights: expected none, default or a file" in capsys.readouterr().err


def test_data_that_another_process_locks_are_waited_for_and_that_is_told(tmp_path):
    root = make_folder(tmp_path)
    with holding(root) as (holder, let_go):
        threading.Timer(3, let_go).start()
        found, said = warned(root)
    assert said == [f"waiting for {root}, which process {holder.pid} holds"]
    assert len(found.train_images) == 6


def limited(more, code, *arguments):
    """Run code in a process that may have some bytes of address space beside its own.

    It is a process of its own, as one that ran before has memory to spare.
    """
    return commands.run("-c", LIMITED + code, more, *arguments)


LIMITED = """
import resource, sys
from pathlib import Path
from recipes.cifar_wrn import main
from recipes.data import pictures
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, -1))
"""
MAIN = "sys.exit(main(sys.argv[2:]))"
LONG = """
pixels, _ = pictures.read(Path(sys.argv[2]), 224)
print(tuple(pixels.shape), pixels[0].min().item())
"""


@pytest.mark.parametrize("size", [(100_000, 1), (1, 100_000), (60_000, 3), (7, 50_000)])
def test_of_the_longest_pictures_the_middle_is_read_in_little_memory(tmp_path, size):
    image = Image.new("RGB", size, (0, 0, 255))
    width, height = (min(100, n) for n in size)
    image.paste(
        (200, 0, 0),
        (
            size[0] // 2 - width // 2,
            size[1] // 2 - height // 2,
            size[0] // 2 + width,
            size[1] // 2 + height,
        ),
    )
    image.save(tmp_path / "long.png")
    assert (tmp_path / "long.png").stat().st_size < 10_000
    pictures.read(tmp_path / "long.png", 8)
    done = limited(2**28, LONG, tmp_path / "long.png")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(3, 224, 224) 200\n"


def test_pictures_that_are_not_that_long_are_read_as_before(tmp_path):
    from torchvision.transforms.v2 import functional as transforms

    pixels = torch.randint(256, (3, 5, 300), dtype=torch.uint8)
    transforms.to_pil_image(pixels).save(tmp_path / "long.png")
    resized = transforms.resize(pixels, [16], antialias=True)
    expected = transforms.center_crop(resized, [16, 16])
    assert torch.equal(pictures.read(tmp_path / "long.png", 16).pixels, expected)


def test_too_little_memory_for_a_picture_names_it_and_blames_no_batch(tmp_path, capsys):
    root = make_folder(tmp_path)
    large = root / "train" / "dog" / "1.ppm"
    large.write_bytes(b"P6 9000 9000 255 " + bytes(100))
    flags = ["--data-dir", str(root), *SMALL]
    assert main([*flags, "--dry-run"]) == 2  # The twin: it is cut off.
    assert f"cannot read the image {large}" in capsys.readouterr().err
    done = limited(2**27 + 2**26, MAIN, *flags, "--dry-run")  # The image takes 243 MB.
    assert done.returncode == 4
    assert f"out of memory reading the image {large}" in done.stderr
    assert "batch" not in done.stderr


def test_too_little_memory_for_all_pictures_says_how_many_there_are(tmp_path):
    root = make_folder(tmp_path, sizes=((2000, 2000),), count=10)
    done = limited(2**29, MAIN, "--data-dir", str(root), *SMALL, "--dry-run")
    assert done.returncode == 4
    assert "keeping 20 images of 2000x2000" in done.stderr


ODD = {
    "the name 1": lambda plain: {1: plain},
    "a meta one as 'w'": lambda plain: {"w": plain.to("meta")},
    "a torch.sparse_coo one": lambda plain: {"w": plain.to_sparse()},
    "a torch.sparse_csr one": lambda plain: {"w": plain.to_sparse_csr()},
    "a quantised one": lambda plain: {
        "w": torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8)
    },
}


@pytest.mark.filterwarnings("ignore")  # of what is beta, or will go
@pytest.mark.parametrize("what", ODD)
def test_tensors_that_are_no_plain_ones_are_named(tmp_path, what):
    made = ODD[what](torch.ones(2, 2))
    torch.save({"v": torch.ones(1), **made}, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=f"--weights: expected .* got .*{what}"):
        pretrained.read(tmp_path / "w.pth")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int8, torch.uint8, torch.bool])
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_weights_that_are_no_real_numbers_are_refused(tmp_path, dtype, ending):
    own = {"w": torch.ones(2, 2), "n.num_batches_tracked": torch.tensor(0)}
    given, path = own | {"w": torch.ones(2, 2).to(dtype)}, tmp_path / f"w.{ending}"
    (torch.save if ending == "pth" else save_file)(given, path)
    message = rf"w is of {dtype}, and of torch.float32 here"
    for head in ((), ("w",)):
        with pytest.raises(ConfigError, match=message):
            pretrained.fit(own, pretrained.read(path), head, path)
    assert pretrained.fit(own, own, (), path) == own


@pytest.mark.parametrize("name", ["meta", "cpu\0", "", "gpu", "cuda:99"])
def test_devices_that_compute_nothing_are_refused(name, capsys):
    assert main(["--data", "digits", "--device", name, "--dry-run"]) == 2
    assert "--device: " in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["data-dir", "weights", "output", "resume", "config"])
def test_a_nul_in_a_name_is_no_traceback(flag, capsys):
    assert main([f"--{flag}", "a\0b", "--dry-run"]) == 2
    assert (
        f"--{flag}: expected a text without NUL, got 'a\\x00b'" in capsys.readouterr().err
    )


def test_a_nul_in_a_file_of_settings_is_no_traceback(tmp_path, capsys):
    (tmp_path / "own.toml").write_text('data_dir = "a\\u0000b"\n')
    assert main(["--config", str(tmp_path / "own.toml"), "--dry-run"]) == 2
    assert "data_dir cannot be" in capsys.readouterr().err


def swapped(tensors, texts):
    labels = tensors["train_labels"]
    tensors["train_labels"] = labels.flip(0)


def one_wrong(tensors, texts):
    tensors["test_labels"][0] = 1


def other_names(tensors, texts):
    texts["classes"] = json.dumps(["dog", "cat"])


def too_large(tensors, texts):
    tensors["train_labels"][0] = 7


def negative(tensors, texts):
    tensors["train_labels"][0] = -1


def floats(tensors, texts):
    tensors["train_images"] = tensors["train_images"].float()


def fewer(tensors, texts):
    tensors["test_images"] = tensors["test_images"][:-1]


def flat(tensors, texts):
    tensors["test_images"] = tensors["test_images"].flatten(1)


def lacking(tensors, texts):
    del tensors["test_labels"]


def more(tensors, texts):
    tensors["surprise"] = torch.ones(1)


def huge_number(tensors, texts):
    texts["classes"] = f"[{10**400}, 1]"


def longer_number(tensors, texts):
    texts["classes"] = f"[{'9' * 5000}, 1]"


def deep(tensors, texts):
    texts["notes"] = "[" * 100_000


def no_list(tensors, texts):
    texts["classes"] = "7"


def one_text(tensors, texts):
    texts["classes"] = '"ab"'


def of_others(tensors, texts):
    texts["key"] = texts["key"].replace("reading", "writing")


FORGED = [swapped, one_wrong, other_names, too_large, negative, floats, fewer, flat]
FORGED += [lacking, more, huge_number, longer_number, deep, no_list, one_text, of_others]


@pytest.mark.parametrize("forge", FORGED)
def test_a_forged_cache_of_a_right_digest_is_told_and_made_anew(tmp_path, forge):
    root = make_folder(tmp_path)
    before = sources.load("folder", root)
    (cache,) = root.glob("samfn-*.safetensors")
    tensors, texts = tensorfile.read(cache)
    tensorfile.write(cache, tensors, texts)
    assert warned(root)[1] == []  # The twin: written again as it was.
    forge(tensors, texts)
    tensorfile.write(cache, tensors, texts)
    found, said = warned(root)
    assert equal(found, before)
    assert [line[:24] for line in said] == ["reading the data again: "]
    assert warned(root)[1] == []


def test_a_cache_of_other_images_is_not_taken_for_that_of_these(tmp_path):
    root = make_folder(tmp_path)
    small, large = (sources.load("folder", root, image_size=size) for size in (4, 8))
    first, second = sorted(root.glob("samfn-*.safetensors"), key=lambda p: p.stat().st_size)
    second.write_bytes(first.read_bytes())
    found, (line,) = warned(root, image_size=8)
    assert equal(found, large)
    assert line.endswith(f"{second} was made of other files, or read otherwise")
    assert equal(sources.load("folder", root, image_size=4), small)


def test_a_cache_that_does_not_say_what_it_was_made_of_is_still_read(tmp_path):
    root = make_folder(tmp_path)
    before = sources.load("folder", root)
    (cache,) = root.glob("samfn-*.safetensors")
    tensors, texts = tensorfile.read(cache)
    del texts["key"]
    tensorfile.write(cache, tensors, texts)
    found, said = warned(root)
    assert not said
    assert equal(found, before)
    with safe_open(cache, "pt") as file:
        assert "key" not in file.metadata()


def test_no_cache_stands_for_the_files_of_cifar(tmp_path):
    write(tmp_path / cifar.FORMS["cifar10"].archive, members("cifar10"))
    before = sources.load("cifar10", tmp_path, modified=True)
    # Where older versions kept it, with labels that are swapped.
    text = json.dumps({"format": 3, "source": "cifar10"}, sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    tensors = dict(zip(sources.Dataset._fields[:4], before[:4], strict=True))
    tensors["train_labels"] = tensors["train_labels"].flip(0)
    texts = {"classes": json.dumps(before.classes), "notes": "[]", "key": text}
    tensorfile.write(tmp_path / f"samfn-{name}.safetensors", tensors, texts)
    assert equal(sources.load("cifar10", tmp_path, modified=True), before)
