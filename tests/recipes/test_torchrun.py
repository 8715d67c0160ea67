"""The recipe on several ranks: one run, whatever becomes of its processes."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from recipes import cifar_wrn
from recipes.errors import ConfigError
from recipes.settings.resolve import configure
from recipes.train.build import assemble, read_data
from recipes.train.callbacks import Meter
from tests import ROOT, commands
from tests.ranks import on_ranks

DIGITS = ("--data", "digits", "--batch-size", "128", "--seed", "3")


def start(output, *flags, restarts=0, ranks=2):
    """Start the recipe on several ranks."""
    own = (f"--nproc-per-node={ranks}", f"--max-restarts={restarts}", "-m")
    # torchrun takes --monitor for one of its own that begins so, but for the --.
    return torchrun(
        *own, "--", "recipes.cifar_wrn", *DIGITS, "--output", str(output), *flags
    )


def torchrun(*arguments, cwd=ROOT):
    """Start torchrun, in a session of its own and at a port of its own."""
    said = tempfile.TemporaryFile("w+")  # noqa: SIM115
    OPEN.append(said)
    streams = {"stdout": said.fileno(), "stderr": said.fileno()}
    command = ("-c", TORCHRUN, "--standalone", *arguments)
    process = commands.start(*command, **streams, cwd=cwd)
    process.said = said
    return process


OPEN = []  # files of processes
TORCHRUN = """
import os
os.setsid()
os.environ["OMP_NUM_THREADS"] = "1"
from torch.distributed.run import main
main()
"""


def finish(process, code=0):
    process.join(300)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    said = all_of(process)
    assert process.exitcode == code, said
    return said


def all_of(process):
    process.said.seek(0)
    return process.said.read()


@pytest.fixture(autouse=True)
def _closed():
    """Close what was written to, since a warning of an open file fails a test."""
    yield
    while OPEN:
        OPEN.pop().close()


def run(output, *flags, **how):
    return finish(start(output, *flags, **how))


def rows(output):
    path = output / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def wait_for_epoch(process, output, epoch):
    """Wait until the run has recorded an epoch; return the ids of its ranks' processes."""
    end = time.monotonic() + 300
    while len(rows(output)) < epoch:
        assert time.monotonic() < end
        assert process.is_alive(), all_of(process)
        time.sleep(0.02)
    return ranks_of(process)


def ranks_of(process):
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            environment = (entry / "environ").read_bytes().split(b"\0")
            if parent == process.pid and (own := find_rank(environment)) is not None:
                found[own] = int(entry.name)
    return found


def find_rank(environment):
    named = (entry.partition(b"=") for entry in environment)
    return next((int(value) for key, _, value in named if key == b"RANK"), None)


def model(output):
    return load_file(output / "model.safetensors")


def same(left, right):
    left, right = model(left), model(right)
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def recorded(output):
    """Return what every run of the same settings records alike."""
    varying = ("seconds", "images_per_second", "scan_seconds")
    return [{k: v for k, v in row.items() if k not in varying} for row in rows(output)]


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc").exists(), reason="finds processes in /proc"),
]
EPOCHS = ("--epochs", "4")


README = (ROOT / "samfn" / "distributed" / "README.md").read_text()
COMMANDS = re.findall(r"^    torchrun (.*-m recipes.*)$", README, re.MULTILINE)
assert len(COMMANDS) == 3


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_readme_run(command, tmp_path):
    short = ("--data", "digits", "--epochs", "1", "--batch-size", "256")
    said = finish(torchrun(*shlex.split(command), *short, cwd=tmp_path))
    assert "done" in said
    assert len([*tmp_path.glob("runs/*/model.safetensors")]) == 1


def test_the_example_of_the_readme_runs_on_two_ranks(tmp_path):
    example = re.search(r"```python\n([^`]*distributed\.ranks.*?)```", README, re.DOTALL)[1]
    stepped = "assert (int(state.step), int(state.skipped)) == (3, 0), state\n"
    (tmp_path / "example.py").write_text(example + stepped)
    finish(torchrun("--nproc-per-node=2", "example.py", cwd=tmp_path))


AFTER_EACH = """
import torch.distributed as dist
for p in model.parameters():
    whole = (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
    first = whole.clone()
    dist.broadcast(first, 0)
    assert whole.isfinite().all() and torch.equal(whole, first)
assert not optimizer.perturbed
"""
BEGIN = "torch.distributed.init_process_group()\n"


def test_the_programs_of_the_readme_around_samfn_sam_run_on_two_ranks(tmp_path):
    programs = re.findall(r"```python torchrun\n(.*?)```", README, re.DOTALL)
    assert [program.count(BEGIN) for program in programs] == [1] * 4
    # In one group of processes: those of torchrun have addresses for one only.
    bodies = [program.replace(BEGIN, "") + AFTER_EACH for program in programs]
    end = "dist.destroy_process_group()"
    script = "\n".join(["import torch", BEGIN, *bodies, end])
    (tmp_path / "programs.py").write_text(script)
    finish(torchrun("--nproc-per-node=2", "programs.py", cwd=tmp_path))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return a run on two ranks that nothing disturbed."""
    output = tmp_path_factory.mktemp("ranks") / "whole"
    said = run(output, *EPOCHS)
    return output, said


def test_two_ranks_are_one_process_with_a_perturbation_for_each_half(whole, tmp_path):
    method = 'per_micro_batch(sam, 64, statistics="averaged")'
    one = tmp_path / "one"
    assert cifar_wrn.main([*DIGITS, *EPOCHS, "--method", method, "--output", str(one)]) == 0
    assert same(whole[0], one)  # 64 and 128 divide without rounding.
    for ours, theirs in zip(rows(whole[0]), rows(one), strict=True):
        for name in ("train_accuracy", "test_accuracy", "test_loss", "sharpness"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name


def test_m_is_said_logged_and_kept(whole):
    output, said = whole
    assert "placement replica: a perturbation for each m = 64 of 128 images" in said
    assert all(row["m"] == 64 for row in rows(output))
    newest = sorted((output / "checkpoints").glob("*.safetensors"))[-1]
    header = newest.read_bytes()
    length = int.from_bytes(header[:8], "little")
    metadata = json.loads(header[8 : 8 + length])["__metadata__"]
    assert json.loads(metadata["ranks"]) == {"placement": "replica", "ranks": 2, "m": 64}


def test_only_the_first_rank_speaks(whole):
    assert whole[1].count("handwritten digits") == 1
    assert whole[1].count("done") == 1


def test_a_killed_rank_is_started_again_and_the_run_goes_on_bit_for_bit(whole, tmp_path):
    output = tmp_path / "killed"
    process = start(output, *EPOCHS, "--auto-resume", restarts=1)
    os.kill(wait_for_epoch(process, output, 2)[1], signal.SIGKILL)
    said = finish(process)
    assert "resuming after" in said
    assert same(whole[0], output)
    assert recorded(whole[0]) == recorded(output)


def test_a_rank_that_hangs_ends_all_within_the_timeout(tmp_path):
    output = tmp_path / "hung"
    process = start(output, "--epochs", "200", "--timeout", "3")
    found = wait_for_epoch(process, output, 1)
    os.kill(found[1], signal.SIGSTOP)
    begun = time.monotonic()
    while Path(f"/proc/{found[0]}").exists():
        assert time.monotonic() - begun < 60
        time.sleep(0.1)
    os.kill(found[1], signal.SIGCONT)  # torchrun would kill it in half a minute.
    said = finish(process, code=1)  # torchrun's own
    assert "another rank ended, or did not answer in time" in said


def test_a_signal_to_one_rank_stops_all_after_the_same_step(whole, tmp_path):
    output = tmp_path / "stopped"
    process = start(output, *EPOCHS)
    os.kill(wait_for_epoch(process, output, 2)[1], signal.SIGTERM)
    said = finish(process, code=1)
    assert "goes on where this ended" in said
    again = ("-m", "recipes.cifar_wrn", "--resume", str(output))
    finish(torchrun("--nproc-per-node=2", *again))
    assert same(whole[0], output)


PARTS = ("--batch-size", "1400", "--epochs", "2", "--ema-decay", "0.5", "--monitor")


def test_a_state_in_parts_is_trained_written_whole_and_goes_on_anywhere(tmp_path):
    output, alone = tmp_path / "parts", tmp_path / "alone"
    said = run(output, *PARTS, "--placement", "sharded")
    assert "placement sharded: a perturbation for each m = 1400 of 1400 images" in said
    assert rows(output)[1]["layers"]["gradient"].keys() <= model(output).keys()
    before = model(output)
    (output / "checkpoints" / "step_000000002.safetensors").unlink()
    shutil.copytree(output, alone)
    finish(torchrun("--nproc-per-node=2", "-m", "recipes.cifar_wrn", "--resume", output))
    assert all(torch.equal(before[name], leaf) for name, leaf in model(output).items())
    method = 'accumulated(sam, 700, statistics="averaged")'
    other = ["--resume-override", "--method", method]
    assert cifar_wrn.main(["--resume", str(alone), *other]) == 0
    require_close(before, model(alone))


def test_copies_of_parts_take_the_steps_of_one_process(tmp_path):
    output, alone = tmp_path / "copies", tmp_path / "alone"
    said = run(output, *PARTS, "--placement", "hsdp:2", ranks=4)
    assert "placement hsdp:2: a perturbation for each m = 1400 of 1400 images" in said
    method = 'accumulated(sam, 350, statistics="averaged")'
    how = *DIGITS, *PARTS, "--method", method, "--output", str(alone)
    assert cifar_wrn.main([*how]) == 0
    require_close(model(output), model(alone))


def require_close(found, expected):
    for name, leaf in expected.items():  # Without SAM some would be 0.3 off.
        apart, length = (found[name] - leaf).double().norm(), leaf.double().norm()
        assert apart <= 1e-4 * length, name


def sums_that_go_on():
    config = configure(DIGITS)
    task, _ = assemble(config, read_data(config, lambda items, *_: items, print))
    meter = Meter(task)
    meter.begin({"sums": SUMS, "seconds": 2.0})
    return meter.kept()["sums"]


SUMS = [11.0, 550.0, 3.0, 2.0, 1.0, 11.0]


def test_an_epoch_that_stopped_after_its_last_step_has_the_sums_of_before():
    assert on_ranks(2, sums_that_go_on) == [SUMS, SUMS]


def test_another_number_of_ranks_and_another_m_are_told(whole, capsys):
    assert cifar_wrn.main(["--resume", str(whole[0])]) == 0
    warned = capsys.readouterr().err
    assert "ranks was 2, is now 1: going on, but not bit for bit" in warned
    assert "m = 64 images, is now on 128" in warned


def refuse(flags):
    config = configure([*DIGITS, *flags])
    try:
        assemble(config, read_data(config, lambda items, *_: items, print))
    except ConfigError as error:
        return str(error)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--placement", "group:3"), "3 does not divide the number of ranks, 2"),
        (("--placement", "hsdp:3"), "3 parts do not divide the number of ranks, 2"),
        (("--batch-size", "3"), "at least two images for each of the 2 ranks"),
    ],
)
def test_what_ranks_cannot_do_is_said_at_the_start(flags, told):
    for message in on_ranks(2, refuse, flags):
        assert told in message


@pytest.mark.parametrize(
    ("own", "count"), [("3", "2"), ("-1", "2"), ("x", "2"), ("0", ""), ("0", "9" * 20)]
)
def test_a_rank_that_there_is_not_is_told_and_waits_for_nobody(
    monkeypatch, capsys, own, count
):
    for name, value in (("RANK", own), ("WORLD_SIZE", count), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)
    assert cifar_wrn.main([*DIGITS]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert f"expected a RANK of 0 to below WORLD_SIZE, got {own} of {count}".strip() in told


LAUNCHED = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}


@pytest.mark.parametrize("port", [None, "", "x", "-1", "99999"])
def test_a_port_that_there_is_not_is_told(monkeypatch, capsys, port):
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    if port is not None:
        monkeypatch.setenv("MASTER_PORT", port)
    assert cifar_wrn.main([*DIGITS]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert f"expected a MASTER_PORT of 0 to 65535, got {port or ''!r}" in told


def test_a_port_that_is_taken_is_told(monkeypatch, capsys):
    with socket.create_server(("", 0)) as other:
        given = LAUNCHED | {"WORLD_SIZE": "1", "MASTER_PORT": str(other.getsockname()[1])}
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        assert cifar_wrn.main([*DIGITS]) == 2
    assert "MASTER_PORT is in use by another program" in capsys.readouterr().err


def test_ranks_that_do_not_know_where_the_others_are_do_not_run_alone(monkeypatch, capsys):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert cifar_wrn.main([*DIGITS, "--dry-run"]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "RANK and WORLD_SIZE are set, expected MASTER_ADDR beside them" in told


def test_other_commands_say_that_they_run_alone(monkeypatch, capsys):
    from recipes import compare

    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)
    assert compare.main([]) == 2
    assert "start it without torchrun" in capsys.readouterr().err


def test_easy_images_are_found_by_all_ranks_together(tmp_path):
    flags = ("--select", "easy-skipped", "--select-every", "1", "--easy-scans", "1")
    flags += ("--epochs", "4", "--ema-decay", "0.9", "--monitor", "--placement", "global")
    one, two = tmp_path / "one", tmp_path / "two"
    method = 'accumulated(sam, 64, statistics="averaged")'
    alone = [*DIGITS, *flags, "--method", method, "--output", str(one)]
    assert cifar_wrn.main(alone) == 0
    run(two, *flags)
    images = [row["trained_images"] for row in rows(one)]
    assert images == [row["trained_images"] for row in rows(two)]
    assert images[-1] < images[0]
    assert same(one, two)
