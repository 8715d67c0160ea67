"""Loss landscapes in closed form, and directions filter by filter."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

import samfn
from samfn import tree
from samfn.measure.landscape import ascent, between, filter_normalised, line, plane
from tests.reference import batches, small_network
from tests.strategies import params_and_grads

COORDINATES = [-1.5, 0.0, 0.25, 2.0]
ONE = torch.zeros(1)  # a batch of one example, for losses that read none


def quadratic(params, buffers, batch):
    """Return half of the sum of curvature times squared weight."""
    return (buffers["curvature"] * params["w"].square()).sum() / 2


W = {"w": torch.tensor([1.0, -2.0, 0.5]).double()}
CURVATURE = {"curvature": torch.tensor([3.0, 1.0, -2.0]).double()}


def drawn(seed, params=None, **options):
    source = torch.Generator().manual_seed(seed)
    return filter_normalised(params or network()[0], source, **options)


def network(dtype=torch.float64):
    """Return parameters, buffers, loss and data of a network in evaluation mode."""
    model = small_network(dtype)
    samfn_loss = samfn.supervised(model, F.cross_entropy)
    state = samfn.split(model)
    for batch in batches(3, dtype):  # so that the statistics are not those of the start
        state = state[0], samfn_loss(*state, batch)[1].buffers
    model.eval()
    return *state, samfn_loss, batches(3, dtype)


@given(params_and_grads(), st.floats(-10, 10))
def test_a_line_through_a_quadratic_is_a_parabola(trees, a):
    params, direction = trees

    def loss_fn(params, buffers, batch):
        return samfn.norm(params).square()

    found = line(params, {}, ONE, direction, [a, 0.0], loss_fn=loss_fn)
    parts = [tree.dot(params, params), 2 * a * tree.dot(params, direction)]
    expected = sum(parts) + a * a * tree.dot(direction, direction)
    scale = tree.dot(params, params) + a * a * tree.dot(direction, direction)
    assert_close(found.loss[0] / scale, expected / scale, rtol=0, atol=1e-12)
    assert found.at.tolist() == [a, 0.0]


def test_a_plane_has_the_first_coordinate_in_its_rows():
    first = {"w": torch.tensor([1.0, 0.0, 0.0]).double()}
    second = {"w": torch.tensor([0.0, 1.0, 1.0]).double()}
    at, at2 = COORDINATES, [-1.0, 0.0, 3.0]
    found = plane(W, CURVATURE, ONE, (first, second), at, at2, loss_fn=quadratic)
    expected = [
        [(3 * (1 + a) ** 2 + (-2 + b) ** 2 - 2 * (0.5 + b) ** 2) / 2 for b in at2]
        for a in at
    ]
    assert_close(found.loss, torch.tensor(expected).double())
    assert (found.at.tolist(), found.at2.tolist()) == (at, at2)
    assert found.cosine == 0
    assert found.accuracy is None


def test_a_line_is_the_axis_of_a_plane_and_its_origin_the_solution_bit_for_bit():
    params, buffers, loss_fn, data = network()
    directions = drawn(0), drawn(1)
    given = params, buffers, data
    grid = plane(*given, directions, COORDINATES, [0.0, 1.0], loss_fn=loss_fn)
    axis = line(*given, directions[0], COORDINATES, loss_fn=loss_fn)
    assert_close((axis.loss, axis.accuracy), (grid.loss[:, 0], grid.accuracy[:, 0]))
    here = [loss_fn(params, buffers, batch)[0].item() for batch in data]
    assert axis.loss[1] == sum(8 * loss for loss in here) / 24


def test_the_cosine_is_that_of_the_angle():
    first, second = {"w": torch.tensor([2.0, 0.0, 0])}, {"w": torch.tensor([1.0, 1, 0])}
    params = {"w": torch.ones(3), "v": torch.ones(1)}
    loss_fn = lambda params, buffers, batch: params["w"].sum()  # noqa: E731
    for pair, cosine in (
        ((first, second), 0.5**0.5),
        ((first, {"w": -second["w"]}), -(0.5**0.5)),
        ((first, {"v": torch.ones(1)}), 0.0),
        ((first, {**second, "v": torch.full((1,), 2**0.5)}), 0.5),
    ):
        found = plane(params, {}, ONE, pair, [0.0], [0.0], loss_fn=loss_fn)
        assert found.cosine == pytest.approx(cosine)
    zero = {"w": torch.zeros(3)}
    found = plane(params, {}, ONE, (first, zero), [0.0], [0.0], loss_fn=loss_fn)
    assert math.isnan(found.cosine)


def test_what_a_direction_does_not_name_stays_and_buffers_may_move():
    direction = {"curvature": torch.tensor([1.0, 0.0, 0.0]).double()}
    found = line(W, CURVATURE, ONE, direction, COORDINATES, loss_fn=quadratic)
    at_w = quadratic(W, CURVATURE, ONE)
    assert_close(found.loss, at_w + torch.tensor(COORDINATES).double() / 2)


def test_means_are_of_examples_and_begin_anew_at_every_point():
    data = [torch.tensor([[1.0], [2.0], [6.0]]), torch.tensor([[11.0]])]
    means = line(
        {"w": torch.tensor([1.0])},
        {},
        data,
        {"w": torch.tensor([1.0])},
        [0.0, 1.0, 0.0],
        loss_fn=lambda params, buffers, batch: (batch * params["w"]).mean(),
    )
    assert means.loss.tolist() == [5.0, 10.0, 5.0]  # and not (3 + 11) / 2 = 7


def scores_are(params, buffers, batch):
    """Return as scores of two classes the inputs and w."""
    scores = torch.stack([batch[0], params["w"].expand_as(batch[0])], 1)
    return scores.mean(), samfn.Aux(scores, buffers)


def test_accuracy_is_in_percent_of_all_examples():
    data = [(torch.tensor([1.0, 1, -1]), torch.tensor([0, 1, 1])), (-ONE, ONE.long())]
    way = {"w": torch.tensor(1.0)}
    found = line(
        {"w": torch.tensor(-5.0)}, {}, data, way, [0.0, 5.0, 10.0], loss_fn=scores_are
    )
    # All are taken for class 0; then those that are above 0; then none.
    assert found.accuracy.tolist() == [50.0, 75.0, 50.0]


def test_scores_that_are_not_finite_are_wrong_and_losses_stay_what_they_are():
    inputs = torch.tensor([1.0, 1.0])
    way = {"w": torch.tensor(1.0)}
    found = line(
        {"w": torch.tensor(torch.inf)},
        {},
        (inputs, torch.tensor([1, 0])),
        way,
        [0.0],
        loss_fn=scores_are,
    )
    assert found.loss.tolist() == [math.inf]
    assert found.accuracy.tolist() == [0.0]
    nan = line(
        {"w": torch.tensor(torch.nan)},
        {},
        (inputs, torch.tensor([1, 1])),
        way,
        [0.0],
        loss_fn=scores_are,
    )
    assert math.isnan(nan.loss)
    assert nan.accuracy.tolist() == [0.0]


@pytest.mark.parametrize(
    ("outputs", "labels"),
    [
        (None, torch.zeros(2).long()),
        (torch.zeros(2, 3), torch.zeros(2)),
        (torch.zeros(2, 1), torch.zeros(2).long()),
        (torch.zeros(2), torch.zeros(2).long()),
        (torch.zeros(2, 3, 4), torch.zeros(2).long()),
        (torch.zeros(2, 3), torch.zeros(2, 3).long()),
    ],
)
def test_there_is_no_accuracy_where_nothing_is_classified(outputs, labels):
    def loss_fn(params, buffers, batch):
        return params["w"].sum(), samfn.Aux(outputs, buffers)

    found = line(W, {}, (torch.zeros(2), labels), W, [0.0], loss_fn=loss_fn)
    assert found.accuracy is None


def test_every_filter_of_a_direction_is_as_long_as_that_of_the_weights():
    for dtype in (torch.float32, torch.float64):
        params, *_ = network(dtype)
        direction = drawn(0, params)
        assert {name: (d.shape, d.dtype) for name, d in direction.items()} == {
            name: (w.shape, w.dtype) for name, w in params.items()
        }
        for name in ("0.weight", "3.weight", "7.weight"):
            lengths, expected = (
                torch.stack([f.norm() for f in t[name]]) for t in (direction, params)
            )
            assert_close(lengths, expected, rtol=1e-6, atol=0)


def test_filters_may_be_counted_across_as_ml_cvnets_does():
    params, *_ = network()
    direction = drawn(0, params, over=(0,))
    for name in ("0.weight", "7.weight"):
        assert_close(direction[name].norm(dim=0), params[name].norm(dim=0))


def test_biases_and_normalisation_do_not_move():
    direction = drawn(0)
    for name in ("0.bias", "1.weight", "1.bias", "7.bias"):
        assert not direction[name].any()


def test_a_filter_of_zeros_stays_zero_and_a_filter_may_have_one_entry():
    params = {"w": torch.tensor([[1.0, 2.0], [0.0, 0.0]]), "v": torch.tensor([[-3.0]])}
    direction = drawn(0, params)
    assert direction["w"][0].norm() == pytest.approx(5**0.5)
    assert direction["w"][1].tolist() == [0.0, 0.0]
    assert direction["v"].abs().tolist() == [[3.0]]


def test_a_direction_depends_on_seed_and_shapes_and_not_on_order_or_layout():
    params, *_ = network(torch.float32)
    direction = drawn(0, params)
    turned = {name: params[name] for name in reversed(params)}
    turned["3.weight"] = params["3.weight"].to(memory_format=torch.channels_last)
    again = drawn(0, turned)
    assert_close({n: again[n] for n in params}, direction, rtol=1e-6, atol=0)
    assert again["3.weight"].is_contiguous(memory_format=torch.channels_last)
    doubled = drawn(0, tree.scale(params, 2.0))
    assert_close(doubled, tree.scale(direction, 2.0))
    wide = drawn(0, {name: w.double() for name, w in params.items()})
    assert_close({n: d.float() for n, d in wide.items()}, direction)
    assert not torch.allclose(drawn(1, params)["0.weight"], direction["0.weight"])


def test_a_generator_that_is_not_on_the_cpu_is_refused():
    class Elsewhere:
        device = torch.device("cuda")

    with pytest.raises(ValueError, match="must be on the CPU, got one on cuda"):
        filter_normalised(W, Elsewhere())


def test_between_two_solutions_all_that_is_floating_point_moves():
    params, buffers, loss_fn, data = network()
    moved = tree.add(params, drawn(0))
    others = {
        name: leaf * 2 + 1 if leaf.is_floating_point() else leaf + 7
        for name, leaf in buffers.items()
    }
    way = between(params | buffers, moved | others)
    assert way.keys() == params.keys() | {n for n in buffers if "running" in n}
    found = line(params, buffers, data, way, [0.0, 0.5, 1.0], loss_fn=loss_fn)
    for index, (p, b) in enumerate(((params, buffers), (moved, others))):
        losses = [loss_fn(p, b, batch)[0] for batch in data]
        assert_close(found.loss[2 * index], torch.stack(losses).mean())
    still = line(params, buffers, data, between(params, moved), [1.0], loss_fn=loss_fn)
    losses = [loss_fn(moved, buffers, batch)[0] for batch in data]
    assert_close(still.loss[0], torch.stack(losses).mean())
    with pytest.raises(ValueError, match="start and end must have the same names"):
        between(params, buffers)


def test_the_ascent_is_that_of_sam_for_all_examples_as_one_batch():
    params, buffers, loss_fn, data = network()
    uneven = [data[0], tuple(part[:3] for part in data[1])]
    whole = tuple(torch.cat(parts) for parts in zip(*uneven, strict=True))
    grads = samfn.evaluate(loss_fn, params, buffers, whole).grads
    step = tree.subtract(samfn.perturb(params, grads, 1.0), params)
    assert_close(ascent(params, buffers, uneven, loss_fn=loss_fn), step)
    assert_close(ascent(params, buffers, whole, loss_fn=loss_fn), step)


def test_a_zero_gradient_leads_nowhere():
    flat = lambda params, buffers, batch: 0 * params["w"].sum()  # noqa: E731
    assert not ascent(W, {}, ONE, loss_fn=flat)["w"].any()


def test_nothing_that_was_given_changes():
    params, buffers, loss_fn, data = network()
    ways = drawn(0), between(params | buffers, params | buffers)
    given = [params, buffers, *ways]
    before = [
        {n: (leaf, leaf.data_ptr(), leaf.clone()) for n, leaf in t.items()} for t in given
    ]
    model = loss_fn.function.__self__._model
    weights = {name: leaf.clone() for name, leaf in model.state_dict().items()}
    plane(params, buffers, data, ways, COORDINATES, [-1.0, 1.0], loss_fn=loss_fn)
    ascent(params, buffers, data, loss_fn=loss_fn)
    for tree_, kept in zip(given, before, strict=True):
        assert tree_.keys() == kept.keys()
        for name, (leaf, address, copy) in kept.items():
            assert tree_[name] is leaf
            assert leaf.data_ptr() == address
            assert torch.equal(leaf, copy)
    for name, leaf in model.state_dict().items():
        assert torch.equal(leaf, weights[name])


def test_what_is_evaluated_shares_no_memory_with_what_was_given_and_has_no_graph():
    seen = []

    def loss_fn(params, buffers, batch):
        w = params["w"]
        seen.append((w.data_ptr(), w.requires_grad, torch.is_grad_enabled()))
        return w.sum()

    direction = {"w": W["w"].clone().requires_grad_()}
    found = line(W, {}, [ONE, ONE], direction, COORDINATES, loss_fn=loss_fn)
    assert len(seen) == 8
    ((address, *graph),) = set(seen)  # One copy, written to again and again.
    assert address not in {W["w"].data_ptr(), direction["w"].data_ptr()}
    assert graph == [False, False]
    assert not found.loss.requires_grad


def test_progress_is_told_after_every_point():
    told = []
    loss_fn = lambda params, buffers, batch: told.append("loss") or params["w"].sum()  # noqa: E731
    line(W, {}, ONE, W, [0.0, 1.0], loss_fn=loss_fn, progress=lambda *at: told.append(at))
    assert told == ["loss", (1, 2), "loss", (2, 2)]
    told.clear()
    plane(
        W,
        {},
        ONE,
        (W, W),
        [0.0],
        [0.0, 1.0, 2.0],
        loss_fn=quadratic_of_one,
        progress=lambda *at: told.append(at),
    )
    assert told == [(1, 3), (2, 3), (3, 3)]


def quadratic_of_one(params, buffers, batch):
    return params["w"].square().sum()


def test_a_loader_is_gone_through_at_every_point():
    data = torch.utils.data.TensorDataset(torch.arange(5.0)[:, None])
    loader = torch.utils.data.DataLoader(data, batch_size=2, shuffle=True)
    found = line(
        {"w": torch.ones(1)},
        {},
        loader,
        {"w": torch.ones(1)},
        [0.0, 1.0, 2.0],
        loss_fn=lambda params, buffers, batch: (params["w"] * batch[0]).mean(),
    )
    assert_close(found.loss, torch.tensor([2.0, 4.0, 6.0]).double())


@pytest.mark.parametrize("one", [torch.ones(2), (torch.ones(2),), {"x": torch.ones(2)}])
def test_a_tuple_tensor_or_mapping_is_one_batch(one):
    seen = []

    def loss_fn(params, buffers, batch):
        seen.append(batch)
        return params["w"].sum()

    line(W, {}, one, W, [0.0], loss_fn=loss_fn)
    assert seen == [one] or seen[0] is one


BAD_INPUTS = [
    ({"batches": iter([ONE])}, TypeError, "be gone through again.* got list_iterator"),
    ({"batches": (x for x in [ONE])}, TypeError, "got generator"),
    ({"batches": 3}, TypeError, "got int"),
    ({"batches": []}, ValueError, "an example that counts in the loss, got none"),
    (
        {"batches": [(ONE, torch.ones(2))]},
        ValueError,
        r"one length.* \(1,\), \(2,\)",
    ),
    ({"direction": {}}, ValueError, r"must name params or buffers, got \[\]"),
    ({"direction": {"x": ONE}}, ValueError, r"must name params or buffers, got \['x'\]"),
    (
        {"direction": {"w": ONE.double()}},
        ValueError,
        r"direction .* w: \(3,\) against \(1,\)",
    ),
    ({"direction": {"w": torch.ones(3)}}, ValueError, "float64 against torch.float32"),
    ({"direction": {"count": ONE.long()}}, ValueError, r"can move, not \['count'\]"),
    ({"direction": W["w"]}, TypeError, "a direction must map names to tensors"),
    ({"at": []}, ValueError, "at must be a list of finite numbers"),
    ({"at": [0.0, math.nan]}, ValueError, "at must be a list of finite numbers"),
    ({"at": [[0.0]]}, ValueError, "at must be a list of finite numbers"),
    ({"params": {"w": W["w"].long()}}, ValueError, "params must be floating point"),
    ({"buffers": W}, ValueError, r"must not share names, both hold \['w'\]"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_INPUTS)
def test_bad_input_says_what_came(change, error, message):
    given = {"params": W, "buffers": {**CURVATURE, "count": ONE.long()}}
    given |= {"batches": ONE, "direction": W, "at": [0.0]} | change
    with pytest.raises(error, match=message):
        line(**given, loss_fn=quadratic)


def test_a_state_that_shares_its_memory_with_the_model_is_refused():
    _, buffers, loss_fn, data = network()
    own = {
        name: w.detach() for name, w in loss_fn.function.__self__._model.named_parameters()
    }
    for evaluated in (
        lambda: line(own, buffers, data, own, [0.0], loss_fn=loss_fn),
        lambda: ascent(own, buffers, data, loss_fn=loss_fn),
    ):
        with pytest.raises(ValueError, match="shares its memory with the model"):
            evaluated()
