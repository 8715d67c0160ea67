"""Benchmarks; each module says how to run it, `results/` holds dated reports."""
