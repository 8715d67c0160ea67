"""Several processes on this machine, as torchrun would start them: ranks, by gloo."""

import io
import os
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tests import commands

TIMEOUT = 300.0  # seconds that a rank waits for another; far more than any case takes


def on_ranks(count, function, *arguments, timeout=TIMEOUT, context=None):
    """Call a function of a module on `count` ranks; return the results, by rank.

    The function is found again by its name, and its results are what `torch.save` takes.
    Processes are made by `context`, of multiprocessing, if another than usual.
    """
    context = context or commands.context()
    with tempfile.TemporaryDirectory() as directory:
        store = Path(directory, "store")
        pipes = [context.Pipe(duplex=False) for _ in range(count)]
        processes = [
            context.Process(
                target=_begin,
                args=(rank, count, store, pipes[rank][1], timeout, function, arguments),
                daemon=True,
            )
            for rank in range(count)
        ]
        for process in processes:
            process.start()
        for _, end in pipes:
            end.close()
        answers = [_answer(rank, begin) for rank, (begin, _) in enumerate(pipes)]
        for process in processes:
            process.join(timeout)
    failed = [text for text, _ in answers if text is not None]
    assert not failed, "\n".join(failed)
    return [torch.load(io.BytesIO(data), weights_only=False) for _, data in answers]


def _answer(rank, pipe):
    try:
        return pipe.recv()
    except EOFError:
        return f"rank {rank} ended without an answer", None


def _begin(rank, count, store, pipe, timeout, function, arguments):
    os.environ.pop("PYTEST_CURRENT_TEST", None)
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=count,
            timeout=timedelta(seconds=timeout),
        )
        # A rank that is done at once would close connections that others still make.
        dist.all_reduce(torch.zeros(()))
        data = io.BytesIO()
        torch.save(function(*arguments), data)
        pipe.send((None, data.getvalue()))
    except BaseException:
        pipe.send((f"rank {rank}: {traceback.format_exc()}", None))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


class Sent(TorchDispatchMode):
    """Notes what is exchanged: operation, bytes of the whole vector, ranks."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "_c10d_functional" and len(args) > 1:
            name = func.name().split("::")[1].rstrip("_")  # Some work in place.
            *_, group = [argument for argument in args if isinstance(argument, str)]
            self.found.append((name, max(args[0].nbytes, result.nbytes), group))
        return result
