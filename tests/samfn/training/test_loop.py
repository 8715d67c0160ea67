import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import samfn
from samfn.measure import landscape
from samfn.training import callbacks, loop
from samfn.training.loop import Epoch, Evaluation, Start, Step, Training
from tests.reference import small_network

BATCHES = 5


def problem(seed=0):
    """Return a training that begins, and what `engine.run` takes beside it."""
    torch.manual_seed(seed)
    model = small_network().float()
    optimizer = samfn.sgd(momentum=0.9)
    loss_fn = samfn.supervised(model, F.cross_entropy)
    state = samfn.init(*samfn.split(model), optimizer=optimizer)
    source = torch.Generator().manual_seed(1)
    inputs = torch.randn(BATCHES * 6, 2, 4, 4, generator=source)
    labels = torch.randint(3, (BATCHES * 6,), generator=source)

    def batches(training):
        order = torch.Generator().manual_seed(training.epoch)
        rows = torch.randperm(len(labels), generator=order).view(BATCHES, -1)
        for row in rows[training.batch :]:
            yield inputs[row], labels[row]

    def evaluate(training):
        params, buffers = callbacks.ema_of(training)
        model.eval()
        found = loop.evaluate(
            params,
            buffers,
            [(inputs[:20], labels[:20]), (inputs[20:], labels[20:])],
            loss_fn=loss_fn,
            measures={"accuracy": loop.accuracy},
        )
        model.train()
        return found

    update = partial(samfn.sam_update, loss_fn=loss_fn, optimizer=optimizer)
    options = {"batches": batches, "update": update, "rho": 0.05, "lr": 0.1}
    return Training(state), options | {"evaluate": evaluate}


def same(left, right):
    assert left.state.params.keys() == right.state.params.keys()
    return all(
        torch.equal(w, right.state.params[name]) for name, w in left.state.params.items()
    ) and torch.equal(left.state.step, right.state.step)


def test_a_run_is_a_loop_over_epochs_and_batches():
    training, options = problem()
    loop.run(training, **options, epochs=3)
    plain, options = problem()
    state, update = plain.state, options["update"]
    for epoch in range(3):
        for batch in options["batches"](Training(state, epoch=epoch)):
            state, _ = update(state, batch, rho=0.05, lr=0.1)
    assert same(training, Training(state))
    assert (training.epoch, training.batch, training.step) == (3, 0, 3 * BATCHES)


@pytest.mark.parametrize("kind", [Start, Step, Evaluation, Epoch])
def test_a_run_that_was_left_amid_its_callbacks_is_not_gone_on_with_unseen(tmp_path, kind):
    # A cell of a notebook, run again after Ctrl-C: the average would lack a step.
    def interrupting(event):
        if isinstance(event, kind) and event.training.step == BATCHES * (kind is not Start):
            raise KeyboardInterrupt

    training, options = problem()
    kept = samfn.Checkpoints(tmp_path)
    own = [callbacks.ema(0.9), callbacks.saving(kept, every=2)]
    with pytest.raises(KeyboardInterrupt):
        loop.run(training, **options, epochs=2, callbacks=[interrupting, *own])
    assert training.untold
    with pytest.raises(RuntimeError, match="was left while its callbacks were told"):
        loop.run(training, **options, epochs=2, callbacks=own)
    if callbacks.resume(kept, training):
        loop.run(training, **options, epochs=2, callbacks=own)
        whole, options = problem()
        loop.run(whole, **options, epochs=2, callbacks=[callbacks.ema(0.9)])
        ends = [callbacks.ema_of(one)[0] for one in (training, whole)]
        assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    else:
        assert kind is Start
        training.untold = False
        loop.run(training, **options, epochs=1)


def test_a_run_that_was_left_between_a_step_and_its_callbacks_is_known():
    training, options = problem()
    training.count(training.state)
    with pytest.raises(RuntimeError, match="step 1, and some were not"):
        loop.run(training, **options, epochs=1)


def test_callbacks_are_told_of_everything_in_order():
    seen = []

    def first(event):
        match event:
            case Start(training):
                seen.append(("start", training.epoch, training.batch))
            case Step(training, batch, metrics):
                seen.append(("step", training.epoch, training.batch))
                assert len(batch[1]) == 6
                assert metrics.loss.ndim == 0
            case Evaluation(training, row):
                seen.append(("evaluation", training.epoch, training.batch))
                assert row["loss"] > 0
                row["more"] = training.step
            case Epoch(training):
                seen.append(("epoch", training.epoch, training.batch))
                assert training.row["more"] == training.step

    training, options = problem()
    loop.run(training, **options, epochs=2, callbacks=[first, lambda e: seen.append(0)])
    expected = []
    for epoch in range(2):
        expected.append(("start", epoch, 0))
        expected += [("step", epoch, batch) for batch in range(1, 6)]
        expected += [("evaluation", epoch, 5), ("epoch", epoch + 1, 0)]
    assert seen == [item for event in expected for item in (event, 0)]


def test_steps_are_a_budget_in_the_middle_of_an_epoch_too():
    training, options = problem()
    loop.run(training, **options, steps=BATCHES + 2)
    assert training.step == BATCHES + 2
    assert training.row["epoch"] == 2
    assert training.row["loss"] > 0


@pytest.mark.parametrize(("epochs", "steps", "taken"), [(1, 99, 5), (99, 3, 3)])
def test_of_two_budgets_the_smaller_ends_the_run(epochs, steps, taken):
    training, options = problem()
    loop.run(training, **options, epochs=epochs, steps=steps)
    assert training.step == taken


def test_dials_follow_the_run():
    seen = []
    training, options = problem()
    update = options["update"]

    def watched(state, batch, *, rho, lr):
        seen.append((rho, lr))
        return update(state, batch, rho=rho, lr=lr)

    options |= {"update": watched, "rho": lambda t: 0.1 * t.epoch, "lr": 0.01}
    options["lr"] = lambda t: 1 / (1 + t.step)
    loop.run(training, **options, epochs=2)
    assert seen == [(0.1 * (i // BATCHES), 1 / (1 + i)) for i in range(2 * BATCHES)]


@pytest.mark.parametrize("budget", [float("nan"), 1.5, "3", -1, True])
@pytest.mark.parametrize("name", ["epochs", "steps"])
def test_a_budget_is_a_whole_number(name, budget):
    training, options = problem()
    with pytest.raises(ValueError, match=f"{name} must be a whole number"):
        loop.run(training, **options, **{name: budget})
    assert training.step == 0


def test_a_run_without_budget_or_batches_is_refused():
    training, options = problem()
    with pytest.raises(ValueError, match="a budget of epochs, steps or both, got none"):
        loop.run(training, **options)
    with pytest.raises(ValueError, match="epoch 1 has no batches"):
        loop.run(training, **options | {"batches": lambda t: []}, epochs=1)


@pytest.mark.parametrize("name", ["epoch", "step"])
def test_an_evaluation_returns_nothing_that_the_engine_counts(name):
    training, options = problem()
    options["evaluate"] = lambda t: {name: 7, "score": 1.0}
    with pytest.raises(ValueError, match=f"evaluate returned {name}: the engine's own"):
        loop.run(training, **options, epochs=1)


def test_a_run_that_was_stopped_says_so_and_stays():
    training, options = problem()
    loop.run(training, **options, epochs=1)
    training.stop = "no better score for 2 epochs"
    loop.run(training, **options, epochs=1)  # Its budget is spent: nothing to say.
    with pytest.warns(UserWarning, match="has ended: no better score for 2 epochs"):
        loop.run(training, **options, epochs=2)
    assert training.epoch == 1


def test_evaluation_is_a_mean_over_examples():
    model = nn.Linear(4, 3)
    params, buffers = samfn.split(model)
    inputs, labels = torch.randn(11, 4), torch.randint(3, (11,))
    found = loop.evaluate(
        params,
        buffers,
        [(inputs[:9], labels[:9]), (inputs[9:], labels[9:])],
        loss_fn=samfn.supervised(model, F.cross_entropy),
        measures={"accuracy": loop.accuracy},
    )
    outputs = model(inputs).detach()
    assert found["loss"] == pytest.approx(float(F.cross_entropy(outputs, labels)))
    right = (outputs.argmax(1) == labels).float().mean()
    assert found["accuracy"] == pytest.approx(100 * float(right))
    shares = F.one_hot(labels, 3) * 0.9
    assert torch.equal(
        loop.accuracy(outputs, (inputs, shares)),
        loop.accuracy(outputs, (inputs, labels)),
    )
    with pytest.raises(
        ValueError, match=r"'mean' must give a value for each .*\(4,\), got"
    ):
        loop.evaluate(
            params,
            buffers,
            [(inputs[:4], labels[:4])],
            loss_fn=samfn.supervised(model, F.cross_entropy),
            measures={"mean": lambda outputs, batch: outputs.mean()},
        )
    with pytest.raises(ValueError, match='a measure is called "loss"'):
        loop.evaluate(
            params,
            buffers,
            [(inputs[:4], labels[:4])],
            loss_fn=samfn.supervised(model, F.cross_entropy),
            measures={"loss": loop.accuracy},
        )
    with pytest.raises(ValueError, match="at least one batch, got none"):
        loop.evaluate(params, buffers, [], loss_fn=samfn.supervised(model, F.mse_loss))


def features(checkpoints):
    return [
        callbacks.lookahead(lambda step: 0.05 * step, every=3, last=14),
        callbacks.ema(0.8, start=2),
        callbacks.copy_ema(2),
        callbacks.early_stopping("accuracy", 50),
        callbacks.finite(),
        callbacks.saving(checkpoints, score="accuracy", every=2),
    ]


@pytest.mark.parametrize("stop", [1, 2, 4, 5, 7, 8, 10, 11, 13])
def test_a_run_that_stopped_anywhere_goes_on_as_if_it_had_not(tmp_path, stop):
    whole, options = problem()
    kept = samfn.Checkpoints(tmp_path / "whole")
    loop.run(whole, **options, epochs=3, callbacks=features(kept))

    def stops(event):
        if isinstance(event, Step) and event.training.step == stop:
            event.training.stop = "killed"

    first, options = problem()
    kept = samfn.Checkpoints(tmp_path / "parts")
    loop.run(first, **options, epochs=3, callbacks=[*features(kept), stops])
    assert first.step == stop
    again, options = problem(seed=5)
    assert callbacks.resume(kept, again) == (stop > 1)
    if stop == 1:
        again, options = problem()
    assert again.step == stop - stop % 2 if stop % BATCHES else stop
    loop.run(again, **options, epochs=3, callbacks=features(kept))
    assert same(again, whole)
    assert again.row == whole.row
    for kept in ("ema", "lookahead"):
        for name, tensor in whole.memory[kept].items():
            assert torch.equal(again.memory[kept][name], tensor), name
    assert again.memory["early_stopping"] == whole.memory["early_stopping"]


@pytest.mark.parametrize(
    ("kind", "stop"), [(Step, 1), (Step, 5), (Step, 8), (Evaluation, 10)]
)
def test_a_run_that_is_asked_to_stop_is_saved_there_and_goes_on(tmp_path, kind, stop):
    whole, options = problem()
    loop.run(whole, **options, epochs=3, callbacks=features(samfn.Checkpoints(tmp_path)))

    def stops(event):
        if isinstance(event, kind) and event.training.step == stop:
            event.training.stop = "enough"

    first, options = problem()
    kept = samfn.Checkpoints(tmp_path / "parts")
    loop.run(first, **options, epochs=3, callbacks=[stops, *features(kept)])
    assert (first.epoch * BATCHES + first.batch, first.stop) == (stop, "enough")
    again, options = problem(seed=5)
    assert callbacks.resume(kept, again)
    assert (again.step, again.epoch, again.batch) == (stop, first.epoch, first.batch)
    assert again.row == first.row  # Nothing is in it of an epoch that is not counted.
    assert first.row.get("epoch", 0) == first.epoch
    loop.run(again, **options, epochs=3, callbacks=features(kept))
    assert same(again, whole)
    assert again.row == whole.row


def test_a_checkpoint_that_is_asked_for_is_written_once(tmp_path):
    def asks(event):
        if isinstance(event, Step) and event.training.step == 3:
            event.training.save = True

    training, options = problem()
    kept, found = samfn.Checkpoints(tmp_path, keep_last=9), []
    parts = [asks, callbacks.saving(kept), lambda e: found.append(len(kept.paths()))]
    loop.run(training, **options, epochs=1, callbacks=parts)
    assert found == [0, 0, 0, 1, 1, 1, 1, 2]


def test_where_batches_have_a_length_the_last_step_is_known(tmp_path):
    training, options = problem()
    batches, seen = options["batches"], []
    options["batches"] = lambda t: [*batches(t)]
    training.batch = 2  # as in a run that goes on
    parts = [lambda event: seen.append(event.training.batches)]
    kept = samfn.Checkpoints(tmp_path, keep_last=9)
    parts.append(callbacks.saving(kept, every=1))
    parts.append(lambda event: seen.append(len(kept.paths())))
    loop.run(training, **options, epochs=1, callbacks=parts)
    # After the last step the one of the epoch comes, and no other.
    assert seen == [5, 0, 5, 1, 5, 2, 5, 2, 5, 2, 5, 3]
    training, options = problem()
    loop.run(training, **options, epochs=1)
    assert training.batches == 0


def test_what_a_callback_keeps_may_be_asked_for_when_a_checkpoint_is_written(tmp_path):
    asked = []

    def sums(event):
        if isinstance(event, Start):
            event.training.memory["sums"] = lambda: asked.append(0) or {"steps": 7}

    training, options = problem()
    kept = samfn.Checkpoints(tmp_path)
    loop.run(training, **options, epochs=2, callbacks=[sums, callbacks.saving(kept)])
    assert asked == [0, 0]
    again, _ = problem()
    assert callbacks.resume(kept, again)
    assert again.memory["sums"] == {"steps": 7}


def test_several_scores_choose_their_own_best(tmp_path):
    training, options = problem()
    options["evaluate"] = lambda t: {"up": float(t.epoch), "down": -float(t.epoch)}
    kept = samfn.Checkpoints(tmp_path)
    both = {"rising": "up", "falling": "down"}
    loop.run(training, **options, epochs=4, callbacks=[callbacks.saving(kept, score=both)])
    found = [int(kept.best(by)[0].stem[5:]) // BATCHES for by in both]
    assert found == [4, 1]


def test_the_average_follows_every_step_after_its_start():
    training, options = problem()
    states = []

    def watch(event):
        if isinstance(event, Step):
            states.append(event.training.state)

    loop.run(training, **options, epochs=1, callbacks=[callbacks.ema(0.5, start=2), watch])
    expected = states[1].params
    for state in states[2:]:
        expected = samfn.moving_average(expected, state.params, 0.5)
    params, buffers = callbacks.ema_of(training)
    for name, tensor in expected.items():
        assert torch.equal(params[name], tensor)
    counter = next(name for name in buffers if "tracked" in name)
    assert buffers[counter] == BATCHES
    assert not torch.equal(
        buffers["1.running_mean"], training.state.buffers["1.running_mean"]
    )


def test_the_average_shares_no_memory_with_the_state():
    training, options = problem()
    loop.run(training, **options, epochs=1, callbacks=[callbacks.ema(0.5)])
    assert shared_with_state(training, "ema") == set()


def test_an_average_of_other_numbers_is_no_average():
    params, buffers = samfn.split(small_network())
    training = Training(samfn.init(params, buffers, optimizer=samfn.sgd()))
    average = {f"params/{name}": leaf for name, leaf in params.items()}
    average |= {f"buffers/{name}": leaf for name, leaf in buffers.items()}
    training.memory[callbacks.EMA] = average
    callbacks.require_average(training)
    training.memory[callbacks.EMA] = {name: leaf.long() for name, leaf in average.items()}
    with pytest.raises(ValueError, match=r"of torch.float\d+, got torch.int64"):
        callbacks.require_average(training)


def test_the_average_becomes_the_state_after_its_epoch_only():
    training, options = problem()
    changed = []

    def watch(event):
        if isinstance(event, Epoch):
            params = callbacks.ema_of(event.training)[0]
            now = event.training.state.params
            changed.append(all(torch.equal(params[name], w) for name, w in now.items()))

    parts = [callbacks.ema(0.9), callbacks.copy_ema(2), watch]
    loop.run(training, **options, epochs=3, callbacks=parts)
    assert changed == [False, True, False]


def test_lookahead_goes_on_from_slow_weights_that_follow():
    def decay(step):
        return 0.6 * step / 12

    training, options = problem()
    look = callbacks.lookahead(decay, every=3, last=11)
    loop.run(training, **options, steps=11, epochs=3, callbacks=[look])

    state = problem()[0].state
    slow = {name: t.clone() for name, t in callbacks._together(state).items()}
    by_hand = Training(state)
    for step in range(1, 12):
        by_hand.epoch, by_hand.batch = divmod(step - 1, BATCHES)
        batch = next(iter(options["batches"](by_hand)))
        state, _ = options["update"](by_hand.state, batch, rho=0.05, lr=0.1)
        params, buffers = dict(state.params), dict(state.buffers)
        for kind, tree in (("params", params), ("buffers", buffers)):
            for name, fast in tree.items():
                if not fast.is_floating_point():
                    continue
                own = slow[f"{kind}/{name}"]
                if step % 3 == 0:
                    own = decay(step) * own + (1 - decay(step)) * fast
                    slow[f"{kind}/{name}"] = own
                if step % 3 == 0 or step == 11:
                    tree[name] = own
        by_hand.state = state._replace(params=params, buffers=buffers)
    for name, tensor in by_hand.state.params.items():
        torch.testing.assert_close(training.state.params[name], tensor)
    for name, tensor in by_hand.state.buffers.items():
        torch.testing.assert_close(training.state.buffers[name], tensor)
    counter = next(name for name in training.state.buffers if "tracked" in name)
    assert training.state.buffers[counter] == 11
    assert shared_with_state(training, "lookahead") == set()


def shared_with_state(training, name):
    """Return the places in memory that the state shares with what is kept under a name."""
    own = {t.data_ptr() for t in training.memory[name].values()}
    state = training.state
    return own & {t.data_ptr() for t in (*state.params.values(), *state.buffers.values())}


def test_patience_counts_epochs_without_a_new_best():
    values = [1.0, 3.0, 3.0, 2.0, 4.0, 4.0, 4.0]
    training, options = problem()
    options["evaluate"] = lambda t: {"score": values[t.epoch]}
    stop = callbacks.early_stopping("score", 2)
    loop.run(training, **options, epochs=7, callbacks=[stop])
    assert training.epoch == 4
    assert training.stop == "no better score for 2 epochs"
    training.stop = None  # As a run is that goes on from its last checkpoint.
    loop.run(training, **options, epochs=7, callbacks=[stop])
    assert training.epoch == 4
    training, options = problem()
    options["evaluate"] = lambda t: {"score": -values[t.epoch]}
    stop = callbacks.early_stopping("score", 2, higher=False)
    loop.run(training, **options, epochs=7, callbacks=[stop])
    assert training.epoch == 4


def test_patience_goes_by_the_numbers_that_come_after_a_nan():
    values = [math.nan, 1.0, 2.0, math.nan, 3.0]
    training, options = problem()
    options["evaluate"] = lambda t: {"score": values[t.epoch]}
    stop = callbacks.early_stopping("score", 2)
    loop.run(training, **options, epochs=5, callbacks=[stop])
    assert training.epoch == 5
    assert training.memory["early_stopping"] == [3.0, 0]


def test_steps_that_are_not_finite_end_the_run():
    training, options = problem()

    def poisoned(t):
        for inputs, labels in problem()[1]["batches"](t):
            yield inputs * float("nan") if t.step >= 7 else inputs, labels

    options |= {"batches": poisoned}
    with pytest.raises(samfn.NonFiniteError, match="the last 3 of 10 steps"):
        loop.run(training, **options, epochs=9, callbacks=[callbacks.finite(3, every=1)])


@pytest.mark.parametrize(("allowed", "raises"), [(2, True), (3, False)])
def test_steps_that_are_not_finite_count_between_two_looks(allowed, raises):
    training, options = problem()

    def poisoned(t):
        for index, (inputs, labels) in enumerate(problem()[1]["batches"](t), 1):
            yield inputs * float("nan") if index in (2, 3) else inputs, labels

    options |= {"batches": poisoned}
    parts = [callbacks.finite(allowed, every=4)]
    if raises:
        with pytest.raises(samfn.NonFiniteError, match="the last 2 of 4 steps"):
            loop.run(training, **options, epochs=1, callbacks=parts)
    else:
        loop.run(training, **options, epochs=2, callbacks=parts)


def test_evaluation_is_the_mean_over_what_counts_in_all_batches():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    criterion = torch.nn.CrossEntropyLoss(ignore_index=2, weight=torch.tensor([1.0, 3, 1]))
    loss_fn = samfn.supervised(model, criterion)
    inputs, targets = torch.randn(9, 4), torch.tensor([0, 1, 2, 2, 2, 2, 1, 1, 0])
    batches = [*zip(inputs.split(3), targets.split(3), strict=True)]  # one of nothing
    params, buffers = samfn.split(model)
    expected = criterion(model(inputs), targets).item()
    found = loop.evaluate(params, buffers, batches, loss_fn=loss_fn)
    assert found["loss"] == pytest.approx(expected)
    objective = samfn.Objective(loss_fn, buffers, batches)
    assert objective.loss(params).item() == pytest.approx(expected)
    nothing, message = batches[1:2], "expected an example that counts in the loss, got none"
    with pytest.raises(ValueError, match=message):
        samfn.Objective(loss_fn, buffers, nothing).loss(params)
    with pytest.raises(ValueError, match=message):
        loop.evaluate(params, buffers, nothing, loss_fn=loss_fn)
    with pytest.raises(ValueError, match=message):
        landscape.line(params, buffers, nothing, params, [0.0], loss_fn=loss_fn)


def test_accuracy_is_of_the_shapes_it_knows():
    scores = torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0]])
    for targets in (torch.tensor([1, 1, 1]), torch.tensor([[1], [1], [1]])):
        assert loop.accuracy(scores, (None, targets)).tolist() == [100, 0, 100]
    shares = torch.tensor([[0.1, 0.9], [0.6, 0.4], [0.8, 0.2]])
    assert loop.accuracy(scores, (None, shares)).tolist() == [100, 100, 0]
    with pytest.raises(ValueError, match=r"two classes or more, got \(3, 1\)"):
        loop.accuracy(scores[:, :1], (None, torch.tensor([1, 1, 1])))
    with pytest.raises(
        ValueError, match=r"targets of shape \(3,\) or \(3, 2\), got \(4,\)"
    ):
        loop.accuracy(scores, (None, torch.ones(4)))
    for outputs, batch in ((scores, {"labels": shares}), ({"logits": scores}, (None, 1))):
        with pytest.raises(ValueError, match="accuracy expects scores and"):
            loop.accuracy(outputs, batch)


def test_scores_that_are_not_finite_are_wrong_and_left_out_classes_are_not():
    nan, inf = torch.nan, torch.inf
    scores = torch.tensor([[nan, nan], [nan, 1.0], [inf, 1.0], [1.0, -inf], [-inf, -inf]])
    assert loop.accuracy(scores, (None, torch.zeros(5).long())).tolist() == [
        0,
        0,
        0,
        100,
        0,
    ]


def valley(losses, callback=None, start=None, steps=2, overwriting=False):
    """Go through epochs of `steps` steps, the weight of step n being n, by these losses.

    A step makes a new weight, or overwrites the old one, as compiled steps may.
    """
    training = start or Training(
        samfn.init({"w": torch.zeros(1)}, {}, optimizer=samfn.sgd())
    )
    callback = callback or callbacks.swad("loss")
    for loss in losses:
        for _ in range(steps):
            weight = torch.tensor([float(training.step)])
            if overwriting:
                weight = training.state.params["w"].copy_(weight)
            training.count(training.state._replace(params={"w": weight}))
            callback(Step(training, None, None))
        training.row = {"loss": loss}
        training.epoch, training.batch = training.epoch + 1, 0
        callback(Epoch(training))
        if training.stop:
            break
    return training


# Losses of epochs -> the epochs of the paper's algorithm 1, from 1; and whether it ended.
VALLEYS = {
    # 1.0 is the first least of three, and the bar is 1.3 * 1.1 = 1.43.
    (2.0, 1.5, 1.0, 1.2, 1.1, 1.4, 9.0, 1.3, 9.0): (3, 8, False),
    (2.0, 1.5, 1.0, 1.2, 1.1, 9.0, 1.43, *[1.44] * 6, 1.0): (3, 7, True),
    # Five above the bar are no six.
    (1.0, 1.2, 1.1, *[2.0] * 5, 1.3, 2.0): (1, 9, False),
    # The bar is 3.9 by a loss that is above it, and counts as one lower follows.
    (1.0, 2.0, 6.0): (1, 2, False),
    (1.0, 2.0, 6.0, 1.0): (1, 4, False),
    # An equal loss is no new least; one that is no number begins no valley, nor ends it.
    (1.0, 1.0, 1.0): (1, 3, False),
    (math.nan, 1.0, math.nan, 3.0, 3.1, 3.2, math.nan, 3.0): (4, 8, False),
}


@pytest.mark.parametrize("overwriting", [False, True])
@pytest.mark.parametrize("losses", VALLEYS)
def test_swad_averages_all_steps_from_the_first_to_the_last_epoch_of_the_valley(
    losses, overwriting
):
    first, last, ended = VALLEYS[losses]
    training = valley(losses, overwriting=overwriting)
    kept = training.memory["swad"]
    assert (kept["first"], kept["last"], bool(training.stop)) == (first, last, ended)
    mean = sum(range(2 * first - 2, 2 * last)) / (2 * (last - first + 1))
    assert callbacks.swad_of(training)["w"].item() == pytest.approx(mean)


# khanrc/swad domainbed/swad.py 252190e, run once on these losses by the steps of `valley`:
# the weight that it averaged, and of which epochs.
VALLEY = 1.0, 1.2, 1.1, 1.2, 1.3, 1.2, 1.1, 1.2, *[9.0] * 7
OFFICIAL = {
    (5.0, 4.5, 4.0, 3.5, 3.0, 2.5, *VALLEY): (19.5, [*range(7, 15)]),
    # Also the epoch before the first, which is not above the bar, and the first again.
    (5.0, 4.0, 3.0, 2.0, 1.1, 1.15, *VALLEY): (17.9, [6, 7, *range(7, 15)]),
}


@pytest.mark.parametrize("losses", OFFICIAL)
def test_swad_is_its_official_code_but_for_what_that_adds_before_the_valley(losses):
    official, epochs = OFFICIAL[losses]
    assert sum(2 * epoch - 1.5 for epoch in epochs) / len(epochs) == pytest.approx(official)
    training = valley(losses)
    own = sum(2 * epoch - 1.5 for epoch in range(7, 15)) / 8
    assert callbacks.swad_of(training)["w"].item() == pytest.approx(own)
    assert training.stop


@pytest.mark.parametrize("losses", [(), (3.0, 2.0, 1.0), (2.0, 1.0, 1.1)])
def test_before_a_valley_swad_gives_the_weights_of_the_state(losses):
    training = valley(losses)
    assert torch.equal(callbacks.swad_of(training)["w"], training.state.params["w"])
    assert not training.stop


def test_swad_is_told_how_long_and_how_high_a_valley_is():
    callback = callbacks.swad("loss", converge=2, overfit=1, tolerance=1.0)
    training = valley([3.0, 1.0, 1.2, 1.1, 1.11, 1.0], callback)
    assert (training.memory["swad"]["first"], training.memory["swad"]["last"]) == (2, 2)
    assert "loss is above the valley for 1 epochs" in training.stop
    for wrong in ({"converge": 0}, {"overfit": 0}, {"tolerance": 0.9}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            callbacks.swad("loss", **wrong)


@pytest.mark.parametrize("stop", range(1, 14))
def test_swad_goes_on_bit_for_bit_wherever_a_run_was_stopped(tmp_path, stop):
    losses = (2.0, 1.5, 1.0, 1.2, 1.1, 1.4, 9.0, 1.3, *[9.0] * 6)
    first = valley(losses[:stop])
    samfn.save(tmp_path / "run", first.state, **callbacks.to_metadata(first))
    state, metadata = samfn.restore(tmp_path / "run", like=first.state)
    again = callbacks.from_metadata(state, metadata)
    again.step = 2 * stop
    whole, again = valley(losses), valley(losses[stop:], start=again)
    assert again.stop == whole.stop
    assert again.memory["swad"] == whole.memory["swad"]
    assert torch.equal(callbacks.swad_of(again)["w"], callbacks.swad_of(whole)["w"])


@pytest.mark.parametrize("name", ["early_stopping", "swad", "saving"])
def test_a_metric_that_is_not_in_the_row_is_told_with_those_that_are(name, tmp_path):
    callback = {
        "early_stopping": callbacks.early_stopping("right", 3),
        "swad": callbacks.swad("right"),
        "saving": callbacks.saving(samfn.Checkpoints(tmp_path), score="right"),
    }[name]
    training, options = problem()
    message = f"{name}: expected 'right' in the row .*, got epoch, step, loss, accuracy:"
    with pytest.raises(ValueError, match=message):
        loop.run(training, **options, epochs=1, callbacks=[callback])


def test_lookahead_has_to_see_the_weights_before_the_first_step():
    training, options = problem()
    batch = next(options["batches"](training))
    state, metrics = options["update"](training.state, batch, lr=0.1)
    training.count(state)
    with pytest.raises(ValueError, match="expected Start before the first Step"):
        loop.tell([callbacks.lookahead(0.5)], Step(training, batch, metrics))
