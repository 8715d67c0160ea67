"""Measures of a minimum: sharpness, curvature, the landscape around it, each example."""

from samfn.measure import landscape, per_example, sharpness
from samfn.measure.curvature import NotTwiceDifferentiableError, hessian_product
from samfn.measure.objective import Objective

__all__ = [
    "NotTwiceDifferentiableError",
    "Objective",
    "hessian_product",
    "landscape",
    "per_example",
    "sharpness",
]
