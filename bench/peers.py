"""The other ways to take a SAM step, to compare with; none of them knows samfn."""

import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.networks import Network

LR, MOMENTUM, WEIGHT_DECAY, RHO = 0.01, 0.9, 5e-4, 0.05
SETTINGS: dict[str, Any] = {"lr": LR, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}


class Peer:
    """A model trained with the optimizer that `step` calls, as most loops are written."""

    def __init__(
        self, network: Network, dtype: torch.dtype | None, *, compiled: bool, tuned: bool
    ) -> None:
        self.model = copy.deepcopy(network.model)
        self.inputs, self.targets, self.dtype = network.inputs, network.targets, dtype
        if not tuned:
            self.model = self.model.to(memory_format=torch.contiguous_format)
            self.inputs = self.inputs.contiguous()
        self._forward = torch.compile(self.model) if compiled else self.model
        self.sgd = torch.optim.SGD(self.model.parameters(), **SETTINGS, foreach=tuned)

    def backward(self) -> None:
        """Compute the loss and its gradients."""
        device = self.inputs.device.type
        with torch.autocast(device, dtype=self.dtype, enabled=self.dtype is not None):
            loss = F.cross_entropy(self._forward(self.inputs), self.targets)
        torch.autograd.backward(loss)

    def step(self) -> None:
        """Take a step of plain SGD."""
        self.backward()
        self.sgd.step()
        self.sgd.zero_grad()

    def weights(self) -> dict[str, Tensor]:
        """Return the parameters."""
        return {name: p.detach() for name, p in self.model.named_parameters()}


class Overwriting(Peer):
    """SAM by overwriting the weights and restoring them, with foreach operations."""

    @torch.no_grad()
    def ascend(self) -> None:
        """Move to the worst point nearby."""
        self.moved: list[Tensor] = [*self.model.parameters()]
        grads = [p.grad for p in self.moved if p.grad is not None]
        self.kept = [p.detach().clone() for p in self.moved]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        steps = torch._foreach_mul(grads, RHO / (norm + 1e-12))
        torch._foreach_add_(self.moved, list(steps))

    @torch.no_grad()
    def restore(self) -> None:
        """Move back."""
        torch._foreach_copy_(self.moved, self.kept)

    def step(self) -> None:
        """Take a step of SAM."""
        self.backward()
        self.ascend()
        self.sgd.zero_grad()
        hold_statistics(self.model)
        self.backward()
        release_statistics(self.model)
        self.restore()
        self.sgd.step()
        self.sgd.zero_grad()


class OverwritingByTensor(Overwriting):
    """The same with a loop over the tensors, as in davda54/sam."""

    @torch.no_grad()
    def ascend(self) -> None:
        """Move to the worst point nearby."""
        self.moved: list[Tensor] = [*self.model.parameters()]
        grads = [p.grad for p in self.moved if p.grad is not None]
        self.kept = [p.detach().clone() for p in self.moved]
        norm = torch.stack([g.norm(p=2) for g in grads]).norm(p=2)
        for weight, grad in zip(self.moved, grads, strict=True):
            weight.add_(grad * (RHO / (norm + 1e-12)))

    @torch.no_grad()
    def restore(self) -> None:
        """Move back."""
        for weight, old in zip(self.moved, self.kept, strict=True):
            weight.copy_(old)


class PytorchOptimizer(Peer):
    """SAM of the package pytorch_optimizer, as its documentation shows it."""

    def __init__(self, network: Network, dtype: torch.dtype | None, **kind: bool) -> None:
        from pytorch_optimizer import SAM

        super().__init__(network, dtype, **kind)
        parameters = self.model.parameters()
        self.sam: Any = SAM(parameters, torch.optim.SGD, rho=RHO, foreach=True, **SETTINGS)

    def step(self) -> None:
        """Take a step of SAM."""
        self.backward()
        self.sam.first_step(zero_grad=True)
        hold_statistics(self.model)
        self.backward()
        release_statistics(self.model)
        self.sam.second_step(zero_grad=True)


class Optax:
    """optax.contrib.sam on the MLP, jitted whole, as JAX users write it."""

    def __init__(self, network: Network, *, sam: bool) -> None:
        import jax
        import optax
        from jax import numpy as jnp

        linear = [m for m in network.model.modules() if isinstance(m, nn.Linear)]
        self._params = [
            (jnp.array(m.weight.detach().numpy()), jnp.array(m.bias.detach().numpy()))
            for m in linear
        ]
        x = jnp.array(network.inputs.numpy())
        y = jnp.array(network.targets.numpy())

        def loss(params: Any) -> Any:
            hidden = x
            for weight, bias in params[:-1]:
                hidden = jax.nn.relu(hidden @ weight.T + bias)
            weight, bias = params[-1]
            logits = hidden @ weight.T + bias
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        # v <- m v + g + d w; w <- w - lr v
        base = optax.chain(optax.add_decayed_weights(WEIGHT_DECAY), optax.sgd(LR, MOMENTUM))
        if sam:
            adversary = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
            optimizer = optax.contrib.sam(base, adversary, opaque_mode=True)
        else:
            optimizer = base
        self._state = optimizer.init(self._params)

        def update(params: Any, state: Any) -> Any:
            grads = jax.grad(loss)(params)
            extra = {"grad_fn": lambda p, _: jax.grad(loss)(p)} if sam else {}
            changes, state = optimizer.update(grads, state, params, **extra)
            return optax.apply_updates(params, changes), state

        self._update = jax.jit(update, donate_argnums=(0, 1))
        self._names = [name for name, _ in network.model.named_parameters()]

    def step(self) -> None:
        """Take a step, and wait for it."""
        self._params, self._state = self._update(self._params, self._state)
        self._params[-1][1].block_until_ready()

    def weights(self) -> dict[str, Tensor]:
        """Return the parameters, by PyTorch's names."""
        import numpy as np

        flat = [torch.from_numpy(np.array(leaf)) for pair in self._params for leaf in pair]
        return dict(zip(self._names, flat, strict=True))


def hold_statistics(model: nn.Module) -> None:
    """Make BatchNorm keep its statistics in the next pass: the momentum trick."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.backup_momentum = module.momentum  # type: ignore[assignment]
            module.momentum = 0.0


def release_statistics(model: nn.Module) -> None:
    """Undo `hold_statistics`."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = module.backup_momentum  # type: ignore[assignment]


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def peers(
    network: Network, dtype: torch.dtype | None, *, sam: bool
) -> dict[str, Callable[[], Any]]:
    """Return what makes each peer that this machine has, by name."""
    tuned, compiled = {"tuned": True}, {"tuned": True, "compiled": True}
    eager = tuned | {"compiled": False}
    if not sam:
        made: dict[str, Callable[[], Any]] = {
            "SGD eager": lambda: Peer(network, dtype, **eager),
            "SGD compiled model": lambda: Peer(network, dtype, **compiled),
        }
    else:
        made = {
            "overwriting eager": lambda: Overwriting(network, dtype, **eager),
            "overwriting untuned": lambda: OverwritingByTensor(
                network, None, tuned=False, compiled=False
            ),
            "overwriting compiled model": lambda: Overwriting(network, dtype, **compiled),
        }
        if _installed("pytorch_optimizer"):
            made |= {
                "pytorch_optimizer eager": lambda: PytorchOptimizer(
                    network, dtype, **eager
                ),
                "pytorch_optimizer compiled model": lambda: PytorchOptimizer(
                    network, dtype, **compiled
                ),
            }
    if network.name == "mlp" and dtype is None and _installed("optax"):
        name = "optax.contrib.sam jitted" if sam else "SGD optax jitted"
        made[name] = lambda: Optax(network, sam=sam)
    return made
