"""How to draw parameters and gradients: structure by Hypothesis, values by a seed."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

radii = st.floats(1e-3, 1e3)
shapes = st.lists(st.integers(1, 4), max_size=3)
names = st.text("abc.", min_size=1, max_size=6)
layouts = st.dictionaries(names, shapes, min_size=1, max_size=5)
scales = st.sampled_from([1e-6, 1.0, 1e6])


@st.composite
def params_and_grads(draw: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two float64 trees of one layout; no gradient entry is zero."""
    layout, seed, scale = draw(layouts), draw(st.integers(0, 2**32 - 1)), draw(scales)
    generator = torch.Generator().manual_seed(seed)

    def fill(size: float) -> dict[str, Tensor]:
        return {
            name: size * torch.randn(shape, generator=generator, dtype=torch.float64)
            for name, shape in layout.items()
        }

    return fill(1.0), fill(scale)
