import pytest
import torch
from torch import nn
from torch.optim.adadelta import adadelta as adadelta_kernel
from torch.optim.adamax import adamax as adamax_kernel
from torch.optim.radam import radam as radam_kernel
from torch.optim.sgd import sgd as sgd_kernel
from torch.testing import assert_close

import samfn

radam = samfn.from_torch(
    torch.optim.RAdam,
    radam_kernel,
    {"exp_avgs": torch.zeros_like, "exp_avg_sqs": torch.zeros_like},
    weight_decay=0.01,
)

adamax = samfn.from_torch(
    torch.optim.Adamax,
    adamax_kernel,
    {"exp_avgs": torch.zeros_like, "exp_infs": torch.zeros_like},
)
adadelta = samfn.from_torch(
    torch.optim.Adadelta,
    adadelta_kernel,
    {"square_avgs": torch.zeros_like, "acc_deltas": torch.zeros_like},
    weight_decay=0.1,
)

PAIRS = [
    (samfn.sgd(), torch.optim.SGD, {"momentum": 0.9}),
    (samfn.sgd(0.0), torch.optim.SGD, {}),
    (
        samfn.sgd(0.8, nesterov=True, weight_decay=0.1),
        torch.optim.SGD,
        {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
    ),
    (
        samfn.sgd(0.8, nesterov=True),
        torch.optim.SGD,
        {"momentum": 0.8, "nesterov": True},
    ),
    (samfn.adam(), torch.optim.Adam, {}),
    (
        samfn.adam((0.8, 0.9), 1e-6, 0.1, amsgrad=True),
        torch.optim.Adam,
        {"betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1, "amsgrad": True},
    ),
    (samfn.adamw(), torch.optim.AdamW, {}),
    (
        samfn.adamw(weight_decay=0.3, amsgrad=True),
        torch.optim.AdamW,
        {"weight_decay": 0.3, "amsgrad": True},
    ),
    (samfn.nadam(), torch.optim.NAdam, {}),
    (
        samfn.nadam(weight_decay=0.1, momentum_decay=0.1),
        torch.optim.NAdam,
        {"weight_decay": 0.1, "momentum_decay": 0.1},
    ),
    (samfn.rmsprop(), torch.optim.RMSprop, {}),
    (
        samfn.rmsprop(0.9, 1e-6, 0.1, momentum=0.5, centered=True),
        torch.optim.RMSprop,
        {
            "alpha": 0.9,
            "eps": 1e-6,
            "weight_decay": 0.1,
            "momentum": 0.5,
            "centered": True,
        },
    ),
    (samfn.adagrad(), torch.optim.Adagrad, {}),
    (
        samfn.adagrad(0.1, 0.1, 0.5),
        torch.optim.Adagrad,
        {"lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.5},
    ),
    (adamax, torch.optim.Adamax, {}),
    (adadelta, torch.optim.Adadelta, {"weight_decay": 0.1}),
    (radam, torch.optim.RAdam, {"weight_decay": 0.01}),
]


def start():
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 4), "b": (5,), "c": ()}
    return {name: torch.randn(s, generator=generator) for name, s in shapes.items()}


@pytest.mark.parametrize("lr", [0.05, torch.tensor(0.05)], ids=["number", "tensor"])
@pytest.mark.parametrize(
    ("optimizer", "theirs", "options"),
    PAIRS,
    ids=[f"{c.__name__}-{len(o)}" for _, c, o in PAIRS],
)
def test_ten_steps_equal_the_class_of_torch_bit_for_bit(optimizer, theirs, options, lr):
    params = start()
    own = {name: nn.Parameter(w.clone()) for name, w in params.items()}
    reference = theirs(own.values(), lr=float(lr), **options)
    opt_state = optimizer.init(params)
    for seed in range(10):
        torch.manual_seed(seed)
        grads = {name: torch.randn_like(w) for name, w in params.items()}
        for name, w in own.items():
            w.grad = grads[name].clone()
        reference.step()
        params, opt_state = samfn.descend(
            params, grads, opt_state, optimizer=optimizer, lr=lr
        )
        for name in params:
            assert torch.equal(params[name], own[name]), f"{name} in step {seed}"
    assert not torch.equal(params["a"], start()["a"])


def in_step_with_torch(optimizer, theirs, groups, lr, steps=10):
    """Yield what both have after each step; `groups` are names and options of theirs."""
    params = start()
    own = {name: nn.Parameter(w.clone()) for name, w in params.items()}
    reference = theirs(
        [{"params": [own[name] for name in names], **how} for names, how in groups],
        lr=float(lr),
    )
    opt_state = optimizer.init(params)
    for seed in range(steps):
        torch.manual_seed(seed)
        grads = {name: torch.randn_like(w) for name, w in params.items()}
        for name, w in own.items():
            w.grad = grads[name].clone()
        reference.step()
        params, opt_state = samfn.descend(
            params, grads, opt_state, optimizer=optimizer, lr=lr
        )
        yield params, own


BY_GROUPS = {
    "without decay": (
        lambda: samfn.grouped(
            samfn.sgd(0.9, weight_decay=0.1), (["b", "c"], samfn.sgd(0.9))
        ),
        torch.optim.SGD,
        [
            (["a"], {"momentum": 0.9, "weight_decay": 0.1}),
            (["b", "c"], {"momentum": 0.9}),
        ],
    ),
    "three groups, one without memory": (
        lambda: samfn.grouped(
            samfn.sgd(0.8, nesterov=True),
            ({"b"}, samfn.sgd(0.0)),
            (("a",), samfn.scaled_lr(samfn.sgd(0.5), 0.25)),
        ),
        torch.optim.SGD,
        [
            (["c"], {"momentum": 0.8, "nesterov": True}),
            (["b"], {}),
            (["a"], {"momentum": 0.5, "lr": 0.05 * 0.25}),
        ],
    ),
    "adamw": (
        lambda: samfn.grouped(
            samfn.adamw(weight_decay=0.3),
            (["b"], samfn.scaled_lr(samfn.adamw((0.5, 0.6), weight_decay=0.0), 10)),
        ),
        torch.optim.AdamW,
        [
            (["a", "c"], {"weight_decay": 0.3}),
            (["b"], {"betas": (0.5, 0.6), "weight_decay": 0.0, "lr": 0.5}),
        ],
    ),
}


@pytest.mark.parametrize("name", BY_GROUPS)
def test_groups_are_those_of_torch_bit_for_bit(name):
    make, theirs, groups = BY_GROUPS[name]
    for params, own in in_step_with_torch(make(), theirs, groups, lr=0.05):
        assert [*params] == [*own]
        for key, w in own.items():
            assert torch.equal(params[key], w), key
    assert not torch.equal(params["b"], start()["b"])


def test_groups_that_differ_in_nothing_are_one():
    params, whole = start(), samfn.adamw()
    parts = samfn.grouped(whole, (["b"], samfn.scaled_lr(whole, 1)))
    results = [
        samfn.descend(params, params, one.init(params), optimizer=one, lr=0.1)[0]
        for one in (whole, parts)
    ]
    assert_close(*results, rtol=0, atol=0)


def test_a_clip_around_groups_is_by_the_norm_of_all():
    params = {"a": torch.zeros(1), "b": torch.zeros(1)}
    grads = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    plain = samfn.sgd(0.0)
    around = samfn.clipped(samfn.grouped(plain, (["b"], plain)), 1.0)
    inside = samfn.grouped(plain, (["b"], samfn.clipped(plain, 1.0)))
    expected = {around: (-0.6, -0.8), inside: (-3.0, -1.0)}
    for optimizer, values in expected.items():
        opt_state = optimizer.init(params)
        moved, _ = samfn.descend(params, grads, opt_state, optimizer=optimizer, lr=1.0)
        assert_close(torch.cat([*moved.values()]), torch.tensor(values))


def groups_of(*exceptions):
    return samfn.grouped(samfn.sgd(), *((names, samfn.sgd(0.5)) for names in exceptions))


@pytest.mark.parametrize(
    ("exceptions", "error", "message"),
    [
        ([["b", "x", "y"]], ValueError, "grouped: x, y is none of the parameters"),
        ([["a"], ["b", "c"]], ValueError, "all parameters are exceptions"),
        ([["a", "b"], ["b"]], ValueError, "grouped: b named twice"),
        ([["b", "b"]], ValueError, "grouped: b named twice"),
        ([["b"], []], ValueError, "an exception names no parameter"),
        (["b"], TypeError, "expected names of parameters, got the text 'b'"),
    ],
)
def test_groups_that_are_none_say_why(exceptions, error, message):
    with pytest.raises(error, match=message):
        groups_of(*exceptions).init(start())


def test_state_of_other_groups_is_an_error():
    params, one = start(), groups_of(["b"])
    others = {
        "another optimizer: expected .*'group_1'.* got .*mom": samfn.sgd(),
        "another optimizer: expected .*mom.* got": samfn.grouped(
            samfn.sgd(), (["b"], samfn.adam())
        ),
        "other parameters: momentum_buffer_list holds 1 names, params 2": groups_of(
            ["a", "c"]
        ),
    }
    for message, other in others.items():
        with pytest.raises(ValueError, match=message):
            samfn.descend(params, params, other.init(params), optimizer=one, lr=0.1)
    with pytest.raises(ValueError, match="b is none of the parameters"):
        one.check(one.init(params), {"a": params["a"]})


def test_what_is_frozen_after_some_steps_moves_as_all_else_before_and_never_again():
    plain = samfn.sgd(0.9, weight_decay=0.1)
    frozen = samfn.frozen_after(plain, 3, ["b"])
    both = {one: (start(), one.init(start())) for one in (plain, frozen)}
    for step in range(6):
        torch.manual_seed(step)
        grads = {name: torch.randn_like(w) for name, w in start().items()}
        held = both[frozen][0]["b"]
        for one, (params, memory) in both.items():
            both[one] = samfn.descend(params, grads, memory, optimizer=one, lr=0.1)
        moved, expected = both[frozen][0], both[plain][0]
        for name in ("a", "c"):
            assert torch.equal(moved[name], expected[name])
        assert torch.equal(moved["b"], expected["b"] if step < 3 else held)
        assert [*moved] == [*start()]
    assert not torch.equal(both[frozen][0]["b"], both[plain][0]["b"])


@pytest.mark.parametrize(
    ("steps", "names", "message"),
    [
        (3, ["x"], "frozen_after: x is none of the parameters"),
        (0, ["b"], "steps must be a whole number of at least 1, got 0"),
    ],
)
def test_nothing_that_is_not_there_is_frozen(steps, names, message):
    with pytest.raises(ValueError, match=message):
        samfn.frozen_after(samfn.sgd(), steps, names).init(start())
    memory, params = samfn.sgd().init(start()), start()
    frozen = samfn.frozen_after(samfn.sgd(), 3, ["b"])
    with pytest.raises(ValueError, match="made by another optimizer"):
        samfn.descend(params, params, memory, optimizer=frozen, lr=0.1)


def test_what_needs_no_decay_is_biases_and_normalisation():
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(2, 3, 3),
            "norm": nn.LayerNorm([3, 4]),  # A matrix, and no weight to decay.
            "embed": nn.Embedding(5, 6),
            "head": nn.Linear(6, 5),
            "frozen": nn.BatchNorm1d(3).requires_grad_(False),
        }
    )
    model["head"].weight = model["embed"].weight
    model["scale"] = nn.ParameterList([nn.Parameter(torch.ones(()))])
    names = samfn.no_decay_parameters(model)
    assert names == ("conv.bias", "norm.weight", "norm.bias", "head.bias", "scale.0")
    samfn.grouped(samfn.sgd(), (names, samfn.sgd())).init(samfn.split(model)[0])


def test_arguments_stay_as_they_were():
    of_groups = [make() for make, _, _ in BY_GROUPS.values()]
    for optimizer in [*(optimizer for optimizer, _, _ in PAIRS), *of_groups]:
        params, grads = start(), start()
        _, opt_state = samfn.descend(
            params, grads, optimizer.init(params), optimizer=optimizer, lr=0.1
        )
        given = (params, grads, opt_state)
        copies = [torch.utils._pytree.tree_map(torch.clone, tree) for tree in given]
        samfn.descend(params, grads, opt_state, optimizer=optimizer, lr=0.1)
        for tree, copy in zip(given, copies, strict=True):
            assert_close(tree, copy, rtol=0, atol=0)


def test_gradients_are_matched_by_name():
    params = {"a": torch.zeros(1), "b": torch.zeros(1)}
    grads = {"b": torch.tensor([2.0]), "a": torch.tensor([1.0])}
    optimizer = samfn.sgd()
    moved, _ = samfn.descend(
        params, grads, optimizer.init(params), optimizer=optimizer, lr=1.0
    )
    assert_close(moved, {"a": torch.tensor([-1.0]), "b": torch.tensor([-2.0])})


@pytest.mark.parametrize("max_norm", [0.5, 5.0, 1e9])
def test_clipping_is_that_of_torch(max_norm):
    params, grads = start(), start()
    for name, w in (own := {n: nn.Parameter(w) for n, w in params.items()}).items():
        w.grad = grads[name].clone()
    nn.utils.clip_grad_norm_(own.values(), max_norm)
    optimizer = samfn.clipped(samfn.sgd(0.0), max_norm)
    moved, _ = samfn.descend(
        params, grads, optimizer.init(params), optimizer=optimizer, lr=1.0
    )
    expected = {name: params[name] - w.grad for name, w in own.items()}
    assert_close(moved, expected, rtol=1e-5, atol=1e-5)


def test_clipping_leaves_a_zero_gradient_zero():
    params = start()
    optimizer = samfn.clipped(samfn.sgd(), 1.0)
    still, _ = samfn.descend(
        params,
        samfn.tree.zeros_like(params),
        optimizer.init(params),
        optimizer=optimizer,
        lr=0.1,
    )
    assert_close(still, params, rtol=0, atol=0)


def test_state_of_another_optimizer_is_an_error():
    params = start()
    with pytest.raises(ValueError, match=r"another optimizer: .*exp_avg.* got \['mom"):
        samfn.descend(
            params, params, samfn.sgd().init(params), optimizer=samfn.adam(), lr=0.1
        )


def test_state_for_other_parameters_is_an_error():
    params, sgd = start(), samfn.sgd()
    opt_state = sgd.init({"a": params["a"]})
    with pytest.raises(ValueError, match="momentum_buffer_list holds 1 names, params 3"):
        samfn.descend(params, params, opt_state, optimizer=sgd, lr=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: samfn.sgd(momentum=-1), "momentum"),
        (lambda: samfn.sgd(momentum=0.0, nesterov=True), "Nesterov"),
        (lambda: samfn.adam(betas=(1.5, 0.9)), "beta"),
        (lambda: samfn.clipped(samfn.sgd(), 0.0), "max_norm must be positive, got 0"),
        (lambda: samfn.scaled_lr(samfn.sgd(), -1), "factor must be .* least 0, got -1"),
    ],
)
def test_bad_options_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lr": -0.1}, ValueError, "lr must be .* at least 0, got -0.1"),
        ({"lr": None}, TypeError, "lr must be a number or a 0-d tensor, got NoneType"),
        ({"grads": {"a": torch.ones(1)}}, ValueError, "same names: b, c missing"),
    ],
)
def test_bad_input_says_what_came(change, error, message):
    params, sgd = start(), samfn.sgd()
    given = {"grads": params, "lr": 0.1} | change
    with pytest.raises(error, match=message):
        samfn.descend(
            params, given["grads"], sgd.init(params), optimizer=sgd, lr=given["lr"]
        )


def test_to_maximise_is_refused_for_steps_that_perturb_to_higher_loss():
    with pytest.raises(ValueError, match=r"maximize must be False: .* negative of what"):
        samfn.from_torch(torch.optim.SGD, sgd_kernel, {}, maximize=True)


MUONS = {
    "defaults": {},
    "Moonshot's": {
        "momentum": 0.8,
        "nesterov": False,
        "weight_decay": 0.3,
        "adjust_lr_fn": "match_rms_adamw",
    },
    "unclamped": {"adjust_lr_fn": "spectral_unclamped"},
}


def matrices(*shapes):
    generator = torch.Generator().manual_seed(0)
    return {str(shape): torch.randn(shape, generator=generator) for shape in shapes}


@pytest.mark.parametrize("name", MUONS)
def test_ten_steps_of_muon_are_those_of_torch_in_its_precision(name):
    params = matrices((3, 4), (7, 5), (16, 40))
    own = {name: nn.Parameter(w.clone()) for name, w in params.items()}
    try:
        reference = torch.optim.Muon(own.values(), lr=0.05, **MUONS[name])
    except ValueError as error:  # PyTorch 2.11 has fewer of them.
        if "is not supported" not in str(error):
            raise
        pytest.skip(str(error))
    optimizer = samfn.muon(**MUONS[name], dtype=torch.bfloat16)
    opt_state = optimizer.init(params)
    for seed in range(10):
        torch.manual_seed(seed)
        grads = {name: torch.randn_like(w) for name, w in params.items()}
        for name, w in own.items():
            w.grad = grads[name].clone()
        reference.step()
        params, opt_state = samfn.descend(
            params, grads, opt_state, optimizer=optimizer, lr=0.05
        )
        for name, w in own.items():
            assert_close(params[name], w.detach(), rtol=1e-6, atol=1e-6)


def first_step_of_muon(shape, **options):
    """Return what a first step with lr 1 adds, and the gradient."""
    options = {"weight_decay": 0.0, "adjust_lr_fn": "spectral_unclamped"} | options
    grads = {"w": torch.randn(shape, dtype=torch.float64)}
    params = samfn.tree.zeros_like(grads)
    optimizer = samfn.muon(**options)
    state = optimizer.init(params)
    return optimizer.update(params, grads, state, 1.0)[0]["w"], grads["w"]


@pytest.mark.parametrize("shape", [(4, 4), (3, 8), (8, 3), (4, 3, 2, 2)])
def test_muon_steps_along_the_singular_vectors_within_its_tolerance(shape):
    torch.manual_seed(0)
    step, gradient = first_step_of_muon(shape)
    u, _, v = torch.linalg.svd(gradient.flatten(1), full_matrices=False)
    rows, columns = gradient.flatten(1).shape
    inner = u.T @ step.flatten(1) @ v.T * -((columns / rows) ** 0.5)
    assert_close(inner, torch.diag(inner.diag()), rtol=0, atol=1e-12)
    assert ((inner.diag() > 0.68) & (inner.diag() < 1.14)).all()
    assert_close(
        step.flatten(1), u @ torch.diag(inner.diag()) @ v * -((rows / columns) ** 0.5)
    )


def test_muon_decays_the_weights_apart_from_the_step():
    params = {"w": torch.ones(2, 3)}
    grads, optimizer = {"w": torch.zeros(2, 3)}, samfn.muon(weight_decay=0.5)
    found, _ = optimizer.update(params, grads, optimizer.init(params), 0.1)
    assert_close(found["w"], torch.full((2, 3), 0.95))


def test_muon_computes_in_the_dtype_of_the_gradient_on_a_cpu_or_as_it_is_told():
    found = []
    for dtype in (None, torch.float64, torch.bfloat16):
        torch.manual_seed(0)
        found.append(first_step_of_muon((9, 9), dtype=dtype)[0])
    own, wide, half = found
    assert torch.equal(own, wide)
    assert torch.equal(half, half.bfloat16().double())
    assert not torch.equal(wide, wide.float().double())
    assert_close(half, wide, rtol=0.1, atol=0.05)


def test_muon_refuses_vectors_and_says_whose_they_are():
    with pytest.raises(
        ValueError, match=r"two dimensions and more, got b, c: give them to"
    ):
        samfn.init(start(), {}, optimizer=samfn.muon())
    with pytest.raises(ValueError, match="adjust_lr_fn must be one of"):
        samfn.muon(adjust_lr_fn="none")
    with pytest.raises(ValueError, match="momentum must be at least 0 and below 1"):
        samfn.muon(momentum=1.0)


@pytest.fixture(params=[torch.float16, torch.bfloat16], ids=str)
def narrow_default(request):
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize(
    ("optimizer", "theirs"),
    [(samfn.adam(), torch.optim.Adam), (samfn.nadam(), torch.optim.NAdam)],
)
def test_steps_are_counted_beyond_what_a_narrow_default_dtype_holds(
    narrow_default, optimizer, theirs
):
    params = {"w": torch.ones(2, dtype=torch.float32)}
    own = nn.Parameter(params["w"].clone())
    reference, opt_state = theirs([own], lr=0.01), optimizer.init(params)
    for _ in range(260):
        own.grad = own.detach() - 3
        reference.step()
        grads = {"w": params["w"] - 3}
        given = {"optimizer": optimizer, "lr": 0.01}
        params, opt_state = samfn.descend(params, grads, opt_state, **given)
    assert opt_state["state_steps"] == 260
    assert torch.equal(params["w"], own)


def test_methods_remember_in_float32_whatever_the_default_dtype_is(narrow_default):
    params = {"w": torch.ones(2, dtype=torch.float32)}
    for method in (samfn.loss_scaled(samfn.sam()), samfn.ae_sam(5), samfn.unified_sam()):
        found = [leaf.dtype for leaf in method.init(params, params).values()]
        assert {*found} <= {torch.float32, torch.int64}


def test_names_may_be_given_by_an_iterator():
    def names():
        return (name for name in ["b"])

    plain, decayed = samfn.sgd(0.0), samfn.sgd(0.0, weight_decay=0.5)
    for made, expected in (
        (samfn.frozen_after(plain, 1, names()), samfn.frozen_after(plain, 1, ["b"])),
        (samfn.grouped(plain, (names(), decayed)), samfn.grouped(plain, (["b"], decayed))),
    ):
        found = []
        for optimizer in (made, expected):
            params, memory = start(), optimizer.init(start())
            for _ in range(3):
                given = {"optimizer": optimizer, "lr": 0.1}
                params, memory = samfn.descend(params, params, memory, **given)
            found.append(params)
        assert_close(found[0], found[1], rtol=0, atol=0)


def test_nothing_goes_past_the_optimizer_to_what_it_leaves_alone():
    params, method = start(), samfn.wsam()
    optimizer = samfn.frozen_after(samfn.sgd(), 1, ["b"])
    state = samfn.init(params, {}, optimizer=optimizer, method=method)
    given = {"optimizer": optimizer, "method": method, "lr": 0.1}
    with pytest.raises(ValueError, match=r"wsam .* move what frozen_after leaves alone"):
        samfn.sam_update(state, None, loss_fn=lambda p, _, __: p["b"].sum(), **given)


def test_dampening_which_spares_the_first_step_is_refused():
    memory = {"momentum_buffer_list": torch.zeros_like}
    with pytest.raises(ValueError, match="dampening must be 0"):
        samfn.from_torch(torch.optim.SGD, sgd_kernel, memory, momentum=0.9, dampening=0.5)


def test_muon_leaves_matrices_without_entries_as_they_are():
    optimizer, params = samfn.muon(), {"w": torch.eye(2)}
    expected, _ = samfn.descend(
        params, params, optimizer.init(params), optimizer=optimizer, lr=0.1
    )
    params |= {"rows": torch.zeros(0, 4), "columns": torch.zeros(3, 0)}
    found, _ = samfn.descend(
        params, params, optimizer.init(params), optimizer=optimizer, lr=0.1
    )
    assert torch.equal(found["w"], expected["w"])
    assert {name: tuple(found[name].shape) for name in found} == {
        "w": (2, 2),
        "rows": (0, 4),
        "columns": (3, 0),
    }
