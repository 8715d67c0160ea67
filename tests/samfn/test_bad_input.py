"""Forty kinds of wrong input, each refused with what was expected and what came."""

import pytest
import torch
from torch.nn import functional as F

import samfn
from recipes.cifar_wrn import main
from samfn.training import callbacks
from tests.reference import batches, small_network

MODEL = small_network()
LOSS = samfn.supervised(MODEL, F.cross_entropy)
OPTIMIZER = samfn.sgd()
BATCH = batches(1)[0]


def fresh():
    return samfn.init(*samfn.split(MODEL), optimizer=OPTIMIZER)


def without(tree, name):
    return {key: leaf for key, leaf in tree.items() if key != name}


def params_with(**changes):
    state = fresh()
    return state._replace(params={**state.params, **changes})


WEIGHT = fresh().params["0.weight"]
WRONG = [
    # What a step is given.
    ({"rho": -0.1}, ValueError, "rho must be finite and at least 0, got -0.1"),
    ({"rho": float("nan")}, ValueError, "rho must be finite and at least 0, got nan"),
    ({"rho": float("inf")}, ValueError, "rho must be finite and at least 0, got inf"),
    ({"rho": 10**5000}, ValueError, "rho must be finite and at least 0, got inf"),
    ({"rho": True}, TypeError, "rho must be a number or a 0-d tensor, got bool"),
    ({"rho": "0.1"}, TypeError, "rho must be a number or a 0-d tensor, got str"),
    ({"rho": torch.ones(1)}, ValueError, r"rho must be .*0-d tensor, got shape \(1,\)"),
    ({"rho": torch.tensor(-0.1)}, ValueError, "rho must be finite and at least 0, got -0"),
    ({"rho": torch.tensor(True)}, TypeError, "rho must be .* tensor, got torch.bool"),
    ({"lr": torch.tensor(-0.1)}, ValueError, "lr must be finite and at least 0, got -0"),
    ({"lr": torch.tensor(float("nan"))}, ValueError, "lr must be finite .* 0, got nan"),
    ({"lr": None}, TypeError, "lr must be a number or a 0-d tensor, got NoneType"),
    ({"lr": -1}, ValueError, "lr must be finite and at least 0, got -1"),
    ({"optimizer": samfn.adam()}, ValueError, "exp_avg"),
    # What a state holds.
    ({"state": {"0.weight": WEIGHT.float()}}, ValueError, "float64 against torch.float32"),
    ({"state": {"0.weight": WEIGHT[:2]}}, ValueError, r"\(4, 2, 3, 3\) against \(2, 2"),
    ({"state": {"0.weight": WEIGHT.long()}}, ValueError, "must be floating point"),
    ({"state": {"0.weight": 3}}, TypeError, "must be a tensor, got <class 'int'>"),
    ({"state": {"extra": WEIGHT}}, ValueError, "extra"),
    ({"state": {"0.weight": WEIGHT.clone().requires_grad_()}}, ValueError, "not require"),
    ({"state": {"0.weight": WEIGHT.to("meta")}}, ValueError, "must have values"),
    # What a batch holds: PyTorch says it, and nothing changes.
    ({"batch": (BATCH[0][:, :1], BATCH[1])}, RuntimeError, "channels"),
    ({"batch": (BATCH[0], BATCH[1][:3])}, ValueError, "batch_size"),
    ({"batch": (BATCH[0], BATCH[1] + 99)}, IndexError, "Target .* is out of bounds"),
    ({"batch": (BATCH[0], BATCH[1] - 1 - BATCH[1])}, IndexError, "Target -1 is out of"),
    ({"batch": (BATCH[0].float(), BATCH[1])}, RuntimeError, "type|dtype"),
    (
        {"batch": (BATCH[0][:0], BATCH[1][:0])},
        ValueError,
        r"at least one example, got targets of shape \(0,\)",
    ),
    ({"method": samfn.vasso()}, ValueError, r"another method: .* 'mean'\], got \[\]: give"),
    ({"batch": BATCH[0]}, ValueError, r"of two, \(inputs, targets\), got Tensor"),
    ({"batch": (*BATCH, 1)}, ValueError, r"of two, \(inputs, targets\), got 3 of them"),
    ({"batch": [{"x": BATCH[0]}]}, ValueError, r"\(inputs, targets\), got 1 of them"),
    ({"batch": {"x": BATCH[0], "y": BATCH[1]}}, TypeError, "keyword argument 'x'"),
    ({"batch": ({"self": BATCH[0]}, BATCH[1])}, TypeError, "values for argument 'self'"),
]


def tensors_of(state):
    """Return the tensors of a state that have values to compare."""
    named = {**state.params, **state.buffers, "step": state.step}
    return {
        name: leaf
        for name, leaf in named.items()
        if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta"
    }


@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_wrong_input_of_a_step_is_refused_and_changes_nothing(change, error, message):
    state = params_with(**change["state"]) if "state" in change else fresh()
    options = {"optimizer": OPTIMIZER, "lr": 0.1, "rho": 0.1}
    options |= {key: v for key, v in change.items() if key not in ("state", "batch")}
    before = {name: leaf.clone() for name, leaf in tensors_of(state).items()}
    batch = change.get("batch", BATCH)
    with pytest.raises(error, match=message):
        samfn.sam_update(state, batch, loss_fn=LOSS, **options)
    after = tensors_of(state)
    assert all(torch.equal(leaf, after[name]) for name, leaf in before.items())


def test_a_method_that_is_forgotten_in_the_step_is_refused():
    state = samfn.init(
        *samfn.split(MODEL), optimizer=OPTIMIZER, method=samfn.friendly_sam()
    )
    with pytest.raises(
        ValueError, match=r"another method: expected its memory .* \[\], got"
    ):
        samfn.sam_update(state, BATCH, loss_fn=LOSS, optimizer=OPTIMIZER, lr=0.1)


def test_a_missing_name_is_refused_where_functional_call_would_take_the_models():
    state = fresh()
    state = state._replace(params=without(state.params, "0.weight"))
    with pytest.raises(ValueError, match=r"0\.weight missing"):
        samfn.sam_update(state, BATCH, loss_fn=LOSS, optimizer=OPTIMIZER, lr=0.1)


def test_pixels_that_are_no_numbers_are_skipped_and_counted():
    state = fresh()
    batch = BATCH[0].clone(), BATCH[1]
    batch[0][0, 0, 0, 0] = float("nan")
    new, metrics = samfn.sam_update(state, batch, loss_fn=LOSS, optimizer=OPTIMIZER, lr=0.1)
    assert not metrics.finite
    assert new.skipped == 1
    assert all(torch.equal(w, new.params[name]) for name, w in state.params.items())


OPTIONS = [
    (lambda: samfn.muon(weight_decay=-1.0), ValueError, "weight_decay must be .* got -1"),
    (lambda: samfn.muon(weight_decay=float("nan")), ValueError, "weight_decay .* got nan"),
    (lambda: callbacks.lookahead(2.0), ValueError, "decay must be .* below 1, got 2.0"),
    (lambda: callbacks.lookahead(float("nan")), ValueError, "decay must be .* got nan"),
    (
        lambda: samfn.l2_regularized(LOSS, 0.1, without="wb"),
        TypeError,
        "without: expected names of parameters, got the text 'wb'",
    ),
    (
        lambda: samfn.frozen_after(OPTIMIZER, 3, "0.weight"),
        TypeError,
        "frozen_after: expected names of parameters, got the text '0.weight'",
    ),
]


@pytest.mark.parametrize(("make", "error", "message"), OPTIONS)
def test_wrong_options_are_refused_where_they_are_given(make, error, message):
    with pytest.raises(error, match=message):
        make()


LOADED = [
    ({"0.weight": WEIGHT[:2]}, r"0\.weight: \(4, 2, 3, 3\) against \(2, 2, 3, 3\)"),
    ({"0.weight": WEIGHT.float()}, "float64 against torch.float32"),
    ({"other": WEIGHT}, "other unexpected"),
    (None, r"0\.weight missing"),
]


@pytest.mark.parametrize(("change", "message"), LOADED)
def test_what_does_not_fit_a_model_is_not_loaded(change, message):
    params, buffers = samfn.split(MODEL)
    wrong = params | change if change else without(params, "0.weight")
    with pytest.raises(ValueError, match=message):
        samfn.load(MODEL, wrong, buffers)
    assert all(torch.equal(w, params[name]) for name, w in samfn.split(MODEL)[0].items())


COMMANDS = [
    ("--rho -1", "--rho: expected a finite number of at least 0, got -1.0"),
    ("--rho nan", "--rho: expected a finite number of at least 0, got nan"),
    ("--lr 0", "--lr: expected a finite number above 0, got 0.0"),
    ("--batch-size 1", "--batch-size: expected at least 2, got 1"),
    ("--batch-size 99999", "--batch-size: expected at most the 1437 training images"),
    ("--method wsam --clip-norm 1", "--clip-norm: what wsam moves past the optimizer"),
    ("--epochs 0", "--epochs: expected at least 1, got 0"),
    ("--save-steps 0", "--save-steps: expected at least 1, or None, got 0"),
    ("--model resnet", "--model: "),
    ("--method samm", "--method: "),
    ("--device cuda:99", "--device: 'cuda:99' cannot be used"),
    ("--preset nothing", "--preset: expected auto or one of"),
    ("--config absent.toml", "cannot read absent.toml: No such file"),
    ("--resume absent", "cannot read absent/config.toml: No such file"),
    ("--resume README.md", "expected the directory of a run, or one of its checkpoints"),
    ("--eval-only", "--eval-only: expected --resume with it"),
    ("--data-dir absent", "--data-dir: digits come with scikit-learn"),
]


@pytest.mark.parametrize(("flags", "message"), COMMANDS)
def test_wrong_input_of_the_command_ends_it_with_code_2(flags, message, capsys):
    assert main(["--data", "digits", *flags.split()]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_there_are_forty_of_them():
    assert len(WRONG) + len(LOADED) + len(COMMANDS) + 2 >= 40
