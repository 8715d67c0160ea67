"""Those of torch.optim, by its own functional kernels, on copies."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adagrad import adagrad as adagrad_kernel
from torch.optim.adam import adam as adam_kernel
from torch.optim.adamw import adamw as adamw_kernel
from torch.optim.nadam import nadam as nadam_kernel
from torch.optim.rmsprop import rmsprop as rmsprop_kernel
from torch.optim.sgd import sgd as sgd_kernel

from samfn import tree
from samfn.descend import STEPS, Optimizer, OptState, require_memory
from samfn.tree import Params


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
        require_memory(opt_state, expected, params)

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
