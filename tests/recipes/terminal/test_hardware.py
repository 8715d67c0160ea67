"""What a machine has instructions for is asked, and said where it matters."""

import pytest
import torch

from bench import cost, measure
from bench.gpu.setup import GPU, SMOKE
from recipes.cifar_wrn import main
from recipes.settings.resolve import configure
from recipes.terminal import hardware

HALVES = (torch.bfloat16, torch.float16)
OLD = {"architecture": "x86_64", "avx2": True, "avx512_bf16": False, "amx_bf16": False}


@pytest.fixture
def cpu(monkeypatch):
    """Return what sets the instructions of the CPU."""

    def has(capabilities, slowness=None):
        """A CPU that is not asked, and so timed, raises without a slowness."""
        monkeypatch.setattr(hardware, "_capabilities", lambda: capabilities)
        monkeypatch.setattr(hardware, "slowness", (slowness or {}).__getitem__)

    return has


@pytest.mark.parametrize(
    ("capabilities", "emulated"),
    [
        (OLD, [True, True]),
        (OLD | {"avx512_bf16": True}, [False, True]),
        (OLD | {"amx_bf16": True}, [False, True]),
        (OLD | {"amx_bf16": True, "avx512_fp16": True}, [False, False]),
        (OLD | {"amx_fp16": True}, [True, False]),
    ],
)
def test_an_x86_cpu_is_asked(cpu, capabilities, emulated):
    cpu(capabilities)
    assert [hardware.emulated(dtype) for dtype in HALVES] == emulated


@pytest.mark.parametrize("capabilities", [{}, {"architecture": "arm64", "bf16": True}])
@pytest.mark.parametrize("slow", HALVES)
def test_another_cpu_is_timed(cpu, capabilities, slow):
    cpu(capabilities, slowness={dtype: 20.0 if dtype is slow else 1.0 for dtype in HALVES})
    assert [hardware.emulated(dtype) for dtype in HALVES] == [x is slow for x in HALVES]


def test_float32_and_gpus_emulate_nothing(cpu):
    cpu(OLD)
    assert not any(hardware.emulated(dtype) for dtype in (None, torch.float32))
    assert not any(hardware.emulated(dtype, "cuda:0") for dtype in HALVES)


@pytest.mark.parametrize("dtype", HALVES)
def test_the_answer_is_what_a_product_shows(dtype):
    # Between the two lie CPUs with vectors of 512 bits and no such instructions.
    seen = hardware.slowness(dtype)
    assert seen > 1.5 if hardware.emulated(dtype) else seen < 3


@pytest.mark.parametrize("precision", ["bf16", "fp16", "float32", "auto"])
@pytest.mark.parametrize("native", [False, True])
def test_a_run_says_that_its_precision_is_emulated(cpu, precision, native):
    cpu(OLD | dict.fromkeys(("amx_bf16", "amx_fp16"), native))
    said = []
    configure(
        ["--data", "digits", "--device", "cpu", "--precision", precision], said.append
    )
    line = f"{precision} is emulated on this CPU: expect it to be many times slower than"
    expected = precision in ("bf16", "fp16") and not native
    assert [text for text in said if "emulated" in text] == [f"{line} float32"] * expected


def test_a_run_that_goes_on_says_so_too(cpu, tmp_path, capsys):
    cpu(OLD)
    short = ["--data", "digits", "--epochs", "1", "--batch-size", "1437", "--rho", "0"]
    run = ["--precision", "bf16", "--device", "cpu", "--output", str(tmp_path / "run")]
    assert main([*short, *run]) == 0
    assert "bf16 is emulated on this CPU" in capsys.readouterr().out
    assert main(["--resume", str(tmp_path / "run")]) == 0
    assert "bf16 is emulated on this CPU" in capsys.readouterr().out


def test_cases_that_are_emulated_are_timed_only_where_they_are_named(cpu, capsys):
    cpu(OLD | {"amx_bf16": True})
    cases = cost.Steps.cases
    assert cost.default_cases(cases) == [*cases]
    assert capsys.readouterr().out == ""
    cpu(OLD)
    left = [case for case in cases if case.endswith(":float32")]
    assert cost.default_cases(cases) == left
    said = "bf16 is emulated on this CPU; left out: wrn-16-2:64:bf16, wrn-16-2:128:bf16;"
    assert said in capsys.readouterr().out


def test_the_smoke_test_computes_in_what_the_cpu_has(cpu):
    found = []
    for native in (False, True):
        cpu(OLD | {"avx512_bf16": native})
        found += [SMOKE.precision, SMOKE.dtype, GPU.precision]
    assert found == ["float32", torch.float32, "bf16", "bf16", torch.bfloat16, "bf16"]


@pytest.mark.parametrize("rate", [1e8, 1e9, 1e10, 1e12, 1e15])
@pytest.mark.parametrize("seconds", [0.5, 10])
def test_a_peak_is_found_within_its_time(monkeypatch, rate, seconds):
    sizes, spent = [], []

    def timed(step, repeats):
        one = 2 * sizes[-1] ** 3 / rate
        spent.append(repeats * one)
        return one

    def product(size, dtype, device):
        sizes.append(size)
        spent.append(2 * size**3 / rate)  # its first time

    monkeypatch.setattr(measure, "timed", timed)
    monkeypatch.setattr(measure, "_product", product)
    assert measure.peak_flops(torch.float32, "cpu", seconds) == pytest.approx(rate)
    assert sizes[-1] == 128 or sum(spent) < 1.2 * seconds
    assert sizes[-1] == 2048 or 8 * sum(spent) > 0.5 * seconds
    assert sizes[-1] <= 2048


@pytest.mark.parametrize("size", [2**46, 2**62])
def test_a_tensor_for_which_there_is_no_memory_is_told_from_a_wrong_one(size):
    with pytest.raises(RuntimeError) as raised:
        torch.empty(size)
    assert hardware.lacks_memory(raised.value)
    with pytest.raises(RuntimeError) as raised:
        torch.empty(-1)
    assert not hardware.lacks_memory(raised.value)
