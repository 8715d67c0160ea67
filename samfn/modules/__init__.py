"""Between nn.Module and dicts of tensors: copied, lent other tensors, left as it was."""

from samfn.modules.lending import ImpureError
from samfn.modules.parameters import (
    load,
    no_decay_parameters,
    norm_parameters,
    reestimated,
    split,
    state_dict,
    trained,
)
from samfn.modules.supervised import supervised

__all__ = [
    "ImpureError",
    "load",
    "no_decay_parameters",
    "norm_parameters",
    "reestimated",
    "split",
    "state_dict",
    "supervised",
    "trained",
]
