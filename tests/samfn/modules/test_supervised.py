import copy
import itertools
import sys
from collections import UserDict
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy
import pytest
import torch
from torch import nn
from torch.autograd.graph import register_multi_grad_hook
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.testing import assert_close
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import samfn
from bench.zoo import habits
from bench.zoo.habits import Around
from samfn.compiled import operations
from samfn.gradient import GradientError, evaluate
from tests.reference import batches, small_network


def test_split_gives_detached_copies_of_everything():
    model = small_network()
    params, buffers = samfn.split(model)
    assert params.keys() == dict(model.named_parameters()).keys()
    assert buffers.keys() == dict(model.named_buffers()).keys()
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in (params | buffers).items():
        assert torch.equal(tensor, own[name])
        assert tensor.data_ptr() != own[name].data_ptr()
        assert not tensor.requires_grad


def test_frozen_parameters_and_integers_travel_as_buffers():
    model = small_network()
    model[0].weight.requires_grad_(False)
    params, buffers = samfn.split(model)
    assert "0.weight" not in params
    assert "0.weight" in buffers
    assert buffers["1.num_batches_tracked"].dtype is torch.int64


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.embed(tokens))


def test_tied_weights_are_one_entry_and_get_one_gradient():
    model = Tied()
    params, buffers = samfn.split(model)
    assert list(params) == ["embed.weight"]
    loss_fn = samfn.supervised(model, F.cross_entropy)
    tokens = torch.tensor([0, 3])
    grads = torch.func.grad(lambda p: loss_fn(p, buffers, (tokens, tokens))[0])(params)
    F.cross_entropy(model(tokens), tokens).backward()
    assert_close(grads["embed.weight"], model.embed.weight.grad)


def test_load_undoes_split():
    source, target = small_network(), small_network()
    source(batches(1)[0][0])  # moves the statistics
    with torch.no_grad():
        for p in source.parameters():
            p.add_(1.0)
    pointers = [p.data_ptr() for p in target.parameters()]
    samfn.load(target, *samfn.split(source))
    assert_close(target.state_dict(), source.state_dict(), rtol=0, atol=0)
    assert [p.data_ptr() for p in target.parameters()] == pointers


def test_load_changes_nothing_when_it_refuses():
    model = small_network()
    before = samfn.split(model)
    params, buffers = samfn.split(model)
    del buffers["1.running_mean"]
    with pytest.raises(ValueError, match=r"1.running_mean missing"):
        samfn.load(model, {n: p + 1 for n, p in params.items()}, buffers)
    assert_close(samfn.split(model), before, rtol=0, atol=0)


def test_loss_reads_and_writes_nothing_of_the_model():
    model = small_network()
    params, buffers = samfn.split(model)
    before = samfn.split(model)
    copies = [samfn.tree.clone(tree) for tree in (params, buffers)]
    loss_fn = samfn.supervised(model, F.cross_entropy)
    _, aux = loss_fn(params, buffers, batches(1)[0])
    assert_close(samfn.split(model), before, rtol=0, atol=0)
    assert_close([params, buffers], copies, rtol=0, atol=0)
    assert aux.buffers["1.num_batches_tracked"] == 1
    assert not torch.equal(aux.buffers["1.running_mean"], buffers["1.running_mean"])


def test_evaluation_mode_counts_at_every_call():
    model = small_network()
    params, buffers = samfn.split(model)
    loss_fn = samfn.supervised(model, F.cross_entropy)
    model.eval()
    loss, aux = loss_fn(params, buffers, batches(1)[0])
    assert aux.buffers["1.num_batches_tracked"] == 0
    assert_close(aux.outputs, model(batches(1)[0][0]))
    model.train()
    assert loss_fn(params, buffers, batches(1)[0])[0] != loss


def test_half_precision_computes_in_it_and_keeps_gradients_in_float32():
    model = small_network(torch.float32)
    params, buffers = samfn.split(model)
    loss_fn = samfn.supervised(model, F.cross_entropy, dtype=torch.bfloat16)
    batch = batches(1, torch.float32)[0]
    half = samfn.evaluate(loss_fn, params, buffers, batch)
    full = samfn.evaluate(samfn.supervised(model, F.cross_entropy), params, buffers, batch)
    assert half.outputs.dtype is torch.bfloat16
    assert {g.dtype for g in half.grads.values()} == {torch.float32}
    cosine = F.cosine_similarity(half.grads["7.weight"], full.grads["7.weight"]).min()
    assert 0.99 < cosine < 0.999999


def step_on(model, state):
    loss_fn = samfn.supervised(model, F.cross_entropy)
    options = {"loss_fn": loss_fn, "optimizer": samfn.sgd(), "lr": 0.1}
    return samfn.sam_update(state, batches(1)[0], **options)


def change(tree, name, value):
    return {**tree, name: value}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda p, b: (change(p, "extra", torch.ones(1)), b), "extra unexpected"),
        (
            lambda p, b: ({n: t for n, t in p.items() if n != "0.bias"}, b),
            "0.bias miss",
        ),
        (lambda p, b: (p, {}), r"buffers must have the same names: 1.num_b.* 1 more"),
        (
            lambda p, b: (change(p, "0.bias", torch.ones(7)), b),
            r"\(4,\) against \(7,\)",
        ),
        (
            lambda p, b: (change(p, "0.bias", p["0.bias"].float()), b),
            "same dtypes: 0.bias: torch.float64 against torch.float32",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_an_error(edit, message):
    model = small_network()
    state = samfn.init(*edit(*samfn.split(model)), optimizer=samfn.sgd())
    with pytest.raises(ValueError, match=message):
        step_on(model, state)


def test_the_loss_alone_refuses_other_names_too():
    model = small_network()
    params, buffers = samfn.split(model)
    loss_fn = samfn.supervised(model, F.cross_entropy)
    with pytest.raises(ValueError, match=r"model and params .* 0.bias missing"):
        loss_fn({n: p for n, p in params.items() if n != "0.bias"}, buffers, batches(1)[0])
    with pytest.raises(ValueError, match=r"model and buffers .* x unexpected"):
        loss_fn(params, {**buffers, "x": torch.ones(1)}, batches(1)[0])


def test_a_model_may_be_cast_after_it_was_wrapped():
    model = small_network(torch.float32)
    loss_fn = samfn.supervised(model, F.cross_entropy)
    model.double()
    state = samfn.init(*samfn.split(model), optimizer=samfn.sgd())
    options = {"loss_fn": loss_fn, "optimizer": samfn.sgd(), "lr": 0.1}
    assert samfn.sam_update(state, batches(1)[0], **options)[1].finite


def test_parameters_that_share_memory_with_the_model_are_an_error():
    model = small_network()
    _, buffers = samfn.split(model)
    aliases = {name: p.detach() for name, p in model.named_parameters()}
    state = samfn.init(aliases, buffers, optimizer=samfn.sgd())
    with pytest.raises(ValueError, match=r"0.weight shares its memory with the model"):
        step_on(model, state)


def test_models_that_cannot_be_split_say_why():
    with pytest.raises(TypeError, match="got DataParallel: pass what it wraps"):
        samfn.split(nn.DataParallel(nn.Linear(1, 1)))
    with pytest.raises(ValueError, match="weight is lazy"):
        samfn.split(nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"first: 0.weight is lazy"):
        samfn.supervised(nn.Sequential(nn.LazyLinear(3)), F.cross_entropy)
    with pytest.raises(ValueError, match="running_mean is lazy"):
        samfn.supervised(nn.LazyBatchNorm1d(affine=False), F.cross_entropy)
    with pytest.raises(ValueError, match="no parameter that requires grad"):
        samfn.split(nn.Linear(1, 1).requires_grad_(False))


def test_without_a_dtype_it_computes_in_that_of_the_parameters():
    model = small_network(torch.float32)
    batch = batches(1, torch.float32)[0]
    loss_fn = samfn.supervised(model, F.cross_entropy)
    _, plain = loss_fn(*samfn.split(model), batch)
    with torch.autocast("cpu", torch.bfloat16):
        _, inside = loss_fn(*samfn.split(model), batch)
    assert torch.equal(inside.outputs, plain.outputs)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_an_autocast_around_a_step_changes_no_gradient(dtype):
    model = small_network(torch.float32)
    batch = batches(1, torch.float32)[0]
    loss_fn = samfn.supervised(model, F.cross_entropy, dtype=dtype)
    params, buffers = samfn.split(model)
    given = loss_fn, params, buffers, batch

    def found():
        yield samfn.evaluate(*given).grads
        yield samfn.measure.hessian_product(*given, params)
        optimizer = samfn.sgd()
        for plan in ("whole", "gradient", "loss"):
            state = samfn.init(*samfn.split(model), optimizer=optimizer)
            how = {"plan": plan, "backend": "aot_eager"}
            step = samfn.compile_update(loss_fn=loss_fn, optimizer=optimizer, **how)
            yield step(state, batch, lr=0.1)[0].params

    plain = [*found()]
    with torch.autocast("cpu", torch.float16):
        inside = [*found()]
    assert_close(inside, plain, rtol=0, atol=0)


def test_inside_of_torch_func_it_says_what_to_call():
    model, (images, labels) = small_network(), batches(1)[0]
    loss_fn, (params, buffers) = samfn.supervised(model, F.mse_loss), samfn.split(model)

    def gradient(image, label):
        return samfn.evaluate(loss_fn, params, buffers, (image[None], label[None])).grads

    with pytest.raises(samfn.GradientError, match="call the loss function there"):
        torch.vmap(gradient)(images, labels)


def test_every_use_of_a_tied_weight_or_buffer_reads_what_was_given():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    model[1].register_buffer("running_var", model[1].running_mean)
    params, buffers = samfn.split(model)
    assert {*params} == {"0.weight", "0.bias", "1.weight", "1.bias", "2.bias"}
    assert {*buffers} == {"1.running_mean", "1.num_batches_tracked"}
    loss_fn = samfn.supervised(model, F.mse_loss)
    moved = {name: w + 1 for name, w in params.items()}
    buffers["1.running_mean"] = torch.full((3,), 7.0)
    batch = torch.randn(4, 3), torch.randn(4, 3)
    model.eval()
    _, aux = loss_fn(moved, buffers, batch)
    samfn.load(model, moved, buffers)
    assert_close(aux.outputs, model(batch[0]).detach())


def checkpointed(*, reentrant):
    torch.manual_seed(0)
    return Around(partial(habits.checkpointed, reentrant=reentrant)).double()


def taken(model, *, criterion=F.cross_entropy, batch=None, **options):
    """Return what a step gives on random vectors; the state that it is given stays."""
    batch = batch or (habits.vectors(), habits.classes())
    loss_fn, optimizer = samfn.supervised(model, criterion), samfn.sgd()
    state = samfn.init(*samfn.split(model), optimizer=optimizer)
    before = pytree.tree_map(torch.clone, state)
    given = {"loss_fn": loss_fn, "optimizer": optimizer, "lr": 0.1, **options}
    result = samfn.sam_update(state, batch, **given)
    assert_close(state, before, rtol=0, atol=0)
    return result


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_loss_that_recomputes_is_not_differentiated_by_other_means(reentrant):
    model = checkpointed(reentrant=reentrant)
    loss_fn = samfn.supervised(model, F.cross_entropy)
    params, buffers = samfn.split(model)
    leaves = {name: w.requires_grad_() for name, w in params.items()}
    batch = habits.vectors(), habits.classes()
    with pytest.raises(RuntimeError, match="take the gradient by a step or a measure"):
        loss_fn(leaves, buffers, batch)
    if not reentrant:  # PyTorch warns of the other.
        with torch.no_grad():
            loss_fn(leaves, buffers, batch)
    with pytest.raises(RuntimeError, match=r"cannot differentiate this|take the gradient"):
        evaluate(lambda *given: loss_fn(*given), params, buffers, batch)


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_computed_again_counts_batches_once(reentrant):
    state, _ = taken(checkpointed(reentrant=reentrant))
    assert state.buffers["inner.1.num_batches_tracked"] == 1


class Closed(nn.Module):
    """A criterion that is a function of a model it was given."""

    def __init__(self, model):
        super().__init__()
        self._kept = [model]

    def forward(self, outputs, targets):
        return F.cross_entropy(outputs, targets) + self._kept[0](outputs).mean()


def test_a_gradient_that_nobody_would_use_is_an_error():
    other = nn.Linear(3, 1).double()
    model = habits.head().double()
    with pytest.raises(GradientError, match=r"not in params, of shape \(1(, 3|,)\)"):
        taken(model, criterion=Closed(other))
    taken(model, criterion=Closed(other.requires_grad_(False)))
    with pytest.raises(
        ValueError, match="criterion has parameters of its own, weight, bias"
    ):
        samfn.supervised(model, nn.Linear(3, 1))


def test_a_loss_of_the_model_itself_is_an_error():
    model = habits.head().double()
    params, buffers = samfn.split(model)

    def ignores(params, buffers, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    with pytest.raises(GradientError, match="depends on none of the parameters"):
        evaluate(ignores, params, buffers, (habits.vectors(), habits.classes()))


def test_without_gradients_a_step_is_an_error():
    with torch.inference_mode(), pytest.raises(GradientError, match="inference_mode"):
        taken(nn.Linear(6, 3).double())


@pytest.mark.parametrize(
    ("criterion", "came"),
    [(lambda out, y: {"loss": out.sum()}, "got dict"), (lambda out, y: 0.5, "got float")],
)
def test_what_a_criterion_must_return_is_said(criterion, came):
    with pytest.raises(TypeError, match=came):
        taken(habits.head().double(), criterion=criterion)


def test_cached_parametrizations_are_refused_around_a_step_alone():
    model = habits.layers(nn.utils.parametrizations.weight_norm).double()
    with parametrize.cached(), pytest.raises(RuntimeError, match=r"cached\(\) is open"):
        taken(model)
    taken(model)


def test_numbers_of_numpy_are_numbers():
    model = nn.Linear(6, 3).double()
    batch = habits.vectors(), habits.classes()
    found = taken(model, batch=batch, lr=numpy.float32(0.5), rho=numpy.float64(0.25))
    expected = taken(model, batch=batch, lr=0.5, rho=0.25)
    assert_close(found, expected, rtol=0, atol=0)


class Graph(nn.Module):
    """Messages along the edges of a graph that is a sparse buffer."""

    def __init__(self):
        super().__init__()
        self.layer = habits.head()
        edges = torch.tensor([[0, 1, 2], [3, 4, 5]])
        adjacency = torch.sparse_coo_tensor(
            edges, torch.ones(3), (8, 8), check_invariants=True
        )
        self.register_buffer("edges", adjacency.coalesce())

    def forward(self, x):
        return self.layer(x + torch.sparse.mm(self.edges, x))


def test_sparse_buffers_are_read_and_stay():
    model = Graph().double()
    batch = habits.vectors(), habits.classes()
    state, _ = taken(model, batch=batch)
    assert_close(state.buffers["edges"], model.edges)
    dense = Graph().double()
    dense.load_state_dict(model.state_dict())
    dense.edges = dense.edges.to_dense()
    expected, _ = taken(dense, batch=batch)
    assert_close(dict(state.params), dict(expected.params))


def test_states_are_stepped_outside_of_transforms():
    model = nn.Linear(6, 3).double()
    optimizer, loss_fn = samfn.sgd(), samfn.supervised(model, F.cross_entropy)
    state = samfn.init(*samfn.split(model), optimizer=optimizer)
    states = pytree.tree_map(lambda leaf: torch.stack([leaf, leaf]), state)
    batch = habits.vectors(), habits.classes()

    def step(state):
        given = {"loss_fn": loss_fn, "optimizer": optimizer, "lr": 0.1}
        return samfn.sam_update(state, batch, **given)[0].params

    with pytest.raises(ValueError, match=r"one inside of torch.vmap"):
        torch.vmap(step)(states)


def test_a_batch_that_asks_for_a_gradient_gets_none():
    inputs = habits.vectors().requires_grad_()
    taken(nn.Linear(6, 3).double(), batch=(inputs, habits.classes()))
    assert inputs.grad is None


def test_recurrent_layers_remember_their_own_weights():
    model = habits.Recurrent(nn.GRU(6, 6)).double()
    taken(model, batch=(habits.packed(), habits.classes()))
    own = dict(model.layer.named_parameters())
    assert all(
        w is own[name] for name, w in zip(own, model.layer._flat_weights, strict=True)
    )
    copy.deepcopy(model)


@pytest.mark.parametrize(
    "weight", [None, torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64)]
)
@pytest.mark.parametrize("as_module", [False, True])
def test_a_loss_tells_what_it_is_a_mean_over(weight, as_module):
    targets = torch.tensor([0, 1, 7, 2, 7, 1])
    options = {"ignore_index": 7, "weight": weight}
    criterion = nn.CrossEntropyLoss(**options)
    if not as_module:
        criterion = partial(F.cross_entropy, **options)
    weigh = samfn.supervised(nn.Linear(6, 3), criterion).weigh
    found = weigh((torch.ones(6, 6), targets))
    kept = targets[targets != 7]
    assert found == (len(kept) if weight is None else weight[kept].sum())
    by_rows = samfn.supervised(nn.Linear(6, 3), F.mse_loss).weigh
    assert by_rows((torch.ones(6, 6), targets)) == 6


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_gradient_by_some_parameters_goes_through_what_is_computed_again(reentrant):
    batch = habits.vectors(), habits.classes()
    model = checkpointed(reentrant=reentrant)
    params, buffers = samfn.split(model)
    loss_fn = samfn.supervised(model, F.cross_entropy)
    whole = evaluate(loss_fn, params, buffers, batch).grads
    some = ["inner.0.weight", "last.bias"]
    before = samfn.supervised(model, F.cross_entropy)
    model._call, call = habits.plainly, model._call  # It begins to recompute later.
    evaluate(before, params, buffers, batch)
    model._call = call
    for known in (loss_fn, before):
        found = evaluate(known, params, buffers, batch, wrt=some).grads
        assert_close(found, {name: whole[name] for name in some}, rtol=0, atol=0)
        assert found["inner.0.weight"].any()


def test_hooks_of_parameters_run_in_what_a_reentrant_checkpoint_computes_again():
    model = checkpointed(reentrant=True)
    model.inner[0].weight.register_hook(lambda grad: 0 * grad)
    params, buffers = samfn.split(model)
    loss_fn = samfn.supervised(model, F.cross_entropy)
    seen = evaluate(loss_fn, params, buffers, (habits.vectors(), habits.classes()))
    assert not seen.grads["inner.0.weight"].any()
    assert seen.grads["inner.3.weight"].any()


class Asking(nn.Module):
    """A module that asks what its parameters are."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale = habits.head(), nn.Parameter(torch.tensor(2.0))
        self.layer.bias.gain = 3.0

    def forward(self, x):
        scale = self.scale if isinstance(self.scale, nn.Parameter) else 1.0
        return self.layer(x) * scale * getattr(self.layer.bias, "gain", 1.0)


def test_parameters_are_lent_as_parameters_with_their_attributes():
    model = Asking().double()
    batch = habits.vectors(), habits.classes()
    expected = F.cross_entropy(model(batch[0]), batch[1])
    _, metrics = taken(model, batch=batch)
    assert_close(metrics.loss, expected.detach())
    assert type(samfn.split(model)[0]["scale"]) is torch.Tensor


def test_a_penalty_on_what_requires_grad_is_the_same_in_every_pass():
    model = habits.head().double()
    batch = habits.vectors(), habits.classes()

    def criterion(outputs, targets):
        squares = [p.square().sum() for p in model.parameters() if p.requires_grad]
        return F.cross_entropy(outputs, targets) + sum(squares)

    expected = criterion(model(batch[0]), batch[1]).item()
    loss_fn = samfn.supervised(model, criterion)
    params, buffers = samfn.split(model)
    for wrt in (None, (), ("bias",)):
        seen = evaluate(loss_fn, params, buffers, batch, wrt=wrt)
        assert seen.loss.item() == pytest.approx(expected)
    with torch.no_grad():
        assert loss_fn(params, buffers, batch)[0].item() == pytest.approx(expected)
    assert not any(w.requires_grad for w in params.values())


def test_what_is_frozen_between_steps_is_not_trained_in_silence():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)).double()
    loss_fn, optimizer = samfn.supervised(model, F.cross_entropy), samfn.sgd()
    state = samfn.init(*samfn.split(model), optimizer=optimizer)
    given = {"loss_fn": loss_fn, "optimizer": optimizer, "lr": 0.1}
    batch = habits.vectors(), habits.classes()
    state, _ = samfn.sam_update(state, batch, **given)
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"0.weight, 0.bias is frozen in the model"):
        samfn.sam_update(state, batch, **given)


class Later(nn.Linear):
    """A layer that begins to clip its weight at its third pass."""

    passes = 0

    def forward(self, x):
        self.passes += 1
        if self.passes > 2:
            with torch.no_grad():
                self.weight.clamp_(-0.01, 0.01)
        return super().forward(x)


class Listed(nn.Module):
    """A module that reaches a tensor of its own by a list."""

    def __init__(self, *, buffer):
        super().__init__()
        self.layer = habits.head()
        self.register_buffer("mean", torch.zeros(6, dtype=torch.float64))
        self.layer.double()
        self.kept = [self.mean if buffer else self.layer.weight]

    def forward(self, x):
        if self.kept[0] is self.mean or self.kept[0].ndim == 1:
            return self.layer(x - self.kept[0].mul_(0.9).add_(x.mean(0)))
        with torch.no_grad():
            shift = F.linear(x, self.kept[0])
        return self.layer(x) + shift


def test_writes_that_begin_later_and_tensors_behind_the_attributes_are_errors():
    model = Later(6, 3).double()
    taken(model)  # two passes
    with pytest.raises(ValueError, match="the forward pass writes to weight"):
        taken(model)
    for buffer, name in ((True, "mean"), (False, "layer.weight")):
        with pytest.raises(ValueError, match=f"model's own {name} by another way"):
            taken(Listed(buffer=buffer))


def test_a_leaf_of_the_caller_gets_no_gradient():
    leaf = torch.ones((), dtype=torch.float64, requires_grad=True)
    taken(habits.head().double(), criterion=lambda out, y: F.cross_entropy(out * leaf, y))
    assert leaf.grad is None


def test_a_criterion_that_writes_to_its_buffers_is_an_error():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("centre", torch.zeros(3, dtype=torch.float64))

        def forward(self, outputs, targets):
            self.centre.mul_(0.9).add_(outputs.detach().mean(0))
            return F.cross_entropy(outputs - self.centre, targets)

    with pytest.raises(ValueError, match="writes to the criterion's centre"):
        taken(habits.head().double(), criterion=Centred())


def test_what_a_mean_is_over_follows_the_criterion_and_sums_are_none():
    batch = torch.ones(4, 6), torch.tensor([0, 1, 2, 2])
    criterion = nn.CrossEntropyLoss()
    weigh = samfn.supervised(nn.Linear(6, 3), criterion).weigh
    assert weigh(batch) == 4
    criterion.ignore_index = 2
    assert weigh(batch) == 2

    class Focal(nn.CrossEntropyLoss):
        """Reduces in a way of its own."""

        def forward(self, outputs, targets):
            return F.cross_entropy(outputs, targets, reduction="none").mean()

    model = nn.Linear(6, 3)
    loss_fn = samfn.supervised(model, Focal(ignore_index=2))
    samfn.evaluate(loss_fn, *samfn.split(model), batch)
    assert loss_fn.weigh(batch) == 4
    summed = partial(F.cross_entropy, reduction="sum")
    with pytest.raises(ValueError, match="expected a mean of the examples' losses"):
        samfn.supervised(nn.Linear(6, 3), summed).weigh(batch)


def stepped(model, batch, criterion=F.cross_entropy):
    optimizer = samfn.sgd()
    state = samfn.init(*samfn.split(model), optimizer=optimizer)
    how = {"loss_fn": samfn.supervised(model, criterion), "optimizer": optimizer}
    return samfn.sam_update(state, batch, **how, lr=0.1)


class Keeping(nn.Linear):
    """Keeps its weights in evaluation, as LeViT of timm its attention biases."""

    def __init__(self):
        super().__init__(4, 3)
        self.cache, self.seen = {}, []

    def forward(self, inputs):
        if self.training:
            return super().forward(inputs)
        self.seen.append(inputs)
        return inputs @ self.cache.setdefault("weight", self.weight * 1).T + self.bias


def test_what_a_model_keeps_in_evaluation_is_not_read_at_other_parameters():
    model = Keeping().eval()
    loss_fn = samfn.supervised(model, F.cross_entropy)
    params, buffers = samfn.split(model)
    batch = torch.randn(2, 4), torch.tensor([0, 1])
    for scale in (1, 3):
        scaled = samfn.tree.scale(params, scale)
        outputs = batch[0] @ scaled["weight"].T + scaled["bias"]
        assert_close(loss_fn(scaled, buffers, batch)[0], F.cross_entropy(outputs, batch[1]))
    assert model.cache == {}
    assert model.seen == []


class Recent(nn.Linear):
    """Keeps in order what it used last."""

    def __init__(self):
        super().__init__(4, 3)
        self.used = dict.fromkeys("abc")

    def forward(self, inputs):
        self.used["a"] = self.used.pop("a")
        return super().forward(inputs)


def test_what_a_model_keeps_in_evaluation_keeps_its_order():
    model = Recent().eval()
    batch = torch.randn(2, 4), torch.tensor([0, 1])
    loss_fn = samfn.supervised(model, F.cross_entropy)
    samfn.evaluate(loss_fn, *samfn.split(model), batch)
    assert [*model.used] == ["a", "b", "c"]
    model(batch[0])
    assert [*model.used] == ["b", "c", "a"]


def test_a_dry_run_leaves_nothing_in_what_a_model_keeps():
    model = Keeping()
    model.register_forward_hook(lambda module, _, outputs: module.seen.append(outputs))
    state = samfn.init(*samfn.split(model), optimizer=samfn.sgd())
    loss_fn = samfn.supervised(model, F.cross_entropy)
    operations(loss_fn, state, (torch.randn(2, 4), torch.tensor([0, 1])))
    assert model.seen == []


class Record:
    """A batch of a kind that nobody can copy."""

    def __init__(self, value):
        self.parts = {"x": [value]}


@pytest.mark.parametrize("writes", [False, True])
def test_a_batch_that_cannot_be_copied_may_be_read(writes):
    class Opening(nn.Linear):
        def forward(self, record):
            (inputs,) = record.parts["x"]
            return super().forward(inputs.mul_(2) if writes else inputs)

    batch = Record(torch.ones(2, 4)), torch.tensor([0, 1])
    if writes:
        with pytest.raises(ValueError, match="a tensor inside of the batch's Record"):
            stepped(Opening(4, 3), batch)
    else:
        stepped(Opening(4, 3), batch)


@pytest.mark.parametrize("writes", [False, True])
def test_buffers_that_share_memory_may_be_read(writes):
    class Views(nn.Linear):
        def __init__(self):
            super().__init__(4, 3)
            self.register_buffer("whole", torch.zeros(4))
            self.register_buffer("start", self.whole[:2])

        def forward(self, inputs):
            if writes:
                self.whole.add_(1)
            return super().forward(inputs + self.whole) + self.start.sum()

    batch = torch.ones(2, 4), torch.tensor([0, 1])
    if writes:
        with pytest.raises(ValueError, match="whole, which shares memory with another"):
            stepped(Views(), batch)
    else:
        stepped(Views(), batch)


def test_a_model_is_lent_to_one_pass_at_a_time():
    model = nn.Linear(4, 3)
    inner = samfn.supervised(model, F.cross_entropy)
    given, batch = samfn.split(model), (torch.ones(2, 4), torch.tensor([0, 1]))

    def criterion(outputs, targets):
        return F.cross_entropy(outputs, targets) + inner(*given, batch)[0]

    with pytest.raises(ValueError, match="lent to another pass"):
        stepped(model, batch, criterion)
    stepped(model, batch)


def test_a_named_tuple_is_one_argument_of_a_model():
    class Pair(NamedTuple):
        left: torch.Tensor
        right: torch.Tensor

    class Adding(nn.Linear):
        def forward(self, pair):
            return super().forward(pair.left + pair.right)

    stepped(Adding(4, 3), (Pair(torch.ones(2, 4), torch.ones(2, 4)), torch.tensor([0, 1])))


def test_a_batch_of_several_inputs_stays_what_it_is_where_forward_writes_to_it():
    class Sum(nn.Linear):
        def forward(self, one, other):
            return super().forward(one.sub_(0.5) + other["x"].mul_(2.0))

    inputs = torch.randn(4, 3), {"x": torch.randn(4, 3)}
    batch = inputs, torch.randint(2, (4,))
    before = copy.deepcopy(batch)
    model = Sum(3, 2)
    loss_fn = samfn.supervised(model, F.cross_entropy)
    found = samfn.evaluate(loss_fn, *samfn.split(model), batch)
    assert_close(batch, before, atol=0, rtol=0)
    again = samfn.evaluate(loss_fn, *samfn.split(model), batch)
    assert found.loss == again.loss


def test_hooks_that_wait_for_several_gradients_run_or_are_refused():
    batch, seen = (torch.randn(2, 4), torch.tensor([0, 1])), []
    for mode in ("any", "all"):
        model = nn.Linear(4, 3)
        register_multi_grad_hook([*model.parameters()], seen.append, mode=mode)
        if mode == "any":
            stepped(model, batch)
            assert len(seen) == 2  # once in each pass
        else:
            with pytest.raises(ValueError, match="a hook of register_multi_grad_hook that"):
                stepped(model, batch)


def test_hooks_that_are_registered_later_are_refused_too():
    model, batch = nn.Linear(4, 3), (torch.randn(2, 4), torch.tensor([0, 1]))
    optimizer, loss_fn = samfn.sgd(), samfn.supervised(model, F.cross_entropy)
    state = samfn.init(*samfn.split(model), optimizer=optimizer)
    given = {"loss_fn": loss_fn, "optimizer": optimizer, "lr": 0.1}
    state, _ = samfn.sam_update(state, batch, **given)
    model.weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ValueError, match=r"a hook that waits for its gradient in \.grad"):
        samfn.sam_update(state, batch, **given)


def test_a_forward_pass_that_fails_in_a_selective_checkpoint_leaves_nothing_behind():
    def fails(inner, x):
        return habits.selectively(lambda x: inner(x) + x.new_ones(7), x)

    model = Around(fails).double()
    with pytest.raises(RuntimeError, match="must match the size"):
        taken(model)
    assert not _get_current_dispatch_mode_stack()
    model.first.weight.detach().clone()


class Encoding(UserDict):
    """A mapping of a kind that trees of PyTorch do not know, as of tokenizers."""


@dataclass
class Cloud:
    x: torch.Tensor


class Shifting(nn.Linear):
    """Puts what it computes into the batch, as is usual with point clouds."""

    def forward(self, data):
        if isinstance(data, Cloud):
            data.x = data.x - 1
            return super().forward(data.x)
        data["x"] = data["x"] - 1
        return super().forward(data["x"])


@pytest.mark.parametrize("make", [Encoding, Cloud, dict])
def test_what_forward_puts_into_a_batch_the_next_pass_does_not_find(make):
    model = Shifting(6, 3).double()
    inputs, targets = habits.vectors(), habits.classes()
    loss_fn, optimizer = samfn.supervised(model, F.cross_entropy), samfn.sgd()
    state = samfn.init(*samfn.split(model), optimizer=optimizer)
    data, given = make(x=inputs), {"loss_fn": loss_fn, "optimizer": optimizer, "lr": 0.1}
    _, metrics = samfn.sam_update(state, ((data,), targets), rho=1e-6, **given)
    expected = F.cross_entropy(nn.Linear.forward(model, inputs - 1), targets)
    assert_close(metrics.loss, expected.detach())
    assert_close(metrics.perturbed_loss, expected.detach(), rtol=1e-4, atol=0)
    assert (data.x if make is Cloud else data["x"]) is inputs


@pytest.mark.parametrize("trains", [True, False])
def test_after_ctrl_c_at_any_line_the_model_is_what_it_was(trains):
    model = nn.Sequential(Keeping(), nn.BatchNorm1d(3)).train(trains)
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    loss_fn = samfn.l2_regularized(samfn.supervised(model, F.cross_entropy), 0.1)
    given = *samfn.split(model), (torch.randn(4, 4), torch.tensor([0, 1, 0, 1]))
    where = tuple(sys.modules[m].__file__ for m in ("contextlib", "samfn.modules.lending"))
    expected = samfn.evaluate(loss_fn, *given).grads
    samfn.evaluate(loss_fn, *given)  # The first pass is watched, and takes other lines.

    def lines_until_ctrl_c(after):
        left = after

        def trace(frame, event, _):
            nonlocal left
            if not frame.f_code.co_filename.startswith(where):
                return None
            # Signals are seen at calls and jumps back, at no line where code is straight.
            straight = frame.f_code.co_name in ("holding", "_as_they_are")
            if event == "call" or (event == "line" and not straight):
                left -= 1
                if left == 0:
                    raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            samfn.evaluate(loss_fn, *given)
        except KeyboardInterrupt as error:
            sys.settrace(before)
            return error  # Who keeps it keeps the frames.
        finally:
            sys.settrace(before)
        return None

    for after in itertools.count(1):
        error = lines_until_ctrl_c(after)
        now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        assert now.keys() == own.keys(), after
        assert all(now[name] is own[name] for name in own), after
        if error is None:
            break
    assert after > 100
    grads = samfn.evaluate(loss_fn, *given).grads
    assert all(torch.equal(grads[name], expected[name]) for name in expected)


class Empty(nn.Sequential):
    """A criterion whose length is 0."""

    def forward(self, outputs, targets):
        return F.mse_loss(outputs, targets)


@pytest.mark.parametrize(
    "criterion",
    [Empty(), torch.compile(nn.MSELoss(), backend="eager")],
    ids=["empty", "compiled"],
)
def test_a_criterion_of_any_length_is_one(criterion):
    model = nn.Linear(3, 2)
    loss_fn = samfn.supervised(model, criterion)
    outputs, targets = torch.randn(4, 2), torch.randn(4, 2)
    found = loss_fn.criterion(outputs, (torch.randn(4, 3), targets))
    assert_close(found, F.mse_loss(outputs, targets))
