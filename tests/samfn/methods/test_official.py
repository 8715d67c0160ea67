"""In step with the official code, run once; its commits and weights stand here.

Each was run for 40 steps on the problem of `test_published`, eight batches in turn, in
float64, around torch.optim.SGD with momentum. A difference of 1e-11 is that of the small
number that it adds to a norm. No official code was found of `light_sam`, `functional_sam`
and `preconditioned`; `spectral_sam` is not published; `muon` is held to torch.optim.Muon in
`tests/samfn/test_descend.py`.
"""

from typing import NamedTuple

import pytest
import torch
from torch.testing import assert_close

import samfn
from tests.samfn.methods.test_published import RHO, STEPS, layer, problem, weighted

LR = 0.05


class Official(NamedTuple):
    source: str
    """Repository, file and commit."""
    method: samfn.Method
    weights: list[float]
    """After the last step: the weight, row by row, and the bias."""
    loss_fn: object = layer


# Half a weight at most, as Focal-SAM's of each row; and the last four rows, as ImbSAM's of
# rare classes, without the factor 2 that its script has for them.
shares = torch.linspace(0, 0.5, 10, dtype=torch.float64)
rare = (torch.arange(10) >= 6).double()

# fmt: off
OFFICIAL = {
    "ssam": Official(
        "cltan023/stablesam2024 sam.py 57264e7, stable=True", samfn.ssam(),
        [1.028721173762, -0.488130358745, -0.097605422373, -0.016137625413,
         0.625334424152, -0.519415065187, -0.182751347974, 0.049566361462]),
    "usam": Official(
        "cltan023/stablesam2024 usam.py 57264e7", samfn.usam(),
        [0.909232578303, -0.407471932742, -0.26344540601, -0.092883798298,
         0.431210741243, -0.455145357997, -0.176541503042, 0.18442243747]),
    "unified_sam": Official(
        "dimitris-oik/unifiedsam unifiedsam.py 978ce39, lambd='1-1/t'", samfn.unified_sam(),
        [0.691814102167, -0.437817379667, -0.217364436482, -0.04304905781,
         0.485563720515, -0.526267296521, -0.104755363002, 0.098287868086]),
    "unified_sam 0.3": Official(
        "dimitris-oik/unifiedsam unifiedsam.py 978ce39, lambd=0.3", samfn.unified_sam(0.3),
        [0.836906067181, -0.434290128827, -0.248252053105, -0.053744338406,
         0.482720629711, -0.486214472764, -0.163209079077, 0.154347703845]),
    "le_sam": Official(
        "smithgun2005/LE-SAM-ICML2026 lesam.py 2b3ecd9", samfn.le_sam(0.35),
        [0.585306124949, -0.452947770748, -0.198773802876, -0.085756201607,
         0.46187250878, -0.421705178123, -0.067248255264, 0.064825460666]),
    "sagm": Official(
        "Wang-pengfei/SAGM domainbed/sagm/sagm.py 69d4d9d, alpha=0.1", samfn.sagm(0.1),
        [0.571839010431, -0.333106801877, -0.139725402423, -0.030437948426,
         0.311344871214, -0.217408301447, -0.050341072102, 0.042237642813]),
    "s2_sam": Official(
        "jjsrf/SSAM-NEURIPS2024 sam.py e7d1632, whose zero_grad leaves zeros",
        samfn.s2_sam(),
        [0.642080440529, -0.502201202454, -0.27544160442, -0.012323286511,
         0.180684687681, -0.633047994773, -0.017669694984, -0.020617645316]),
    "awp": Official(
        "csdongxian/AWP AT_AWP/utils_awp.py a7acf5d", samfn.awp(),
        [0.738953342195, -0.394783664464, -0.11152572353, -0.091390070646,
         0.46239378412, -0.572178887245, -0.193192694942, 0.133472456171]),
    "rwp": Official(
        "nblt/RWP train_rwp_parallel.py cb0acb0, its noise, alpha=0.3", samfn.rwp(0.3),
        [0.653662135533, -0.304213539775, -0.121103111868, -0.015964611003,
         0.33845675193, -0.221879673451, -0.035247927034, 0.035197309905]),
    "rwp alone": Official(
        "nblt/RWP train_rwp_parallel.py cb0acb0, its noise, alpha=1", samfn.rwp(1.0),
        [1.233258890701, -0.534998493809, -0.089619152048, -0.148561076891,
         0.904433729184, -0.833456213086, -0.296829877561, 0.144936782629]),
    "on_loss, Focal-SAM": Official(
        "scongl/Focal-SAM focal_sam.py 86c13c6",
        samfn.on_loss(samfn.sam(), weighted(shares)),
        [0.548848133119, -0.362908114011, -0.147629500268, 0.00109985478,
         0.31278579628, -0.284223681536, -0.044862704247, 0.032509184007],
        weighted(1 - shares)),
    "on_loss, ImbSAM": Official(
        "cool-xuan/Imbalanced_SAM imbsam.py c65f41e",
        samfn.on_loss(samfn.sam(), weighted(rare)),
        [0.539915200709, -0.416858653216, -0.135287405231, 0.033124279279,
         0.353922653951, -0.594306391355, -0.053333607157, 0.140424165213],
        weighted(1 - rare)),
}
# fmt: on


@pytest.mark.parametrize("name", OFFICIAL)
def test_forty_steps_are_those_of_the_official_code(name):
    _, method, expected, loss_fn = OFFICIAL[name]
    optimizer = samfn.sgd(0.9)
    _, _, params, batches = problem()
    state = samfn.init(params, {}, optimizer=optimizer, method=method)
    given = {"loss_fn": loss_fn, "optimizer": optimizer, "method": method}
    torch.manual_seed(0)  # For the noise of `rwp`.
    for step in range(40):
        batch = batches[step % STEPS]
        state, _ = samfn.sam_update(state, batch, **given, rho=RHO, lr=LR)
    found = torch.cat([state.params["weight"].flatten(), state.params["bias"]])
    assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-11)
