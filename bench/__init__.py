"""Benchmarks; each module says how to run it, `results/` holds dated reports."""

from recipes.terminal.legible import replace_what_streams_lack

replace_what_streams_lack()  # Each module is a command, and imports this first.
