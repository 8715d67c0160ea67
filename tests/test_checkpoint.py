import errno
import os
import signal
import stat
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils import _pytree as pytree

import samfn
from tests.reference import batches, small_network

OPTIMIZERS = {
    "sgd": samfn.sgd(),
    "plain sgd": samfn.sgd(0.0),
    "nadam": samfn.nadam(),
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
    command = [sys.executable, "-c", CUT_OFF, str(path), kind]
    assert subprocess.run(command, check=False).returncode == code


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
        patch.setattr("samfn.checkpoint.FORMAT", "3")
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
    for step, score in enumerate((1, 3.0, 2.0, float("nan"), 10**400), 1):
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
