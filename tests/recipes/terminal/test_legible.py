"""Output in any encoding, and names of files that are text in none."""

import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from recipes import compare
from recipes.cifar_wrn import main
from recipes.settings.saved import of_run
from recipes.terminal.console import COLUMNS, Display, QuietConsole
from recipes.terminal.legible import legible, quoted, replace_what_streams_lack
from recipes.train.loggers import Loggers
from tests import ROOT
from tests.recipes.data.test_sources import make_folder
from tests.recipes.test_recipe import SMALL, equal, tensors

ENCODINGS = (
    "ascii",
    "latin-1",
    "cp1252",
    "cp437",
    "koi8-r",
    "shift_jis",
    "gb2312",
    "utf-8",
)
NAME = os.fsdecode(b"b\xff\xe9 '\xc3\xbc")
# What LANG=C is where Python may not take it for UTF-8.
REAL_C = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
SPEED = ["--compile", "no", "--batch-size", "256"]


@pytest.fixture
def streams(monkeypatch):
    """Make standard output and error those of an encoding; return what reads them."""

    def make(encoding):
        made = [io.TextIOWrapper(io.BytesIO(), encoding, "strict") for _ in range(2)]
        for name, stream in zip(("stdout", "stderr"), made, strict=True):
            monkeypatch.setattr(sys, name, stream)

        def read():
            for stream in made:
                stream.flush()
            return [stream.buffer.getvalue().decode(encoding) for stream in made]

        return read

    return make


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_run_and_its_table_are_shown_in_any_encoding(tmp_path, streams, encoding):
    read = streams(encoding)
    assert main([*SMALL, *SPEED, "--epochs", "1", "--output", str(tmp_path / NAME)]) == 0
    out, errors = read()
    assert not errors
    rows = [line for line in out.splitlines() if re.search(r"grad| 1/1 ", line)]
    sign = "‖" if encoding == "utf-8" else "|"
    assert f" {sign}grad{sign} " in rows[0]
    assert {len(row) for row in rows} == {sum(width for _, width in COLUMNS)}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_columns_stay_columns_where_signs_become_words(streams, encoding):
    read = streams(encoding)
    replace_what_streams_lack()
    rows = [["a", "1.00 ± 2.00", "λ1"], ["目录", "3", "…"]]
    Display().table(["", "ρ", "last ρ"], rows)
    lines = read()[0].splitlines()
    assert len(lines) == 3
    assert len({*map(len, lines)}) == 1
    if encoding == "ascii":
        assert lines == [
            "                       rho  last rho",
            "a             1.00 +- 2.00   lambda1",
            "\\u76ee\\u5f55             3       ...",
        ]


def test_every_text_is_shown_in_every_encoding(record_property):
    counted = []

    @given(st.text(st.characters(exclude_categories=())), st.sampled_from(ENCODINGS))
    def shown(text, encoding):
        counted.append(text)
        stream = io.TextIOWrapper(io.BytesIO(), encoding, "samfn.legible")
        stream.write(text)
        stream.flush()
        written = stream.buffer.getvalue().decode(encoding)
        assert written == legible(text, encoding)
        kept = text.encode(encoding, "ignore").decode(encoding)
        assert len(written) >= len(text)
        assert written == text if kept == text else written != text

    shown()
    record_property("trials", len(counted))


@pytest.mark.parametrize("command", ["recipes.sweep", "bench.cost"])
def test_help_is_shown_in_ascii(command):
    done = subprocess.run(
        [sys.executable, "-m", command, "--help"],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "FORCE_COLOR": "1"},
        capture_output=True,
        check=True,
    )
    assert b"--help" in done.stdout
    assert done.stdout.isascii()


def test_what_bench_prints_is_shown_in_ascii():
    done = subprocess.run(
        [sys.executable, "-c", "import bench; print('ρ ± ‖ ┃ é')"],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=True,
    )
    assert done.stdout == b"rho +- | | \\xe9\n"


def test_a_run_whose_names_are_no_text_goes_on_and_is_compared(tmp_path, streams):
    read = streams("ascii")
    data = make_folder(tmp_path / NAME, count=6)
    first, second = (tmp_path / NAME / name for name in ("a", "b"))
    flags = ["--data-dir", str(data), "--model", "wrn-10-1", "--batch-size", "4"]
    flags += ["--epochs", "1", "--compile", "no"]
    assert main([*flags, "--output", str(first), "--export"]) == 0
    weights = str(first / "model.safetensors")
    assert main([*flags, "--output", str(second), "--weights", weights]) == 0
    before = tensors(second)
    assert of_run(second).data_dir == data
    assert of_run(second).network.weights == weights
    config = (second / "config.toml").read_bytes()
    assert os.fsencode(data) in config
    assert main(["--resume", str(second), "--eval-only"]) == 0
    assert main(["--resume", str(second)]) == 0
    assert equal(tensors(second), before)
    assert (second / "config.toml").read_bytes() == config
    third = str(tmp_path / NAME / "c")
    assert main(["--config", str(second / "config.toml"), "--output", third]) == 0
    assert equal(tensors(Path(third)), before)
    report = str(tmp_path / NAME / "compared")
    assert compare.main([str(first), third, "--no-sharpness", "--output", report]) == 0
    out, errors = read()
    assert not errors
    typed = re.search(r"--eval-only --resume (.*/a')\n", out)[1]
    echoed = subprocess.run(["bash", "-c", f"printf %s {typed}"], capture_output=True)
    assert echoed.stdout == os.fsencode(first)


@pytest.mark.parametrize("name", ["a b", "é", "$'", "a'\\b", NAME, "\udcffa"])
def test_quoted_names_are_those_that_a_shell_makes_of_them(name):
    done = subprocess.run(
        ["bash", "-c", f"printf %s {quoted(name)}"], capture_output=True, check=True
    )
    assert done.stdout == os.fsencode(name)
    assert name != "a b" or quoted(name) == shlex.quote(name)


MAINS = """
import sys
from recipes import cifar_wrn, compare
run, other, report = sys.argv[1:4]
flags = ["--data-dir", sys.argv[4], "--model", "wrn-10-1", "--batch-size", "4"]
flags += ["--epochs", "1", "--compile", "no", "--config", sys.argv[5]]
codes = [
    cifar_wrn.main([*flags, "--output", run]),
    cifar_wrn.main([*flags, "--output", other, "--seed", "1"]),
    cifar_wrn.main(["--resume", run, "--epochs", "2", "--resume-override"]),
    compare.main([run, other, "--no-sharpness", "--output", report]),
]
sys.exit(str(codes) if any(codes) else 0)
"""


@pytest.mark.parametrize("name", [NAME, "ünïcödé-目录"])
def test_in_the_locale_c_all_is_as_in_others(tmp_path, name):
    data = make_folder(tmp_path / name, count=6)
    settings = tmp_path / name / "own.toml"
    settings.write_text("# ρ\nrho = 0.1\n", encoding="utf-8")
    paths = [tmp_path / name / part for part in ("a", "b", "report")]
    done = subprocess.run(
        [sys.executable, "-c", MAINS, *map(str, paths), str(data), str(settings)],
        cwd=ROOT,
        env=os.environ | REAL_C,
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"|grad|" in done.stdout
    assert done.stdout.isascii()
    assert of_run(paths[0]).data_dir == data  # in this process, of another locale
    assert main(["--resume", str(paths[0])]) == 0
    text = (paths[2] / "compare.md").read_text(encoding="utf-8")
    assert "±" in text


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_boxes_stay_boxes_where_signs_become_words(encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding, "samfn.legible")
    display = Display(QuietConsole(file=stream, force_terminal=True, width=60))
    display.facts("samfn", {"ρ": "0.05 ± 0.01", "λ": "目录 …"})
    stream.flush()
    lines = stream.buffer.getvalue().decode(encoding).splitlines()
    lines = [re.sub(r"\x1b\[\d*m", "", line) for line in lines]
    assert len(lines) == 4
    assert len({*map(cell_len, lines)}) == 1
    assert (" rho " in lines[1]) == (encoding != "utf-8")
    assert lines[1][0] == ("│" if encoding == "utf-8" else "|")


def test_loggers_that_know_utf_8_alone_are_left_out_and_named(tmp_path):
    said = []
    run = tmp_path / NAME
    run.mkdir()
    Loggers(["tensorboard", "wandb"], run, {}, [], said.append).close()
    assert [line.split()[:3] for line in said] == [
        ["--log", "tensorboard", "failed,"],
        ["--log", "wandb", "failed,"],
    ]
    assert all("needs a directory whose name is text in this locale" in x for x in said)
    assert not [*run.iterdir()]
