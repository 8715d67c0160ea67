import errno
import gc
import json
import os
import shutil
import signal
import stat
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils import _pytree as pytree

import samfn
from samfn.storage import tensorfile
from tests import commands
from tests.reference import batches, small_network
from tests.special import SPECIAL, make_special

VECTORS = samfn.no_decay_parameters(small_network())
OPTIMIZERS = {
    "sgd": samfn.sgd(),
    "plain sgd": samfn.sgd(0.0),
    "nadam": samfn.nadam(),
    "muon": samfn.grouped(samfn.muon(), (VECTORS, samfn.sgd())),
    "clipped adamw": samfn.clipped(samfn.adamw(amsgrad=True), 1.0),
}


def trained(optimizer, count=3, state=None):
    model = small_network().to(memory_format=torch.channels_last)
    if state is None:
        state = samfn.init(*samfn.split(model), optimizer=optimizer)
    loss_fn = samfn.supervised(model, F.cross_entropy)
    for batch in batches(count):
        state, _ = samfn.sam_update(
            state, batch, loss_fn=loss_fn, optimizer=optimizer, lr=0.1
        )
    return state


def fresh(optimizer):
    model = small_network().to(memory_format=torch.channels_last)
    return samfn.init(*samfn.split(model), optimizer=optimizer)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_restore_undoes_save_and_training_goes_on_bit_for_bit(tmp_path, name):
    optimizer, path = OPTIMIZERS[name], tmp_path / "state.safetensors"
    state = trained(optimizer)
    metadata = {"epoch": 3, "note": "é", "nested": {"a": [1, None, 2.5]}}
    samfn.save(path, state, **metadata)
    restored, read = samfn.restore(path, like=fresh(optimizer))
    assert read == metadata
    assert_close(restored, state, rtol=0, atol=0)
    strides = [leaf.stride() for leaf in pytree.tree_leaves(state)]
    assert [leaf.stride() for leaf in pytree.tree_leaves(restored)] == strides
    further = [trained(optimizer, 4, start) for start in (state, restored)]
    assert_close(*further, rtol=0, atol=0)


def test_tensors_are_named_by_their_place(tmp_path):
    path = tmp_path / "state.safetensors"
    samfn.save(path, trained(samfn.sgd()))
    names = load_file(path).keys()
    assert {"step", "params/0.weight", "buffers/1.running_mean"} <= names
    assert "opt_state/momentum_buffer_list/0.weight" in names


def test_a_failed_save_keeps_the_old_file_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "state.safetensors"
    samfn.save(path, trained(samfn.sgd()), epoch=1)
    before = path.read_bytes()
    with pytest.raises(TypeError, match="not JSON serializable"):
        samfn.save(path, trained(samfn.sgd()), epoch=object())
    path.with_name("busy").mkdir()
    with pytest.raises(OSError, match="busy"):
        samfn.save(path.with_name("busy"), trained(samfn.sgd()))
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["busy", "state.safetensors"]


def test_files_have_the_permissions_that_the_user_wants(tmp_path):
    path, mask = tmp_path / "state.safetensors", os.umask(0o027)
    try:
        samfn.save(path, trained(samfn.sgd()))
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_files_that_are_no_checkpoint_are_errors(tmp_path):
    like = fresh(samfn.sgd())
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*absent"):
        samfn.restore(tmp_path / "absent", like=like)
    junk = tmp_path / "junk"
    junk.write_bytes(b"not a checkpoint at all")
    with pytest.raises(ValueError, match="junk is no safetensors file"):
        samfn.restore(junk, like=like)
    foreign = tmp_path / "foreign"
    save_file({"w": torch.ones(1)}, foreign)
    with pytest.raises(ValueError, match=r"foreign holds no samfn\.sha256"):
        samfn.restore(foreign, like=like)


def test_a_state_of_another_structure_is_an_error(tmp_path):
    path = tmp_path / "state.safetensors"
    samfn.save(path, trained(samfn.sgd()))
    with pytest.raises(ValueError, match=r"exp_avg.* missing, .*momentum.* unexpected"):
        samfn.restore(path, like=fresh(samfn.adam()))
    like = fresh(samfn.sgd())
    like.params["7.bias"] = torch.zeros(9).double()
    with pytest.raises(ValueError, match=r"params/7.bias: \(9,\) against \(3,\)"):
        samfn.restore(path, like=like)
    like.params["7.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"7.bias: torch.float32 against torch.float64"):
        samfn.restore(path, like=like)


MEMORIES = {
    "friendly_sam": samfn.friendly_sam(),
    "vasso": samfn.vasso(),
    "momentum_sam": samfn.momentum_sam(),
    "s2_sam": samfn.s2_sam(),
    "unified_sam": samfn.unified_sam(),
    "light_sam": samfn.light_sam(),
    "looksam": samfn.looksam(3),
    "ae_sam": samfn.ae_sam(9),
    "every": samfn.every(samfn.friendly_sam(), 2),
    "on_parameters": samfn.on_parameters(samfn.vasso(), "*.weight"),
    "loss_scaled": samfn.loss_scaled(samfn.looksam(2), interval=2),
}


@pytest.mark.parametrize("name", MEMORIES)
def test_what_a_method_remembers_is_saved_and_training_goes_on_bit_for_bit(tmp_path, name):
    method, optimizer = MEMORIES[name], samfn.sgd()
    model, path = small_network(), tmp_path / "state.safetensors"
    common = {"loss_fn": samfn.supervised(model, F.cross_entropy), "optimizer": optimizer}
    state = samfn.init(*samfn.split(model), optimizer=optimizer, method=method)
    start = state
    for number, batch in enumerate(batches(6)):
        if number == 3:
            samfn.save(path, state)
        state, _ = samfn.sam_update(state, batch, **common, method=method, lr=0.1)
    again, _ = samfn.restore(path, like=start)
    for batch in batches(6)[3:]:
        again, _ = samfn.sam_update(again, batch, **common, method=method, lr=0.1)
    assert_close(again, state, rtol=0, atol=0)


def test_tensors_may_be_metadata(tmp_path):
    path, state = tmp_path / "state.safetensors", trained(samfn.sgd())
    metadata = {
        "ema": state.params,  # the very tensors of the state
        "scale": torch.tensor(2.0),
        "of other names": {"a/b": torch.ones(2), "c": torch.zeros(1)},
        "empty": {},
        "mixed": {"a": 1},
    }
    samfn.save(path, state, **metadata)
    restored, read = samfn.restore(path, like=fresh(samfn.sgd()))
    assert_close(restored, state, rtol=0, atol=0)
    assert_close(read, metadata, rtol=0, atol=0)


FAILING = {
    "EIO": (errno.EIO, "fsync"),
    "no space left": (errno.ENOSPC, "fsync"),
    "quota": (errno.EDQUOT, "fsync"),
    "read-only": (errno.EROFS, "mkdir"),
    "EACCES": (errno.EACCES, "mkdir"),
    "EPERM": (errno.EPERM, "chmod"),
    "EIO at last": (errno.EIO, "replace"),
}


@pytest.mark.parametrize("kind", FAILING)
def test_what_cannot_be_written_is_an_error_and_the_old_file_stays(
    tmp_path, monkeypatch, kind
):
    path, state = tmp_path / "state.safetensors", trained(samfn.sgd())
    samfn.save(path, state, epoch=1)
    number, call = FAILING[kind]
    happened = []

    def failing(*args, **options):
        happened.append(call)
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        with pytest.raises(samfn.CheckpointWriteError, match=os.strerror(number)) as caught:
            samfn.save(path, state, epoch=2)
    assert happened
    assert str(path) in str(caught.value)
    assert samfn.restore(path, like=state)[1] == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    samfn.save(path, state, epoch=2)  # The twin: nothing fails.
    assert samfn.restore(path, like=state)[1] == {"epoch": 2}


CUT_OFF = """
import sys, torch, samfn
from safetensors.torch import load_file
path, bare = sys.argv[1], sys.argv[2] == "bare"
like = samfn.init({"w": torch.zeros(2**20)}, {}, optimizer=samfn.sgd(0.0))
if bare:
    tensor = load_file(path)["params/w"]
else:
    tensor = samfn.restore(path, like=like)[0].params["w"]
with open(path, "r+b") as file:
    file.truncate(100)
sys.exit(0 if tensor.sum() == 2**20 else 1)
"""


@pytest.mark.parametrize(("kind", "code"), [("samfn", 0), ("bare", -signal.SIGBUS)])
def test_a_file_that_is_cut_off_after_it_was_loaded_kills_nobody(tmp_path, kind, code):
    path = tmp_path / "state.safetensors"
    state = samfn.init({"w": torch.ones(2**20)}, {}, optimizer=samfn.sgd(0.0))
    samfn.save(path, state)
    assert commands.run("-c", CUT_OFF, path, kind).returncode == code


def counted(step, value=0.0):
    state = samfn.init({"w": torch.full((3,), value)}, {}, optimizer=samfn.sgd(0.0))
    return state._replace(step=torch.tensor(step))


def steps(checkpoints):
    return [int(path.stem[5:]) for path in checkpoints.paths()]


def test_the_last_few_and_the_best_few_stay(tmp_path):
    checkpoints = samfn.Checkpoints(tmp_path / "new", keep_last=2, keep_best=2)
    scores = [None, 3.0, 1.0, 3.0, 2.0, None, 0.0]
    expected = [
        [1],
        [1, 2],
        [2, 3],
        [2, 3, 4],
        [2, 4, 5],
        [2, 4, 5, 6],
        [2, 4, 6, 7],
    ]
    for step, (score, kept) in enumerate(zip(scores, expected, strict=True), 1):
        path = checkpoints.save(counted(step), score=score, note=step)
        assert path.name == f"step_{step:09d}.safetensors"
        assert steps(checkpoints) == kept
    assert [int(path.stem[5:]) for path in checkpoints.best()] == [2, 4]
    again = samfn.Checkpoints(tmp_path / "new")
    found = again.latest(counted(0))
    assert found.path == path
    assert found.metadata == {"score": 0.0, "note": 7}
    assert found.state.step == 7
    assert samfn.Checkpoints(tmp_path / "empty").latest(counted(0)) is None
    assert not (tmp_path / "empty").exists()


def test_each_name_of_a_score_has_its_own_best(tmp_path):
    checkpoints = samfn.Checkpoints(tmp_path, keep_last=2, keep_best=1)
    raw, average = (5.0, 1.0, 2.0, 3.0), (1.0, 5.0, 2.0, float("nan"))
    for step, pair in enumerate(zip(raw, average, strict=True), 1):
        checkpoints.save(counted(step), score=dict(zip(("raw", "ema"), pair, strict=True)))
    assert steps(checkpoints) == [1, 2, 3, 4]
    assert checkpoints.best_whole(counted(0), by="raw").state.step == 1
    assert checkpoints.best_whole(counted(0), by="ema").state.step == 2
    assert checkpoints.best() == []
    checkpoints.save(counted(5), score={"raw": 9.0, "ema": 9.0})
    assert steps(checkpoints) == [4, 5]


def test_the_newest_whole_checkpoint_counts_and_a_damaged_one_is_set_aside(tmp_path):
    said = []
    checkpoints = samfn.Checkpoints(tmp_path, warn=said.append)
    for step in (1, 2, 3):
        checkpoints.save(counted(step, float(step)))
    assert checkpoints.latest(counted(0)).state.step == 3  # The twin: nothing is damaged.
    assert not said
    newest = checkpoints.paths()[-1]
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    with pytest.raises(samfn.CheckpointCorruptError, match="step_000000003"):
        samfn.restore(newest, like=counted(0))
    assert newest.exists()
    found = checkpoints.latest(counted(0))
    assert (found.state.step, found.state.params["w"][0]) == (2, 2.0)
    assert len(said) == 1
    assert "step_000000003.safetensors is damaged" in said[0]
    assert newest.with_name(newest.name + ".corrupt").read_bytes() == content


def test_what_is_set_aside_takes_the_place_of_nothing(tmp_path):
    checkpoints = samfn.Checkpoints(tmp_path, warn=lambda line: None)
    for content in (b"first", b"second", b"third"):
        checkpoints.save(counted(1))
        checkpoints.save(counted(2))
        checkpoints.paths()[-1].write_bytes(content)
        assert checkpoints.latest(counted(0)).state.step == 1
        checkpoints.save(counted(2))
        checkpoints.drop_after(1)
    corrupt = {p.name: p.read_bytes() for p in tmp_path.glob("*.corrupt*")}
    assert corrupt == {
        "step_000000002.safetensors.corrupt": b"first",
        "step_000000002.safetensors.corrupt.1": b"second",
        "step_000000002.safetensors.corrupt.2": b"third",
    }
    assert len(list(tmp_path.glob("*.superseded*"))) == 3


def test_what_cannot_be_set_aside_keeps_nobody_from_the_one_before(tmp_path, monkeypatch):
    said = []
    checkpoints = samfn.Checkpoints(tmp_path, warn=said.append)
    for step in (1, 2):
        checkpoints.save(counted(step))
    newest = checkpoints.paths()[-1]
    newest.write_bytes(b"")

    def refuse(path, target):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "rename", refuse)
    assert checkpoints.latest(counted(0)).state.step == 1
    assert newest.exists()
    assert "cannot be renamed, Permission denied, and stays, going on with" in said[0]
    with pytest.raises(samfn.CheckpointWriteError, match=r"cannot rename .* denied"):
        checkpoints.drop_after(1)


def test_a_name_of_another_step_is_told(tmp_path):
    said = []
    checkpoints = samfn.Checkpoints(tmp_path, warn=said.append)
    path = checkpoints.save(counted(1))
    assert checkpoints.latest(counted(0)).state.step == 1
    assert not said
    other = shutil.copy(path, tmp_path / "step_9.safetensors")
    assert checkpoints.latest(counted(0)).state.step == 1
    assert said == [f"{other} is of step 1, whatever its name says"]


@pytest.mark.parametrize("step", [-1, 1.5, float("nan"), 2j, [1, 2], "x", None])
def test_a_step_that_can_name_nothing_is_refused(tmp_path, step):
    is_text = step is None or isinstance(step, str)
    state = counted(1)._replace(step=step if is_text else torch.tensor(step))
    with pytest.raises(ValueError, match="a whole step of at least 0, got "):
        samfn.Checkpoints(tmp_path).save(state)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("count", [-1, None, "a", 1.5])
def test_a_count_of_the_best_is_a_count(tmp_path, count):
    with pytest.raises(ValueError, match="keep_best must be a whole number of at least 0"):
        samfn.Checkpoints(tmp_path, keep_best=count)


@pytest.mark.parametrize("state", [None, (1, 2), "state"])
def test_what_is_no_state_is_called_that(tmp_path, state):
    kind = type(state).__name__
    with pytest.raises(TypeError, match=f"expected a training state, got a {kind}"):
        samfn.save(tmp_path / "file", state)
    samfn.save(tmp_path / "file", counted(1))
    with pytest.raises(TypeError, match=f"expected a training state, got a {kind}"):
        samfn.restore(tmp_path / "file", like=state)


@pytest.mark.parametrize("state", [None, {}, torch.nn.Linear(2, 2)])
def test_what_is_no_state_is_no_checkpoint(tmp_path, state):
    kind = type(state).__name__
    with pytest.raises(TypeError, match=f"expected a training state, got a {kind}"):
        samfn.Checkpoints(tmp_path).save(state)
    assert not [*tmp_path.iterdir()]


def test_an_unreadable_directory_is_not_taken_for_an_empty_one(tmp_path):
    assert samfn.Checkpoints(tmp_path / "none").latest(counted(0)) is None
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, error in (("file", NotADirectoryError), ("loop", OSError), ("link", OSError)):
        with pytest.raises(error, match=name):
            samfn.Checkpoints(tmp_path / name).latest(counted(0))


def test_what_is_no_damage_is_not_set_aside(tmp_path):
    checkpoints = samfn.Checkpoints(tmp_path)
    checkpoints.save(counted(1))
    other = samfn.init({"v": torch.ones(1)}, {}, optimizer=samfn.sgd(0.0))
    with pytest.raises(ValueError, match=r"params/v missing, params/w unexpected"):
        checkpoints.latest(other)
    assert steps(checkpoints) == [1]


def test_a_format_of_the_future_is_named_and_not_set_aside(tmp_path, monkeypatch):
    checkpoints = samfn.Checkpoints(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("samfn.storage.encoding.FORMAT", "3")
        checkpoints.save(counted(1))
    with pytest.raises(samfn.CheckpointFormatError, match="format 3, this samfn"):
        checkpoints.latest(counted(0))
    assert steps(checkpoints) == [1]


def test_going_on_from_an_older_checkpoint_sets_the_newer_ones_aside(tmp_path):
    checkpoints = samfn.Checkpoints(tmp_path, keep_last=3)
    for step in (1, 2, 3):
        checkpoints.save(counted(step))
    checkpoints.drop_after(2)
    assert steps(checkpoints) == [1, 2]
    assert (tmp_path / "step_000000003.safetensors.superseded").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_states_that_are_not_finite_are_not_kept(tmp_path, value):
    checkpoints = samfn.Checkpoints(tmp_path)
    checkpoints.save(counted(1))
    with pytest.raises(samfn.NonFiniteError, match="w is not finite after 2 steps"):
        checkpoints.save(counted(2, value))
    assert steps(checkpoints) == [1]


def test_fewer_than_two_checkpoints_are_no_safety(tmp_path):
    with pytest.raises(ValueError, match="keep_last must be a whole number of at least 2"):
        samfn.Checkpoints(tmp_path, keep_last=1)


def test_too_many_tensors_for_any_reader_are_not_written(tmp_path):
    params = {f"w{i}": torch.ones(1) for i in range(10_001)}
    state = samfn.init(params, {}, optimizer=samfn.sgd(0.0))
    with pytest.raises(ValueError, match=r"at most 10,000 tensors, got 10,00"):
        samfn.save(tmp_path / "file", state)
    assert not list(tmp_path.iterdir())


def test_names_that_the_file_needs_itself_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must not be called samfn.*sha256"):
        samfn.save(tmp_path / "file", counted(1), **{"samfn.sha256": 1})


def test_the_best_that_is_whole_is_read_and_scores_are_numbers(tmp_path):
    said = []
    checkpoints = samfn.Checkpoints(tmp_path, keep_last=5, warn=said.append)
    for step, score in enumerate((1, numpy.float32(3), 2.0, float("nan"), 10**400), 1):
        checkpoints.save(counted(step), score=score)
    assert checkpoints.best_whole(counted(0)).state.step == 2
    content = bytearray(checkpoints.paths()[1].read_bytes())
    content[-1] ^= 1
    checkpoints.paths()[1].write_bytes(content)
    assert checkpoints.best_whole(counted(0)).state.step == 3
    assert len(said) == 1
    assert samfn.Checkpoints(tmp_path / "empty").best_whole(counted(0)) is None


def test_a_lack_of_threads_is_no_damage(tmp_path, monkeypatch):
    checkpoints = samfn.Checkpoints(tmp_path)
    checkpoints.save(counted(1))

    def start(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr("threading.Thread.start", start)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            checkpoints.latest(counted(0))
    assert checkpoints.latest(counted(0)).state.step == 1


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=99),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)
WRITABLE = st.characters(codec="utf-8", exclude_characters="/")
KEYS = st.text(WRITABLE).filter(lambda key: not key.startswith("samfn."))


def test_whatever_json_holds_comes_back(tmp_path, record_property):
    path, trials = tmp_path / "file", []

    @given(st.dictionaries(KEYS.filter(lambda key: key not in ("path", "state")), JSON))
    def comes_back(metadata):
        samfn.save(path, counted(1), **metadata)
        assert samfn.restore(path, like=counted(0))[1] == metadata
        trials.append(metadata)

    comes_back()
    record_property("trials", len(trials))


LONG = {
    "500,000 losses": [1 / (i + 1) for i in range(500_000)],
    "a text of 9 MiB": "é" * (9 * 2**19),
    "just as long as a header holds": "x" * (2**16 - 2),
    "one more": "x" * (2**16 - 1),
    "names": {f"layer {i}": i for i in range(300_000)},
}


@pytest.mark.parametrize("kind", LONG)
def test_metadata_of_any_size_comes_back(tmp_path, kind):
    checkpoints = samfn.Checkpoints(tmp_path)
    for step in (1, 2):
        path = checkpoints.save(counted(step), score=1.0, losses=LONG[kind], note="é")
    found = checkpoints.latest(counted(0))
    assert found.path == path
    assert found.metadata == {"score": 1.0, "losses": LONG[kind], "note": "é"}
    assert steps(checkpoints) == [1, 2]
    assert checkpoints.best() == [checkpoints.paths()[0]]


def nested(levels):
    value = []
    for _ in range(levels - 1):
        value = [value]
    return value


def test_nothing_is_written_that_could_not_be_read(tmp_path, record_property):
    """What is refused names itself, and what is just not refused is read back."""
    path, like = tmp_path / "file", counted(1)
    samfn.save(path, like, deep=nested(100))
    assert samfn.restore(path, like=like)[1] == {"deep": nested(100)}
    path.unlink()
    ring = []
    ring.append(ring)
    text = "x" * 60_000
    tensor = torch.ones(1)
    refused = {
        r"metadata deep/0/0/.* more than 100 levels": {"deep": nested(101)},
        r"metadata ring/0/0/.* more than 100 levels": {"ring": ring},
        r"metadata big: .*4300": {"big": 10**5000},
        r"metadata a: .*not JSON serializable": {"a": {"b": {1, 2}}},
        r"metadata a/b/1 is a tensor": {"a": {"b": [0, tensor]}},
        r"metadata a/b is a tensor": {"a": {"b": tensor, "c": 1}},
        r"metadata a/b/c is a tensor": {"a": {"b": {"c": tensor}}},
        r"as metadata/a/b, got NoneType|metadata a/c is a tensor": {
            "a": {"b": None, "c": tensor}
        },
        r"two tensors would be called metadata/a/1": {"a": {1: tensor, "1": tensor}},
        r"metadata a has two names .*\[1, '1'\]": {"a": {1: 0, "1": 0}},
        r"metadata a/0 has two names .*\[None, 'null'\]": {"a": [{None: 0, "null": 0}]},
        r"no / in its name: 'a/b'": {"a/b": tensor, "a": {"b": tensor}},
        r"UTF-8 holds, got .*udc80": {"\udc80": 1},
        r"at most 8,388,608 bytes, got 9,0\d\d,\d\d\d; the largest is 'k": {
            f"k{i}": text for i in range(150)
        },
    }
    for message, metadata in refused.items():
        with pytest.raises((TypeError, ValueError), match=message):
            samfn.save(path, like, **metadata)
        assert not list(tmp_path.iterdir()), message
    record_property("trials", len(refused))


def with_params(**params):
    return counted(1)._replace(params={"w": torch.ones(3), **params})


SPARSE = torch.eye(3).to_sparse()
UNWRITABLE = {
    "sparse ones: params/edges": lambda: {"edges": SPARSE},
    "sparse ones: params/rows": lambda: {"rows": torch.eye(3).to_sparse_csr()},
    "nested ones: params/texts": lambda: {
        "texts": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    },
    "nested ones: params/jagged": lambda: {
        "jagged": torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged)
    },
    "meta ones: params/promised": lambda: {"promised": torch.ones(2, device="meta")},
    r"params/wide \(torch.complex128\)": lambda: {"wide": torch.ones(1).to(torch.cdouble)},
    "as params/none, got NoneType": lambda: {"none": None},
    "as params/listed, got list": lambda: {"listed": [torch.ones(1)]},
    "as params/number, got float": lambda: {"number": 1.0},
    "two tensors would be called params/a/b": lambda: {
        "a": {"b": torch.ones(1)},
        "a/b": torch.zeros(1),
    },
    "two tensors would be called params/1": lambda: {"1": torch.ones(1), 1: torch.ones(1)},
}


@pytest.mark.filterwarnings("ignore:.*Nested|nested|Sparse")
@pytest.mark.parametrize("message", UNWRITABLE)
def test_what_a_file_does_not_hold_is_named_and_nothing_written(tmp_path, message):
    params = {"w": torch.ones(3), **UNWRITABLE[message]()}
    with pytest.raises((TypeError, ValueError), match=message):
        samfn.save(tmp_path / "file", counted(1)._replace(params=params))
    assert not list(tmp_path.iterdir())


def test_views_that_conjugate_or_negate_are_written_as_what_they_show(tmp_path):
    path, number = tmp_path / "file", torch.tensor([1 + 2j, 3 - 4j])
    conjugate = number.conj()
    negative = conjugate.imag
    assert conjugate.is_conj()
    assert negative.is_neg()
    samfn.save(path, with_params(conjugate=conjugate, negative=negative), extra=conjugate)
    found, metadata = samfn.restore(
        path, like=with_params(conjugate=number, negative=torch.zeros(2))
    )
    assert found.params["conjugate"].tolist() == [1 - 2j, 3 + 4j]
    assert found.params["negative"].tolist() == [-2.0, 4.0]
    assert metadata["extra"].tolist() == [1 - 2j, 3 + 4j]


def test_checkpoints_are_ordered_by_number_and_nothing_else_counts(tmp_path):
    checkpoints = samfn.Checkpoints(tmp_path)
    strays = ("step_best", "step_", "step_1x", "step_-1", "step_١", "step_1.0")
    for name in strays:
        samfn.save(tmp_path / f"{name}.safetensors", counted(7))
    for step in (999_999_998, 999_999_999, 10**9, 10**9 + 1, 10**10):
        path = checkpoints.save(counted(step))
        assert path.exists()
        assert checkpoints.latest(counted(0)).state.step == step
    assert steps(checkpoints) == [10**9 + 1, 10**10]
    checkpoints.drop_after(10**9 + 1)
    assert steps(checkpoints) == [10**9 + 1]
    assert all((tmp_path / f"{name}.safetensors").exists() for name in strays)


def test_what_was_just_written_stays_whatever_is_newer(tmp_path):
    checkpoints = samfn.Checkpoints(tmp_path)
    for step in (10, 20, 5):
        assert checkpoints.save(counted(step)).exists()
    assert steps(checkpoints) == [5, 10, 20]


def test_who_begins_anew_where_a_run_went_further_is_told(tmp_path):
    before, said = samfn.Checkpoints(tmp_path), []
    for step in (10, 20):
        before.save(counted(step))
    checkpoints = samfn.Checkpoints(tmp_path, warn=said.append)
    for step in (5, 6):
        checkpoints.save(counted(step))
    assert len(said) == 1  # Once is enough.
    assert "step_000000020.safetensors is of a later step than step_000000005" in said[0]
    assert "drop_after(5) sets it aside" in said[0]


def edited(path, before, after):
    content = path.read_bytes()
    assert content.count(before) == 1
    path.write_bytes(content.replace(before, after))


@pytest.mark.parametrize("again", [False, True])
def test_a_forged_score_costs_no_whole_checkpoint(tmp_path, again):
    said = []
    checkpoints = samfn.Checkpoints(tmp_path, warn=said.append)
    for step, score in ((1, 5.0), (2, 1.0), (3, 1.5)):
        checkpoints.save(counted(step), score=score)
    edited(checkpoints.paths()[1], b'"1.0"', b'"9.0"')
    if again:  # By a process that has not written it.
        checkpoints = samfn.Checkpoints(tmp_path, warn=said.append)
    assert [path.name for path in checkpoints.best()] == ["step_000000001.safetensors"]
    checkpoints.save(counted(4), score=2.0)
    assert steps(checkpoints) == [1, 3, 4]
    assert len(said) == 1
    assert "step_000000002.safetensors is damaged" in said[0]
    assert (tmp_path / "step_000000002.safetensors.corrupt").exists()
    assert checkpoints.best_whole(counted(0)).state.step == 1


def test_200_changed_bytes_cost_no_whole_checkpoint(tmp_path, record_property):
    before = samfn.Checkpoints(tmp_path / "before")
    for step, score in ((1, 5.0), (2, 1.0), (3, 1.5)):
        before.save(counted(step), score=score)
    content = before.paths()[1].read_bytes()
    places = range(0, len(content), len(content) // 200)
    for place in places:
        directory = tmp_path / str(place)
        shutil.copytree(before.directory, directory)
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        checkpoints = samfn.Checkpoints(directory, warn=lambda text: None)
        checkpoints.paths()[1].write_bytes(changed)
        checkpoints.save(counted(4), score=2.0)
        assert steps(checkpoints) == [1, 3, 4], place
    record_property("trials", len(places))


def test_a_forged_step_of_later_costs_no_whole_checkpoint(tmp_path):
    said = []
    checkpoints = samfn.Checkpoints(tmp_path, warn=said.append)
    for step in (1, 2):
        checkpoints.save(counted(step))
    (tmp_path / "step_000000008.safetensors").write_bytes(b"junk")
    (tmp_path / "step_000000009.safetensors").mkdir()
    checkpoints.save(counted(3))
    assert steps(checkpoints) == [2, 3, 9]
    assert checkpoints.latest(counted(0)).state.step == 3
    assert [text.split(" ")[0] for text in said] == [
        f"{tmp_path}/step_000000008.safetensors",
        "cannot",
        f"{tmp_path}/step_000000009.safetensors",
    ]


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (torch.tensor(1.0), "score must be a number, got a Tensor"),
        ("0.9", "score must be a number, got a str"),
        (True, "score must be a number, got a bool"),
        ({"raw": 1.0, "ema": torch.ones(1)}, "ema must be a number, got a Tensor"),
        ({"raw": None}, "raw must be a number, got a NoneType"),
    ],
)
def test_scores_that_are_no_numbers_are_refused(tmp_path, score, message):
    checkpoints = samfn.Checkpoints(tmp_path)
    checkpoints.save(counted(1), score=0.5)
    with pytest.raises(TypeError, match=message):
        checkpoints.save(counted(2), score=score)
    assert steps(checkpoints) == [1]


def test_scores_that_are_not_finite_come_last(tmp_path):
    checkpoints = samfn.Checkpoints(tmp_path, keep_best=3)
    unranked = (float("nan"), float("inf"), -float("inf"), 10**400)
    for step, score in enumerate((*unranked, 1.0, 2.0, float("nan"), 0.0, -1.0), 1):
        checkpoints.save(counted(step), score=score)
    assert [int(path.stem[5:]) for path in checkpoints.best()] == [6, 5, 8]
    only = samfn.Checkpoints(tmp_path / "only")
    for step in range(1, 5):
        only.save(counted(step), score=float("nan"))
    assert steps(only) == [1, 3, 4]


TWO = """
import os, sys, time, torch, samfn
directory, own = sys.argv[1], int(sys.argv[2])
state = samfn.init({"w": torch.ones(2**18)}, {}, optimizer=samfn.sgd(0.0))
open(f"{directory}.{own}", "w").close()
while not os.path.exists(f"{directory}.{1 - own}"):  # Both begin together.
    time.sleep(0.001)
for number in range(60):
    checkpoints = samfn.Checkpoints(directory, warn=lambda text: None)
    try:
        checkpoints.save(state._replace(step=torch.tensor(2 * number + own)))
    except samfn.CheckpointWriteError as error:
        print(error)
"""


def test_two_that_save_into_one_directory_are_told_what_keeps_others_out(
    tmp_path, record_property
):
    with ThreadPoolExecutor() as pool:
        found = pool.map(partial(commands.run, "-c", TWO, tmp_path), range(2))
    first, second = found
    assert (first.returncode, first.stderr) == (second.returncode, second.stderr) == (0, "")
    lines = (first.stdout + second.stdout).splitlines()
    assert lines
    wanted = ("another process writes to", "`samfn.held` keeps others out")
    assert [line for line in lines if not all(part in line for part in wanted)] == []
    record_property("trials", len(lines))


def test_checkpoints_of_another_run_in_the_place_of_a_held_one_stay(tmp_path):
    place = tmp_path / "run"
    checkpoints = samfn.Checkpoints(place / "checkpoints")
    with samfn.held(place):
        checkpoints.save(counted(1))
        place.rename(tmp_path / "moved")
        with samfn.held(tmp_path / "other"):
            others = samfn.Checkpoints(tmp_path / "other" / "checkpoints")
            others.save(counted(7))
        (tmp_path / "other").rename(place)
        with pytest.raises(samfn.CheckpointWriteError, match="another of this name"):
            checkpoints.save(counted(2))
    found = [path.name for path in samfn.Checkpoints(place / "checkpoints").paths()]
    assert found == ["step_000000007.safetensors"]


def test_a_checkpoint_of_somebody_else_is_told_at_the_next_save(tmp_path):
    said = []
    checkpoints = samfn.Checkpoints(tmp_path, keep_last=3, warn=said.append)
    first, newer = checkpoints.save(counted(1)), tmp_path / "step_000000009.safetensors"
    checkpoints.save(counted(2))
    first.chmod(0o600)  # It is the same file.
    checkpoints.save(counted(3))
    assert said == []
    samfn.save(newer, counted(9))
    samfn.save(first, counted(1))
    for step in (4, 5):
        checkpoints.save(counted(step))
    replaced, new = said
    assert f"{first} was written by somebody else since the last save" in replaced
    assert f"{newer} was written by somebody else" in new
    # One that begins takes what it finds for what it is to go on with.
    samfn.Checkpoints(tmp_path, warn=said.append).save(counted(10))
    assert len(said) == 2


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_file_is_set_aside_as_no_checkpoint(tmp_path, kind):
    said = []
    checkpoints = samfn.Checkpoints(tmp_path, warn=said.append)
    checkpoints.save(counted(1))
    path = tmp_path / "step_000000002.safetensors"
    make_special(path, kind)
    with pytest.raises(samfn.CheckpointCorruptError, match=f"regular file, got {kind}"):
        samfn.restore(path, like=counted(0))
    assert checkpoints.best_whole(counted(0)) is None
    assert checkpoints.latest(counted(0)).state.step == 1
    assert len(said) == 1
    assert steps(checkpoints) == [1]


@pytest.mark.parametrize("kind", ["zeros", "longer", "all of it claimed"])
def test_a_sparse_file_of_4_tb_is_refused_at_once(tmp_path, kind):
    path, like = tmp_path / "step_000000001.safetensors", counted(1)
    samfn.save(path, like)
    if kind == "zeros":
        path.write_bytes(b"")
    if kind == "all of it claimed":
        claimed = {"w": {"dtype": "U8", "shape": [2**42], "data_offsets": [0, 2**42]}}
        claimed["__metadata__"] = {"samfn.sha256": "0" * 64, "score": "9.0"}
        header = json.dumps(claimed).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header)
        os.truncate(path, 8 + len(header) + 2**42)
    else:
        os.truncate(path, 2**42)
    begun = time.monotonic()
    with pytest.raises((samfn.CheckpointCorruptError, OSError), match="step_000000001"):
        samfn.restore(path, like=like)
    said = []
    samfn.Checkpoints(tmp_path, warn=said.append).save(counted(2))
    assert time.monotonic() - begun < 5
    assert len(said) == 1
    assert len(list(tmp_path.iterdir())) == 2


def test_a_checkpoint_of_the_users_alone_stays_so(tmp_path):
    path = tmp_path / "file"
    samfn.save(path, counted(1))
    path.chmod(0o600)
    samfn.save(path, counted(2))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_checkpoints_that_are_gone_are_not_remembered(tmp_path):
    optimizer = samfn.sgd()
    state = samfn.init({"w": torch.zeros(4)}, {}, optimizer=optimizer)
    checkpoints = samfn.Checkpoints(tmp_path)

    def save(steps):
        for step in steps:
            checkpoints.save(state._replace(step=torch.tensor(step)), score=float(step))
            assert checkpoints.latest(like=state).state.step == step

    save(range(1, 50))
    gc.collect()
    paths = [each for each in gc.get_objects() if issubclass(type(each), Path)]
    assert sum(each.name.startswith("step_") for each in paths) < 20


def test_a_mapping_comes_back_by_any_names(tmp_path):
    given = {0: torch.ones(2), "a": {1: torch.zeros(1)}, "": torch.ones(1)}
    samfn.save(tmp_path / "file", given)
    found, _ = samfn.restore(tmp_path / "file", like=given)
    assert_close(found, given)


def test_a_directory_stays_that_of_its_beginning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints = samfn.Checkpoints("runs")
    checkpoints.save(counted(1))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    checkpoints.save(counted(2))
    assert checkpoints.latest(counted(0)).state.step == 2
    assert steps(checkpoints) == [1, 2]
    assert not [*Path.cwd().iterdir()]


@pytest.fixture
def slow(tmp_path, monkeypatch):
    """Return checkpoints in the background, and what lets their writing go on."""
    write, going_on = tensorfile.write, threading.Event()

    def waiting(*args):
        assert going_on.wait(60)
        return write(*args)

    monkeypatch.setattr(tensorfile, "write", waiting)
    yield samfn.Checkpoints(tmp_path / "runs", background=True), going_on
    going_on.set()


def test_what_is_written_in_the_background_is_waited_for_after_ctrl_c(slow):
    checkpoints, going_on = slow
    checkpoints.save(counted(1))

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.wait()
    signal.signal(signal.SIGALRM, before)
    going_on.set()
    assert checkpoints.latest(counted(0)).state.step == 1


def test_a_forked_process_does_not_wait_for_what_its_parent_writes(slow):
    checkpoints, going_on = slow
    checkpoints.save(counted(1))
    if not (child := os.fork()):
        signal.alarm(20)
        os._exit(checkpoints.latest(counted(0)) is not None)
    assert os.waitpid(child, 0)[1] == 0
    going_on.set()
    assert checkpoints.latest(counted(0)).state.step == 1


def test_what_nobody_waited_for_is_told_at_the_end(tmp_path):
    said = []
    checkpoints = samfn.Checkpoints(tmp_path / "runs", background=True, warn=said.append)
    checkpoints.save(counted(1))
    checkpoints.wait()
    shutil.rmtree(tmp_path / "runs")
    checkpoints.save(counted(2))
    with pytest.raises(samfn.CheckpointWriteError):
        checkpoints.wait()
    checkpoints.save(counted(3))
    del checkpoints
    # The thread that failed holds its error, and so all frames on its way, until it ends.
    ends = time.monotonic() + 60
    while not said and time.monotonic() < ends:
        gc.collect()
        time.sleep(0.01)
    assert len(said) == 1
    assert "step_000000003" in said[0]
