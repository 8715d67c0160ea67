"""The matrix U V^T of a matrix U S V^T, found by products of matrices alone."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from samfn.support.collectives import cut_as, whole
from samfn.tree import unmixed

Polynomial = tuple[float, float, float]
"""(a, b, c): a singular value s becomes a s + b s^3 + c s^5."""

MUON: Polynomial = (3.4445, -4.7750, 2.0315)
"""Raises small singular values fastest, and leaves all between 0.68 and 1.13."""
TAYLOR: Polynomial = (15 / 8, -10 / 8, 3 / 8)
"""Takes a singular value that is 1 - d to about 1 - 2.5 d^3."""
SMALLEST = 1e-7  # norm that a matrix is divided by, as in torch.optim.Muon


def newton_schulz(
    matrix: Tensor, polynomials: Sequence[Polynomial], dtype: torch.dtype
) -> Tensor:
    """Return U f(S) V^T, f one polynomial after the other, of S divided by its norm.

    Args:
        matrix: U S V^T, of two dimensions. With five times `MUON`, singular values above a
            thousandth of the Frobenius norm come to 1 within a third; three times
            `TAYLOR` after it bring them to within 1e-9. Zeros stay zeros.
        polynomials: f.
        dtype: of the products, and of the result.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.to(dtype)
    x = x.T if tall else x
    x = x / x.norm().clamp(min=SMALLEST)
    with unmixed({"": matrix}):
        for a, b, c in polynomials:
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def as_matrix(function: Callable[[Tensor], Tensor], leaf: Tensor) -> Tensor:
    """Apply a function of matrices to a tensor: (out, in, ...) is (out, in * ...).

    A vector is a matrix of one column. A DTensor is made whole for it on every rank, and
    the result placed as it was.
    """
    full = whole(leaf)
    matrix = full.flatten(1) if full.ndim > 1 else full.reshape(-1, 1)
    found = function(matrix).reshape(full.shape).to(leaf.dtype)
    return cut_as(found, leaf)
