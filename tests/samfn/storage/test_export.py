"""A trained model leaves samfn, and does there what it did here."""

import copy

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import samfn
from recipes.models.wide_resnet import WideResNet
from samfn.storage import export as export_module
from samfn.storage import tensorfile
from tests.reference import batches, small_network


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.embedding(tokens))


def trained(model, some):
    loss_fn = samfn.supervised(model, F.cross_entropy)
    state = samfn.init(*samfn.split(model), optimizer=samfn.sgd())
    for batch in some:
        state, _ = samfn.sam_update(
            state, batch, loss_fn=loss_fn, optimizer=samfn.sgd(), lr=0.1
        )
    return state


def tokens():
    return [(torch.randint(7, (5,)), torch.randint(7, (5,))) for _ in range(3)]


@pytest.mark.parametrize(
    ("model", "some"), [(small_network(), batches(3)), (Tied(), tokens())]
)
def test_weights_load_into_the_module_by_other_hands(tmp_path, model, some):
    path = tmp_path / "model.safetensors"
    before, state = copy.deepcopy(model.state_dict()), trained(model, some)
    samfn.export_weights(path, model, state.params, state.buffers)
    assert all(torch.equal(before[name], w) for name, w in model.state_dict().items())
    other = copy.deepcopy(model)
    other.load_state_dict(load_file(path), strict=True)
    samfn.load(model, state.params, state.buffers)
    inputs = some[0][0]
    assert torch.equal(other.eval()(inputs), model.eval()(inputs))


def test_texts_stand_beside_the_weights_for_who_has_no_samfn(tmp_path):
    path, (params, buffers) = tmp_path / "m.safetensors", samfn.split(small_network())
    given = path, small_network(), params, buffers
    samfn.export_weights(*given, metadata={"classes": '["é"]'})
    with safe_open(path, "pt") as file:
        assert file.metadata()["classes"] == '["é"]'
    assert tensorfile.read(path)[1] == {"classes": '["é"]'}
    with pytest.raises(ValueError, match=r"without .* got 'samfn\.sha256'"):
        samfn.export_weights(*given, metadata={"samfn.sha256": ""})
    with pytest.raises(TypeError, match="holds texts by name, got 'epoch': 3"):
        samfn.export_weights(*given, metadata={"epoch": 3})


def network():
    torch.manual_seed(0)
    model = WideResNet(10, 1, 10, channels=3, dropout=0.2)
    return model.to(memory_format=torch.channels_last)


def test_a_program_takes_keyword_arguments_as_its_model(tmp_path):
    class Named(nn.Linear):
        def forward(self, *, scale, right, left):
            return super().forward(scale * left + right)

    path, model = tmp_path / "model.pt2", Named(3, 2)
    inputs = {"left": torch.randn(4, 3), "right": torch.randn(4, 3), "scale": 2.0}
    samfn.export_program(path, model, *samfn.split(model), inputs)
    longer = {**inputs, "left": torch.randn(5, 3), "right": torch.randn(5, 3)}
    found = torch.export.load(path).module()(**longer)
    torch.testing.assert_close(found, model(**longer).detach())


def test_a_program_gives_the_models_outputs_for_batches_of_any_length(tmp_path):
    path, model = tmp_path / "model.pt2", network()
    params, buffers = samfn.split(model)
    params = {name: 1.1 * w for name, w in params.items()}
    inputs = torch.randn(2, 3, 8, 8)
    samfn.export_program(path, model, params, buffers, inputs)
    assert model.training
    program = torch.export.load(path).module()
    samfn.load(model, params, buffers)
    for length in (1, 2, 5):
        inputs = torch.randn(length, 3, 8, 8)
        torch.testing.assert_close(program(inputs), model.eval()(inputs))


class Forgetful(nn.Module):
    """A module whose output torch.export does not see the last of."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, inputs):
        wrong = 2.0 if torch.compiler.is_exporting() else 1.0
        return wrong * self.weight * inputs


def test_a_program_that_differs_is_refused_and_the_old_file_stays(tmp_path):
    path, model = tmp_path / "model.pt2", Forgetful()
    path.write_text("old")
    with pytest.raises(samfn.ExportError, match=r"model.pt2 gives other outputs"):
        samfn.export_program(path, model, *samfn.split(model), torch.ones(2, 3))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_other_parameters_than_the_models_are_refused(tmp_path):
    model = small_network()
    params, buffers = samfn.split(model)
    del params["0.weight"]
    with pytest.raises(ValueError, match=r"0.weight missing"):
        samfn.export_weights(tmp_path / "file", model, params, buffers)


class Two(nn.Module):
    """A network of two inputs and two outputs."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, a, b):
        hidden = self.layer(a) + b
        return {"scores": hidden, "hidden": (a, hidden.relu())}


def test_a_program_may_take_several_inputs_and_give_several_outputs(tmp_path):
    path, model = tmp_path / "model.pt2", Two()
    samfn.export_program(
        path, model, *samfn.split(model), (torch.randn(3, 3), torch.randn(3, 2))
    )
    inputs = torch.randn(5, 3), torch.randn(5, 2)
    found = torch.export.load(path).module()(*inputs)
    torch.testing.assert_close(found, model.eval()(*inputs))


class Gives(nn.Module):
    """A layer, and what a function makes of its outputs."""

    def __init__(self, make):
        super().__init__()
        self.layer, self.make = nn.Linear(3, 2), make

    def forward(self, x):
        return self.make(self.layer(x), x)


def export(path, model, inputs):
    samfn.export_program(path, model, *samfn.split(model), inputs)


@pytest.mark.parametrize(
    "make",
    [
        lambda y, x: y.masked_fill(torch.tensor([True, False]), float("-inf")),
        lambda y, x: y / torch.tensor([0.0, 1.0]) * 0.0,  # nan
        lambda y, x: (y, y > 0),
        lambda y, x: (y, y.argmax(1)),
        lambda y, x: (y, x[:, :0]),
    ],
)
def test_outputs_may_be_infinite_booleans_whole_numbers_or_empty(tmp_path, make):
    export(tmp_path / "model.pt2", Gives(make), torch.randn(4, 3))


def test_other_infinities_are_other_outputs():
    inf, one = torch.tensor([1.0, float("inf")]), torch.tensor([1.0, 1.0])
    close = export_module._close
    assert close(inf, inf.clone())
    assert close(one, one + 1e-6)
    for other in (one, -inf, torch.tensor([1.0, float("nan")]), inf[:1], inf + 1e-4):
        assert not close(other, inf)
    assert not close(torch.tensor([True]), torch.tensor([False]))


@pytest.mark.parametrize(
    ("make", "given", "refused"),
    [
        (lambda y, x: torch.stack([2 * row for row in y]), 4, "1 or 5"),
        (lambda y, x: y if x.shape[0] > 3 else 2 * y, 4, "1"),
        (lambda y, x: y, 1, "2"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*specialized")
def test_a_program_that_takes_no_batch_of_any_length_says_so(
    tmp_path, make, given, refused
):
    with pytest.warns(RuntimeWarning, match=f"takes no batch of {refused} examples"):
        export(tmp_path / "model.pt2", Gives(make), torch.randn(given, 3))


class Extra(nn.Linear):
    """A layer with extra state."""

    extra = torch.ones(2)

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


def test_extra_state_is_written_where_it_is_a_tensor_and_named_where_it_is_none(tmp_path):
    path, model = tmp_path / "model.safetensors", nn.Sequential(Extra(3, 2))
    samfn.export_weights(path, model, *samfn.split(model))
    nn.Sequential(Extra(3, 2)).load_state_dict(load_file(path), strict=True)
    model[0].extra = {"scale": 1}
    with pytest.raises(ValueError, match=r"got a dict as 0\._extra_state"):
        samfn.export_weights(path, model, *samfn.split(model))


def test_a_hook_that_renames_weights_is_told_and_writes_none_of_the_models_own(tmp_path):
    model = nn.Sequential(nn.Linear(3, 2))
    model.register_state_dict_post_hook(
        lambda module, found, *_: found.update({"0.w2": found.pop("0.weight")})
    )
    with pytest.raises(ValueError, match=r"holds 0\.w2, which is none of its parameters"):
        samfn.export_weights(tmp_path / "m.safetensors", model, *samfn.split(model))
    assert not (tmp_path / "m.safetensors").exists()
