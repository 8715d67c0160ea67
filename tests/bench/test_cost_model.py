"""What many GPUs would take; and that the messages of the model are those of a step."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import samfn
from bench import cost_model, measure
from bench.cost_model import Link, Machine, Message, Network, duration, memory, predict
from bench.networks import build
from samfn import distributed
from tests.ranks import Sent, on_ranks

PLACEMENTS = ("replica", "group:2", "global", "sharded")
ENDLESS = Link(math.inf, 0.0)
IDEAL = Machine(memory_bandwidth=math.inf, inside=ENDLESS, between=ENDLESS)
NETWORK = Network(parameters=1e8, operations=6e10, buffers=1e4, tensors=50)


@pytest.mark.parametrize("operation", cost_model.HALVES)
def test_a_rank_alone_sends_nothing(operation):
    assert duration(Message(operation, 1e9, 1), Machine()) == 0


@pytest.mark.parametrize("placement", ["replica", "group:1", "global", "sharded"])
def test_a_step_on_one_rank_has_no_messages_to_wait_for(placement):
    found = predict(NETWORK, placement, 1, Machine(), 256)
    assert found.messages == 0
    assert found.seconds == predict(NETWORK, "replica", 1, Machine(), 256).seconds


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_a_ring_sends_all_but_one_part_and_an_all_reduce_does_so_twice(ranks):
    machine = Machine(inside=Link(1e9, 0.0))
    half = (ranks - 1) / ranks * 5.0
    for operation, expected in (("all-gather", half), ("reduce-scatter", half)):
        assert duration(Message(operation, 5e9, ranks), machine) == pytest.approx(expected)
    assert duration(Message("all-reduce", 5e9, ranks), machine) == pytest.approx(2 * half)


def test_the_slowest_link_on_the_way_counts():
    machine = Machine(inside=Link(9e9, 0.0), between=Link(1e9, 0.0), gpus=8)
    inside, between = (duration(Message("all-gather", 1e9, n), machine) for n in (8, 16))
    assert inside == pytest.approx(7 / 8 / 9)
    assert between == pytest.approx(15 / 16)
    slow_inside = replace(machine, inside=Link(5e8, 0.0))
    assert duration(Message("all-gather", 1e9, 16), slow_inside) == pytest.approx(15 / 8)


def test_latencies_add_up_along_a_ring_and_down_a_tree():
    machine = Machine(inside=Link(1.0, 1.0), between=Link(1.0, 100.0), gpus=8)
    assert duration(Message("all-gather", 0, 32), machine) == 28 * 1 + 3 * 100
    assert duration(Message("all-reduce", 0, 32), machine) == 2 * (7 * 1 + 2 * 100)
    assert duration(Message("all-reduce", 0, 2), machine) == 2


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_with_endless_bandwidth_scaling_is_ideal(placement):
    one = predict(NETWORK, "replica", 1, IDEAL, 256).seconds
    assert one == pytest.approx(2 * 256 * 6e10 / (0.4 * 989e12))
    for ranks in (2, 16, 64):
        strong = predict(NETWORK, placement, ranks, IDEAL, 256 / ranks).seconds
        assert strong == pytest.approx(one / ranks)
        assert predict(NETWORK, placement, ranks, IDEAL, 256).seconds == one
        real = predict(NETWORK, placement, ranks, Machine(), 256 / ranks).seconds
        assert real > 1.01 * one / ranks


def test_only_a_sharded_update_is_shared_out():
    slow = replace(IDEAL, memory_bandwidth=1e9)
    silent = replace(NETWORK, parameters=0, buffers=0, tensors=0)

    def own(placement, ranks):  # less what packing of messages moves
        packed = sum(
            2 * cost_model.HALVES[message.operation] * message.size
            for message in cost_model.messages(NETWORK, placement, ranks)
        )
        return predict(NETWORK, placement, ranks, slow, 0).traffic - packed / 1e9

    assert predict(silent, "replica", 1, slow, 0).traffic == 0
    assert own("replica", 4) == pytest.approx(own("global", 4))
    assert own("sharded", 4) == pytest.approx(own("global", 4) / 4)


def test_a_sharded_state_falls_with_the_ranks_and_its_step_to_what_a_pass_needs():
    network = Network(parameters=1e9, optimizer=2)
    assert memory(network, "replica", 1).state == 12e9
    for ranks in (1, 2, 8):
        sharded, whole = (memory(network, name, ranks) for name in ("sharded", "global"))
        assert sharded.state == 12e9 / ranks
        assert whole == memory(network, "replica", 64)
        assert sharded.step == pytest.approx(8e9 + 24e9 / ranks)
        several = memory(replace(network, tensors=100), "sharded", ranks)
        assert several.step == pytest.approx(8e7 + 24e9 / ranks)


def sent_in(placement, machine, ranks):
    return predict(NETWORK, placement, ranks, machine, 32).messages


def test_a_group_pays_only_where_links_between_nodes_are_less_than_half_as_fast():
    slow = Machine(inside=Link(450e9, 0.0), between=Link(50e9, 0.0))
    replica, group, everyone = (
        sent_in(placement, slow, 64) for placement in ("replica", "group:8", "global")
    )
    assert replica < group < everyone
    alike = replace(slow, between=slow.inside)
    replica, group, everyone = (
        sent_in(placement, alike, 64) for placement in ("replica", "group:8", "global")
    )
    assert replica < everyone < group


def test_a_group_has_to_divide_the_ranks():
    with pytest.raises(ValueError, match=r"group:3.* 3 does not divide 4"):
        cost_model.messages(NETWORK, "group:3", 4)


def exchanged(method):
    """On a rank: what a step of each placement sends, and of what network."""
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    params, buffers = samfn.split(model)
    loss_fn = samfn.supervised(model, nn.CrossEntropyLoss())
    batch = torch.randn(8, 6), torch.randint(4, (8,))
    found = {}
    for name in PLACEMENTS:
        own = distributed.shard(params) if name == "sharded" else params
        own_method = method if name == "sharded" else distributed.placed(method, name)
        how = {"optimizer": samfn.sgd(), "method": own_method}
        state = samfn.init(own, buffers, **how)
        with Sent() as sent:
            samfn.sam_update(state, batch, **how, loss_fn=loss_fn, lr=0.1)
        found[name] = sent.found
    return found, [leaf.numel() for leaf in params.values()]


def exchanged_by_two():
    return exchanged(samfn.sam()), exchanged(samfn.vasso())


def by_operation(messages):
    """Return how many messages there are of each operation, and their size together."""
    return {
        name: (len(sizes), pytest.approx(sum(sizes)))
        for name in ("all_gather_into_tensor", "all_reduce", "reduce_scatter_tensor")
        for sizes in [[size for operation, size in messages if operation == name]]
    }


def test_the_messages_are_those_that_a_step_sends():
    (sam, vasso), *_ = on_ranks(4, exchanged_by_two)
    names = {
        "all-reduce": "all_reduce",
        "all-gather": "all_gather_into_tensor",
        "reduce-scatter": "reduce_scatter_tensor",
    }
    for method, (found, sizes) in enumerate((sam, vasso)):
        network = Network(
            parameters=sum(sizes), buffers=16, tensors=len(sizes), method=method
        )
        for placement, sent in found.items():
            model = cost_model.messages(network, placement, 4)
            expected = sorted((names[message.operation], message.size) for message in model)
            if method and placement in ("replica", "group:2"):
                # vasso counts its steps, in one number.
                largest = expected.index(max(expected, key=lambda pair: pair[1]))
                name, size = expected[largest]
                expected[largest] = name, size + 4
            exact = sorted((name, size) for name, size, _ in sent)
            if placement == "sharded":  # The model knows of tensors of equal sizes.
                exact, expected = by_operation(exact), by_operation(expected)
                gathers = exact.pop("all_gather_into_tensor")[0]
                most = expected.pop("all_gather_into_tensor")[0]
                assert most / 2 < gathers <= most
            assert exact == expected
            groups = {message.ranks for message in model}
            assert len({group for *_, group in sent}) == len(groups)


def test_the_wide_residual_network_is_counted():
    found = cost_model.wrn()
    assert found.parameters == 36_479_194
    network = build("wrn-28-10", 1)
    forward = measure.forward_operations(network.model, network.inputs)
    first = 2 * 32 * 32 * 3 * 16 * 9  # Images need no gradient.
    assert found.operations == 3 * forward - first


def test_a_network_that_does_not_fit_is_told_to_be_sharded(capsys):
    own = Network(parameters=7e9, operations=8e13, total=64)
    cost_model.main(cost_model.Options(own=own))
    printed = capsys.readouterr().out
    assert 'it has to be "sharded"' in printed
    rows = [line.split() for line in printed.splitlines() if line.startswith("| ")]
    shown = {(row[1], row[3]) for row in rows[2:]}
    assert {("replica", "1"), ("group:8", "16"), ("sharded", "64")} <= shown
    assert ("group:8", "8") not in shown  # It is "global" there.
    assert not any(
        '"sharded"' in cost_model.verdict(n(), Machine())
        for n in (cost_model.wrn, cost_model.transformer)
    )


def test_half_a_network_is_refused():
    with pytest.raises(SystemExit, match=r"--own.operations go together"):
        cost_model.main(cost_model.Options(own=Network(parameters=1e9)))
