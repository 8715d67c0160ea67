"""SAM for existing training loops: an optimizer around another, with state in place."""

from samfn.imperative.optimizer import SAM

__all__ = ["SAM"]
