"""What `samfn.SAM` hangs on parameters and modules: a mark in gradients, and a guard."""

import weakref
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor

from samfn import tree
from samfn.imperative.parts import whole

COPY_LATER = (
    "copy, pickle, split or load inside of `with optimizer.unperturbed()`, or after"
    " second_step or restore"
)


class Mark:
    """Makes the first gradient of a pass NaN, unless the pass before was `finite`."""

    def __init__(self, parameters: Iterable[Tensor], finite: Tensor) -> None:
        self._finite, self._is_set = finite, False
        self._handles = [
            cast(Any, p).register_post_accumulate_grad_hook(self._look)
            for p in parameters
            if p.requires_grad and p.numel()
        ]

    @torch.no_grad()
    def _look(self, parameter: Tensor) -> None:
        grad = cast(Tensor, parameter.grad)
        if not self._is_set:
            here = tree.local(grad)
            here.mul_(torch.where(self._finite, 1.0, torch.nan).to(here.device))
            self._is_set = grad.layout is torch.strided  # A sparse one may be empty.

    def end(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()


class Guard:
    """Keeps perturbed weights out of what is saved of a model; see `samfn.SAM.guard`."""

    def __init__(self, optimizer: Any = None) -> None:
        # The model, which holds this, must not keep the optimizer, nor be pickled with it.
        self._optimizer = weakref.ref(optimizer) if optimizer is not None else lambda: None

    def watch(self, model: torch.nn.Module) -> None:
        """Register the hooks, at all modules of a model."""
        for module in cast(Iterable[Any], model.modules()):
            module.register_state_dict_post_hook(self)
            module.register_load_state_dict_pre_hook(self._before_loading)

    def __call__(
        self, module: torch.nn.Module, state: dict[str, Any], prefix: str, metadata: Any
    ) -> None:
        """Replace parameters by unperturbed ones in what `state_dict` will return."""
        optimizer = self._optimizer()
        clean = (optimizer is not None and optimizer._clean) or {}
        for name, p in module.named_parameters(recurse=False, remove_duplicate=False):
            if p in clean and prefix + name in state:
                state[prefix + name] = whole(clean[p], p)

    def _before_loading(self, *_: Any) -> None:
        # Or the second step would put back the weights of before.
        if (optimizer := self._optimizer()) is not None:
            optimizer.restore()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Return what a copy of the model is made with: a guard of nothing."""
        self.require_unperturbed()
        return Guard, ()

    def require_unperturbed(self) -> None:
        """Raise where the model is not what it seems; `split` and `load` ask, too."""
        optimizer = self._optimizer()
        if optimizer is not None and optimizer.perturbed:
            raise RuntimeError(f"the weights of the model are perturbed: {COPY_LATER}")
