"""The descent half of SAM: base optimizers as pure functions.

An optimizer is a pair of functions. The arithmetic is that of torch.optim's own
functional kernels, on copies, so nothing that is passed in changes.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from math import sqrt
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim.adagrad import adagrad as adagrad_kernel
from torch.optim.adam import adam as adam_kernel
from torch.optim.adamw import adamw as adamw_kernel
from torch.optim.nadam import nadam as nadam_kernel
from torch.optim.rmsprop import rmsprop as rmsprop_kernel
from torch.optim.sgd import sgd as sgd_kernel

from samfn import checks, tree
from samfn.orthogonal import MUON, as_matrix, newton_schulz
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


def from_torch(
    optimizer_class: type[torch.optim.Optimizer],
    kernel: Callable[..., None],
    memory: Mapping[str, Callable[[Tensor], Tensor]],
    **options: Any,
) -> Optimizer:
    """Make an optimizer of a class of torch.optim and its functional kernel.

    The kernel must take its lists by position and its options, `lr` among them, by
    keyword, as those of RAdam, Adamax and Adadelta do. For example::

        from torch.optim.radam import radam as kernel

        radam = from_torch(
            torch.optim.RAdam,
            kernel,
            {"exp_avgs": torch.zeros_like, "exp_avg_sqs": torch.zeros_like},
            weight_decay=1e-4,
        )

    Args:
        optimizer_class: checks `options` and completes them with its defaults.
        kernel: called with lists of tensors, which it changes in place.
        memory: keyword of the kernel -> initial value for a parameter. Keywords that
            `options` leaves unused are simply not named here.
        options: keywords of the class, without `lr`, which every step brings.

    Raises:
        ValueError: the class refuses the options, or they maximise, or dampen.
    """
    defaults = _checked(optimizer_class, options)
    if defaults.get("maximize"):
        raise ValueError(
            "maximize must be False: a step perturbs to where the loss is higher, so let"
            " the loss function return the negative of what is to be maximised"
        )
    if defaults.get("dampening"):
        raise ValueError(
            "dampening must be 0: torch.optim.SGD leaves it out in the first step, which a"
            " momentum that begins with 0 does not"
        )
    defaults["beta1"], defaults["beta2"] = defaults.pop("betas", (None, None))
    accepted = dict(inspect.signature(kernel).parameters)
    counts, capturable = STEPS in accepted, "capturable" in accepted
    fixed = {key: value for key, value in defaults.items() if key in accepted}
    # A kernel takes its lists by position: parameters, gradients, then memory. It wants
    # an empty list for memory that these options do not use.
    lists = [
        key
        for key, p in accepted.items()
        if p.default is p.empty and not _is_keyword_only(p)
    ]
    fixed |= {key: [] for key in lists[2:]}
    expected = {*memory} | ({STEPS} & accepted.keys())

    def init(params: Params) -> OptState:
        opt_state: dict[str, Any] = {
            key: {name: start(w) for name, w in params.items()}
            for key, start in memory.items()
        }
        if counts:
            dtype, device = tree.wide_default(), _any(params).device
            opt_state[STEPS] = torch.zeros((), dtype=dtype, device=device)
        return opt_state

    def update(
        params: Params, grads: Params, opt_state: OptState, lr: float | Tensor
    ) -> tuple[dict[str, Tensor], OptState]:
        new_params = tree.clone(params)
        new_state: dict[str, Any] = {
            key: tree.clone({name: opt_state[key][name] for name in params})
            for key in memory
        }
        options = fixed | {key: list(new_state[key].values()) for key in memory}
        options["lr"] = _scalar(lr)
        if counts:
            # The kernels count once per parameter, we keep one count for all.
            options[STEPS] = list(opt_state[STEPS].repeat(len(params)).unbind())
            new_state[STEPS] = opt_state[STEPS] + 1
        if capturable:
            options["capturable"] = _is_capturable(params)
        # A copy too: SGD's kernel writes Nesterov's step into what it is given.
        ordered = tree.clone(tree.only(grads, params))
        kernel(list(new_params.values()), list(ordered.values()), **options)
        return new_params, new_state

    def check(opt_state: OptState, params: Params) -> None:
        _require_memory(opt_state, expected, params)

    return Optimizer(init, update, check)


def _checked(
    optimizer_class: type[torch.optim.Optimizer], options: dict[str, Any]
) -> dict[str, Any]:
    """Return options as a class completes them, which raises ValueError at bad ones."""

    class Empty(optimizer_class):  # type: ignore[misc, valid-type]
        """Takes groups as they are: to check one, PyTorch imports its compiler."""

        def add_param_group(self, param_group: dict[str, Any]) -> None:
            self.param_groups.append(self.defaults | param_group)

    return dict(Empty([torch.zeros(1)], **options).defaults)


def sgd(
    momentum: float = 0.9, nesterov: bool = False, weight_decay: float = 0.0
) -> Optimizer:
    """Stochastic gradient descent with momentum, as `torch.optim.SGD`.

    v <- momentum v + g + weight_decay w;  w <- w - lr v;
    with nesterov: w <- w - lr (g + weight_decay w + momentum v)

    Args:
        momentum: share of v that stays, in [0, 1); 0 keeps no memory.
        nesterov: look ahead along v.
        weight_decay: in units of gradient per weight.
    """
    memory = {"momentum_buffer_list": torch.zeros_like} if momentum else {}
    return from_torch(
        torch.optim.SGD,
        sgd_kernel,
        memory,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
        foreach=True,
    )


def adam(
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
) -> Optimizer:
    """Adam with L2 regularisation, as `torch.optim.Adam` (arXiv:1412.6980)."""
    return from_torch(
        torch.optim.Adam,
        adam_kernel,
        _adam_memory(amsgrad),
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        amsgrad=amsgrad,
        foreach=True,
    )


def adamw(
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    amsgrad: bool = False,
) -> Optimizer:
    """Adam with decoupled weight decay, as `torch.optim.AdamW` (arXiv:1711.05101)."""
    return from_torch(
        torch.optim.AdamW,
        adamw_kernel,
        _adam_memory(amsgrad),
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        amsgrad=amsgrad,
        foreach=True,
    )


def nadam(
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum_decay: float = 4e-3,
) -> Optimizer:
    """Adam with Nesterov momentum, as `torch.optim.NAdam` (Dozat, 2016)."""
    # Its foreach form rounds differently, so PyTorch's own choice of form stands here.
    return from_torch(
        torch.optim.NAdam,
        nadam_kernel,
        _adam_memory() | {"mu_products": _one_for},
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        momentum_decay=momentum_decay,
    )


def rmsprop(
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
) -> Optimizer:
    """RMSprop, as `torch.optim.RMSprop` (Hinton, 2012, lecture 6e)."""
    memory = {"square_avgs": torch.zeros_like}
    memory |= {"grad_avgs": torch.zeros_like} if centered else {}
    memory |= {"momentum_buffer_list": torch.zeros_like} if momentum else {}
    return from_torch(
        torch.optim.RMSprop,
        rmsprop_kernel,
        memory,
        alpha=alpha,
        eps=eps,
        weight_decay=weight_decay,
        momentum=momentum,
        centered=centered,
        foreach=True,
    )


def adagrad(
    lr_decay: float = 0.0,
    weight_decay: float = 0.0,
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-10,
) -> Optimizer:
    """Adagrad, as `torch.optim.Adagrad` (Duchi et al., 2011, JMLR 12)."""
    return from_torch(
        torch.optim.Adagrad,
        adagrad_kernel,
        {"state_sums": lambda w: torch.full_like(w, initial_accumulator_value)},
        lr_decay=lr_decay,
        weight_decay=weight_decay,
        initial_accumulator_value=initial_accumulator_value,
        eps=eps,
        foreach=True,
    )


Adjusts = Literal["original", "match_rms_adamw", "spectral_unclamped"]

ADJUSTS: dict[Adjusts, Callable[[int, int], float]] = {
    "original": lambda rows, columns: sqrt(max(1, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * sqrt(max(rows, columns)),
    "spectral_unclamped": lambda rows, columns: sqrt(rows / columns),
}


def muon(
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.1,
    adjust_lr_fn: Adjusts = "original",
    *,
    dtype: torch.dtype | None = None,
) -> Optimizer:
    """Orthogonalised momentum for matrices and filters, as `torch.optim.Muon`.

    v <- momentum v + (1 - momentum) g;
    w <- (1 - lr weight_decay) w - lr f NewtonSchulz(v), or with nesterov
    NewtonSchulz(momentum v + (1 - momentum) g)

    The filters of a convolution, (out, in, height, width), are one matrix of (out, in *
    height * width), which torch.optim.Muon refuses. Vectors, embeddings and the layer of
    the outputs belong to another optimizer::

        others = [name for name, w in params.items() if w.ndim < 2] + ["head.weight"]
        rest = samfn.scaled_lr(samfn.adamw(), 0.1)
        optimizer = samfn.grouped(samfn.muon(), (others, rest))

    A matrix of which each rank has a part is gathered, and orthogonalised on every rank.

    Args:
        momentum: share of v that stays, in [0, 1).
        nesterov: look ahead along v.
        weight_decay: decoupled, in units of 1 / lr.
        adjust_lr_fn: f of a matrix of m rows and n columns: "original" sqrt(max(1, m / n)),
            "match_rms_adamw" 0.2 sqrt(max(m, n)), with which lr and weight decay are those
            of AdamW, "spectral_unclamped" sqrt(m / n).
        dtype: of the products. None is bfloat16, as in torch.optim.Muon, but on a CPU the
            dtype of the gradient: most have no instructions for bfloat16, and would take 10
            to 30 times as long.

    Raises:
        ValueError: a number or `adjust_lr_fn` is not as described. When a state is made:
            a parameter is no matrix.

    Source:
        Jordan, 2024, kellerjordan.github.io/posts/muon; `torch.optim.Muon`.
    """
    checks.require_below_one("momentum", momentum)
    checks.require_dial("weight_decay", weight_decay)
    if adjust_lr_fn not in ADJUSTS:
        raise ValueError(f"adjust_lr_fn must be one of {[*ADJUSTS]}, got {adjust_lr_fn!r}")

    def orthogonal(matrix: Tensor) -> Tensor:
        own = matrix.dtype if matrix.device.type == "cpu" else torch.bfloat16
        return newton_schulz(matrix, [MUON] * 5, dtype or own)

    def init(params: Params) -> OptState:
        _require_matrices(params)
        return {"momentum": tree.zeros_like(params)}

    def update(
        params: Params, grads: Params, opt_state: OptState, lr: float | Tensor
    ) -> tuple[dict[str, Tensor], OptState]:
        new = {n: v.lerp(grads[n], 1 - momentum) for n, v in opt_state["momentum"].items()}
        way = {}
        for name, w in params.items():
            ahead = grads[name].lerp(new[name], momentum) if nesterov else new[name]
            if not w.numel():  # As of experts that there are none of.
                way[name] = ahead
                continue
            factor = ADJUSTS[adjust_lr_fn](len(w), w[0].numel())
            way[name] = factor * as_matrix(orthogonal, ahead)
        decayed = tree.scale(params, 1 - lr * weight_decay)
        return tree.add_scaled(decayed, -lr, way), {"momentum": new}

    def check(opt_state: OptState, params: Params) -> None:
        _require_memory(opt_state, {"momentum"}, params)

    return Optimizer(init, update, check)


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
        taken = torch.zeros((), dtype=torch.int64, device=_any(params).device)
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
        _require_keys(opt_state, {"taken", "own"})
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
        _require_keys(opt_state, groups.keys())
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


def _require_matrices(params: Params) -> None:
    if others := [name for name, w in params.items() if w.ndim < 2]:
        raise ValueError(
            "muon moves matrices and filters, of two dimensions and more, got"
            f" {checks.some(others)}: give them to another optimizer, as"
            " samfn.grouped(samfn.muon(), (names, samfn.adamw()))"
        )


def _adam_memory(amsgrad: bool = False) -> dict[str, Callable[[Tensor], Tensor]]:
    keys = ["exp_avgs", "exp_avg_sqs"] + ["max_exp_avg_sqs"] * amsgrad
    return dict.fromkeys(keys, torch.zeros_like)


def _one_for(weight: Tensor) -> Tensor:
    return torch.ones((), dtype=tree.wide_default(), device=weight.device)


def _any(params: Params) -> Tensor:
    return next(iter(params.values()))


def _is_keyword_only(parameter: inspect.Parameter) -> bool:
    return parameter.kind is inspect.Parameter.KEYWORD_ONLY


def _scalar(lr: float | Tensor) -> float | Tensor:
    # Outside of a graph the kernels' foreach forms take no CPU tensor for lr, and reading
    # it is free. They read one on a GPU themselves, and wait: there, give a number.
    if (
        isinstance(lr, Tensor)
        and lr.device.type == "cpu"
        and not torch.compiler.is_compiling()
    ):
        return lr.item()
    return lr


def _is_capturable(params: Params) -> bool:
    # Keeps step counters on the device, where torch.optim supports that.
    return torch.compiler.is_compiling() or _any(params).device.type in ("cuda", "xpu")


def _require_memory(opt_state: OptState, expected: set[str], params: Params) -> None:
    _require_keys(opt_state, expected)
    for key in expected - {STEPS}:
        if opt_state[key].keys() != params.keys():
            raise ValueError(
                f"opt_state was made for other parameters: {key} holds"
                f" {len(opt_state[key])} names, params {len(params)}, and"
                f" {len(opt_state[key].keys() ^ params.keys())} differ"
            )


def _require_keys(opt_state: OptState, expected: Collection[str]) -> None:
    if opt_state.keys() != expected:
        raise ValueError(
            f"opt_state was made by another optimizer: expected {sorted(expected)},"
            f" got {sorted(opt_state)}"
        )
