"""The descent half of SAM: what a base optimizer is, and its step.

An optimizer is a pair of functions; see `samfn.optimizers` for those that there are.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from samfn.support import checks
from samfn.tree import Params

OptState = Mapping[str, Any]  # tensors, and mappings of names to tensors

STEPS = "state_steps"  # what torch.optim's kernels call their step counters


class Optimizer(NamedTuple):
    """A base optimizer: what it remembers, and how it moves the parameters.

    Write the two functions to bring any optimizer along; `from_torch` writes them for
    those of torch.optim.
    """

    init: Callable[[Params], OptState]
    """params -> opt_state."""
    update: Callable[
        [Params, Params, OptState, float | Tensor], tuple[dict[str, Tensor], OptState]
    ]
    """(params, grads, opt_state, lr) -> (params, opt_state), changing none of them."""
    check: Callable[[OptState, Params], None] = lambda opt_state, params: None
    """(opt_state, params) -> None; raises ValueError where they do not go together."""
    clips: bool = False
    """Whether it bounds its gradients, or leaves some parameters where they are: what goes
    past it would escape that."""


def descend(
    params: Params,
    grads: Params,
    opt_state: OptState,
    *,
    optimizer: Optimizer,
    lr: float | Tensor,
) -> tuple[dict[str, Tensor], OptState]:
    """Take one step of the base optimizer.

    For `sgd()`: v <- momentum v + g + weight_decay w;  w <- w - lr v

    Args:
        params: w.
        grads: g, names and shapes of `params`.
        opt_state: from `optimizer.init(params)` or from the step before.
        optimizer: as `samfn.sgd()`.
        lr: learning rate, at least 0. A number, or a 0-d tensor, whose value may change
            from call to call without recompiling.

    Returns:
        New parameters and new optimizer state; the arguments are unchanged.

    Raises:
        ValueError: names or shapes differ, `lr` is a negative number, or `opt_state`
            was made by another optimizer or for other parameters.
    """
    checks.require_gradients(params, grads)
    lr = checks.require_dial("lr", lr)
    optimizer.check(opt_state, params)
    return optimizer.update(params, grads, opt_state, lr)


def require_memory(opt_state: OptState, expected: set[str], params: Params) -> None:
    """Raise unless a state holds these, and each of them for all parameters."""
    require_keys(opt_state, expected)
    for key in expected - {STEPS}:
        if opt_state[key].keys() != params.keys():
            raise ValueError(
                f"opt_state was made for other parameters: {key} holds"
                f" {len(opt_state[key])} names, params {len(params)}, and"
                f" {len(opt_state[key].keys() ^ params.keys())} differ"
            )


def require_keys(opt_state: OptState, expected: Collection[str]) -> None:
    """Raise unless a state holds these."""
    if opt_state.keys() != expected:
        raise ValueError(
            f"opt_state was made by another optimizer: expected {sorted(expected)},"
            f" got {sorted(opt_state)}"
        )
