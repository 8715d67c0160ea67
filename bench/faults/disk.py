"""F4, F6: the disk is full, and files rot."""

import json
import os
import random
import resource
import shutil
import struct
import sys
import time
from pathlib import Path
from typing import Any

import torch

import samfn
from bench.faults.kills import state
from bench.faults.trial import Outcome, damaged, finish, start
from samfn.storage import tensorfile

WROTE, REFUSED = 0, 17  # exit codes


def save_within(directory: str, limit: int) -> None:
    """Save a second checkpoint where files may have `limit` bytes."""
    checkpoints = samfn.Checkpoints(directory)
    checkpoints.save(state(1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        checkpoints.save(state(2))
    except samfn.CheckpointWriteError as error:
        text = str(error)
        told = directory in text and "1,048,600 bytes" in text
        sys.exit(REFUSED if told else 1)
    sys.exit(WROTE)


def full_at(trials: int, root: Path) -> Outcome:
    """F4: the kernel refuses a file's bytes from a random one on."""
    chance, failures = random.Random(0), []
    assert finish(start(save_within, str(root / "twin"), 2**21)) == WROTE
    landed = 0
    for trial in range(trials):
        directory, limit = root / f"trial{trial}", chance.randrange(0, 2**20)
        code = finish(start(save_within, str(directory), limit))
        landed += code == REFUSED
        if code != REFUSED:
            failures.append(f"at {limit} bytes: exit code {code}")
        names = [path.name for path in directory.iterdir()]
        if names != ["step_000000001.safetensors"] or damaged(directory):
            failures.append(f"at {limit} bytes: {names}")
        shutil.rmtree(directory)
    return Outcome(trials, landed, tuple(failures))


def mutate(content: bytes, chance: random.Random) -> tuple[str, bytes]:
    """Return a way to damage a file, and the file damaged so."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + length], content[8 + length :]

    def rebuilt(changed: bytes, rest: bytes = data) -> bytes:
        return struct.pack("<Q", len(changed)) + changed + rest

    def flipped(part: bytes) -> bytes:
        changed = bytearray(part)
        changed[chance.randrange(len(part))] ^= 1 << chance.randrange(8)
        return bytes(changed)

    table = json.loads(header)
    names = [name for name in table if name != "__metadata__"]
    one, other = chance.sample(names, 2)
    place = chance.randrange(len(content))
    kind = chance.choice(KINDS)
    match kind:
        case "truncated":
            return kind, content[:place]
        case "extended":
            return kind, content + chance.randbytes(chance.randrange(1, 99))
        case "length flipped":
            return kind, flipped(content[:8]) + content[8:]
        case "header flipped":
            return kind, rebuilt(flipped(header))
        case "data flipped":
            return kind, rebuilt(header, flipped(data))
        case "inserted":
            return kind, content[:place] + chance.randbytes(8) + content[place:]
        case "deleted":
            return kind, content[:place] + content[place + chance.randrange(1, 9) :]
        case "swapped":
            table[one], table[other] = table[other], table[one]
        case "renamed":
            table[f"{one}x"] = table.pop(one)
        case "twice":
            again = f"{json.dumps(one)}:{json.dumps(table[other])},".encode()
            return kind, rebuilt(b"{" + again + header[1:])
        case "overlapping":
            table["more"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
            table[other]["data_offsets"] = table[one]["data_offsets"]
        case "huge header":
            return kind, struct.pack("<Q", chance.randrange(2**24, 2**63)) + content[8:]
        case "many":
            count = tensorfile.MAX_TENSORS + chance.randrange(1, 99)
            table |= {f"n{i}": table[one] for i in range(count)}
        case "deep":
            return kind, rebuilt(b'{"a":' * 50_000 + b"1" + b"}" * 50_000)
        case "number as text":
            table["__metadata__"]["x"] = chance.randrange(99)
        case "other dtype":
            table[one]["dtype"] = "I32" if table[one]["dtype"] == "F32" else "F64"
        case "other shape":
            table[one]["shape"] = [1, *table[one]["shape"]]
        case "nan":
            (begin, _) = table[one]["data_offsets"]
            nan = struct.pack("<f", float("nan"))
            return kind, rebuilt(header, data[:begin] + nan + data[begin + 4 :])
        case "other text":
            table["__metadata__"]["step"] = "7"
        case "no digest":
            del table["__metadata__"][tensorfile.DIGEST]
    return kind, rebuilt(json.dumps(table).encode())


KINDS = (
    "truncated",
    "extended",
    "length flipped",
    "header flipped",
    "data flipped",
    "inserted",
    "deleted",
    "swapped",
    "renamed",
    "twice",
    "overlapping",
    "huge header",
    "many",
    "deep",
    "number as text",
    "other dtype",
    "other shape",
    "nan",
    "other text",
    "no digest",
)


def read_mutated(directory: str, seed: int, count: int) -> None:
    """Read so many damaged files; print what came of it as JSON."""
    torch.set_num_threads(1)
    chance, path = random.Random(seed), Path(directory, f"file{seed}")
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"t{i}": torch.randn(2**16, generator=generator) for i in range(8)}
    tensorfile.write(path, tensors, {"note": "x", "step": "3"})
    content, (_, texts) = path.read_bytes(), tensorfile.read(path)
    found: dict[str, Any] = dict.fromkeys(("refused", "identical", "slowest", "growth"), 0)
    found["wrong"] = []
    before, largest = 0, len(content)
    for number in range(count):
        kind, damaged = mutate(content, chance)
        path.write_bytes(damaged)
        largest = max(largest, len(damaged))
        started = time.perf_counter()
        try:
            again, read = tensorfile.read(path)
        except tensorfile.CorruptError:
            found["refused"] += 1
        except BaseException as error:
            found["wrong"].append(f"{kind}: {error!r}"[:200])
        else:
            same = read == texts and again.keys() == tensors.keys()
            if same and all(torch.equal(again[name], tensors[name]) for name in again):
                found["identical"] += 1
            else:
                found["wrong"].append(f"{kind}: was taken for whole")
        found["slowest"] = max(found["slowest"], time.perf_counter() - started)
        if number == count // 4:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found["growth"] = (after - before) * 1024 / largest
    path.with_suffix(".json").write_text(json.dumps(found))


def rotten(trials: int, root: Path) -> Outcome:
    """F6: files that are damaged in every way are refused, or hold what they held."""
    each = min(1000, trials)
    failures: list[str] = []
    refused = identical = 0
    slowest = growth = 0.0
    for seed in range(trials // each):
        code = finish(start(read_mutated, str(root), seed, each), 3000)
        if code != 0:
            failures.append(f"a reader ended with {code}")
            continue
        found = json.loads((root / f"file{seed}.json").read_text())
        failures += found["wrong"]
        refused, identical = refused + found["refused"], identical + found["identical"]
        slowest, growth = max(slowest, found["slowest"]), max(growth, found["growth"])
        os.unlink(root / f"file{seed}")
    if slowest > 1 or growth > 2:
        failures.append(f"{slowest:.2f} s, memory grew by {growth:.1f} times the file")
    notes = (
        f"{refused} refused, {identical} proved identical; slowest {1000 * slowest:.0f} ms,"
        f" memory grew by {growth:.1f} times the file"
    )
    return Outcome(trials, refused + identical, tuple(failures), notes)
