import json
import math
from collections import Counter

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

import samfn
from recipes.data import digits
from recipes.train.build import generator as source
from samfn.measure import per_example
from samfn.training import sampling

# The documented algorithm, one example at a time.


def counted(counts, verdicts, limit):
    """Return the counts after a scan that saw these (index, easy)."""
    result = list(counts)
    for index in {index for index, _ in verdicts}:
        if all(easy for other, easy in verdicts if other == index):
            result[index] = min(counts[index] + 1, limit)
        else:
            result[index] = max(counts[index] - 1, 0)
    return result


def is_easy_by_hand(logits, label, confidence):
    highest = max(logits)
    weights = [math.exp(z - highest) for z in logits]
    right = logits.index(highest) == label
    return right and max(weights) / sum(weights) >= confidence


@st.composite
def scans(draw):
    """A number of examples, a limit, and scans of (index, easy), any times each."""
    examples, limit = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    verdict = st.tuples(st.integers(0, examples - 1), st.booleans())
    return examples, limit, draw(st.lists(st.lists(verdict, max_size=9), max_size=12))


DTYPES = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]


@given(scans(), st.sampled_from(DTYPES), st.sampled_from(DTYPES))
def test_counts_are_those_of_the_plain_algorithm(drawn, dtype, index_dtype):
    examples, limit, several = drawn
    counts, expected = sampling.init(examples).to(dtype), [0] * examples
    for verdicts in several:
        before = counts.clone()
        indices = torch.tensor([index for index, _ in verdicts], dtype=index_dtype)
        easy = torch.tensor([easy for _, easy in verdicts], dtype=torch.bool)
        new = sampling.update(counts, easy, indices, limit=limit)
        expected = counted(expected, verdicts, limit)
        assert new.tolist() == expected
        assert new.dtype == dtype
        assert torch.equal(counts, before)
        hard = [i for i, count in enumerate(expected) if count < limit]
        left = sampling.kept(new, source(0), limit=limit, replay=0).tolist()
        assert left == (hard or list(range(examples)))
        counts = new


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), max_size=9))
def test_a_scan_of_everything_needs_no_indices(verdicts):
    counts = with_indices = sampling.init(3)
    for row in verdicts:
        easy = torch.tensor(row)
        counts = sampling.update(counts, easy)
        with_indices = sampling.update(with_indices, easy.flip(0), torch.tensor([2, 1, 0]))
        assert torch.equal(counts, with_indices)


logits = st.lists(st.floats(-5, 5), min_size=3, max_size=3)


@given(st.lists(st.tuples(logits, st.integers(0, 2)), min_size=1), st.floats(0.01, 0.99))
def test_easy_is_right_and_confident(rows, confidence):
    outputs = torch.tensor([row for row, _ in rows], dtype=torch.float64)
    labels = torch.tensor([label for _, label in rows])
    shares = outputs.softmax(1).amax(1)
    assume(((shares - confidence).abs() > 1e-12).all())
    expected = [is_easy_by_hand(row, label, confidence) for row, label in rows]
    found = sampling.is_easy(outputs, labels, confidence)
    assert found.tolist() == expected
    assert found.dtype == torch.bool
    soft = nn.functional.one_hot(labels, 3) * 0.8 + 0.1
    assert sampling.is_easy(outputs, soft, confidence).tolist() == expected


def test_right_is_not_enough_and_neither_is_confident():
    outputs = torch.tensor([[0.1, 0.0, 0.0], [9.0, 0.0, 0.0], [9.0, 0.0, 0.0]])
    labels = torch.tensor([0, 1, 0])
    assert sampling.is_easy(outputs, labels).tolist() == [False, False, True]


def test_the_confidence_itself_is_confident():
    assert sampling.is_easy(torch.zeros(1, 2), torch.tensor([0]), 0.5).item()
    assert not sampling.is_easy(torch.zeros(1, 2), torch.tensor([0]), 0.5001).item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_confidence_is_not_rounded_to_narrow_logits(dtype):
    outputs = torch.tensor([[0.0, -0.002]], dtype=dtype)  # 0.5005: 0.5 in bfloat16
    assert sampling.is_easy(outputs, torch.tensor([0]), 0.5003).item()
    assert not sampling.is_easy(outputs, torch.tensor([0]), 0.5007).item()


def test_logits_that_are_no_numbers_are_not_easy_but_a_class_may_be_ruled_out():
    nan, inf = float("nan"), float("inf")
    outputs = torch.tensor([[nan, 0.0], [inf, 0.0], [0.0, nan], [0.0, -inf]])
    easy = sampling.is_easy(outputs, torch.zeros(4, dtype=torch.int64), 0.01)
    assert easy.tolist() == [False, False, False, True]


# The schedule of ml-cvnets, which replays nobody.


def kept_after(counts, **options):
    return sampling.kept(counts, source(0), replay=0, **options).tolist()


def test_who_is_always_easy_is_dropped_after_exactly_five_scans():
    counts, easy = sampling.init(3), torch.tensor([True, False, True])
    for scan in range(1, 9):
        counts = sampling.update(counts, easy)
        assert kept_after(counts) == ([0, 1, 2] if scan < 5 else [1])


def test_one_hard_scan_brings_back_and_one_easy_scan_drops_again():
    counts = torch.tensor([5, 0], dtype=torch.int8)
    easy, hard = torch.tensor([True, False]), torch.tensor([False, False])
    # However often it was easy: the count does not go above the limit.
    for _ in range(20):
        counts = sampling.update(counts, easy)
    counts = sampling.update(counts, hard)
    assert kept_after(counts) == [0, 1]
    assert kept_after(sampling.update(counts, easy)) == [1]


def test_everyone_comes_back_when_nobody_is_easy_any_more():
    # In ml-cvnets, who was dropped when this happens is dropped for good.
    counts = torch.tensor([5, 5, 0, 5], dtype=torch.int8)
    assert kept_after(counts) == [2]
    counts = sampling.update(counts, torch.zeros(4, dtype=torch.bool))
    assert kept_after(counts) == [0, 1, 2, 3]


def test_an_epoch_is_never_empty():
    counts = torch.full((3,), 5, dtype=torch.int8)
    assert kept_after(counts) == [0, 1, 2]
    assert sampling.kept(counts, source(0), replay=0.1).tolist() == [0, 1, 2]
    assert len(sampling.kept(counts, source(0), replay=0.2)) == 1


def test_who_comes_twice_in_a_scan_counts_once_and_is_hard_if_it_was_so_once():
    counts = torch.tensor([2, 2, 2, 2], dtype=torch.int8)
    indices = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    easy = torch.tensor([True, True, True, False, False, True, False])
    for order in (torch.arange(7), torch.arange(7).flip(0)):
        new = sampling.update(counts, easy[order], indices[order])
        assert new.tolist() == [3, 1, 1, 2]


def test_counts_do_not_overflow_where_the_limit_is_the_largest_number():
    for dtype, limit in ((torch.int8, 127), (torch.uint8, 255)):
        counts = torch.tensor([limit, 0], dtype=dtype)
        easy = torch.tensor([True, False])
        assert sampling.update(counts, easy, limit=limit).tolist() == [limit, 0]


def test_a_lower_limit_takes_hold_of_counts_above_it():
    counts = torch.tensor([5, 5], dtype=torch.int8)
    assert kept_after(counts, limit=2) == [0, 1]  # Both are dropped, hence nobody.
    counts = sampling.update(counts, torch.tensor([True, False]), limit=2)
    assert counts.tolist() == [2, 1]
    assert kept_after(counts, limit=2) == [1]


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=40),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 9),
)
def test_all_hard_ones_are_kept_and_a_share_of_the_others(values, replay, seed):
    counts = torch.tensor(values, dtype=torch.int8)
    left = sampling.kept(counts, source(seed), replay=replay)
    hard = {i for i, value in enumerate(values) if value < 5}
    found = left.tolist()
    assert left.dtype == torch.int64
    assert found == sorted(set(found))
    assert hard <= set(found) <= set(range(len(values)))
    replayed = round(replay * (len(values) - len(hard)))
    assert len(found) == (len(hard) + replayed or len(values))


def test_each_dropped_one_has_its_turn():
    counts = torch.full((40,), 5, dtype=torch.int8)
    counts[:10] = 0
    times = Counter(
        index
        for epoch in range(2000)
        for index in sampling.kept(counts, source("kept", epoch)).tolist()
    )
    assert {times[index] for index in range(10)} == {2000}
    replayed = torch.tensor([times[index] for index in range(10, 40)])
    share = 8 / 30  # A quarter of 30, rounded.
    spread = (2000 * share * (1 - share)) ** 0.5
    assert (replayed - 2000 * share).abs().max() < 4 * spread


def test_counts_go_through_a_checkpoint(tmp_path):
    state = samfn.init({"w": torch.ones(1)}, {}, optimizer=samfn.sgd())
    counts = sampling.update(sampling.init(3), torch.tensor([True, False, True]))
    report = sampling.Report(3, 1).after(3, 1)
    samfn.save(tmp_path / "x", state, counts=counts, report=report)
    _, found = samfn.restore(tmp_path / "x", like=state)
    assert torch.equal(found["counts"], counts)
    assert found["counts"].dtype == counts.dtype
    restored = sampling.Report(*found["report"]).after(2, 1)
    assert (restored.skipped, restored.steps_saved) == ((0, 1), 0)


# Selection by scores.

shares = st.floats(0.001, 1)
scores = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=30)


@given(scores, shares, st.sampled_from([torch.float16, torch.float32, torch.float64]))
def test_the_hardest_are_those_with_the_highest_scores(values, share, dtype):
    found = sampling.hardest(torch.tensor(values, dtype=dtype), share)
    ranked = sorted(range(len(values)), key=lambda i: (-values[i], i))
    assert found.tolist() == ranked[: max(1, round(share * len(values)))]
    assert found.dtype == torch.int64


def test_ties_go_to_the_lowest_index_even_among_many():
    assert sampling.hardest(torch.zeros(100_000), 0.5).equal(torch.arange(50_000))


def test_a_share_is_not_one_too_many_for_the_sake_of_the_last_bit():
    assert len(sampling.hardest(torch.zeros(100), 0.07)) == 7  # 0.07 * 100 > 7


def test_who_has_no_number_is_the_hardest():
    nan, inf = float("nan"), float("inf")
    values = torch.tensor([1.0, nan, -inf, inf, nan])
    assert sampling.hardest(values, 1.0).tolist() == [1, 4, 3, 0, 2]


@given(scores, shares, st.integers(0, 9))
def test_nobody_is_drawn_twice(values, share, seed):
    values = torch.tensor(values)
    found = sampling.draw(values, share, source(seed))
    again = sampling.draw(values, share, source(seed))
    assert found.equal(again)
    assert len(set(found.tolist())) == max(1, round(share * len(values)))


def frequencies(values, share, trials=4000, **options):
    """Return how often each example came first, and how often it came at all."""
    values = torch.tensor(values)
    first, any_place = torch.zeros(len(values)), torch.zeros(len(values))
    stream = source("draw")
    for _ in range(trials):
        found = sampling.draw(values, share, stream, **options)
        first[found[0]] += 1
        any_place[found] += 1
    return first / trials, any_place / trials


def test_chances_are_in_proportion_to_the_scores():
    floor = 0.1 * 2.5  # 2.5 is the mean of 0, 1, 3 and 6.
    weights = torch.tensor([0.0, 1.0, 3.0, 6.0]) + floor
    first = weights / weights.sum()
    # Of two draws: first, or second after any other.
    both = first + sum(
        torch.where(torch.arange(4) == i, 0.0, first[i] * first / (1 - first[i]))
        for i in range(4)
    )
    seen_first, seen = frequencies([-9.0, 1.0, 3.0, 6.0], 0.5)
    assert (seen_first - first).abs().max() < 4 * 0.5 / 4000**0.5
    assert (seen - both).abs().max() < 4 * 0.5 / 4000**0.5


def test_with_no_score_above_zero_all_have_the_same_chance():
    for values in ([0.0, 0.0, 0.0, 0.0], [-1.0, 0.0, -3.0, 0.0]):
        first, _ = frequencies(values, 0.25)
        assert (first - 0.25).abs().max() < 4 * 0.5 / 4000**0.5


def test_a_score_without_a_number_counts_as_the_highest_that_has_one():
    nan, inf = float("nan"), float("inf")
    usual = frequencies([1.0, 6.0, 6.0, 3.0], 0.25)[0]
    assert torch.equal(frequencies([1.0, nan, 6.0, 3.0], 0.25)[0], usual)
    assert torch.equal(frequencies([1.0, 6.0, inf, 3.0], 0.25)[0], usual)


# The order of an epoch, and its parts.


@given(st.integers(1, 40), st.data(), st.integers(0, 99))
def test_dropping_examples_takes_them_out_of_the_order_and_moves_no_other(
    examples, data, seed
):
    left = data.draw(st.lists(st.integers(0, examples - 1), unique=True))
    everyone = torch.randperm(examples, generator=source(seed)).tolist()
    ordered = sampling.order(torch.tensor(left, dtype=torch.int64), examples, source(seed))
    assert ordered.tolist() == [index for index in everyone if index in left]


def test_a_resumed_run_goes_on_exactly():
    def epochs(counts, first, last):
        for epoch in range(first, last):
            left = sampling.kept(counts, source("kept", epoch), limit=2)
            yield counts, sampling.order(left, 30, source("order", epoch)).tolist()
            easy = torch.rand(30, generator=source("easy", epoch)) < 0.8
            counts = sampling.update(counts, easy, limit=2)

    whole = list(epochs(sampling.init(30), 0, 8))
    orders = [order for _, order in whole]
    for stopped in range(8):
        resumed = epochs(whole[stopped][0].clone(), stopped, 8)
        assert [order for _, order in resumed] == orders[stopped:]
    assert len({tuple(order) for order in orders}) == 8
    assert min(map(len, orders)) < 30


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_work_stays_on_the_device_of_its_tensors():
    counts = sampling.init(50)
    easy = torch.rand(50, generator=source(0)) < 0.7
    indices = torch.randint(50, (50,), generator=source(1))
    values = torch.rand(50, generator=source(2))

    def everything(device):
        new = sampling.update(
            counts.to(device), easy.to(device), indices.to(device), limit=1
        )
        left = sampling.kept(new, source(3), limit=1)
        ordered = sampling.order(left, 50, source(4))
        return (
            new,
            left,
            ordered,
            sampling.hardest(values.to(device), 0.3),
            sampling.draw(values.to(device), 0.3, source(5)),
        )

    for there, here in zip(everything("cuda"), everything("cpu"), strict=True):
        assert there.device.type == "cuda"
        assert torch.equal(there.cpu(), here)


# The report.


def test_the_report_counts_examples_and_steps():
    report = sampling.Report(examples=100, steps=10)
    assert (report.skipped, report.skipped_share, report.steps_saved) == ((), 0, 0)
    report = report.after(100, 10).after(75, 7).after(40, 4)
    assert report.skipped == (0, 25, 60)
    assert report.skipped_share == pytest.approx(85 / 300)
    assert report.steps_saved == 9
    assert json.loads(json.dumps(report)) == [100, 10, [100, 75, 40], [10, 7, 4]]


# What is refused.

COUNTS, EASY = sampling.init(3), torch.tensor([True, False, True])
LOGITS, LABELS = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
HALF = torch.ones(3) / 2


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sampling.init(0), ValueError, "examples must .* at least 1, got 0"),
        (lambda: sampling.is_easy(LOGITS, LABELS, 0), ValueError, "confidence .* got 0"),
        (lambda: sampling.is_easy(LOGITS, LABELS, 1.1), ValueError, "confidence .* 1.1"),
        (lambda: sampling.is_easy([LOGITS], LABELS), TypeError, "logits .* got list"),
        (lambda: sampling.is_easy(LOGITS.long(), LABELS), TypeError, "got torch.int64"),
        (lambda: sampling.is_easy(LOGITS[0], LABELS), ValueError, r"got \(4,\)"),
        (lambda: sampling.is_easy(LOGITS[:, :1], LABELS), ValueError, "two classes or mo"),
        (lambda: sampling.is_easy(LOGITS, LABELS[:2]), ValueError, r"\(3,\) or \(3, 4\)"),
        (lambda: sampling.is_easy(LOGITS, HALF), TypeError, "indices .* torch.float32"),
        (lambda: sampling.update(COUNTS.float(), EASY), TypeError, "got torch.float32"),
        (lambda: sampling.update(COUNTS[None], EASY), ValueError, r"got \(1, 3\)"),
        (lambda: sampling.update(COUNTS, EASY, limit=0), ValueError, "limit must be"),
        (lambda: sampling.update(COUNTS, EASY, limit=128), ValueError, "int8, got 128"),
        (lambda: sampling.update(COUNTS, EASY.int()), TypeError, "bool, got torch.int32"),
        (lambda: sampling.update(COUNTS, EASY[:2]), ValueError, r"\(3,\) of the counts"),
        (
            lambda: sampling.update(COUNTS, EASY, LABELS[:2]),
            ValueError,
            r"easy must have the shape \(2,\) of the indices, got \(3,\)",
        ),
        (lambda: sampling.update(COUNTS, EASY, EASY), TypeError, "indices .* torch.bool"),
        (lambda: sampling.update(COUNTS, EASY, LABELS + 3), ValueError, "0 to 2, got 3"),
        (lambda: sampling.update(COUNTS, EASY, LABELS - 1), ValueError, "0 to 2, got -1"),
        (
            lambda: sampling.update(COUNTS, EASY[:1], LABELS[:1, None]),
            ValueError,
            r"indices must have one dimension, got shape \(1, 1\)",
        ),
        (lambda: sampling.kept(HALF, source(0)), TypeError, "counts must be integers"),
        (lambda: sampling.kept(COUNTS, source(0), replay=1), ValueError, "replay .* got 1"),
        (lambda: sampling.kept(COUNTS, source(0), limit=-1), ValueError, "limit .* got -1"),
        (lambda: sampling.hardest(HALF, 0), ValueError, "share must be above 0"),
        (lambda: sampling.hardest(LABELS, 0.5), TypeError, "scores .* torch.int64"),
        (lambda: sampling.hardest(HALF[:0], 0.5), ValueError, r"scores .* got \(0,\)"),
        (lambda: sampling.draw(HALF, 1.5, source(0)), ValueError, "share .* got 1.5"),
        (
            lambda: sampling.draw(HALF, 0.5, source(0), floor=0),
            ValueError,
            "floor must be above 0",
        ),
        (lambda: sampling.order(LABELS, 3, source(0)), ValueError, "once each, 2 came ag"),
        (lambda: sampling.order(HALF, 3, source(0)), TypeError, "indices must be integers"),
        (lambda: sampling.order(LABELS, 0, source(0)), ValueError, "examples must be"),
        (lambda: sampling.Report(9, 3).after(10, 3), ValueError, "has 9 examples, not 10"),
        (lambda: sampling.Report(9, 3).after(9, -1), ValueError, "taken must be"),
    ],
)
def test_wrong_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


# All of it, on digits.


@pytest.fixture
def one_thread():
    """Small networks wait for their threads where others work, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train_on_digits(seed, lr, *, epochs, **options):
    """Train a small network, pruned if there are options; return accuracy and report."""
    images, labels, test_images, test_labels = digits.read()
    inputs, test_inputs = (x.flatten(1) / images.max() for x in (images, test_images))
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    loss_fn = samfn.supervised(model, nn.functional.cross_entropy)
    optimizer, size, examples = samfn.sgd(), 64, len(labels)
    state = samfn.init(*samfn.split(model), optimizer=optimizer)
    counts = sampling.init(examples)
    report = sampling.Report(examples, steps=examples // size)
    for epoch in range(epochs):
        left = sampling.kept(counts, source(seed, "kept", epoch), limit=3, **options)
        indices = sampling.order(left, examples, source(seed, "order", epoch))
        rows = indices[: len(indices) // size * size].view(-1, size)
        for row in rows:
            state, _ = samfn.sam_update(
                state,
                (inputs[row], labels[row]),
                loss_fn=loss_fn,
                optimizer=optimizer,
                lr=lr(epoch),
            )
        report = report.after(len(left), len(rows))
        if options and epoch % 2:
            easy = per_example.easy(
                state.params, state.buffers, (inputs, labels), loss_fn=loss_fn
            )
            counts = sampling.update(counts, easy, limit=3)
    samfn.load(model, state.params, state.buffers)
    right = model(test_inputs).argmax(1) == test_labels
    return 100 * right.double().mean().item(), report


def mean_accuracy(lr, **options):
    runs = [train_on_digits(seed, lr, **options)[0] for seed in range(3)]
    return sum(runs) / 3


@pytest.mark.usefixtures("one_thread")
def test_half_of_the_work_can_be_skipped_for_one_and_a_half_percent_of_the_digits():
    lr, epochs = samfn.schedules.cosine(0.1, 30), 30
    everything = mean_accuracy(lr, epochs=epochs)
    assert everything > 96
    assert mean_accuracy(lr, epochs=epochs, replay=0.25) > everything - 1.5
    _, report = train_on_digits(0, lr, epochs=epochs, replay=0.25)
    assert report.skipped_share > 0.5
    assert report.steps_saved > report.steps * epochs / 2
    assert report.skipped[:6] == (0,) * 6  # The third scan is the first to drop anyone.
    assert report.skipped[6] > 0


@pytest.mark.usefixtures("one_thread")
def test_who_is_never_replayed_is_forgotten():
    lr = samfn.schedules.constant(0.1)
    replayed, forgotten = (
        mean_accuracy(lr, epochs=20, replay=share) for share in (0.25, 0.0)
    )
    assert replayed > 94
    assert replayed - forgotten > 2


def test_what_is_drawn_depends_on_no_default_dtype():
    scores = torch.arange(1.0, 200.0)
    expected = sampling.draw(scores, 0.5, torch.Generator().manual_seed(0))
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = sampling.draw(scores, 0.5, torch.Generator().manual_seed(0))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("size", [3e38, 1e-42])
def test_the_size_of_scores_does_not_matter_to_what_is_drawn(size):
    scores = torch.tensor([0.0, 1.0, 1.0, 0.5])
    for seed in range(12):
        expected = sampling.draw(scores, 0.25, source(seed))
        assert torch.equal(sampling.draw(size * scores, 0.25, source(seed)), expected)
