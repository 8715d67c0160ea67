"""SAM in the geometry of Muon: a ball in which every matrix has its spectral norm."""

from samfn.methods.base import Method, two_pass
from samfn.perturb import perturb_spectral


def spectral_sam() -> Method:
    """SAM in a ball of spectral norms: every singular direction of a layer moves alike.

    e_l = rho U V^T of each matrix g_l = U S V^T, rho g_l / ||g_l|| of each vector;
    <- grad L(w + e)

    Two gradients a step, and 24 products of matrices for each tensor. rho is the largest
    singular value of a perturbation, not its length: see `samfn.perturb_spectral`. Its
    direction is that of a step of `samfn.muon`, without momentum.

    Source:
        None was found: SAM in this ball is not published. The dual of the spectral norm
        as steepest descent is in Bernstein and Newhouse, 2024, arXiv:2409.20325.
    """
    return two_pass(perturb_spectral)
