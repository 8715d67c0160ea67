"""What turns base optimizers into others: a clip, a factor, an end, groups."""

from collections import Counter
from collections.abc import Collection

import torch
from torch import Tensor

from samfn import tree
from samfn.descend import Optimizer, OptState, require_keys
from samfn.support import checks
from samfn.tree import Params


def clipped(optimizer: Optimizer, max_norm: float) -> Optimizer:
    """Return `optimizer` behind a clip of the final gradient by its global norm.

    g <- g min(1, max_norm / ||g||)

    The ascent gradient is normalised by SAM anyway; this bounds what descends, as the
    original SAM code does with 5.0.

    Args:
        optimizer: receives the clipped gradient.
        max_norm: largest norm of all gradients together, in units of g; positive.
    """
    checks.require_positive("max_norm", max_norm)

    def update(
        params: Params, grads: Params, opt_state: OptState, lr: float | Tensor
    ) -> tuple[dict[str, Tensor], OptState]:
        return optimizer.update(params, tree.clip(grads, max_norm), opt_state, lr)

    return optimizer._replace(update=update, clips=True)


def scaled_lr(optimizer: Optimizer, factor: float) -> Optimizer:
    """Return `optimizer` with factor * lr as its learning rate.

    Inside of `grouped` it gives some parameters a learning rate of their own. What a method
    moves past the optimizer, as `wsam` does, goes by lr itself.

    Args:
        optimizer: receives the scaled learning rate.
        factor: at least 0; 0 leaves the parameters where they are.
    """
    checks.require_dial("factor", factor)

    def update(
        params: Params, grads: Params, opt_state: OptState, lr: float | Tensor
    ) -> tuple[dict[str, Tensor], OptState]:
        return optimizer.update(params, grads, opt_state, factor * lr)

    return optimizer._replace(update=update)


def frozen_after(optimizer: Optimizer, steps: int, names: Collection[str]) -> Optimizer:
    """Return `optimizer`, which leaves some parameters alone after its first steps.

    w <- w, for the parameters that are named, once `steps` steps were taken

    Their gradient is computed all the same, and a method perturbs them. Steps that were
    skipped, since they were not finite, do not count.

    Args:
        optimizer: of all parameters.
        steps: that move the named parameters as all others.
        names: of these parameters.

    Raises:
        TypeError: `names` is a text.
        ValueError: `steps` is no positive number. When a state is made or checked: there is
            no such parameter.
    """
    checks.require_count("steps", steps)
    checks.require_no_text(names, what="frozen_after")
    names = tuple(names)  # Gone through in each step.

    def init(params: Params) -> OptState:
        checks.require_names_of(params, names, what="frozen_after")
        device = next(iter(params.values())).device
        taken = torch.zeros((), dtype=torch.int64, device=device)
        return {"taken": taken, "own": optimizer.init(params)}

    def update(
        params: Params, grads: Params, opt_state: OptState, lr: float | Tensor
    ) -> tuple[dict[str, Tensor], OptState]:
        moved, own = optimizer.update(params, grads, opt_state["own"], lr)
        moves = opt_state["taken"] < steps
        kept = {name: torch.where(moves, moved[name], params[name]) for name in names}
        return {**moved, **kept}, {"taken": opt_state["taken"] + 1, "own": own}

    def check(opt_state: OptState, params: Params) -> None:
        checks.require_names_of(params, names, what="frozen_after")
        require_keys(opt_state, {"taken", "own"})
        optimizer.check(opt_state["own"], params)

    return Optimizer(init, update, check, clips=True)


def grouped(
    optimizer: Optimizer, *exceptions: tuple[Collection[str], Optimizer]
) -> Optimizer:
    """Return an optimizer that treats some parameters as others do, and the rest as ever.

    For example, without weight decay where there is little to decay::

        names = samfn.no_decay_parameters(model)
        optimizer = samfn.grouped(
            samfn.sgd(0.9, weight_decay=5e-4), (names, samfn.sgd(0.9))
        )

    Each group sees nothing of the others: put `clipped` around it for a clip by the norm of
    all gradients together.

    Args:
        optimizer: of all parameters that no exception names.
        exceptions: (names, their optimizer); no name twice.

    Raises:
        TypeError: an exception gives a text in place of names.
        ValueError: an exception names no parameter, or a name stands twice. When a state is
            made or checked: there is no such parameter, or all are exceptions.
    """
    lists: list[Collection[str]] = [
        names if isinstance(names, str) else tuple(names) for names, _ in exceptions
    ]
    _require_apart(lists)
    named = [frozenset(names) for names in lists]
    apart = frozenset().union(*named)
    optimizers = [optimizer, *(other for _, other in exceptions)]
    groups = {f"group_{number}": one for number, one in enumerate(optimizers)}

    def split(values: Params) -> dict[str, dict[str, Tensor]]:
        rest = [name for name in values if name not in apart]
        others = [[name for name in values if name in some] for some in named]
        return {
            key: tree.only(values, names)
            for key, names in zip(groups, [rest, *others], strict=True)
        }

    def init(params: Params) -> OptState:
        _require_groups(params, apart)
        own = split(params)
        return {key: one.init(own[key]) for key, one in groups.items()}

    def update(
        params: Params, grads: Params, opt_state: OptState, lr: float | Tensor
    ) -> tuple[dict[str, Tensor], OptState]:
        own, theirs = split(params), split(grads)
        moved: dict[str, Tensor] = {}
        new_state: dict[str, OptState] = {}
        for key, one in groups.items():
            found, new_state[key] = one.update(own[key], theirs[key], opt_state[key], lr)
            moved |= found
        return tree.only(moved, params), new_state

    def check(opt_state: OptState, params: Params) -> None:
        _require_groups(params, apart)
        require_keys(opt_state, groups.keys())
        own = split(params)
        for key, one in groups.items():
            one.check(opt_state[key], own[key])

    return Optimizer(init, update, check, any(one.clips for one in optimizers))


def _require_apart(groups: list[Collection[str]]) -> None:
    for names in groups:
        checks.require_no_text(names, what="grouped")
    if not all(groups):
        raise ValueError("grouped: an exception names no parameter")
    counts = Counter(name for names in groups for name in names)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"grouped: {checks.some(twice)} named twice")


def _require_groups(params: Params, apart: Collection[str]) -> None:
    checks.require_names_of(params, apart, what="grouped")
    if len(apart) == len(params):
        raise ValueError(
            "grouped: all parameters are exceptions, none is left to the first"
        )
