"""Training from the first epoch to the last: the loop, callbacks, averages of weights."""

from samfn.training import callbacks, loop, sampling
from samfn.training.averaging import mean_of, moving_average

__all__ = ["callbacks", "loop", "mean_of", "moving_average", "sampling"]
