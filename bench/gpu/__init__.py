"""The suite of a GPU: `python -m bench.gpu`."""
