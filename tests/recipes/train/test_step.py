"""What the settings say of a step."""

import pytest

from recipes.settings.resolve import configure
from recipes.train.step import counts_epochs, lr_of, rho_of

FLAGS = ["--data", "digits", "--rho", "0.1", "--epochs", "4"]
DIALS = [
    "--schedule cosine",
    "--schedule polynomial",
    "--schedule one-cycle",
    "--schedule warm-restarts --restart-epochs 1",
    "--schedule step",
    "--schedule step --milestones 1 3",
    "--schedule wsd",
    "--schedule triangle",
    "--schedule constant",
    "--schedule constant --warmup-epochs 1",
    "--schedule constant --rho-schedule linear",
    "--schedule constant --rho-schedule proportional",
    "--schedule constant --sam-last 0.5",
]


@pytest.mark.parametrize("flags", DIALS)
def test_epochs_count_where_the_dials_depend_on_them(flags):
    config = configure([*FLAGS, *flags.split()])
    found = []
    for one in (config, config.replace(epochs=5)):
        lr = lr_of(one, 10)
        rho = rho_of(one, lr, 10 * one.epochs)
        found.append([(lr(t), rho(t)) for t in range(40)])
    assert counts_epochs(config) == (found[0] != found[1])


@pytest.mark.parametrize(
    ("flags", "counts"),
    [
        (["--lookahead", "0.9"], True),
        (["--select", "loss"], True),
        (["--method", "ae_sam"], True),
        (["--method", "every(sam, steps)"], True),
        (["--method", "every(sam, 5)"], False),
    ],
)
def test_epochs_count_where_a_method_or_what_is_around_it_does(flags, counts):
    config = configure([*FLAGS, "--schedule", "constant", *flags])
    assert counts_epochs(config) is counts
