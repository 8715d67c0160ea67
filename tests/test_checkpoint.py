import os
import stat

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
