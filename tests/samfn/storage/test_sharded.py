"""A state that ranks hold parts of is a directory: whole, verified, for any other ranks."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing import assert_close

import samfn
from samfn import distributed
from samfn.storage import parts
from samfn.training import callbacks, loop
from tests.ranks import on_ranks
from tests.special import make_special

OPTIMIZER, METHOD = samfn.adamw(weight_decay=0.1), samfn.looksam(2)
STEPS = 3


def network():
    torch.manual_seed(0)
    # Of four ranks, some have no row of these.
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.GELU(), nn.Linear(7, 3))
    model.register_buffer("scale", torch.tensor([2.0, 3.0]))
    return model.double()


def start(cut):
    params, buffers = samfn.split(network())
    params = distributed.shard(params) if cut else params
    return samfn.init(params, buffers, optimizer=OPTIMIZER, method=METHOD)


def trained(state, cut, first, steps=STEPS):
    method = distributed.placed(METHOD, "global") if cut else METHOD
    for step in range(first, first + steps):
        source = torch.Generator().manual_seed(step)
        inputs = torch.randn(8, 5, generator=source, dtype=torch.float64)
        targets = torch.randn(8, 3, generator=source, dtype=torch.float64)
        state, _ = samfn.sam_update(
            state,
            distributed.share((inputs, targets)),
            loss_fn=samfn.supervised(network(), nn.MSELoss()),
            optimizer=OPTIMIZER,
            method=method,
            lr=0.01,
        )
    return state


def write_and_go_on(directory):
    """On ranks: train, save, train; and go on from what was saved."""
    state = trained(start(True), True, 0)
    metadata = {"ema": state.params, "random": samfn.random_state(), "epoch": 3}
    samfn.Checkpoints(directory).save(state, score=0.5, **metadata)
    return distributed.gather(trained(state, True, STEPS)), go_on(directory)


def go_on(directory):
    """On any ranks, or on one process: restore, and train."""
    cut = distributed.size() > 1
    found = samfn.Checkpoints(directory).latest(start(cut))
    ema = found.metadata["ema"]
    assert found.metadata["epoch"] == 3
    assert all(isinstance(leaf, DTensor) == cut for leaf in ema.values())
    assert_close(distributed.gather(ema), distributed.gather(found.state.params))
    samfn.set_random_state(found.metadata["random"])
    return distributed.gather(trained(found.state, cut, STEPS))


def test_a_checkpoint_of_four_ranks_goes_on_with_any_number(tmp_path):
    (expected, again), *_ = on_ranks(4, write_and_go_on, tmp_path)
    assert_close(again, expected, rtol=0, atol=0)
    (path,) = tmp_path.iterdir()
    assert path.name == "step_000000003.sharded"
    assert len([*path.glob("rank_*")]) == 4
    other, *_ = on_ranks(2, go_on, tmp_path)
    for found in (other, go_on(tmp_path)):
        assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert found.step == 2 * STEPS
    assert_close(
        trained(start(False), False, 0).params, params_of(path), rtol=1e-12, atol=0
    )


def run_and_go_on(directory):
    """On ranks: run with the engine's callbacks, stop, resume; return averages by way."""

    def run(place, epochs, state):
        training, kept = loop.Training(state), samfn.Checkpoints(directory / place)
        resumed = callbacks.resume(kept, training)
        loop.run(
            training,
            batches=lambda t: range(t.step, t.step + 1),
            update=lambda state, step: (trained(state, True, step, 1), None),
            epochs=epochs,
            callbacks=[callbacks.ema(0.5), callbacks.saving(kept)],
        )
        distributed.require_alike(training.state)
        return resumed, callbacks.ema_of(training)[0]

    once = run("once", 4, start(True))
    first, again = run("twice", 2, start(True)), run("twice", 4, start(True))
    assert [found for found, _ in (once, first, again)] == [False, False, True]
    assert all(isinstance(leaf, DTensor) for leaf in again[1].values())
    return distributed.gather((once[1], again[1], run("once", 4, start(False))[1]))


def test_the_engine_saves_and_resumes_a_state_in_parts_with_its_average(tmp_path):
    for once, again, whole in on_ranks(2, run_and_go_on, tmp_path):
        assert_close(again, once, rtol=0, atol=0)
        assert_close(whole, once, rtol=0, atol=0)


def params_of(path):
    return samfn.restore(path, like=start(False))[0].params


FULL = {
    "even": (8, 3),
    "uneven": (7, 3),
    "few": (2, 3),
    "one": (1,),
    "none": (0, 3),
    "scalar": (),
    "images": (6, 4, 3, 3),
    "odd": (5, 5),
}


def whole(name):
    values = torch.arange(1.0, 1 + torch.Size(FULL[name]).numel()).view(FULL[name])
    return values.to(memory_format=torch.channels_last) if name == "images" else values


def cut(names, mesh, placements):
    return {
        n: distribute_tensor(whole(n), mesh, placements, src_data_rank=None) for n in names
    }


def strided(name, mesh):
    """Return a tensor as `fully_shard` cuts one that tensor parallelism has cut before."""
    part = whole(name)
    for dim in (1, 0):
        part = part.tensor_split(2)[mesh.get_local_rank(dim)]
    placements = [_StridedShard(0, split_factor=2), Shard(0)]
    like = whole(name)
    return DTensor.from_local(
        part, mesh, placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def layouts():
    line, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    some = [name for name in FULL if name not in ("scalar", "one")]
    matrices = ["even", "uneven", "few", "none", "images", "odd"]
    plain = {name: whole(name) for name in FULL}
    return {
        "1-D": plain | cut(some, line, [Shard(0)]),
        "replicated": plain | cut(FULL, line, [Replicate()]),
        "columns": plain | cut(matrices, line, [Shard(1)]),
        "HSDP": plain | cut(some, square, [Replicate(), Shard(0)]),
        "2-D": plain | cut(matrices, square, [Shard(0), Shard(1)]),
        "twice": plain | cut(some, square, [Shard(0), Shard(0)]),
        "strided": plain | {n: strided(n, square) for n in ("even", "uneven", "images")},
        "two meshes": plain
        | cut(["even"], line, [Shard(0)])
        | cut(["odd"], square, [Shard(1)] * 2),
        "plain": plain,
    }


def state_of(params):
    made = samfn.init({"w": torch.ones(1)}, {"mean": torch.ones(3)}, optimizer=samfn.sgd())
    momentum = {name: torch.zeros_like(p) for name, p in params.items()}
    # A step wants all of one kind; what is saved may be of any.
    return made._replace(params=params, opt_state={"momentum": momentum})


def zeros(state):
    return state._replace(params={n: torch.zeros_like(p) for n, p in state.params.items()})


def between_layouts(directory):
    found = layouts()
    for name, params in found.items():
        path = Path(directory, name)
        if name != "plain" or distributed.rank() == 0:
            samfn.save(path, state_of(params), name=name)
        dist.barrier()
        assert path.is_file() == (name == "plain")
        for other, like in found.items():
            state, metadata = samfn.restore(path, like=zeros(state_of(like)))
            assert metadata == {"name": name}
            for key, leaf in state.params.items():
                wanted = like[key]
                assert getattr(leaf, "placements", None) == getattr(
                    wanted, "placements", None
                )
                assert_close(distributed.gather(leaf), whole(key), rtol=0, atol=0)
                ours, theirs = local(leaf), local(wanted)
                assert_close(ours, theirs, rtol=0, atol=0)
                assert ours.stride() == theirs.stride(), (other, key)


def placements_of(leaf):
    return getattr(leaf, "placements", None)


def local(leaf):
    return leaf.to_local() if isinstance(leaf, DTensor) else leaf


def test_every_layout_loads_as_every_other(tmp_path):
    on_ranks(4, between_layouts, tmp_path)
    plain = {name: whole(name) for name in FULL}
    for path in tmp_path.iterdir():
        state, _ = samfn.restore(path, like=zeros(state_of(plain)))
        assert_close(state.params, plain, rtol=0, atol=0)


def simple(step, value=None):
    params = {
        "w": torch.full((4, 3), float(step) if value is None else value),
        "v": torch.arange(8.0) + step,
    }
    state = samfn.init(distributed.shard(params), {}, optimizer=samfn.sgd(0.0))
    return state._replace(step=torch.tensor(step))


def plain(step):
    params = {"w": torch.full((4, 3), float(step)), "v": torch.arange(8.0) + step}
    state = samfn.init(params, {}, optimizer=samfn.sgd(0.0))
    return state._replace(step=torch.tensor(step))


def names(directory):
    return sorted(
        p.name for p in Path(directory).iterdir() if not p.name.startswith(".samfn")
    )


def refused_on_all(directory):
    """On ranks: what one of them refuses, all refuse, and nothing is written."""
    mesh, own = init_device_mesh("cpu", (4,)), distributed.rank()
    state = simple(1)
    broken = simple(1)
    if own == 2:
        broken.params["w"].to_local().fill_(float("nan"))
    sums = DTensor.from_local(torch.ones(3), mesh, [Partial()], run_check=False)
    sparse = simple(1)
    sparse.buffers["edges"] = torch.eye(3).to_sparse()
    cases = [
        (samfn.NonFiniteError, "w is not finite after 1 steps", broken, {}),
        (TypeError, "metadata a: .*not JSON", state, {"a": {1} if own == 3 else 1}),
        (ValueError, "metadata must not be called", state, {"samfn.parts": 1}),
        (ValueError, "params/w is a sum", state._replace(params={"w": sums}), {}),
        (TypeError, "sparse ones: buffers/edges", sparse, {}),
        (TypeError, "score must be a number", state, {"score": "x" if own == 1 else 1.0}),
    ]
    if own == 0:
        Path(directory, "file").write_text("")
        Path(directory, "foreign").mkdir()
        Path(directory, "foreign", "x").touch()
    dist.barrier()
    checkpoints = samfn.Checkpoints(Path(directory, "checkpoints"))
    for kind, message, wrong, metadata in cases:
        with pytest.raises(kind, match=message):
            checkpoints.save(wrong, **metadata)
    for name in ("file", "foreign"):
        with pytest.raises(samfn.CheckpointWriteError, match=f"cannot write .*{name}"):
            samfn.save(Path(directory, name), state)
    with pytest.raises(samfn.CheckpointWriteError, match="absent"):
        samfn.save(Path(directory, "absent", "x"), state)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*absent"):
        samfn.restore(Path(directory, "absent"), like=state)
    samfn.save(Path(directory, "good"), state)
    like = state._replace(params={**state.params, "w": sums})
    with pytest.raises(ValueError, match=r"params/w: \(3,\) against \(4, 3\)"):
        samfn.restore(Path(directory, "good"), like=like)
    with pytest.raises(ValueError, match="params/v unexpected"):
        samfn.restore(
            Path(directory, "good"), like=state._replace(params={"w": state.params["w"]})
        )


def test_what_one_rank_refuses_all_refuse_and_nothing_is_written(tmp_path):
    on_ranks(4, refused_on_all, tmp_path)
    assert names(tmp_path) == ["checkpoints", "file", "foreign", "good"]
    assert not [*(tmp_path / "checkpoints").iterdir()]
    assert not [*tmp_path.glob(".samfn*")]


def kept(directory):
    """On ranks: the last and the best stay, damaged ones go aside, others are replaced."""
    said = []
    checkpoints = samfn.Checkpoints(directory, keep_last=2, keep_best=1, warn=said.append)
    first = distributed.rank() == 0
    for step, score in ((1, 5.0), (2, 1.0), (3, 1.0), (4, 2.0)):
        path = checkpoints.save(simple(step), score=score, long="é" * 70_000)
        dist.barrier()
        assert path.exists()
    assert names(directory) == [f"step_00000000{n}.sharded" for n in (1, 3, 4)]
    assert path.stat().st_mode & 0o777 == 0o777 & ~mask()
    assert checkpoints.best_whole(simple(0)).state.step == 1
    # One that another process wrote, of the same step, and then this one again.
    before = {*path.iterdir()}
    checkpoints.save(simple(4, 9.0), score=2.0)
    dist.barrier()
    assert not before & {file for file in path.iterdir() if file.name != parts.INDEX}
    assert len([*path.iterdir()]) == len(before) == 5
    found = checkpoints.latest(simple(0))
    assert (found.path, found.metadata) == (path, {"score": 2.0})
    assert found.state.params["w"].to_local().eq(9.0).all()
    # The part of the last rank alone is damaged.
    if first:
        file = sorted(path.glob("rank_00003*"))[0]
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    dist.barrier()
    with pytest.raises(samfn.CheckpointCorruptError, match=r"step_000000004.*rank_00003"):
        samfn.restore(path, like=simple(0))
    assert samfn.Checkpoints(directory, warn=said.append).latest(simple(0)).state.step == 3
    assert len(said) == first
    assert first == any("kept as step_000000004.sharded.corrupt" in text for text in said)
    # A whole one is not deleted for a damaged one, by a process that wrote neither.
    if first:
        shutil.copytree(f"{path}.corrupt", path)
    dist.barrier()
    samfn.Checkpoints(directory, warn=said.append).save(simple(5))
    dist.barrier()
    assert names(directory) == [
        "step_000000001.sharded",
        "step_000000003.sharded",
        "step_000000004.sharded.corrupt",
        "step_000000004.sharded.corrupt.1",
        "step_000000005.sharded",
    ]
    dist.barrier()
    if first:
        checkpoints.drop_after(3)
        one = samfn.Checkpoints(directory)  # A file of the same step takes its place.
        one.save(plain(3), score=1.0)
        assert one.latest(plain(0)).path.name == "step_000000003.safetensors"
    dist.barrier()
    assert checkpoints.latest(simple(0)).path.name == "step_000000003.safetensors"
    assert samfn.Checkpoints(Path(directory, "empty")).latest(simple(0)) is None
    return names(directory)


def mask():
    found = os.umask(0)
    os.umask(found)
    return found


def test_the_last_few_and_the_best_few_stay(tmp_path):
    found, *_ = on_ranks(4, kept, tmp_path)
    assert found == [
        "step_000000001.sharded",
        "step_000000003.safetensors",
        "step_000000004.sharded.corrupt",
        "step_000000004.sharded.corrupt.1",
        "step_000000005.sharded.superseded",
    ]


def in_the_background(directory):
    checkpoints = samfn.Checkpoints(directory, background=True)
    for step in (1, 2, 3):
        state = simple(step)
        metadata = {"seen": torch.ones(2)}
        path = checkpoints.save(state, **metadata)
        for leaf in (*state.params.values(), metadata["seen"], state.step):
            local(leaf).fill_(77)  # As a compiled step does, which is given the state.
        distributed.mean({"a": 1.0}, 1)  # What ranks exchange meanwhile.
    checkpoints.wait()
    assert path.exists()
    found = checkpoints.latest(simple(0))
    assert found.state.step == 3
    assert found.metadata["seen"].tolist() == [1.0, 1.0]
    assert_close(distributed.gather(found.state.params), plain(3).params)
    if distributed.rank() == 0:
        Path(directory, "step_000000004.sharded").write_text("")
    dist.barrier()
    checkpoints.save(simple(4))
    with pytest.raises(samfn.CheckpointWriteError, match="step_000000004"):
        checkpoints.wait()
    checkpoints.wait()  # It was told.


def test_writing_in_the_background_writes_what_was(tmp_path):
    on_ranks(2, in_the_background, tmp_path)
    checkpoints = samfn.Checkpoints(tmp_path / "one", background=True)
    for step in (1, 2):
        state = plain(step)
        checkpoints.save(state)
        state.params["w"].fill_(77)
    assert_close(checkpoints.latest(plain(0)).state.params, plain(2).params)
    (tmp_path / "one" / "step_000000003.safetensors").mkdir()
    checkpoints.save(plain(3))
    with pytest.raises(samfn.CheckpointWriteError, match="step_000000003"):
        checkpoints.wait()
    assert not [*tmp_path.rglob(".samfn-*")]


def write_two(directory):
    checkpoints = samfn.Checkpoints(directory)
    for step in (1, 2):
        checkpoints.save(simple(step), score=step)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("written")
    on_ranks(4, write_two, directory)
    return directory


def changed(place):
    def change(file, others):
        content = bytearray(file.read_bytes())
        content[place] ^= 1
        file.write_bytes(content)

    return change


def swapped(file, others):
    aside = file.with_name("aside")
    file.rename(aside)
    others[0].rename(file)
    aside.rename(others[0])


def of_before(file, others):
    """Put the file of the same rank of the checkpoint before in its place."""
    number = file.name.partition("-")[0]
    (older,) = (file.parents[1] / "step_000000001.sharded").glob(f"{number}-*")
    shutil.copy(older, file)


def is_a(kind):
    def change(file, others):
        file.unlink()
        make_special(file, kind)

    return change


DAMAGE = {
    "missing": lambda file, others: file.unlink(),
    "empty": lambda file, others: file.write_bytes(b""),
    "truncated": lambda file, others: os.truncate(file, file.stat().st_size - 1),
    "longer": lambda file, others: file.write_bytes(file.read_bytes() + b"0"),
    "changed header": changed(40),
    "changed data": changed(-1),
    "swapped": swapped,
    "of the checkpoint before": of_before,
    "a directory": is_a("a directory"),
    "a pipe": is_a("a named pipe"),
}


@pytest.mark.parametrize("which", ["rank_00002", "index"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_named_and_the_checkpoint_before_goes_on(
    tmp_path, written, kind, which
):
    if which == "index" and kind in ("swapped", "of the checkpoint before"):
        pytest.skip("an index has no other in its directory")
    directory, said = tmp_path / "copy", []
    shutil.copytree(written, directory)
    path = directory / "step_000000002.sharded"
    file, *_ = path.glob(f"{which}*")
    before = samfn.Checkpoints(directory, warn=lambda text: None)
    assert samfn.restore(path, like=plain(0))[0].step == 2  # The twin: nothing is damaged.
    assert before.best() == [path]
    DAMAGE[kind](file, sorted(path.glob("rank_00001*")))
    named = "rank_0000[12]" if kind == "swapped" else which
    with pytest.raises(samfn.CheckpointCorruptError, match=f"step_000000002.*{named}"):
        samfn.restore(path, like=plain(0))
    assert before.best() == [directory / "step_000000001.sharded"]
    checkpoints = samfn.Checkpoints(directory, warn=said.append)
    assert checkpoints.latest(plain(0)).state.step == 1
    assert len(said) == 1
    assert names(directory) == ["step_000000001.sharded", "step_000000002.sharded.corrupt"]


def forged(index, change):
    """Write an index again, with a digest that is right."""
    tensors, texts = parts.tensorfile.read(index)
    found = json.loads(texts["samfn.parts"])
    change(found)
    parts.tensorfile.write(index, tensors, texts | {"samfn.parts": json.dumps(found)})


def outside(part):
    """Name the same file by a path that could lead anywhere."""
    part[2] = f"../copy/{part[2]}"


FORGED = {
    "a part left out": lambda found: found["params/w"]["parts"].pop(),
    "outside": lambda found: found["params/w"]["parts"][0][0].__setitem__(0, 99),
    "negative": lambda found: found["params/w"]["parts"][0][0].__setitem__(0, -1),
    "elsewhere": lambda found: outside(found["params/w"]["parts"][0]),
    "no number": lambda found: found["params/w"].update(shape=["4", 3]),
    "no dtype": lambda found: found["params/w"].update(dtype="F1"),
    "other dtype": lambda found: found["params/w"].update(dtype="I32"),
    "no list": lambda found: found.update({"params/w": 3}),
    "other digest": lambda found: found["params/w"]["parts"][0].__setitem__(3, "0" * 64),
    "shape of all memory": lambda found: found["params/w"].update(shape=[2**60, 3]),
}


@pytest.mark.parametrize("kind", FORGED)
def test_a_forged_index_is_refused(tmp_path, written, kind):
    path = tmp_path / "copy"
    shutil.copytree(written / "step_000000002.sharded", path)
    forged(path / parts.INDEX, lambda found: None)
    assert samfn.restore(path, like=plain(0))[0].step == 2
    forged(path / parts.INDEX, FORGED[kind])
    with pytest.raises(ValueError, match="copy"):
        samfn.restore(path, like=plain(0))


def test_parts_are_safetensors_that_anything_reads(written):
    path = written / "step_000000002.sharded"
    read = parts.tensorfile.read
    rows = [read(file)[0]["params/w"] for file in sorted(path.glob("rank_*"))]
    assert_close(torch.cat(rows), plain(2).params["w"])
    tensors, texts = read(path / parts.INDEX)
    assert tensors.keys() == {"step", "skipped", "skipped_in_a_row"}
    assert json.loads(texts["samfn.parts"])["params/v"]["shape"] == [8]


def of_a_future_format(directory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("samfn.storage.encoding.FORMAT", "3")
        samfn.save(Path(directory, "x"), simple(1))
    with pytest.raises(samfn.CheckpointFormatError, match="format 3, this samfn"):
        samfn.restore(Path(directory, "x"), like=simple(1))


def test_a_format_of_the_future_is_named(tmp_path):
    on_ranks(1, of_a_future_format, tmp_path)
    assert names(tmp_path) == ["x"]
