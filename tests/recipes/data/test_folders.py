"""Folders of images that systems, editors and links have been at."""

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.datasets import DatasetFolder

from recipes.data import folders, sources
from recipes.data.pictures import endings
from recipes.errors import DataError
from tests.recipes.data.test_sources import make_folder, warned


def equal(left, right):
    pairs = zip(left[:4], right[:4], strict=True)
    return left.classes == right.classes and all(torch.equal(a, b) for a, b in pairs)


def whole(root):
    (root / "test").rename(root / "own")
    (root / "test").symlink_to("train")


def one_class(root):
    (root / "test" / "cat").rename(root / "own")
    (root / "test" / "cat").symlink_to(root / "train" / "cat")


def one_link(root):
    (root / "test" / "dog" / "7.png").symlink_to("../../train/cat/0.png")


def one_file(root):
    os.link(root / "train" / "dog" / "1.png", root / "test" / "cat" / "7.png")


def train_is_test(root):
    (root / "train").rename(root / "own")
    (root / "train").symlink_to("test")


SHARED = {whole: 6, one_class: 3, one_link: 1, one_file: 1, train_is_test: 6}


@pytest.mark.parametrize("share", SHARED)
def test_images_that_are_in_both_train_and_test_are_refused(tmp_path, share):
    root = make_folder(tmp_path)
    before = sources.load("folder", root)
    share(root)
    message = rf"got {SHARED[share]} that are in both: .*test/.*png is .*train/.*png"
    for size in (None, 4):
        with pytest.raises(DataError, match=message):
            sources.load("folder", root, image_size=size)
    assert len(before.test_images) == 6


HIDDEN = [
    "train/.ipynb_checkpoints/0-checkpoint.png",
    "test/.ipynb_checkpoints/0-checkpoint.png",
    "train/cat/.ipynb_checkpoints/0-checkpoint.png",
    "train/__MACOSX/cat/0.png",
    "test/dog/@eaDir/0.png",
    "train/.Trash-0/files/0.png",
    "train/cat/._0.png",
    "test/.hidden.png",
]


@pytest.mark.parametrize("name", HIDDEN)
def test_what_is_hidden_is_left_out_and_told(tmp_path, name):
    root = make_folder(tmp_path / "images")
    before, path = sources.load("folder", root), root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"no image")
    for _ in range(2):
        found, (line,) = warned(root)
        assert line.startswith(
            "left out, as they are hidden: 1 files and folders, the first"
        )
        assert name.startswith(line.rpartition(" ")[2])
        assert equal(found, before)


@pytest.mark.parametrize(
    "name", ["train/cat/x.png", "train/emu", "test/x.png", "test/dog/x"]
)
@pytest.mark.parametrize("to", ["nowhere", "itself", "back"])
def test_links_that_lead_nowhere_are_left_out_and_told(tmp_path, name, to):
    root = make_folder(tmp_path / "images")
    before, link = sources.load("folder", root), root / name
    target = {"nowhere": "nowhere", "itself": link.name, "back": link.parent}[to]
    link.symlink_to(target)
    found, (line,) = warned(root)
    assert line == f"left out, as they lead nowhere, or back: 1 links, the first {name}"
    assert equal(found, before)


def test_links_that_lead_to_images_are_followed(tmp_path):
    root = make_folder(tmp_path / "images")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("train/cat", "test/dog"):
        (root / name).rename(elsewhere / name.replace("/", "-"))
        (root / name).symlink_to(elsewhere / name.replace("/", "-"))
    image = root / "train" / "dog" / "0.png"
    image.rename(elsewhere / "dog.png")
    image.symlink_to(elsewhere / "dog.png")
    found, said = warned(root)
    assert not said
    assert equal(found, sources.load("folder", make_folder(tmp_path / "plain")))


NAMES = st.sampled_from(["a", "B", "b", "10", "9", "é", "a b", "a.b", "a-b", "a/z", "a/9"])


@given(
    st.lists(st.tuples(st.sampled_from("xyz"), NAMES), min_size=1, max_size=12, unique=True)
)
def test_images_come_in_the_order_of_torchvision(tmp_path_factory, images):
    root = tmp_path_factory.mktemp("images")
    for split in folders.SPLITS:
        for name in "xyz":
            (root / split / name).mkdir(parents=True)
            (root / split / name / "m.PNG").touch()
        for name, image in images:
            path = root / split / name / f"{image}.png"
            path.parent.mkdir(exist_ok=True)
            path.touch()
    found = folders.samples(root, folders.look_through(root))
    for split in folders.SPLITS:
        theirs = DatasetFolder(str(root / split), None, extensions=endings())
        assert [(str(path), label) for path, label in found.of[split]] == theirs.samples
        assert list(found.classes) == theirs.classes


def test_a_folder_of_nothing_but_links_ends_where_it_began(tmp_path):
    root = make_folder(tmp_path)
    for name in "abcdefgh":  # Followed, they would lead to 8 ** 40 folders.
        (root / "train" / "cat" / name).symlink_to("..", target_is_directory=True)
    found, (line,) = warned(root)
    assert "back: 8 links" in line
    assert len(found.train_images) == 6


def test_folders_that_link_to_each_other_are_read_once_in_each(tmp_path):
    root = make_folder(tmp_path)
    for one, other in (("cat", "dog"), ("dog", "cat")):
        (root / "train" / one / "a").symlink_to(f"../{other}")
    found, (line,) = warned(root)
    assert "back: 2 links, the first train/cat/a/a" in line
    assert len(found.train_images) == 2 * (3 + 3)
