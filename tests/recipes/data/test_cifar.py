"""CIFAR from archives and folders of its form, small, and from hostile ones."""

import hashlib
import io
import os
import pickle
import tarfile
from contextlib import contextmanager
from sys import addaudithook

import numpy
import pytest
import torch
from torchvision import datasets

from recipes import errors
from recipes.data import cifar, sources
from recipes.data.cifar import CifarError

SEEN = []  # what the audit hook saw while it was on
WATCHING = False


def hook(event, args):
    if WATCHING and event in ("pickle.find_class", "marshal.loads", "exec", "os.system"):
        SEEN.append((event, args))


addaudithook(hook)


@contextmanager
def watching():
    global WATCHING
    SEEN.clear()
    WATCHING = True
    try:
        yield SEEN
    finally:
        WATCHING = False


def unpickled(seen):
    return [event for event in seen if event[0] == "pickle.find_class"]


def records(count, labels, classes):
    generator = numpy.random.default_rng(0)
    rows = generator.integers(0, 256, (count, labels + cifar.PIXELS), dtype=numpy.uint8)
    rows[:, labels - 1] = numpy.arange(count) % classes
    return rows


def members(source, images=(50, 20)):
    form = cifar.FORMS[source]
    files = {}
    for names, count in zip((form.train, form.test), images, strict=True):
        each = count // len(names)
        for name in names:
            files[name] = records(each, form.labels, form.classes).tobytes()
    names = "\n".join(f"class{i}" for i in range(form.classes)) + "\n\n"
    files[form.names] = names.encode()
    return {f"{form.folder}/{name}": content for name, content in files.items()}


def write(path, files, extra=()):
    with tarfile.open(path, "w:gz") as archive:
        for info, content in extra:
            archive.addfile(info, io.BytesIO(content))
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def published(monkeypatch, source, path, images=(50, 20)):
    """Make an archive the one whose digest and sizes are published."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    form = cifar.FORMS[source]._replace(sha256=digest, images=images)
    monkeypatch.setitem(cifar.FORMS, source, form)


@pytest.mark.parametrize(
    ("source", "images"), [("cifar10", (50, 10)), ("cifar100", (200, 100))]
)
def test_archives_become_tensors_without_unpickling(tmp_path, monkeypatch, source, images):
    form, files = cifar.FORMS[source], members(source, images)
    path = write(tmp_path / form.archive, files)
    published(monkeypatch, source, path, images)
    with watching() as seen:
        found = sources.load(source, tmp_path)
    assert not unpickled(seen)
    assert found.train_images.shape == (images[0], 3, 32, 32)
    assert found.classes == tuple(f"class{i}" for i in range(form.classes))
    first = numpy.frombuffer(files[f"{form.folder}/{form.train[0]}"], numpy.uint8)
    pixels = first[form.labels : form.labels + cifar.PIXELS].reshape(3, 32, 32)
    assert torch.equal(found.train_images[0], torch.from_numpy(pixels.copy()))
    expected = torch.arange(images[1]) % form.classes
    assert torch.equal(found.test_labels, expected)
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix == ".gz") == [path.name]
    assert not [*tmp_path.glob("*.safetensors")]  # It could hold other labels.
    assert torch.equal(sources.load(source, tmp_path).test_images, found.test_images)


class Bomb:
    """Unpickling this would leave a directory."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def write_pickles(root, reader, protocol, bomb=None):
    """Write what torchvision unpacks, small, with the digests that go with it."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    pixels = {}

    def dump(name, content):
        raw = pickle.dumps(content, protocol)
        (folder / name).write_bytes(raw)
        return [name, hashlib.md5(raw).hexdigest()]

    def batch(name, count):
        pixels[name] = records(count, 1, 10)[:, 1:]
        content = {
            # So many that what comes after is beyond the short opcodes of the memo.
            "filenames": [f"{name}{i}.png" for i in range(600)],
            "batch_label": f"batch {name}",
            "labels": [i % 10 for i in range(count)],
            "data": pixels[name],
        }
        return dump(name, content | ({"bomb": bomb} if bomb else {}))

    reader.train_list = [batch(f"data_batch_{i}", 20) for i in range(1, 3)]
    reader.test_list = [batch("test_batch", 20)]
    names = [f"class{i}" for i in range(10)]
    name, digest = dump("batches.meta", {"num_vis": 3072, "label_names": names})
    reader.meta = {"filename": name, "key": "label_names", "md5": digest}
    return pixels


@pytest.fixture
def reader(monkeypatch):
    reader = type("CIFAR10", (datasets.CIFAR10,), {})
    monkeypatch.setattr(datasets, "CIFAR10", reader)
    form = cifar.FORMS["cifar10"]._replace(images=(40, 20))
    monkeypatch.setitem(cifar.FORMS, "cifar10", form)
    return reader


@pytest.mark.parametrize("protocol", [2, 4])
def test_what_torchvision_unpacked_is_read_and_never_run(tmp_path, reader, protocol):
    bomb = Bomb(tmp_path / "exploded")
    pixels = write_pickles(tmp_path, reader, protocol, bomb)
    with watching() as seen:
        found = sources.load("cifar10", tmp_path)
        assert not unpickled(seen)
        assert not (tmp_path / "exploded").exists()
        pickle.loads((tmp_path / "cifar-10-batches-py" / "test_batch").read_bytes())
    assert (tmp_path / "exploded").exists()  # The bomb was a real one, and the hook works.
    assert unpickled(seen)
    assert found.train_images.shape == (40, 3, 32, 32)
    expected = torch.from_numpy(pixels["data_batch_2"][3].reshape(3, 32, 32).copy())
    assert torch.equal(found.train_images[23], expected)
    assert found.test_labels.tolist() == [*range(10)] * 2
    assert found.classes == tuple(f"class{i}" for i in range(10))


def test_files_that_are_not_the_published_ones_need_a_flag(tmp_path, reader):
    write_pickles(tmp_path, reader, 2)
    reader.test_list[0][1] = "0" * 32
    with pytest.raises(
        errors.DataError, match=r"test_batch is not the published .* MD5 000"
    ):
        sources.load("cifar10", tmp_path)
    assert len(sources.load("cifar10", tmp_path, modified=True).test_labels) == 20
    write_again = tmp_path / "cifar-10-batches-py" / "test_batch"
    content = write_again.read_bytes()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(content)
    again = sources.load("cifar10", tmp_path, modified=True)  # No cache stands for it.
    assert torch.equal(again.train_images[:20], again.test_images)


def damaged(source, change):
    files = members(source)
    name = next(name for name in files if "train" in name or "data_batch_2" in name)
    files[name] = change(files[name])
    return files


LENGTH = 1 + cifar.PIXELS
DAMAGE = {
    "cut off": (lambda content: content[:-5], "expected records of 3073 bytes, got"),
    "label out of range": (
        lambda content: bytes([77]) + content[1:],
        "expected labels below 10, got 77",
    ),
    "a class too few": (
        lambda content: content[LENGTH:] + bytes([1]) + content[1:LENGTH],
        "expected 5 images of each class, got 4 to 6; --allow-modified-data",
    ),
    "empty": (lambda content: b"", "expected 5 images of each class, got 4 to 4"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_data_are_refused(tmp_path, monkeypatch, kind):
    change, said = DAMAGE[kind]
    path = write(tmp_path / "cifar-10-binary.tar.gz", damaged("cifar10", change))
    published(monkeypatch, "cifar10", path)
    with pytest.raises(CifarError, match=said):
        cifar.read("cifar10", tmp_path)


def test_a_missing_member_or_class_is_named(tmp_path, monkeypatch):
    files = members("cifar10")
    del files["cifar-10-batches-bin/test_batch.bin"]
    path = write(tmp_path / "cifar-10-binary.tar.gz", files)
    published(monkeypatch, "cifar10", path)
    with pytest.raises(CifarError, match=r"lacks test_batch\.bin"):
        cifar.read("cifar10", tmp_path)
    files = members("cifar10") | {"cifar-10-batches-bin/batches.meta.txt": b"cat\ndog\n"}
    published(monkeypatch, "cifar10", write(path, files))
    with pytest.raises(CifarError, match="expected 10 classes, got 2"):
        cifar.read("cifar10", tmp_path)


def test_a_flipped_byte_or_half_an_archive_is_refused_before_it_is_opened(
    tmp_path, monkeypatch
):
    path = write(tmp_path / "cifar-10-binary.tar.gz", members("cifar10"))
    published(monkeypatch, "cifar10", path)
    assert len(cifar.read("cifar10", tmp_path)[0][1]) == 50
    content = path.read_bytes()
    for other in (content[:-1], content[: len(content) // 2], b"", content[:-1] + b"x"):
        path.write_bytes(other)
        with pytest.raises(CifarError, match="is not the published file: expected SHA256"):
            cifar.read("cifar10", tmp_path)
        with pytest.raises(CifarError):
            cifar.read("cifar10", tmp_path, modified=len(other) < len(content) - 1)


def entry(name, kind=tarfile.REGTYPE, target="", size=0):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, size
    return info


BATCH = "cifar-10-batches-bin/data_batch_1.bin"
HOSTILE = {
    "parent": [(entry("../escaped", size=1), b"x")],
    "absolute": [(entry("/samfn-escaped", size=1), b"x")],
    "symbolic link": [(entry(BATCH, tarfile.SYMTYPE, "/etc/passwd"), b"")],
    "hard link": [(entry(BATCH, tarfile.LNKTYPE, "../../etc/passwd"), b"")],
    "device": [(entry(BATCH, tarfile.CHRTYPE), b"")],
    "pipe": [(entry(BATCH, tarfile.FIFOTYPE), b"")],
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_members_are_passed_over(tmp_path, monkeypatch, kind):
    folder = tmp_path / "data"
    folder.mkdir()
    path = write(folder / "cifar-10-binary.tar.gz", members("cifar10"), HOSTILE[kind])
    published(monkeypatch, "cifar10", path)
    (images, _), _, _ = cifar.read("cifar10", folder)
    assert len(images) == 50
    assert [p.name for p in folder.iterdir()] == [path.name]
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize("kind", ["members", "size"])
def test_archives_that_would_never_end_are_refused(tmp_path, monkeypatch, kind):
    path = tmp_path / "cifar-10-binary.tar.gz"
    if kind == "members":
        extra = [(entry(f"file{i}"), b"") for i in range(100)]
        write(path, members("cifar10"), extra)
    else:
        size = 10 * 2**20
        write(path, members("cifar10"), [(entry("zeros", size=size), bytes(size))])
    published(monkeypatch, "cifar10", path)
    with pytest.raises(CifarError, match=r"is no archive of CIFAR: '(file64|zeros)'"):
        cifar.read("cifar10", tmp_path)


def test_a_download_that_fails_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "SERVER", "https://no-such-host.invalid/")
    monkeypatch.setattr("recipes.data.download.time.sleep", lambda seconds: None)
    with pytest.raises(errors.DataError, match="cannot read or download cifar10 in"):
        sources.load("cifar10", tmp_path)
    assert {p.name for p in tmp_path.iterdir()} <= {".samfn.lock"}
