"""What is compiled, with which options, and whether anything can be."""

import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from samfn.gradient import GradientError, evaluate
from samfn.loss import LossFn, as_loss
from samfn.methods.base import Method
from samfn.modules.lending import ImpureError
from samfn.step import Metrics, TrainState
from samfn.support.nested import as_it_was
from samfn.tree import Batch, any_sharded, is_sharded

Parts = Literal["whole", "gradient", "loss"]
Plan = Literal["auto", "whole", "gradient", "loss"]
Dials = float | Tensor | tuple[float | Tensor, ...]
"""Of a dial: one value for all steps of a call, or one for each."""
Step = Callable[..., tuple[TrainState, Metrics]]
"""(state, batch, rho, lr) -> (new state, metrics)."""

# Above this many operations in one gradient, a CPU spends its time in them: one graph of
# the whole step is no faster then than one compiled gradient called twice, and takes about
# twice as long to compile. Measured in bench/results/; between 1e9 and 3e10 both will do.
ARITHMETIC = 1e10

# On a CPU. Dynamo's guards have checked what these asserts would check again, and waking a
# second thread takes as long as a loop over ten thousand numbers.
LEAN: dict[str, Any] = {
    "size_asserts": False,
    "alignment_asserts": False,
    "cpp.min_chunk_size": 16384,
}
if "TORCHINDUCTOR_VEC_ISA_OK" not in os.environ:
    # What the processor says of its vector registers holds: PyTorch would find out by a
    # program for each of their widths, and 2.11 loads them anew in every process.
    LEAN["cpp.vec_isa_ok"] = True
if shutil.which("openssl") is None:  # by which PyTorch tells precompiled headers apart
    LEAN["cpp_cache_precompile_headers"] = False

# Calls the kernels from C++. On a GPU, a CUDA graph does away with the calls altogether.
# The calls are compiled apart from the kernels: with less optimisation, in half the time.
FROM_CPP = {"cpp_wrapper": True, "cpp_wrapper_build_separate": True}


def missing_compiler(device: torch.device, backend: str = "inductor") -> str | None:
    """Return what torch.compile lacks on this machine, in a few words, or None."""
    if backend != "inductor":
        torch._dynamo.lookup_backend(backend)  # Raises where there is none of this name.
        return None
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "found no Triton"
        if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
            return "found no C compiler for Triton"
        return None
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        return f"found no C++ compiler ({compiler})"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "found no headers of Python (Python.h)"
    return None


def keep_headers(directory: Path) -> None:
    """Let PyTorch keep precompiled headers in a directory: it asks no variable where."""
    from torch._inductor import codecache, config

    if hasattr(codecache, "_HEADER_DIR") and hasattr(codecache, "_HEADER_LOCK_DIR"):
        codecache._HEADER_DIR = str(directory)
        codecache._HEADER_LOCK_DIR = str(directory / "locks")
    else:  # another version of PyTorch
        config.cpp_cache_precompile_headers = False


def choose(
    wanted: Plan, loss_fn: LossFn, method: Method, state: TrainState, batch: Batch
) -> Parts:
    """Return what to compile first.

    Raises:
        ValueError: the plan is "whole", and the method does not trace.
    """
    if wanted == "whole" and not method.traces:
        raise ValueError('this method does not trace: expected plan "gradient" or "auto"')
    try:  # It tells the loss, too, what it is a mean over.
        count = operations(loss_fn, state, batch)
    except (GradientError, ImpureError):
        raise
    except Exception:  # Whatever a model does that needs real values.
        count = 0
    if method.cuts:  # A graph looks at nothing.
        as_loss(loss_fn).look(batch)
    if wanted != "auto":
        return wanted
    if not method.traces:
        return "gradient"
    # On a GPU, one graph reads and writes every weight least often.
    few = state.step.device.type != "cpu" or count <= ARITHMETIC
    return "whole" if few else "gradient"


def operations(loss_fn: LossFn, state: TrainState, batch: Batch) -> int:
    """Count the floating-point operations of one gradient; nothing is computed.

    Those of matrix products, convolutions and attention count, as in
    `torch.utils.flop_counter`; a multiply-add is two.
    """
    from torch.utils.flop_counter import FlopCounterMode  # takes as long as samfn itself

    fake = FakeTensorMode(allow_non_fake_inputs=True)

    def as_fake(leaf: Tensor) -> Tensor:
        if not is_sharded(leaf):
            return fake.from_tensor(leaf)
        with fake:  # A pass sees it whole.
            return torch.empty(leaf.shape, dtype=leaf.dtype, device=leaf.device)

    given = dict(state.params), dict(state.buffers), batch
    arguments = pytree.tree_map_only(Tensor, as_fake, given)
    # A dry run leaves nothing in the lists of a criterion, as those that keep losses.
    dry = as_it_was(as_loss(loss_fn).function)
    with dry, fake, FlopCounterMode(display=False) as counter:
        evaluate(loss_fn, *arguments)
    return int(counter.get_total_flops())


def candidates(
    backend: str, options: Mapping[str, Any] | None, plan: Plan, state: TrainState
) -> list[dict[str, Any]]:
    """Return what to give to torch.compile, the fastest first."""
    if options is not None or backend != "inductor":
        return [{"backend": backend, "options": options and dict(options)}]
    device = state.step.device
    # DTensors cannot be called from C++, and once that was tried, not from Python either.
    sharded = any_sharded(state.params.values())
    if device.type == "cpu" and plan == "whole" and not sharded:
        # A few operations cannot be called from C++.
        return [{"options": LEAN | FROM_CPP}, {"options": LEAN}]
    return [{"options": LEAN if device.type == "cpu" else {}}]
