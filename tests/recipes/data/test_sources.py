import http.server
import os
import socket
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from recipes.data import cifar, sources
from recipes.data.folders import SPLITS
from recipes.errors import ConfigError, DataError
from recipes.settings.resolve import configure
from tests.samfn.storage.test_files import holding


def homeless():
    """Stand for `Path.home` where a user has neither HOME nor a name."""
    raise RuntimeError("Could not determine home directory.")


def make_folder(root, sizes=((6, 6),), classes=("cat", "dog"), count=3):
    """Write PNG images whose pixels all say which image they are."""
    number = 0
    for split in SPLITS:
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                number += 1
                size = sizes[number % len(sizes)]
                Image.new("RGB", size, (number, 0, 255)).save(folder / f"{index}.png")
    return root


def test_folders_become_tensors_with_labels_in_the_order_of_the_names(tmp_path):
    found = sources.load("folder", make_folder(tmp_path))
    assert found.classes == ("cat", "dog")
    assert found.train_images.shape == (6, 3, 6, 6)
    assert found.train_images.dtype is torch.uint8
    assert found.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.train_images[:, 0, 0, 0].tolist() == [1, 2, 3, 4, 5, 6]
    assert found.test_images[:, 0, 5, 5].tolist() == [7, 8, 9, 10, 11, 12]
    assert found.train_images[:, 2].eq(255).all()


def test_the_second_time_comes_from_the_cache_and_is_equal(tmp_path):
    root = make_folder(tmp_path)
    first = sources.load("folder", root)
    (cache,) = root.glob("samfn-*.safetensors")
    before = cache.stat().st_mtime_ns
    tracked = []
    second = sources.load("folder", root, track=lambda *a: tracked.append(a) or a[0])
    assert not tracked
    assert cache.stat().st_mtime_ns == before
    assert all(torch.equal(a, b) for a, b in zip(first[:4], second[:4], strict=True))
    assert second.classes == first.classes


def test_a_changed_file_or_size_makes_a_new_cache(tmp_path):
    root = make_folder(tmp_path)
    sources.load("folder", root)
    Image.new("RGB", (6, 6), (99, 0, 0)).save(root / "train" / "cat" / "0.png")
    assert sources.load("folder", root).train_images[0, 0, 0, 0] == 99
    assert sources.load("folder", root, image_size=4).train_images.shape[2:] == (4, 4)
    assert len(list(root.glob("samfn-*.safetensors"))) == 3


@pytest.mark.parametrize("how", ["written", "swapped", "folders"])
def test_files_of_the_same_size_and_time_are_told_apart(tmp_path, how):
    root = tmp_path / "images"
    for number, name in enumerate(("cat", "dog")):
        for split in SPLITS:
            file = root / split / name / "0.ppm"
            file.parent.mkdir(parents=True)
            Image.new("RGB", (6, 6), (number, 9, 0)).save(file)
            os.utime(file, (1e9, 1e9))
    cat, dog = (root / "train" / name / "0.ppm" for name in ("cat", "dog"))
    assert sources.load("folder", root).train_images[:, 0, 0, 0].tolist() == [0, 1]
    match how:
        case "written":
            Image.new("RGB", (6, 6), (9, 9, 0)).save(cat)
            os.utime(cat, (1e9, 1e9))
        case "swapped":
            swap(cat, dog)
        case "folders":
            swap(cat.parent, dog.parent)
    expected = [9, 1] if how == "written" else [1, 0]
    assert sources.load("folder", root).train_images[:, 0, 0, 0].tolist() == expected


def swap(one, other):
    """Give two files or folders each other's names."""
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def test_a_damaged_cache_is_made_anew_and_said_so(tmp_path):
    root, said = make_folder(tmp_path), []
    first = sources.load("folder", root)
    (cache,) = root.glob("samfn-*.safetensors")
    content = bytearray(cache.read_bytes())
    content[-1] ^= 1
    cache.write_bytes(content)
    again = sources.load("folder", root, warn=said.append)
    assert len(said) == 1
    assert "reading the data again: " in said[0]
    assert cache.name in said[0]
    assert torch.equal(again.train_images, first.train_images)
    assert cache.stat().st_size > 100


def test_progress_is_shown_for_every_image(tmp_path):
    seen = []

    def track(items, total, text):
        for item in items:
            seen.append((text, total))
            yield item

    sources.load("folder", make_folder(tmp_path), track=track)
    assert seen == [("reading train images", 6)] * 6 + [("reading test images", 6)] * 6


def test_images_of_several_sizes_need_a_size(tmp_path):
    root = make_folder(tmp_path, sizes=((6, 6), (9, 7)))
    with pytest.raises(DataError, match=r"png is 6x6, .* 9x7; --image-size N resizes"):
        sources.load("folder", root)
    resized = sources.load("folder", root, image_size=5)
    assert resized.train_images.shape == (6, 3, 5, 5)


def test_of_photographs_the_middle_is_kept_upright(tmp_path):
    root = make_folder(tmp_path, sizes=((8, 8),))
    image = Image.new("RGB", (16, 8), (0, 0, 0))
    image.paste((200, 0, 0), (0, 0, 4, 8))  # the left quarter, which is cut off,
    image.paste((0, 200, 0), (4, 0, 12, 4))  # and half of the middle
    image.save(root / "train" / "cat" / "0.png")
    turned = image.rotate(90, expand=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: the camera was turned, and so is what it wrote.
    turned.save(root / "train" / "cat" / "1.png", exif=exif)
    first, second, *_ = sources.load("folder", root, image_size=8).train_images
    assert first[0].max() == 0
    assert first[1, :4].eq(200).all()
    assert first[1, 4:].max() == 0
    assert torch.equal(first, second)


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    root = make_folder(tmp_path)
    (root / "test" / "dog" / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"cannot read the image .*test/dog/1.png"):
        sources.load("folder", root)


def test_classes_must_be_the_same_in_both_splits(tmp_path):
    root = make_folder(tmp_path)
    (root / "test" / "cat").rename(root / "test" / "cow")
    with pytest.raises(DataError, match=r"not in both train and test: \['cat', 'cow'\]"):
        sources.load("folder", root)


def test_a_class_without_images_is_an_error(tmp_path):
    root = make_folder(tmp_path)
    (root / "train" / "emu").mkdir()
    with pytest.raises(DataError, match="emu"):
        sources.load("folder", root)


def test_a_directory_that_holds_nothing_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"neither train/<class>.* nor cifar-10"):
        sources.choose_source("auto", tmp_path)
    with pytest.raises(DataError, match="expected train/<class>"):
        sources.load("folder", tmp_path)
    with pytest.raises(DataError, match=r"cifar10, cifar100, .* got 'mnist'"):
        sources.choose_source("mnist", tmp_path)


def test_the_source_follows_from_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source, line = sources.choose_source("auto", None)
    assert source == "digits"
    assert "no CIFAR-10" in line
    assert "no network" in line
    assert "\n" not in line
    (tmp_path / "cache" / "samfn" / "cifar-10-batches-py").mkdir(parents=True)
    assert sources.choose_source("auto", None)[0] == "cifar10"
    assert sources.choose_source("auto", make_folder(tmp_path / "own"))[0] == "folder"
    assert sources.choose_source("cifar100", tmp_path)[0] == "cifar100"


def test_without_a_home_there_are_digits_and_what_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    source, line = sources.choose_source("auto", None)
    assert source == "digits"
    assert line.startswith("no home directory: expected HOME or XDG_CACHE_HOME: training")
    assert configure(["--data", "digits"]).data == "digits"
    assert configure(["--data-dir", str(make_folder(tmp_path))]).data == "folder"
    with pytest.raises(DataError, match="no home directory"):
        configure(["--data", "cifar10"])


def test_a_download_that_fails_leaves_the_digits(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with http.server.HTTPServer(("127.0.0.1", 0), Refusing) as server:
        server.status = 200
        threading.Thread(target=server.handle_request, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(cifar, "SERVER", url)
        source, line = sources.choose_source("auto", None)
    assert source == "digits"
    assert "no download (cannot read or download cifar10" in line
    assert "expected an https address" in line


def test_what_is_wrong_is_told_before_anything_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fetched = []
    monkeypatch.setattr(cifar, "fetch", lambda *args: fetched.append(args))
    with http.server.HTTPServer(("127.0.0.1", 0), Refusing) as server:
        server.status = 200
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setattr(cifar, "SERVER", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(ConfigError, match="--rho: expected a finite number"):
            configure(["--rho", "-1"])
    assert fetched == []


class Refusing(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_error(self.server.status)

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("status", [200, 404])
def test_a_server_that_answers_is_reachable_whatever_it_says(status):
    with http.server.HTTPServer(("127.0.0.1", 0), Refusing) as server:
        server.status = status
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert sources.is_reachable(f"http://127.0.0.1:{server.server_port}")


def test_a_server_that_is_not_there_or_never_answers_is_not_reachable():
    assert not sources.is_reachable("https://no-such-host.invalid")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert not sources.is_reachable(url, seconds=0.2)


def test_digits_are_split_by_class_and_the_same_every_time():
    first, second = sources.load("digits"), sources.load("digits")
    assert first.train_images.shape == (1437, 1, 8, 8)
    assert first.test_images.shape == (360, 1, 8, 8)
    assert first.train_images.min() == 0
    assert first.train_images.max() == 255
    counts = torch.bincount(first.test_labels)
    assert counts.min() >= 34
    assert counts.max() <= 38
    assert torch.equal(first.test_images, second.test_images)


@given(st.integers(2, 20), st.floats(0, 1), st.integers(0, 2**31), st.integers(1, 300))
def test_label_noise_makes_its_share_of_labels_wrong(classes, fraction, seed, count):
    labels = torch.arange(count) % classes
    before = labels.clone()

    def noisy():
        source = torch.Generator().manual_seed(seed)
        return sources.corrupt_labels(labels, classes, fraction, source)

    changed = noisy() != labels
    assert changed.sum() == round(fraction * count)
    assert noisy().min() >= 0
    assert noisy().max() < classes
    assert torch.equal(noisy(), noisy())
    assert torch.equal(labels, before)


def test_label_noise_is_symmetric():
    source = torch.Generator().manual_seed(0)
    noisy = sources.corrupt_labels(torch.zeros(9000, dtype=torch.int64), 10, 1.0, source)
    counts = torch.bincount(noisy, minlength=10)
    assert counts[0] == 0
    assert counts[1:].min() > 880
    assert counts[1:].max() < 1120


def test_validation_takes_images_away_from_training_with_their_labels():
    digits = sources.load("digits")
    source = torch.Generator().manual_seed(0)
    smaller, images, labels = sources.hold_out(digits, 0.1, source)
    assert len(images) == len(labels) == 144
    assert len(smaller.train_images) == len(smaller.train_labels) == 1437 - 144
    together = torch.cat([smaller.train_images, images]).flatten(1)
    together = torch.cat([together, torch.cat([smaller.train_labels, labels])[:, None]], 1)
    original = torch.cat([digits.train_images.flatten(1), digits.train_labels[:, None]], 1)
    rows = [sorted(map(tuple, table.tolist())) for table in (together, original)]
    assert rows[0] == rows[1]
    assert smaller.test_images is digits.test_images


@pytest.mark.parametrize("fraction", [0.0001, 0.9999])
def test_validation_leaves_no_set_empty(fraction):
    with pytest.raises(DataError, match="both sets need at least one"):
        sources.hold_out(sources.load("digits"), fraction, torch.Generator())


def test_fingerprints_tell_data_apart():
    digits = sources.load("digits")
    found = {sources.fingerprint(digits), sources.fingerprint(sources.load("digits"))}
    assert len(found) == 1
    other = digits.train_labels.clone()
    other[0] += 1
    found.add(sources.fingerprint(digits._replace(train_labels=other)))
    found.add(sources.fingerprint(digits._replace(classes=tuple("abcdefghij"))))
    found.add(sources.fingerprint(digits._replace(test_images=digits.test_images + 1)))
    assert len(found) == 4


def test_folders_behind_links_count_for_the_cache(tmp_path):
    root = make_folder(tmp_path / "links")
    (root / "train" / "cat").rename(tmp_path / "elsewhere")
    (root / "train" / "cat").symlink_to(tmp_path / "elsewhere")
    sources.load("folder", root)
    Image.new("RGB", (6, 6), (99, 0, 0)).save(tmp_path / "elsewhere" / "0.png")
    assert sources.load("folder", root).train_images[0, 0, 0, 0] == 99


def test_statistics_are_mean_and_deviation_of_each_channel():
    images = torch.randint(256, (20, 3, 5, 7), dtype=torch.uint8)
    mean, std = sources.statistics(images)
    pixels = images.double() / 255
    torch.testing.assert_close(mean.double(), pixels.mean((0, 2, 3)), rtol=1e-6, atol=0)
    expected = pixels.std((0, 2, 3), correction=0)
    torch.testing.assert_close(std.double(), expected, rtol=1e-6, atol=0)


def warned(root, **options):
    """Load a folder; return what was found and said."""
    said = []
    return sources.load("folder", root, warn=said.append, **options), said


def test_files_that_are_left_out_are_told_with_and_without_a_cache(tmp_path):
    root = make_folder(tmp_path)
    for name in ("a.heic", "b.HEIC", "c.txt", ".hidden", "Thumbs.db"):
        (root / "train" / "dog" / name).write_bytes(b"")
    Image.new("RGB", (6, 6)).save(root / "test" / "loose.png")
    (root / "val").mkdir()
    expected = [
        "left out, as their names end otherwise: 3 files (2 of .heic, 1 of .txt), the first"
        " train/dog/a.heic; read are .",
        "left out, as they are in no class folder: 1 of the images, the first test/loose",
        f"left out {root / 'val'}: only train and test are read, and --validation",
    ]
    for _ in range(2):
        found, said = warned(root)
        assert len(found.train_images) == 6
        assert [line[: len(e)] for line, e in zip(said, expected, strict=True)] == expected


def test_litter_and_images_of_every_accepted_ending_need_no_word(tmp_path):
    root = make_folder(tmp_path)
    names = [f"{end[1:]}{end}" for end in sources.pictures.endings()]
    for name in [".DS_Store", "desktop.ini"]:
        (root / "test" / "cat" / name).write_bytes(b"")
    for name in names:  # The content decides on how it is read, not the name.
        image = Image.new("RGB", (6, 6), (50, 0, 255))
        image.save(root / "train" / "cat" / name.upper(), format="png")
    found, said = warned(root)
    assert not said
    assert len(found.train_images) == 6 + len(names)


def test_what_is_remarked_of_images_is_told_with_and_without_a_cache(tmp_path):
    root = make_folder(tmp_path)
    for index in range(2):
        Image.new("L", (6, 6), 0).save(root / "train" / "dog" / f"{index}.png")
    Image.new("RGBA", (6, 6), (9, 9, 9, 99)).save(root / "test" / "cat" / "2.png")
    expected = [
        "images with transparent parts, which were laid over white: 1 of 12, the first"
        " test/cat/2.png",
        "images that are nothing but black, or nothing but white: 2 of 12, the first"
        " train/dog/0.png",
    ]
    assert [warned(root)[1] for _ in range(2)] == [expected, expected]


def test_an_image_whose_range_is_not_known_is_named(tmp_path):
    root = make_folder(tmp_path)
    Image.new("F", (6, 6), 0.5).save(root / "test" / "dog" / "x.tif")
    message = r"cannot read the image .*test/dog/x.tif: expected 8 bits.*TIFF of mode F;"
    with pytest.raises(DataError, match=message):
        sources.load("folder", root)


def test_images_of_16_bits_that_use_12_are_refused_unless_one_uses_more(tmp_path):
    root = make_folder(tmp_path)
    for index, value in enumerate((4095, 300)):
        Image.new("I;16", (6, 6), value).save(root / "train" / "cat" / f"{index}.png")
    with pytest.raises(DataError, match=r"train/cat/0.png, and each .* multiply them"):
        sources.load("folder", root)
    Image.new("I;16", (6, 6), 4500).save(root / "test" / "cat" / "0.png")
    assert sources.load("folder", root).test_images[0, 0, 0, 0] == 18


def test_one_class_is_no_classification(tmp_path):
    with pytest.raises(DataError, match="expected at least two classes, got only cat"):
        sources.load("folder", make_folder(tmp_path, classes=("cat",)))


def test_a_cache_of_another_way_to_read_is_not_used(tmp_path, monkeypatch):
    root = make_folder(tmp_path)
    sources.load("folder", root)
    monkeypatch.setattr(sources.pictures, "READING", 0)
    sources.load("folder", root)
    monkeypatch.setitem(sources.pictures.ENDINGS, "PNG", (".png",))
    sources.load("folder", root)
    assert len(list(root.glob("samfn-*.safetensors"))) == 3


def test_who_waits_for_data_is_told_which_process_reads_it(tmp_path):
    root, said = make_folder(tmp_path), []
    with holding(root) as (holder, let_go):

        def warn(text):
            said.append(text)
            let_go()

        assert sources.load("folder", root, warn=warn).classes == ("cat", "dog")
        holder.join()
        assert holder.exitcode == 0
    assert said[0] == f"waiting for {root}, which process {holder.pid} holds"
