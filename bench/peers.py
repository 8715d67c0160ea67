"""The other ways to take a SAM step, to compare with; none of them knows samfn."""

import copy
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.networks import LR, MOMENTUM, RHO, WEIGHT_DECAY, Network

# Networks of which a call takes several steps, too, and how many.
SEVERAL = {"mlp": (4, 8)}
SETTINGS: dict[str, Any] = {"lr": LR, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}


class Peer:
    """A model trained with the optimizer that `step` calls, as most loops are written."""

    steps = 1  # that a call takes

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

    @torch.no_grad()
    def descend(self) -> None:
        """Move back, and on."""
        self.restore()
        self.sgd.step()

    def step(self) -> None:
        """Take a step of SAM."""
        self.backward()
        self.ascend()
        self.sgd.zero_grad()
        hold_statistics(self.model)
        self.backward()
        release_statistics(self.model)
        self.descend()
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


class OverwritingInGraphs(Overwriting):
    """The same, of a compiled model, with what comes after each gradient compiled too."""

    def __init__(self, network: Network, dtype: torch.dtype | None) -> None:
        super().__init__(network, dtype, compiled=True, tuned=True)
        self.ascend = torch.compile(super().ascend)  # type: ignore[method-assign]
        self.descend = torch.compile(super().descend)  # type: ignore[method-assign]


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


def installed(name: str) -> bool:
    """Return whether a package is there."""
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
            "overwriting all compiled": lambda: OverwritingInGraphs(network, dtype),
        }
        if installed("pytorch_optimizer"):
            made |= {
                "pytorch_optimizer eager": lambda: PytorchOptimizer(
                    network, dtype, **eager
                ),
                "pytorch_optimizer compiled model": lambda: PytorchOptimizer(
                    network, dtype, **compiled
                ),
            }
    if dtype is None and network.inputs.device.type == "cpu" and installed("optax"):
        name = "optax.contrib.sam jitted" if sam else "SGD optax jitted"
        made[name] = partial(_of_jax, network, sam=sam)
        for steps in SEVERAL.get(network.name, ()):
            made[f"{name}, {steps} steps a call"] = partial(
                _of_jax, network, sam=sam, steps=steps
            )
    return made


def _of_jax(network: Network, **how: Any) -> Any:
    from bench.peers_of_jax import Optax  # JAX takes a second to import.

    return Optax(network, **how)
