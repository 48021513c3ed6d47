"""Ranks that die, hang, stop or fail: the others say who, where and why, and none is left waiting."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
import time
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

import planmoe_ds.watchdog as watchdog_module
from planmoe_ds.chunking import Chunking
from planmoe_ds.rows import order_rows
from planmoe_ds.tensor_parallel import TensorParallelSplit, gather_rows
from tests.engine.support import rank_device
from tests.faults.layers import HIDDEN, Model, batch, die, in_backward, notice, seconds_until_error
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


def hang() -> None:
    time.sleep(12)


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
        return seconds_until_error(lambda: (place(model, action), notice(model)))


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
        assert f"rank {ODD}" in message
        assert "where the ranks are:" in message


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


class FullDisk(io.StringIO):
    """A log that cannot be written."""

    def write(self, _: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


class StoppedTerminal(io.StringIO):
    """A log that takes nothing for long."""

    def write(self, _: str) -> int:
        time.sleep(40)
        return 0


def freeze_while_waiting() -> tuple[float, str, str]:
    """Rank 3 is late; of those that wait for it, the odd one freezes: its connections stay, its machine is gone."""
    log = {0: StoppedTerminal(), 1: FullDisk()}.get(dist.get_rank(), sys.stderr)
    with patch.object(watchdog_module, "SILENCE_SECONDS", 3.0), patch.object(sys, "stderr", log):
        model = Model()
        dist.barrier()
        hidden = model.layer(0, *batch())
        if dist.get_rank() == 3:
            time.sleep(20)
        if dist.get_rank() == ODD:
            subprocess.Popen(["sh", "-c", f"sleep 3; kill -STOP {os.getpid()}; sleep 14; kill -CONT {os.getpid()}"])
        return seconds_until_error(lambda: model.layer(1, hidden, batch()[1]))


def test_a_rank_that_is_gone_while_it_waits_like_the_others(ranks: RankPool) -> None:
    outcomes = ranks.run(4, freeze_while_waiting, fresh=True, timeout=60)
    for rank, (seconds, kind, message) in enumerate(outcomes):
        assert kind == "PlanMoEError", (rank, message)
        # Once it goes on, the odd one finds that the store has not answered it for long.
        assert rank == ODD or f"rank {ODD} has not been heard of" in message, message
        assert seconds < (12 if rank < ODD else 25)


def agree(action: Any) -> tuple[float, str, str]:
    """On what tasks took, while the odd rank does something else."""
    group = Model({"timeout_seconds": 3}).layers[0].group
    dist.barrier()

    def add_up() -> None:
        with group.working("agreeing", 0):
            if dist.get_rank() == ODD:
                action()
            group.sum_of_ranks(torch.ones(3), "adding up what tasks took")

    return seconds_until_error(add_up)


@pytest.mark.parametrize("action", [hang, run_out_of_memory], ids=lambda action: action.__name__)
def test_agreements_are_watched(ranks: RankPool, action: Any) -> None:
    for rank, (seconds, kind, message) in enumerate(ranks.run(4, agree, action, fresh=True, timeout=60)):
        if rank == ODD and action is run_out_of_memory:
            assert kind == "OutOfMemoryError"
            continue
        assert kind == "PlanMoEError", (rank, kind, message)
        words = f"rank {ODD} stopped in agreeing" if action is run_out_of_memory else "adding up what tasks took"
        assert words in message, message
        assert seconds < (12 if rank != ODD else 40)


def gather() -> tuple[float, str, str]:
    """The rows of tensor-parallel ranks, of which the odd one is late."""
    group = Model({"timeout_seconds": 3}).layers[0].group
    split = TensorParallelSplit(group.rank, group.size, group, layer=0)
    orders = [order_rows(torch.zeros(1, 2), torch.zeros(1, 2), group.size, Chunking(1), group.size)] * group.size
    dist.barrier()
    if dist.get_rank() == ODD:
        time.sleep(8)
    return seconds_until_error(lambda: gather_rows(torch.ones(2, HIDDEN), orders, split))


def test_gathering_between_tensor_parallel_ranks_is_watched(ranks: RankPool) -> None:
    for _, kind, message in ranks.run(4, gather, fresh=True, timeout=60):
        assert kind == "PlanMoEError", message
        assert "the exchange of rows between tensor-parallel ranks" in message, message


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


def leave_when_done() -> tuple[float, str, str]:
    """Rank 0 waits for rows of all others, of which the odd one has ended, and then is silent, and rank 3 is late."""
    with patch.object(watchdog_module, "SILENCE_SECONDS", 3.0):
        group = Model({"timeout_seconds": 60}).layers[0].group
        watchdog: Any = group.watchdog
        rank, size = group.rank, group.size
        sent, received = [int(rank > 0), *[0] * (size - 1)], [int(rank == 0 and peer > 0) for peer in range(size)]
        rows = torch.ones(sum(sent), 4, device=rank_device())
        dist.barrier()
        if rank == 3:
            time.sleep(8)

        def exchange() -> None:
            arrival = group.exchange(rows, sent, received)
            assert arrival.exchange is not None
            with group.waiting(arrival.exchange, "the last exchange"):
                arrival.exchange.wait()
            assert rank > 0 or arrival.rows.sum() == 12

        found = seconds_until_error(exchange)
        if rank == ODD:
            watchdog._monitor.stop()
            time.sleep(8)
        return found


def test_a_rank_that_ends_when_nobody_needs_it(ranks: RankPool) -> None:
    assert [found[1:] for found in ranks.run(4, leave_when_done, fresh=True, timeout=60)] == [("", "")] * 4


def stop_while_the_store_is_silent() -> tuple[float, str, str]:
    """Rank 1 stops by itself, as for a store that does not answer; the odd one comes late."""
    model = Model({"timeout_seconds": 60})
    watchdog: Any = model.layers[0].group.watchdog
    dist.barrier()
    if dist.get_rank() == 1:
        watchdog._monitor._stop_all(watchdog_module.Reason(1, "error", "rank 1 waits; the store has not answered"))
    if dist.get_rank() == ODD:
        time.sleep(6)
    found = seconds_until_error(lambda: model.forward(*batch()))
    time.sleep(2 if dist.get_rank() == ODD else 8)  # nobody ends before the others know
    return found


def test_a_reason_found_while_the_store_was_silent_is_told_later(ranks: RankPool) -> None:
    for rank, (seconds, kind, message) in enumerate(ranks.run(4, stop_while_the_store_is_silent, fresh=True)):
        assert (kind, message) == ("PlanMoEError", "rank 1 waits; the store has not answered"), rank
        assert seconds < 5, rank


def train(slow: bool) -> tuple[list[float], float]:
    """Sums of gradients, and the seconds of the fastest step on this rank."""
    model = Model({"timeout_seconds": 10})
    found, seconds = [], []
    for _ in range(3):
        start = time.monotonic()
        tokens, experts = batch()
        model.forward(tokens, experts).sum().backward()
        if slow and dist.get_rank() == ODD:
            time.sleep(max(1.0, 9 * (time.monotonic() - start)))
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
