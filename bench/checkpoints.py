r"""Cost of saving and restoring, at the size of WRN-28-10 with momentum.

    python -m bench.checkpoints

Beside `samfn.save` and `samfn.restore`, in turns: bare safetensors, with an fsync after
saving, and with a copy into the state's own tensors after loading, which by itself may
map the file and read nothing. Each load is the first of a process, as when a run goes on:
later ones take memory that is warm, or not, by the allocator's mood. The epoch is one of
50,000 images, from the time of a SAM step on this machine.
"""

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

import samfn
from bench import measure
from recipes.models.wide_resnet import WideResNet
from recipes.terminal import cli
from samfn.storage import tensorfile

IMAGES = 50_000


@dataclass(frozen=True)
class Options:
    """Size of the network, and how often it is saved and restored."""

    model: str = "28-10"
    """Depth and width of the Wide ResNet."""
    rounds: int = 15
    """Turns of each measurement."""
    batch: int = 8
    """Images in the step that the epoch is reckoned from."""
    directory: Path = Path(tempfile.gettempdir())
    """Directory on the disk that is measured."""
    report: Path | None = None
    """Markdown file to write."""


OURS, BARE = "samfn.safetensors", "bare.safetensors"


def made(model: str) -> tuple[WideResNet, samfn.TrainState, dict[str, Tensor]]:
    """Return a network, its state, and the parameters and momentum in it by name."""
    depth, width = map(int, model.split("-"))
    network = WideResNet(depth, width, 10).to(memory_format=torch.channels_last)
    state = samfn.init(*samfn.split(network), optimizer=samfn.sgd())
    memory = state.opt_state["momentum_buffer_list"]
    assert isinstance(memory, dict)
    tensors = {f"params/{name}": w for name, w in state.params.items()}
    tensors |= {f"momentum/{name}": w for name, w in memory.items()}
    return network, state, tensors


def saves(
    folder: Path, state: samfn.TrainState, tensors: dict[str, Tensor]
) -> dict[str, Callable[[], object]]:
    """Return what is timed of saving, by name."""

    def save_bare() -> None:
        save_file({name: w.contiguous() for name, w in tensors.items()}, folder / BARE)
        with (folder / BARE).open("rb+") as file:
            os.fsync(file.fileno())

    return {
        "samfn.save": lambda: samfn.save(folder / OURS, state),
        "save_file, fsync": save_bare,
    }


LOADS = ("samfn.restore", "load_file by pread, copy", "load_file mapped, copy")


def time_of_load(name: str, folder: Path, model: str) -> float:
    """Return the seconds of one load; called in a process of its own."""
    _, state, tensors = made(model)

    def load() -> object:
        if name == "samfn.restore":
            return samfn.restore(folder / OURS, like=state)
        loaded = load_file(folder / BARE, backend="pread" if "pread" in name else "mmap")
        return {key: torch.empty_like(w).copy_(loaded[key]) for key, w in tensors.items()}

    return measure.timed(load, 1)


def times_of_loads(folder: Path, model: str, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each load, by name, each the first of a new process."""
    spawn = multiprocessing.get_context("spawn")
    times: dict[str, list[float]] = {name: [] for name in LOADS}
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        for _ in range(rounds):
            for name, seconds in times.items():
                seconds.append(pool.submit(time_of_load, name, folder, model).result())
    return times


def hash_time(state: samfn.TrainState) -> float:
    """Return the seconds that the SHA-256 of parameters and momentum takes."""
    tensors = [w.contiguous() for w in (*state.params.values(),) * 2]

    def hash_all() -> None:
        with ThreadPoolExecutor(tensorfile.THREADS) as pool:
            list(pool.map(tensorfile.sha256, tensors))

    return measure.timed(hash_all, 5)


def epoch(model: torch.nn.Module, state: samfn.TrainState, batch: int) -> float:
    """Return the seconds that an epoch would take, from one step after a first one."""
    images = torch.randn(batch, 3, 32, 32).to(memory_format=torch.channels_last)
    targets = torch.randint(10, (batch,))
    loss_fn, optimizer = samfn.supervised(model, F.cross_entropy), samfn.sgd()

    def step() -> None:
        samfn.sam_update(
            state, (images, targets), loss_fn=loss_fn, optimizer=optimizer, lr=0.1
        )

    step()
    return measure.timed(step, 1) * IMAGES / batch


def main(options: Options) -> None:
    """Measure, print and report."""
    model, state, tensors = made(options.model)
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        folder = Path(name)
        seen = measure.interleaved(
            saves(folder, state, tensors), seconds=0, rounds=options.rounds
        )
        seen |= times_of_loads(folder, options.model, options.rounds)
        size = (folder / OURS).stat().st_size
    hashing = 1000 * hash_time(state)
    seconds = epoch(model, state, options.batch)
    bare = {"samfn.save": "save_file, fsync", "samfn.restore": LOADS[1]}
    rows = [
        {
            "what": name,
            **measure.milliseconds(times),
            "of bare": measure.ratios(times, seen[bare[name]])["median"]
            if name in bare
            else "",
            "of an epoch": f"{measure.quantiles(times)['median'] / seconds:.5%}",
        }
        for name, times in seen.items()
    ]
    about = f"""In turns, {options.rounds} rounds, each load the first of a process. "of
bare" is the median of the ratios in a round: to save_file of contiguous tensors with an
fsync, and to load_file reading (pread), with a copy into new tensors of the state's
strides; mapping the file is cheaper, and a file that shrinks under it kills the process.
Restoring also hashes:
SHA-256 alone takes {hashing:.0f} ms in {tensorfile.THREADS} threads.
An epoch of SAM takes {seconds:,.0f} s here, reckoned from a step of
{options.batch} images."""
    title = f"What saving and restoring cost: WRN-{options.model}, {size / 1e6:,.0f} MB"
    parts = [about, measure.table(rows, tuple(rows[0]))]
    text = measure.page(title, parts, "bench.checkpoints")
    print(text)
    if options.report is not None:
        options.report.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(cli.parsed(Options, prog="python -m bench.checkpoints", description=__doc__))
