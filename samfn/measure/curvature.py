"""The product of the Hessian with a direction, by kernels that have a second derivative."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vjp
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from samfn import tree
from samfn.gradient import (
    GradientError,
    dense,
    explained,
    leaving,
    own_leaves,
    require_gradients_here,
    share_of,
)
from samfn.loss import Loss, LossFn, as_loss, loss_and_aux
from samfn.support import checks
from samfn.support.collectives import over_parts, summed, wholes
from samfn.tree import Batch, Params

RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
# As PyTorch says that there is no second derivative.
LACKING = re.compile(r"derivative for \S+ is not implemented")
# Other versions than 2.11 and 2.14 may call it otherwise; those raise by themselves.
KEEPING: Any = getattr(checkpoint, "_CachingTorchDispatchMode", ())
SELECTIVE = (
    "expected a loss that PyTorch can differentiate twice, got selective gradient"
    " checkpointing, which gives what it kept to the first backward pass alone: call"
    " torch.utils.checkpoint.checkpoint without context_fn, or leave it out, to measure"
    " curvature"
)


class NotTwiceDifferentiableError(RuntimeError):
    """A loss has a part whose second derivative PyTorch does not have."""


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Take kernels that have a second derivative, where PyTorch has any, within this block.

    Fused attention, the recurrent layers of oneDNN and cuDNN, and hardsigmoid have none:
    attention is computed by its matrices, recurrent layers step by step, hardsigmoid by its
    formula. That of `normalize` is NaN at a vector of zeros, as padded windows have them,
    and that of `weight_norm` is wrong by the direction (torch 2.14, on a CPU); by
    formulas they are right. The values differ by rounding. Selective gradient checkpointing
    is refused: PyTorch 2.11 computes a wrong product with it.

    A function of one's own whose backward pass is marked `once_differentiable` is not found
    out: PyTorch takes that pass for a constant.

    Raises:
        NotTwiceDifferentiableError: there is none; it names the kernel.
    """
    calls = _Replacing()
    try:
        with sdpa_kernel(SDPBackend.MATH), calls:
            yield
    except RuntimeError as error:
        if calls.met_selective:
            raise NotTwiceDifferentiableError(SELECTIVE) from error
        if (found := LACKING.search(str(error))) is None:
            raise
        raise NotTwiceDifferentiableError(
            f"expected a loss that PyTorch can differentiate twice, got: {found[0]}"
        ) from error
    if calls.met_selective:
        raise NotTwiceDifferentiableError(SELECTIVE)


def _hardsigmoid(x: Tensor, inplace: bool = False) -> Tensor:
    return F.relu6(x + 3) / 6


def _normalize(
    x: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Tensor | None = None
) -> Tensor:
    if p != 2 or out is not None or torch.finfo(x.dtype).tiny > eps**2:
        return F.normalize(x, p, dim, eps, out)
    return x * x.square().sum(dim, keepdim=True).clamp(min=eps**2).rsqrt()


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    others = [place for place in range(v.ndim) if dim != -1 and place != dim % v.ndim]
    length: Tensor = torch.linalg.vector_norm(v, dim=others or None, keepdim=dim != -1)
    return v * (g / length)


FORMULAS: dict[Any, Callable[..., Tensor]] = {
    F.hardsigmoid: _hardsigmoid,
    F.normalize: _normalize,
    torch._weight_norm: _weight_norm,
}


class _Replacing(TorchFunctionMode):
    """Calls of functions that have no second derivative go to those that have one."""

    met_selective = False
    """Whether one came from within a selective checkpoint."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # Raised here, PyTorch 2.11 would leave that mode switched on.
        modes = _get_current_dispatch_mode_stack()
        self.met_selective |= any(isinstance(mode, KEEPING) for mode in modes)
        if getattr(func, "__name__", "") in RECURRENT:
            with torch.backends.cudnn.flags(enabled=False), _without_mkldnn():
                return func(*args, **(kwargs or {}))
        return FORMULAS.get(func, func)(*args, **(kwargs or {}))


@contextmanager
def _without_mkldnn() -> Iterator[None]:
    """Leave mkldnn's kernels out; its own `flags` set TF32, too, which warns on a CPU."""
    set_flags: Any = torch.backends.mkldnn.set_flags
    before = set_flags(_enabled=False, _fp32_precision=None)[0]
    try:
        yield
    finally:
        set_flags(_enabled=before, _fp32_precision=None)


def hessian_product(
    loss_fn: LossFn, params: Params, buffers: Params, batch: Batch, direction: Params
) -> dict[str, Tensor]:
    """Return the product of the Hessian of the loss in `params` with a direction.

    H v = d (grad L . v) / dw; for a Wide ResNet it takes 3.5 times as long as a gradient

    Args:
        loss_fn: what is evaluated; must be twice differentiable.
        params: w.
        buffers: what `loss_fn` reads beside them.
        batch: what `loss_fn` takes.
        direction: v; names, shapes and dtypes of `params`.

    Raises:
        TypeError, GradientError, RuntimeError: as `evaluate`.
        ValueError: as `evaluate`; the direction's names, shapes or dtypes differ, or the
            model has hooks that may change gradients.
        NotTwiceDifferentiableError: PyTorch has no second derivative of a part.
    """
    checks.require_same_layout(params, direction, names="params and direction")

    loss_fn = as_loss(loss_fn)
    with twice_differentiable():
        if loss_fn.differentiating:
            return _product_by_autograd(loss_fn, params, buffers, batch, direction)
        full, beside, way = map(wholes, (params, buffers, direction))
        product = _product_by_func(loss_fn.function, full, beside, batch, way)
    if not tree.any_sharded(params.values()):
        return product
    share = _share(loss_fn, params, batch)
    return {name: summed(share_of(v, share), params[name]) for name, v in product.items()}


def _share(loss_fn: Loss, params: Params, batch: Batch) -> float | Tensor:
    """Return the share of the rank's batch in those of all that have parts of `params`."""
    return loss_fn.weigh(batch) / over_parts(loss_fn.weigh, params)(batch)


def _product_by_func(
    function: LossFn, params: Params, buffers: Params, batch: Batch, direction: Params
) -> dict[str, Tensor]:

    def loss(params: Params) -> Tensor:
        return loss_and_aux(function(params, buffers, batch), buffers)[0]

    product: dict[str, Tensor]
    with torch.no_grad(), explained():  # BatchNorm leaves a graph behind otherwise.
        backward = vjp(grad(loss), dict(params))[1]
        (product,) = backward({name: direction[name] for name in params})
    return product


@leaving
def _product_by_autograd(
    loss_fn: Loss,
    params: Params,
    buffers: Params,
    batch: Batch,
    direction: Params,
) -> dict[str, Tensor]:
    require_gradients_here()
    leaves = {name: w.detach().requires_grad_() for name, w in params.items()}
    inputs = list(leaves.values())
    given: Any = leaves, buffers, own_leaves(batch)
    differentiating: Any = loss_fn.differentiating
    with torch.enable_grad(), differentiating(*given, twice=True) as returned:
        loss, _ = loss_and_aux(returned, buffers)
        if tree.any_sharded(inputs):
            loss = share_of(loss, _share(loss_fn, params, batch))
        if not loss.requires_grad:
            raise GradientError(f"the loss depends on none of {checks.some([*params])}")
        slopes = torch.autograd.grad(
            loss, inputs, create_graph=True, materialize_grads=True
        )
        # Where the loss is linear, the slope is no function of the parameters.
        curved = {
            name: dense(slope)
            for name, slope in zip(leaves, slopes, strict=True)
            if slope.requires_grad
        }
        if not curved:
            return tree.zeros_like(params)
        products = torch.autograd.grad(
            list(curved.values()),
            inputs,
            [direction[name] for name in curved],
            materialize_grads=True,
        )
    return {name: dense(leaf) for name, leaf in zip(leaves, products, strict=True)}
