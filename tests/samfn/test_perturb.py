import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import samfn
from samfn import everything, perturb, perturb_adaptive
from tests.reference import asam_perturbation, flat
from tests.strategies import params_and_grads, radii

METRICS = [perturb, perturb_adaptive, samfn.perturb_spectral]


def moved(params, grads, rho, metric=perturb):
    return flat(metric(params, grads, rho)) - flat(params)


@given(params_and_grads(), radii)
def test_moves_a_distance_rho(trees, rho):
    length = torch.linalg.vector_norm(moved(*trees, rho))
    assert_close(length, torch.tensor(rho, dtype=torch.float64), rtol=1e-9, atol=0)


@given(params_and_grads(), radii)
def test_moves_in_the_steepest_direction(trees, rho):
    # The equality of Cauchy-Schwarz holds only along the gradient, and uphill.
    gradient = flat(trees[1])
    uphill = moved(*trees, rho) @ gradient
    assert_close(uphill, rho * torch.linalg.vector_norm(gradient), rtol=1e-9, atol=0)


@given(params_and_grads(), radii, st.floats(1e-3, 1e3))
def test_does_not_depend_on_the_scale_of_the_loss(trees, rho, factor):
    params, grads = trees
    scaled = {name: factor * g for name, g in grads.items()}
    assert_close(
        moved(params, scaled, rho), moved(params, grads, rho), rtol=1e-7, atol=1e-9
    )


@given(params_and_grads(), radii)
def test_does_not_depend_on_the_order_of_names(trees, rho):
    params, grads = trees
    reversed_grads = dict(reversed(grads.items()))
    assert_close(perturb(params, reversed_grads, rho), perturb(params, grads, rho))


@given(params_and_grads(), radii)
def test_does_not_depend_on_how_the_vector_is_cut_into_tensors(trees, rho):
    whole = [{"all": flat(tree)} for tree in trees]
    assert_close(moved(*trees, rho), moved(*whole, rho), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_zero_gradient_gives_back_the_parameters_exactly(metric, dtype):
    params = {"weight": torch.tensor([3.0, -4.0], dtype=dtype)}
    still = metric(params, {"weight": torch.zeros(2, dtype=dtype)}, 0.05)
    assert_close(still, params, rtol=0, atol=0)


@pytest.mark.parametrize(
    "size", [1e-44, 1e-30, 1e-25, 1e-20, 1e-16, 1e-12, 1e-8, 1.0, 1e15, 1e25]
)
def test_length_is_rho_or_zero_whatever_the_size_of_the_gradient(size):
    grads = {"a": torch.full((1000,), size), "b": torch.full((3, 5), -size)}
    params = samfn.tree.zeros_like(grads)
    length = samfn.norm(perturb(params, grads, 0.05)).item()
    assert length == 0 or length == pytest.approx(0.05, rel=1e-4)
    assert (length > 0) == (1e-16 <= size < 1e19)


def test_float16_gradients_do_not_overflow():
    grads = {"a": torch.full((4,), 300.0, dtype=torch.float16)}
    params = samfn.tree.zeros_like(grads)
    result = perturb(params, grads, 1.0)["a"]
    assert_close(result, torch.full((4,), 0.5, dtype=torch.float16))


@given(params_and_grads(), radii)
def test_inputs_stay_and_results_are_new(trees, rho):
    params, grads = trees
    copies = [samfn.tree.clone(tree) for tree in trees]
    for metric in METRICS:
        result = metric(params, grads, rho)
        assert_close([params, grads], copies, rtol=0, atol=0)
        for name, tensor in result.items():
            assert tensor.data_ptr() != params[name].data_ptr()


@pytest.mark.parametrize("metric", METRICS)
def test_rho_may_be_a_tensor(metric):
    params, grads = {"weight": torch.randn(5)}, {"weight": torch.randn(5)}
    assert_close(metric(params, grads, torch.tensor(0.1)), metric(params, grads, 0.1))


@given(params_and_grads(), radii, st.floats(0, 1))
def test_adaptive_is_its_formula_number_by_number(trees, rho, eta):
    params, grads = trees
    result = perturb_adaptive(params, grads, rho, eta, adapts=everything)
    numbers = (flat(params).tolist(), flat(grads).tolist(), rho, eta)
    expected = torch.tensor(asam_perturbation(*numbers), dtype=torch.float64)
    assert_close(flat(result), flat(params) + expected, rtol=1e-7, atol=1e-9)


def test_adaptive_has_length_rho_in_its_own_metric():
    params = {"a.weight": torch.randn(3, 4).double(), "a.bias": torch.randn(3).double()}
    grads = {"a.weight": torch.randn(3, 4).double(), "a.bias": torch.randn(3).double()}
    step = samfn.tree.subtract(perturb_adaptive(params, grads, 0.5), params)
    step["a.weight"] /= params["a.weight"].abs() + 0.01
    assert_close(samfn.norm(step), torch.tensor(0.5, dtype=torch.float64))


def test_official_adaptive_leaves_what_is_not_named_weight_unscaled():
    # With T = 1 everywhere, ASAM is SAM.
    params, grads = {"bias": torch.randn(6)}, {"bias": torch.randn(6)}
    assert_close(perturb_adaptive(params, grads, 0.5), perturb(params, grads, 0.5))
    other = perturb_adaptive(params, grads, 0.5, adapts=everything)
    assert not torch.allclose(other["bias"], perturb(params, grads, 0.5)["bias"])


def test_adaptive_does_not_change_when_weights_are_rescaled():
    # (w, g) -> (c w, g / c) is what rescaling a layer does; e then scales with w.
    w, g = torch.randn(6).double(), torch.randn(6).double()
    c = torch.tensor([1e-2, 1.0, 1e2, 3.0, 0.5, 7.0]).double()
    relative = [
        perturb_adaptive({"weight": a}, {"weight": b}, 0.1, eta=0.0)["weight"] / a
        for a, b in ((w, g), (c * w, g / c))
    ]
    assert_close(*relative)


BAD_INPUTS = [
    ({"b": torch.ones(2)}, 0.1, ValueError, "a missing, b unexpected"),
    ({"a": torch.ones(1)}, 0.1, ValueError, r"a: \(2,\) against \(1,\)"),
    (
        {"a": torch.ones(2).half()},
        0.1,
        ValueError,
        "a: torch.float32 against torch.float16",
    ),
    ({"a": torch.ones(2, device="meta")}, 0.1, ValueError, "a: cpu against meta"),
    ({"a": torch.ones(2)}, -0.1, ValueError, "rho must be .* at least 0, got -0.1"),
    ({"a": torch.ones(2)}, float("nan"), ValueError, "rho must be finite .* got nan"),
    ({"a": torch.ones(2)}, torch.ones(1), ValueError, r"0-d tensor, got shape \(1,\)"),
    ({"a": torch.ones(2)}, "0.1", TypeError, "a number or a 0-d tensor, got str"),
]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("grads", "rho", "error", "message"), BAD_INPUTS)
def test_bad_input_says_what_came(metric, grads, rho, error, message):
    with pytest.raises(error, match=message):
        metric({"a": torch.ones(2)}, grads, rho)


def test_negative_eta_is_an_error():
    with pytest.raises(ValueError, match="eta must be at least 0, got -1"):
        perturb_adaptive({"a": torch.ones(2)}, {"a": torch.ones(2)}, 0.1, -1)


def as_matrix(leaf):
    return leaf.flatten(1) if leaf.ndim > 1 else leaf.reshape(-1, 1)


@given(params_and_grads(), radii)
def test_a_spectral_perturbation_is_rho_times_the_singular_vectors(trees, rho):
    params, grads = trees
    found = samfn.perturb_spectral(samfn.tree.zeros_like(params), grads, rho)
    for name, g in grads.items():
        u, s, v = np.linalg.svd(as_matrix(g).numpy(), full_matrices=False)
        if s.min() > 0.003 * s.max():
            expected = torch.tensor(rho * u @ v)
            assert_close(as_matrix(found[name]), expected, rtol=1e-6, atol=1e-6 * rho)


def test_no_other_point_of_the_spectral_ball_raises_a_linear_loss_as_much():
    source = torch.Generator().manual_seed(0)
    shapes = {"filters": (4, 3, 2, 2), "tall": (9, 4), "vector": (5,), "number": ()}
    grads = {n: torch.randn(s, generator=source).double() for n, s in shapes.items()}
    # Of a gradient of rank 1 most singular values are 0.
    grads["thin"] = torch.outer(grads["vector"], grads["vector"] + 1)
    zeros = samfn.tree.zeros_like(grads)
    found = samfn.perturb_spectral(zeros, grads, 0.3)
    largest = [torch.linalg.matrix_norm(as_matrix(e), 2) for e in found.values()]
    assert_close(
        torch.stack(largest), torch.full((5,), 0.3, dtype=torch.float64), rtol=1e-9, atol=0
    )
    most = samfn.tree.dot(found, grads)
    nuclear = sum(torch.linalg.matrix_norm(as_matrix(g), "nuc") for g in grads.values())
    assert_close(most, 0.3 * nuclear, rtol=1e-9, atol=0)
    sam = perturb(zeros, grads, 1.0)
    for _ in range(200):
        other = {
            n: torch.randn(g.shape, generator=source).double() for n, g in grads.items()
        }
        # Near the best, too.
        near = samfn.tree.add_scaled(found, 0.01, other)
        for point in (other, near, sam):
            inside = {
                n: 0.3 * e / torch.linalg.matrix_norm(as_matrix(e), 2)
                for n, e in point.items()
            }
            assert samfn.tree.dot(inside, grads) <= most * (1 + 1e-12)


def test_a_tensor_without_a_gradient_stays_and_the_others_move():
    params = {"a": torch.ones(3, 2), "b": torch.ones(2)}
    grads = {"a": torch.zeros(3, 2), "b": torch.full((2,), 1e-12)}
    found = samfn.perturb_spectral(params, grads, 0.5)
    assert torch.equal(found["a"], params["a"])
    assert_close((found["b"] - 1).norm().item(), 0.5, rtol=1e-6, atol=0)


def test_an_autocast_around_it_leaves_the_orthogonal_matrix_as_precise():
    source = torch.Generator().manual_seed(0)
    params = {"w": torch.randn(6, 4, generator=source)}
    grads = {"w": torch.randn(6, 4, generator=source)}
    expected = samfn.perturb_spectral(params, grads, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        found = samfn.perturb_spectral(params, grads, 0.1)
    assert torch.equal(found["w"], expected["w"])


def test_the_order_of_gradients_does_not_matter_to_layers():
    params = {"a": torch.ones(2, 2), "b": 3 * torch.ones(2, 3)}
    grads = {"a": torch.ones(2, 2), "b": torch.full((2, 3), 5.0)}
    turned = dict(reversed(grads.items()))
    found = samfn.perturb_layerwise(params, turned, 0.1)
    assert_close(found, samfn.perturb_layerwise(params, grads, 0.1), rtol=0, atol=0)
