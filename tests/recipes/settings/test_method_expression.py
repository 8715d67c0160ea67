"""What the recipe's --method may say, and what it may not."""

import pytest
import torch

import samfn
from recipes.settings.method_expression import MAKERS, parse

PARAMS = {"a.weight": torch.tensor([3.0, 4.0]), "n.weight": torch.tensor([1.0])}


def meant(text):
    """Return what a method does to a loss whose gradient is the weights."""
    method = parse(text, steps=10, norm_layers=["n.weight"])
    optimizer = samfn.sgd(0.0)
    state = samfn.init(PARAMS, {}, optimizer=optimizer, method=method)
    trace = []
    for step in range(3):
        state, metrics = samfn.sam_update(
            state,
            torch.ones(8) + step,
            loss_fn=lambda p, b, x: sum((w**2).sum() for w in p.values()) / 2 * x.mean(),
            optimizer=optimizer,
            method=method,
            lr=0.1,
        )
        trace.append((dict(state.params), metrics.perturbation_norm))
    return trace


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("sam", "sam()"),
        ("asam", "asam(0.01)"),
        ("asam(eta=0.1)", "asam(0.1)"),
        ("every(sam, 2)", "every(sam(), k=2)"),
        ("ae_sam", "ae_sam(10)"),
        ("ae_sam(first=0.5)", "ae_sam(steps, 0.5)"),
        ("on_parameters(sam, norm_layers)", "on_parameters(sam, ['n.weight'])"),
        ("on_parameters(gsam, 'n.*')", "on_parameters(gsam, ('n.weight',))"),
        ("gsam(metric=perturb_fisher)", "gsam(0.4, metric=perturb_fisher)"),
        ("per_micro_batch(asam(0.0, adapts=everything), 4)", None),
    ],
)
def test_expressions_mean_what_python_would_make_of_them(text, same):
    assert str(meant(text)) == str(meant(same or text))
    gate_is_open = text.startswith("ae_sam")  # At each of these steps.
    assert (str(meant(text)) == str(meant("sam"))) == (text == "sam" or gate_is_open)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adam", "adam is not known, expected one of .*sam"),
        ("sam(", "cannot read 'sam\\('"),
        ("sam(rho=1)", "unexpected keyword argument 'rho'"),
        ("looksam(k=0)", "k must be a whole number"),
        ("everything", "everything is no method"),
        ("gsam(metric=everything)", "gsam: expected metric to be perturb or perturb_ada"),
        ("gsam(metric=3)", "gsam: expected metric to be perturb or"),
        ("asam(adapts=perturb)", "asam: expected adapts to be everything or named_weight"),
        ("sam(everything)", "sam: expected direction to be preconditioned"),
        ("le_sam(1e308)", "expected numbers of at most 64 bits"),
        (f"ae_sam(-{2**63})", "expected numbers of at most 64 bits"),
        ("every(sam)", "missing 1 required positional argument: 'k'"),
        ("__import__('os').system('echo')", "is not known"),
        ("sam.__class__", "is not known"),
        ("[sam for _ in (1,)]", "is not known"),
        ("sam if 1 else asam", "is not known"),
        ("every(sam, 2 ** 99)", r"2 \*\* 99 is not known"),
        ("every(*[sam], k=2)", "is not known"),
        ("every(sam, **{})", "is not known"),
        ("sam" * 100_000, "is not known"),
    ],
)
def test_everything_else_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text, steps=10, norm_layers=[])


def test_deep_nesting_is_refused_without_a_crash():
    with pytest.raises(ValueError, match="cannot read"):
        parse("every(" * 5000 + "sam" + ", 2)" * 5000, steps=1, norm_layers=[])


def test_every_maker_of_samfn_can_be_named():
    assert {"sam", "gsam", "looksam", "every", "on_parameters"} <= MAKERS.keys()
    assert "init" not in MAKERS
