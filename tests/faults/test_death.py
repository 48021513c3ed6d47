"""Ranks that die, hang, stop or fail: the others say who, where and why, and none is left waiting."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

import planmoe_ds.watchdog as watchdog_module
from tests.engine.support import rank_device
from tests.faults.layers import HIDDEN, Model, batch, die, done, hang, in_backward, notice, seconds_until_error
from tests.harness.ranks import RankPool

pytestmark = pytest.mark.distributed

ODD = 2


class Expert(nn.Module):
    """Calls `action` on the odd rank when it runs."""

    def __init__(self, action: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN).to(rank_device())
        self.action = action

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        if dist.get_rank() == ODD:
            self.action()
        return self.linear(values)


def run_out_of_memory() -> None:
    raise torch.OutOfMemoryError("no memory left for this test")


def in_forward(model: Model, action: Any) -> None:
    tokens, experts = batch()
    hidden = model.layer(0, tokens, experts)
    if dist.get_rank() == ODD:
        action()
    model.layer(1, hidden, experts)


def in_an_expert(model: Model, action: Any) -> None:
    model.experts[1] = [Expert(action) for _ in model.experts[1]]
    model.forward(*batch())


def in_the_backward_pass(model: Model, action: Any) -> None:
    tokens, experts = batch()
    hidden = model.layer(0, tokens, experts)
    if dist.get_rank() == ODD:
        hidden = in_backward(hidden, action)
    model.layer(1, hidden, experts).sum().backward()


def in_an_exchange(model: Model, action: Any) -> None:
    """While rows are on their way: they are posted, and nobody has waited for them."""
    layer = model.layers[1]
    dispatch = layer.group.comm.dispatch

    def start_and_act(*arguments: Any) -> Any:
        exchange = dispatch(*arguments)
        if dist.get_rank() == ODD:
            action()
        return exchange

    hidden = model.layer(0, *batch(2000))
    with patch.object(type(layer.group.comm), "dispatch", lambda _, *arguments: start_and_act(*arguments)):
        model.layer(1, hidden, batch(2000)[1])


PLACES = [in_forward, in_an_expert, in_an_exchange, in_the_backward_pass]


def run_case(place: Any, action: Any, settings: dict[str, object], silence: float) -> tuple[float, str, str]:
    with patch.object(watchdog_module, "SILENCE_SECONDS", silence):
        model = Model(settings)
        dist.barrier()
        found = seconds_until_error(lambda: (place(model, action), notice(model)))
        done()
        return found


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
@pytest.mark.parametrize("comm", ["direct", "dedup"])
def test_a_killed_rank(ranks: RankPool, place: Any, comm: str) -> None:
    settings = {"comm": comm, "ranks_per_node": 2}
    outcomes = ranks.run(4, run_case, place, die, settings, 5.0, expect_failure=True, fresh=True, timeout=60)
    for outcome in outcomes:
        if outcome.rank == ODD:
            assert outcome.failed
            continue
        seconds, kind, message = outcome.result
        assert kind == "PlanMoEError", message
        assert seconds < 12, (seconds, message)
        assert f"rank {ODD} " in message.splitlines()[0], message
        assert "where the ranks are:" in message


ONE_OF_EVERY_NODE = (1, ODD)


def lose_a_rank_of_every_node(comm: str, late: bool = False) -> tuple[float, str, str]:
    """They die once all counts are known, before they send a row; late: the others start when it is known."""
    with patch.object(watchdog_module, "SILENCE_SECONDS", 5.0):
        model = Model({"comm": comm, "ranks_per_node": 2})
        exchanges = model.layers[1].group.comm
        dispatch = exchanges.dispatch

        def die_or_start(_: Any, *arguments: Any) -> Any:
            if dist.get_rank() in ONE_OF_EVERY_NODE:
                die()
            if late:
                time.sleep(0.5)
            return dispatch(*arguments)

        hidden = model.layer(0, *batch())
        with patch.object(type(exchanges), "dispatch", die_or_start):
            return seconds_until_error(lambda: (model.layer(1, hidden, batch()[1]), notice(model)))


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("comm", ["hierarchical", "dedup"])
def test_a_killed_rank_of_every_node(ranks: RankPool, comm: str, late: bool) -> None:
    for outcome in ranks.run(4, lose_a_rank_of_every_node, comm, late, expect_failure=True, fresh=True, timeout=60):
        if outcome.rank not in ONE_OF_EVERY_NODE:
            seconds, kind, message = outcome.result
            assert kind == "PlanMoEError", message
            assert any(f"rank {rank} " in message.splitlines()[0] for rank in ONE_OF_EVERY_NODE), message
            assert seconds < 12, (seconds, message)


REMOTE_ERROR = "NCCL Error 6: remote process exited or there was a network error"


def lose_connections(call: str, dies: bool, silence: float) -> tuple[float, str, str]:
    """As over NCCL between hosts: a rank's death, or a broken link, is an error of the others' calls."""

    def lose_them(*_: object, **__: object) -> None:
        if dies and dist.get_rank() == ODD:
            die()
        raise RuntimeError(REMOTE_ERROR)

    with patch.object(watchdog_module, "SILENCE_SECONDS", silence):
        model = Model()
        hidden = model.layer(0, *batch())
        broken = dies or dist.get_rank() == 0  # else the others wait for this one
        comm = type(model.layers[1].group.comm)
        with patch.object(comm, call, lose_them) if broken else nullcontext():
            return seconds_until_error(lambda: model.layer(1, hidden, batch()[1]))


@pytest.mark.parametrize("call", ["start", "dispatch"])  # of the counts; of rows
def test_a_rank_that_died_is_named_where_nccl_does_not(ranks: RankPool, call: str) -> None:
    for outcome in ranks.run(4, lose_connections, call, True, 3.0, expect_failure=True, fresh=True, timeout=60):
        if outcome.rank != ODD:
            seconds, kind, message = outcome.result
            assert kind == "PlanMoEError", message
            assert message.startswith(f"rank {ODD} has not been heard of"), message
            assert "waits in layer 1 forward" in message, message
            assert seconds < 12, (seconds, message)


def test_what_nccl_says_where_no_rank_is_gone(ranks: RankPool) -> None:
    for seconds, kind, message in ranks.run(4, lose_connections, "dispatch", False, 1.0, fresh=True, timeout=60):
        assert kind == "PlanMoEError", message
        assert message.startswith(f"rank 0 stopped in layer 1 forward: {REMOTE_ERROR}"), message
        assert seconds < 12, (seconds, message)


def start_in_places_of_their_own() -> str:
    """What ranks start has no number yet: they may be apart."""
    group = Model().layers[0].group
    watchdog: Any = group.watchdog
    try:
        with watchdog.waiting(group.number, watchdog_module.NO_NUMBER, f"layer {dist.get_rank()} forward"):
            time.sleep(6 * watchdog_module.PERIOD_SECONDS)
    except RuntimeError as error:
        return str(error)
    return "fine"


def test_ranks_that_start_different_exchanges_are_no_mismatch(ranks: RankPool) -> None:
    assert ranks.run(2, start_in_places_of_their_own, fresh=True) == ["fine"] * 2


class Stuck:
    """An exchange that an accelerator never gets past."""

    passed = False


def leave_the_device_behind() -> tuple[float, str, str]:
    """The host goes on, as on GPUs, while the device waits for a rank that died."""
    with patch.object(watchdog_module, "SILENCE_SECONDS", 3.0):
        group = Model().layers[0].group
        watchdog: Any = group.watchdog
        dist.barrier()
        if dist.get_rank() == ODD:
            die()
        with watchdog.waiting(group.number, 0, "layer 0 forward, dispatch of chunk 0", Stuck()):
            pass

        def look() -> None:
            for _ in range(200):
                watchdog.check()
                time.sleep(0.1)

        return seconds_until_error(look)


def test_a_device_that_waits_for_a_dead_rank_is_watched(ranks: RankPool) -> None:
    outcomes = ranks.run(4, leave_the_device_behind, expect_failure=True, fresh=True, timeout=60)
    for outcome in outcomes:
        if outcome.rank != ODD:
            _, kind, message = outcome.result
            assert kind == "PlanMoEError", message
            assert f"rank {ODD} has not been heard of" in message, message
            assert "waits in layer 0 forward, dispatch of chunk 0" in message, message


def test_a_rank_that_hangs_is_named(ranks: RankPool) -> None:
    settings = {"timeout_seconds": 3}
    outcomes = ranks.run(4, run_case, in_forward, hang, settings, 60.0, expect_failure=True, fresh=True, timeout=60)
    for outcome in outcomes:
        seconds, kind, message = outcome.result
        assert kind == "PlanMoEError", (outcome.rank, kind, message)
        assert f"rank {ODD} was last in layer 0 forward" in message, message
        assert seconds < (12 if outcome.rank != ODD else 40)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_an_error_of_one_rank_reaches_all(ranks: RankPool, place: Any) -> None:
    outcomes = ranks.run(4, run_case, place, run_out_of_memory, {}, 60.0, expect_failure=True, fresh=True, timeout=60)
    for outcome in outcomes:
        seconds, kind, message = outcome.result
        if outcome.rank == ODD:
            assert kind == "OutOfMemoryError"
        elif place in (in_an_expert, in_an_exchange):
            assert kind == "PlanMoEError"
            assert f"rank {ODD} stopped in layer 1 forward: OutOfMemoryError: no memory left" in message, message
        assert seconds < 12


def leave_early(model: Model) -> None:
    tokens, experts = batch()
    model.forward(tokens, experts)
    if dist.get_rank() != ODD:
        model.forward(tokens, experts)


def end_the_program() -> tuple[float, str, str]:
    model = Model({"timeout_seconds": 60})
    dist.barrier()
    found = seconds_until_error(lambda: leave_early(model))
    if dist.get_rank() == ODD:  # what leaving the interpreter does
        watchdog = model.layers[0].group.watchdog
        assert watchdog is not None
        watchdog._monitor.stop()
        time.sleep(8)
    return found


def test_a_rank_that_ends_its_program(ranks: RankPool) -> None:
    for rank, (seconds, kind, message) in enumerate(ranks.run(4, end_the_program, fresh=True, timeout=60)):
        if rank == ODD:
            assert kind == ""
            continue
        assert kind == "PlanMoEError"
        assert f"rank {ODD} ended its program" in message
        assert seconds < 10


def train(slow: bool) -> tuple[list[float], float]:
    """Sums of gradients, and the seconds of the fastest step on this rank."""
    model = Model({"timeout_seconds": 10})
    found, seconds = [], []
    for _ in range(3):
        start = time.monotonic()
        tokens, experts = batch()
        model.forward(tokens, experts).sum().backward()
        if slow and dist.get_rank() == ODD:
            time.sleep(min(max(1.0, 9 * (time.monotonic() - start)), 5.0))  # a first step can be slow itself
        assert tokens.grad is not None
        found.append(float(tokens.grad.sum()))
        seconds.append(time.monotonic() - start)
    return found, min(seconds[1:])


def straggle() -> tuple[list[float], list[float], float, float]:
    """Without and with a rank that takes ten times as long as the others: its peers wait, and nothing else."""
    usual, usual_seconds = train(False)
    slow, slow_seconds = train(True)
    return usual, slow, usual_seconds, slow_seconds


def test_a_straggler(ranks: RankPool) -> None:
    for usual, slow, usual_seconds, slow_seconds in ranks.run(4, straggle):
        assert slow == usual
        assert slow_seconds > usual_seconds
