import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import samfn
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
    half = samfn.gradient.evaluate(loss_fn, params, buffers, batch)
    full = samfn.gradient.evaluate(
        samfn.supervised(model, F.cross_entropy), params, buffers, batch
    )
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
