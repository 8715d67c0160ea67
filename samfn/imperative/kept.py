"""Gradients of micro-batches that are over, until the step that they are for."""

from collections.abc import Iterable

from torch import Tensor

from samfn.imperative.passes import Passes, Seen


class Kept:
    """The sum of gradients of second passes.

    In the second pass of the next micro-batch it is in the place of the gradients, so that
    backward adds to it what it finds: whoever clips, unscales or averages over replicas
    then has the sum. In the first pass it is aside.
    """

    def __init__(self) -> None:
        self.end()

    def end(self) -> None:
        """Begin anew: the step was taken."""
        self.count = 0  # From how many micro-batches it is.
        self._aside: dict[Tensor, Tensor] = {}
        self._placed: dict[Tensor, Seen] = {}

    def give_up(self) -> None:
        """Forget the sum: the step will not be taken."""
        for p in self._placed:
            p.grad = None
        self.end()

    def take(self, parameters: Iterable[Tensor]) -> None:
        """Keep a copy of the gradients, which are the sum."""
        # DistributedDataParallel may write into their memory again.
        self._aside = {p: p.grad.clone() for p in parameters if p.grad is not None}
        self._placed = {}
        self.count += 1

    def place(self) -> None:
        """Let the second pass add to the sum."""
        for p, grad in self._aside.items():
            p.grad = grad
        self._placed = {p: Seen.of(grad) for p, grad in self._aside.items()}
        self._aside = {}

    @property
    def is_placed(self) -> bool:
        """Whether it is in the place of the gradients."""
        return bool(self._placed)

    def parameters(self) -> list[Tensor]:
        """Return the parameters whose gradients are kept."""
        return [*self._aside, *self._placed]

    def require_none(self, before: str) -> None:
        """Raise if there are any; `before` says what may be called before."""
        if self.count:
            raise RuntimeError(
                f"gradients of {self.count} micro-batch{'es' * (self.count > 1)} are kept"
                f" for a step that is not taken: call {before}"
            )

    def is_alone(self, parameters: Iterable[Tensor]) -> bool:
        """Whether no pass has added anything to it."""
        return all(
            p.grad is None or (p in self._placed and self._placed[p].is_still(p.grad))
            for p in parameters
        )

    def wrong_with(self, passes: Passes, parameters: Iterable[Tensor]) -> str | None:
        """Return why two passes are no step, if they are none."""
        lost = passes.cleared or any(p.grad is None for p in self._placed)
        if self.is_placed and lost:
            return (
                "the gradients that keep_step kept were cleared after first_step: clear"
                " them by first_step(zero_grad=True) alone, or by optimizer.zero_grad()"
            )
        differ = passes.first and passes.first != passes.count
        # A gradient that was set by hand is of no backward pass that was counted.
        if differ and (passes.count or self.is_alone(parameters)):
            return (
                f"backward passes: {passes.first} before first_step, {passes.count} after"
                " it; both have to see the same. To accumulate gradients, call first_step,"
                " backward and keep_step for each micro-batch, or give step a closure that"
                " goes through all. To clear gradients between the passes, call"
                " first_step(zero_grad=True) or optimizer.zero_grad()"
            )
        return None
