"""F42 to F46: F1, F2, F4, F6 and F23, of states that several ranks hold parts of."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

import samfn
import samfn.storage.sharded  # Importing it takes seconds; the forkserver does so once.
from bench.faults.disk import REFUSED, WROTE, mutate
from bench.faults.kills import AtByte, AtEvent
from bench.faults.trial import Outcome, Process, finish, start
from samfn import distributed
from samfn.storage import parts

RANKS, STEPS = 2, 20
PATIENCE = 4.0  # seconds that a rank waits for another
LIMIT = 60.0  # seconds after which a rank hangs
KILLED = {-signal.SIGKILL, -signal.SIGXFSZ}
LOST = 3  # exit code of a rank that lost another
Target = Callable[[], Any]


def be_rank(rank: int, count: int, port: int, log: str, target: Target) -> None:
    """Be one of the ranks that torchrun would have started, and call a function."""
    torch.set_num_threads(1)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {**address, "RANK": str(rank), "WORLD_SIZE": str(count)}
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(handle, standard)
    try:
        with distributed.ranks(timeout=PATIENCE, kind="cpu"):
            target()
    except Exception as error:
        if not distributed.is_lost(error):
            raise
        os._exit(LOST)


def start_ranks(log: Path, target: Target, count: int = RANKS) -> list[Process]:
    """Start ranks that call a function."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(be_rank, i, count, port, str(log), target) for i in range(count)]


def state(step: int, size: int = 2**15, cut: bool = True) -> samfn.TrainState:
    """Return a state that depends on `step`, of eight tensors; this rank's parts of it."""
    values = torch.arange(size, dtype=torch.float32) + step
    params = {f"t{number}": values * (1 + number) for number in range(8)}
    params = distributed.shard(params) if cut else params
    made = samfn.init(params, {}, optimizer=samfn.sgd(0.0))
    return made._replace(step=torch.tensor(step))


def damaged(directory: Path) -> list[str]:
    """Return the names of checkpoints that are not whole."""
    found = []
    for path in samfn.Checkpoints(directory).paths():
        try:
            samfn.restore(path, like=state(0, cut=False))
        except samfn.CheckpointCorruptError:
            found.append(path.name)
        except ValueError:
            pass  # A state of another shape, but whole.
    return found


def train(directory: str, log: str, strike: Callable[[int], None] | None = None) -> None:
    """Train from the newest checkpoint on, and save after every step."""
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    optimizer, agreement = samfn.adamw(), distributed.Agreement(1)
    torch.manual_seed(0)
    params = {"w": torch.randn(31, 7), "b": torch.randn(1)}
    like = samfn.init(distributed.shard(params), {}, optimizer=optimizer)
    checkpoints = samfn.Checkpoints(directory, warn=print)
    found = checkpoints.latest(like)
    now = found.state if found else like
    while now.step < STEPS and not max(agreement.now(*asked[:1] or [0])):
        batch = torch.randn(6, 31, generator=torch.Generator().manual_seed(int(now.step)))
        now, _ = samfn.sam_update(
            now,
            distributed.share(batch),
            loss_fn=_loss,
            optimizer=optimizer,
            lr=0.01,
        )
        if distributed.rank() == distributed.FIRST:
            Path(f"{log}.steps").write_text(str(int(now.step)))
        if strike is not None:
            strike(int(now.step))
        checkpoints.save(now, score=-float(now.step))


def _loss(params: samfn.tree.Params, buffers: samfn.tree.Params, batch: Any) -> Any:
    return (batch @ params["w"]).square().mean() + params["b"].square().sum()


def _result(directory: Path) -> list[list[float]]:
    """Return what a run came to."""
    newest = samfn.Checkpoints(directory).paths()[-1]
    params = {"w": torch.empty(31, 7), "b": torch.empty(1)}
    like = samfn.init(params, {}, optimizer=samfn.adamw())
    found, _ = samfn.restore(newest, like=like)
    assert found.step == STEPS
    return [leaf.flatten().tolist() for leaf in found.params.values()]


def _reference(root: Path) -> list[list[float]]:
    """Return the result of a run that nothing happens to, once it proved repeatable."""
    found = []
    for name in ("reference", "twin"):
        log = root / f"{name}.log"
        codes = _finished(start_ranks(log, partial(train, str(root / name), str(log))))
        assert codes == [0] * RANKS, log.read_text()
        found.append(_result(root / name))
    assert found[0] == found[1], "two runs without faults differ"
    return found[0]


def _finished(processes: list[Process]) -> list[int]:
    return [finish(process, LIMIT) for process in processes]


def at_any_moment(trials: int, root: Path) -> Outcome:
    """F42: kill one or all ranks at random times, go on each time, compare the ends."""
    expected, chance = _reference(root), random.Random(0)
    failures: list[str] = []
    landed = runs = lost = 0
    while landed < trials:
        run, log, codes = root / f"run{runs}", root / f"run{runs}.log", [-1]
        runs += 1
        while any(codes) and not failures:
            processes = start_ranks(log, partial(train, str(run), str(log)))
            processes[0].join(chance.uniform(0.0, 3.0))
            victims = chance.choice((processes, processes[:1], processes[1:]))
            for process in victims:
                process.kill()
            codes = _finished(processes)
            if set(codes) - {0, LOST, -signal.SIGKILL}:
                failures.append(f"{run.name}: exit codes {codes}: {log.read_text()[-300:]}")
            landed += -signal.SIGKILL in codes
            failures += [f"{run.name}: {name}" for name in _not_whole(run)]
            lost = max(lost, _steps(log) - _newest(run))
        if not failures and _result(run) != expected:
            failures.append(f"{run.name}: ended elsewhere")
        if failures:
            break
    if lost > 1:
        failures.append(f"{lost} steps were lost, and one may be")
    notes = f"{runs} runs of {RANKS} ranks, {lost} step lost at most"
    return Outcome(landed, landed, tuple(failures), notes)


def _not_whole(run: Path) -> list[str]:
    return damaged(run) if run.exists() else []


def _newest(run: Path) -> int:
    found = samfn.Checkpoints(run).paths()
    return int(found[-1].stem[5:]) if found else 0


def _steps(log: Path) -> int:
    with contextlib.suppress(FileNotFoundError, ValueError):
        return int(Path(f"{log}.steps").read_text())
    return 0


def save_and_die(
    directory: str, victim: int, background: bool, kill: Callable[[], None]
) -> None:
    """Save steps 1 to 3, and be killed while 4 is saved, if this is the victim."""
    checkpoints = samfn.Checkpoints(directory, background=background)
    for step in (1, 2, 3):
        checkpoints.save(state(step), score=-step)  # The first is the best, and stays.
    checkpoints.wait()
    if distributed.rank() == victim:
        kill()
    checkpoints.save(state(4), score=-4.0)
    checkpoints.wait()


def in_a_save(trials: int, root: Path) -> Outcome:
    """F43: kill one rank, or all, before each call of the system, and after some bytes.

    As the ranks wait for the save, and as it goes on in the background.
    """
    chance, failures = random.Random(0), list[str]()
    points: list[tuple[int, bool, Any]] = []
    for victim, background in product(range(RANKS), (False, True)):
        name, at = f"{victim}-{background}", (victim, background)
        count = root / f"count{name}"
        count.write_text("")
        never = AtEvent(0, str(count))
        _, step, problems = _killed(root / f"twin{name}", *at, never)
        assert (step, problems) == (4, []), problems
        events = len(count.read_text().splitlines())
        points += [(*at, AtEvent(i + 1, str(count))) for i in range(events)]
        points += [(*at, AtByte(chance.randrange(1, 2**19))) for _ in range(events // 4)]
    chance.shuffle(points)
    landed = newer = 0
    for trial in range(trials):
        *who, kill = point = points[trial % len(points)]
        directory = root / f"trial{trial}"
        code, step, problems = _killed(directory, *point, alone=bool(trial % 2))
        landed += code in KILLED
        newer += step == 4
        failures += [f"{who}, {vars(kill)}: {problem}" for problem in problems]
        shutil.rmtree(directory)
    notes = f"{len(points)} points; the new state was there after {newer}, else the old"
    return Outcome(trials, landed, tuple(failures), notes)


def _killed(
    directory: Path, victim: int, background: bool, kill: Any, alone: bool = True
) -> tuple[int, int, list[str]]:
    """Kill a rank in a save, and the others with it or not; return what came of it."""
    log = directory.with_suffix(".log")
    target = partial(save_and_die, str(directory), victim, background, kill)
    ranks = start_ranks(log, target)
    ranks[victim].join(LIMIT)
    died = ranks[victim].exitcode in KILLED
    if died and not alone:
        for process in ranks:
            process.kill()
    codes = _finished(ranks)
    step, problems = _look(directory)
    if set(codes) - {0, LOST, *KILLED}:
        problems.append(f"exit codes {codes}: {log.read_text()[-500:]}")
    return codes[victim], step, problems


def _look(directory: Path) -> tuple[int, list[str]]:
    """Return the newest state's step, and what is wrong, also after one save more."""
    problems, like = damaged(directory), state(0, cut=False)
    checkpoints = samfn.Checkpoints(directory)
    found = checkpoints.latest(like)
    step = int(found.state.step) if found else 0
    if found is None or step not in (3, 4):
        problems.append(f"step {step} is the newest")
    elif any(
        not torch.equal(found.state.params[name], leaf)
        for name, leaf in state(step, cut=False).params.items()
    ):
        problems.append(f"step {step} holds something else")
    if not (directory / "step_000000001.sharded").exists():
        problems.append("the best is gone")
    checkpoints.save(state(5, cut=False))
    if left := [path.name for path in directory.glob(".samfn-*")]:
        problems.append(f"left behind: {left}")
    return step, problems


def save_within(directory: str, victim: int, limit: int) -> None:
    """Save a second checkpoint where the files of one rank may have `limit` bytes."""
    checkpoints = samfn.Checkpoints(directory)
    checkpoints.save(state(1))
    if distributed.rank() == victim:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        checkpoints.save(state(2))
    except samfn.CheckpointWriteError as error:
        told = f"{directory}/step_000000002.sharded" in str(error) and "bytes" in str(error)
        sys.exit(REFUSED if told else 1)
    sys.exit(WROTE)


def full_at(trials: int, root: Path) -> Outcome:
    """F44: the kernel refuses a rank's bytes from a random one on."""
    chance, failures, landed = random.Random(0), list[str](), 0
    save = partial(save_within, str(root / "twin"), 0, 2**21)
    assert _finished(start_ranks(root / "log", save)) == [WROTE] * RANKS
    for trial in range(trials):
        directory, limit = root / f"trial{trial}", chance.randrange(0, 2**19)
        save = partial(save_within, str(directory), trial % RANKS, limit)
        codes = _finished(start_ranks(root / "log", save))
        landed += REFUSED in codes
        if codes != [REFUSED] * RANKS:
            failures.append(f"rank {trial % RANKS} at {limit} bytes: exit codes {codes}")
        names = [path.name for path in directory.iterdir()]
        if names != ["step_000000001.sharded"] or damaged(directory):
            failures.append(f"rank {trial % RANKS} at {limit} bytes: {names}")
        shutil.rmtree(directory)
    return Outcome(trials, landed, tuple(failures), f"{RANKS} ranks")


def save_one(directory: str) -> None:
    """Save a checkpoint."""
    samfn.save(Path(directory, "whole.sharded"), state(1), note="x")


def read_mutated(directory: str, trials: int) -> None:
    """Read directories of which a file is damaged; write what came of it as JSON."""
    torch.set_num_threads(1)
    chance, path = random.Random(0), Path(directory, "whole.sharded")
    like, expected = state(0, cut=False), state(1, cut=False)
    all_files = [*sorted(path.glob("rank_*")), path / parts.INDEX]
    found: dict[str, Any] = {"refused": 0, "identical": 0, "slowest": 0.0, "wrong": []}
    for _ in range(trials):
        file = chance.choice(all_files)
        content = file.read_bytes()
        kind, changed = mutate(content, chance)
        file.write_bytes(changed)
        started = time.perf_counter()
        try:
            again, _ = samfn.restore(path, like=like)
        except samfn.CheckpointCorruptError as error:
            found["refused"] += 1
            if str(file) not in str(error):
                found["wrong"].append(f"{kind}: {file.name} is not named: {error}"[:200])
        except BaseException as error:
            found["wrong"].append(f"{kind} in {file.name}: {error!r}"[:200])
        else:
            pairs = ((leaf, again.params[name]) for name, leaf in expected.params.items())
            if again.step == 1 and all(torch.equal(*pair) for pair in pairs):
                found["identical"] += 1
            else:
                found["wrong"].append(f"{kind} in {file.name}: was taken for whole")
        found["slowest"] = max(found["slowest"], time.perf_counter() - started)
        file.write_bytes(content)
    Path(directory, "found.json").write_text(json.dumps(found))


def rotten(trials: int, root: Path) -> Outcome:
    """F45: directories with any file damaged are refused, or hold what they held."""
    ranks = start_ranks(root / "log", partial(save_one, str(root)), 4)
    assert _finished(ranks) == [0] * 4, (root / "log").read_text()
    code = finish(start(read_mutated, str(root), trials), 3000)
    if code != 0:
        return Outcome(trials, 0, (f"the reader ended with {code}",))
    found = json.loads((root / "found.json").read_text())
    notes = (
        f"{found['refused']} refused, {found['identical']} proved identical; slowest"
        f" {1000 * found['slowest']:.0f} ms"
    )
    landed = found["refused"] + found["identical"]
    return Outcome(trials, landed, tuple(found["wrong"]), notes)


def signal_at(victim: int, number: int, wanted: int, step: int) -> None:
    """Send a signal to this process, if it is the victim and at a step."""
    if (distributed.rank(), step) == (victim, wanted):
        os.kill(os.getpid(), number)


def break_parts(directory: str, victim: int) -> None:
    """Save a state of which one rank's parts are not finite; all have to refuse it."""
    checkpoints = samfn.Checkpoints(directory)
    broken = state(99)
    if distributed.rank() == victim:
        part: Any = broken.params["t3"]
        part.to_local().fill_(float("inf"))
    try:
        checkpoints.save(broken)
    except samfn.NonFiniteError as error:
        sys.exit(REFUSED if "t3" in str(error) else 1)


SIGNALS = (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM)


def of_ranks(trials: int, root: Path) -> Outcome:
    """F46: one rank is killed, stopped, signalled or not finite; all end, and go on."""
    expected, chance, failures, landed = _reference(root), random.Random(0), [], 0
    for trial in range(trials):
        run, log = root / f"run{trial}", root / f"run{trial}.log"
        victim, step = trial // 4 % RANKS, chance.randrange(2, STEPS)
        if trial % 4 == len(SIGNALS):
            codes = _finished(start_ranks(log, partial(break_parts, str(run), victim)))
            landed += REFUSED in codes
            if codes != [REFUSED] * RANKS or _newest(run):
                failures.append(f"not finite on rank {victim}: exit codes {codes}")
            continue
        number = SIGNALS[trial % 4]
        strike = partial(signal_at, victim, number, step)
        ranks = start_ranks(log, partial(train, str(run), str(log), strike))
        other, own = finish(ranks[1 - victim], LIMIT), ranks[victim]
        if number == signal.SIGSTOP:
            landed += own.is_alive()
            own.kill()
        codes = [other, finish(own, LIMIT)]
        landed += number == signal.SIGKILL and codes[1] == -number
        landed += number == signal.SIGTERM and codes == [0, 0]
        wanted = {signal.SIGTERM: [step]}.get(number, [step - 1, step])
        if other not in (0, LOST) or damaged(run) or _newest(run) not in wanted:
            failures.append(f"{number.name} at {step}: {codes}, {_newest(run)}")
        again = _finished(start_ranks(log, partial(train, str(run), str(log))))
        if any(again) or _result(run) != expected:
            failures.append(f"{number.name} at {step}: it does not go on: {again}")
    notes = f"{RANKS} ranks, which wait {PATIENCE:.0f} s for another"
    return Outcome(trials, landed, tuple(failures), notes)
