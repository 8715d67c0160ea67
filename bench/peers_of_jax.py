"""The networks once more as plain functions of JAX, and optax.contrib.sam, jitted whole."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
import torch
from jax import lax
from jax import numpy as jnp
from torch import Tensor, nn

from bench.networks import LR, MOMENTUM, RHO, WEIGHT_DECAY, Network, Transformer
from recipes.models.wide_resnet import Block, WideResNet

Arrays = Mapping[str, Any]
# Parameters, statistics and inputs -> scores, one row a target, and new statistics.
Forward = Callable[[Arrays, Arrays, Any], tuple[Any, Arrays]]


class Optax:
    """A network that optax trains, by the names of PyTorch's parameters.

    Args:
        network: what is trained, of those that `forward_of` knows, in float32.
        sam: by `optax.contrib.sam`; otherwise by the gradient alone.
        steps: that a call takes, by `lax.scan` over as many batches.
    """

    def __init__(self, network: Network, *, sam: bool, steps: int = 1) -> None:
        self.steps = steps
        self._module = network.model
        self._params = {
            name: jnp.array(self._turned(name, w.detach()).numpy())
            for name, w in network.model.named_parameters()
        }
        self._stats = {
            name: jnp.array(buffer.numpy())
            for name, buffer in network.model.named_buffers()
            if buffer.is_floating_point()
        }
        images = network.inputs.ndim == 4
        inputs = network.inputs.permute(0, 2, 3, 1) if images else network.inputs
        self._batches = tuple(
            jnp.array(np.stack([part.numpy()] * steps))
            for part in (inputs, network.targets)
        )
        forward = forward_of(network.model)

        def loss(params: Arrays, stats: Arrays, batch: Any) -> Any:
            inputs, targets = batch
            logits, stats = forward(params, stats, inputs)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
            return losses.mean(), stats

        # v <- m v + g + d w; w <- w - lr v
        base = optax.chain(optax.add_decayed_weights(WEIGHT_DECAY), optax.sgd(LR, MOMENTUM))
        adversary = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
        optimizer: Any = base
        if sam:
            optimizer = optax.contrib.sam(base, adversary, opaque_mode=True)
        self._state = optimizer.init(self._params)

        def update(carried: Any, batch: Any) -> Any:
            params, stats, state = carried
            grads, new = jax.grad(loss, has_aux=True)(params, stats, batch)

            def again(params: Any, _: Any) -> Any:
                return jax.grad(loss, has_aux=True)(params, stats, batch)[0]

            extra = {"grad_fn": again} if sam else {}
            changes, state = optimizer.update(grads, state, params, **extra)
            return (optax.apply_updates(params, changes), new, state), None

        def several(carried: Any, batches: Any) -> Any:
            if steps == 1:
                return update(carried, jax.tree.map(lambda x: x[0], batches))[0]
            return lax.scan(update, carried, batches)[0]

        self._update = jax.jit(several, donate_argnums=0)

    def step(self) -> None:
        """Take the steps of a call, and wait for them."""
        carried = self._params, self._stats, self._state
        self._params, self._stats, self._state = self._update(carried, self._batches)
        jax.block_until_ready(self._params)  # type: ignore[no-untyped-call]

    def weights(self) -> dict[str, Tensor]:
        """Return the parameters, by PyTorch's names and in its shapes."""
        return {
            name: self._turned(name, torch.from_numpy(np.array(w)), back=True)
            for name, w in self._params.items()
        }

    @staticmethod
    def _turned(name: str, weight: Tensor, *, back: bool = False) -> Tensor:
        """Return filters with their channels last, as XLA reads them, or `back`."""
        if weight.ndim != 4:
            return weight
        return weight.permute(3, 2, 0, 1) if back else weight.permute(2, 3, 1, 0)


def forward_of(model: nn.Module) -> Forward:
    """Return what a network computes in training, as a function of JAX."""
    if isinstance(model, WideResNet):
        return _wide_resnet(model)
    return _transformer(model) if isinstance(model, Transformer) else _mlp(model)


def _mlp(model: nn.Module) -> Forward:
    *hidden, last = (n for n, m in model.named_modules() if isinstance(m, nn.Linear))

    def forward(params: Arrays, stats: Arrays, x: Any) -> tuple[Any, Arrays]:
        for name in hidden:
            x = jax.nn.relu(_linear(params, name, x))
        return _linear(params, last, x), stats

    return forward


def _transformer(model: Transformer) -> Forward:
    layers: Any = model.layers.layers

    def forward(params: Arrays, stats: Arrays, tokens: Any) -> tuple[Any, Arrays]:
        x = params["tokens.weight"][tokens] + params["positions"]
        for number, layer in enumerate(layers):
            at = f"layers.layers.{number}"
            hidden = _layer_norm(params, f"{at}.norm1", x)
            joint = hidden @ params[f"{at}.self_attn.in_proj_weight"].T
            joint = joint + params[f"{at}.self_attn.in_proj_bias"]
            queries, keys, values = (
                part.reshape(*part.shape[:2], layer.self_attn.num_heads, -1)
                for part in jnp.split(joint, 3, axis=-1)
            )
            mixed = jax.nn.dot_product_attention(queries, keys, values).reshape(x.shape)
            x = x + _linear(params, f"{at}.self_attn.out_proj", mixed)
            hidden = _linear(params, f"{at}.linear1", _layer_norm(params, f"{at}.norm2", x))
            hidden = jax.nn.gelu(hidden, approximate=False)
            x = x + _linear(params, f"{at}.linear2", hidden)
        logits = _linear(params, "head", x)
        return logits.reshape(-1, logits.shape[-1]), stats

    return forward


def _wide_resnet(model: WideResNet) -> Forward:
    blocks = [(n, m) for n, m in model.named_modules() if isinstance(m, Block)]

    def forward(params: Arrays, stats: Arrays, x: Any) -> tuple[Any, Arrays]:
        new = dict(stats)

        def active(name: str, x: Any) -> Any:
            return jax.nn.relu(_batch_norm(params, new, name, x))

        x = _convolution(params, "stem", x)
        for name, block in blocks:
            stride = block.conv1.stride[0]
            hidden = active(f"{name}.norm1", x)
            if block.shortcut is not None:
                x = _convolution(params, f"{name}.shortcut", hidden, stride)
            hidden = _convolution(params, f"{name}.conv1", hidden, stride)
            hidden = active(f"{name}.norm2", hidden)
            x = x + _convolution(params, f"{name}.conv2", hidden)
        return _linear(params, "head", active("norm", x).mean((1, 2))), new

    return forward


def _linear(params: Arrays, name: str, x: Any) -> Any:
    return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]


def _layer_norm(params: Arrays, name: str, x: Any) -> Any:
    x = jax.nn.standardize(x, axis=-1, epsilon=1e-5)
    return x * params[f"{name}.weight"] + params[f"{name}.bias"]


def _convolution(params: Arrays, name: str, x: Any, stride: int = 1) -> Any:
    filters = params[f"{name}.weight"]
    around = [(side // 2, side // 2) for side in filters.shape[:2]]
    kinds = "NHWC", "HWIO", "NHWC"
    return lax.conv_general_dilated(
        x, filters, (stride, stride), around, (1, 1), (1, 1), kinds
    )


def _batch_norm(params: Arrays, stats: dict[str, Any], name: str, x: Any) -> Any:
    """Return normalised channels; `stats` get the running mean and variance of PyTorch."""
    count = x.size // x.shape[-1]
    seen = x.mean((0, 1, 2)), x.var((0, 1, 2)) * (count / (count - 1))
    for kind, value in zip(("running_mean", "running_var"), seen, strict=True):
        stats[f"{name}.{kind}"] = 0.9 * stats[f"{name}.{kind}"] + 0.1 * value
    x = jax.nn.standardize(x, axis=(0, 1, 2), epsilon=1e-5)
    return x * params[f"{name}.weight"] + params[f"{name}.bias"]
