"""Faults that are made to happen, and what samfn does then; see `bench.faults.__main__`."""
