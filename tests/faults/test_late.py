"""Ranks that are late, leave early or learn late why the others stopped."""

from __future__ import annotations

import ctypes
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

import planmoe_ds.watchdog as watchdog_module
from planmoe_ds.chunking import Chunking
from planmoe_ds.config import PlanMoEConfig
from planmoe_ds.connect import connect_hosts
from planmoe_ds.rows import order_rows
from planmoe_ds.stopping import Reason
from planmoe_ds.tensor_parallel import TensorParallelSplit, gather_rows
from tests.engine.support import rank_device
from tests.faults.layers import HIDDEN, Model, batch, die, done, hang, seconds_until_error
from tests.faults.test_death import ODD, run_out_of_memory
from tests.harness.ranks import RankPool

pytestmark = pytest.mark.distributed


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


def pause_all() -> tuple[float, str, str]:
    """The machine stops for longer than a rank may be silent while others wait for the odd one, and goes on."""
    with patch.object(watchdog_module, "SILENCE_SECONDS", 4.0):
        model = Model({"timeout_seconds": 60})
        processes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(processes, os.getpid())
        hidden = model.layer(0, *batch())
        if dist.get_rank() == ODD:
            everyone = " ".join(map(str, processes))
            subprocess.Popen(["sh", "-c", f"sleep 1; kill -STOP {everyone}; sleep 5; kill -CONT {everyone}"])
            for _ in range(40):
                time.sleep(0.1)  # four seconds of its own
        return seconds_until_error(lambda: model.layer(1, hidden, batch()[1]))


def test_a_pause_of_all_is_no_silence(ranks: RankPool) -> None:
    assert [found[1:] for found in ranks.run(4, pause_all, fresh=True, timeout=60)] == [("", "")] * 4


def start_slowly() -> tuple[float, str, str]:
    """All that survive are in the start of an exchange, as over NCCL where one counts there what passes through it."""
    with patch.object(watchdog_module, "SILENCE_SECONDS", 3.0):
        model = Model()
        group = model.layers[0].group
        monitor = group.watchdog._monitor  # type: ignore[union-attr]
        vars(group)["_waits_to_start"] = True

        def wait_for_the_dead(*_: Any) -> Any:
            if dist.get_rank() == ODD:
                die()
            while monitor.reason is None:  # an abort ends it
                time.sleep(0.1)
            raise RuntimeError("aborted")

        hidden = model.layer(0, *batch())
        with patch.object(type(group.comm), "dispatch", wait_for_the_dead):
            return seconds_until_error(lambda: model.layer(1, hidden, batch()[1]))


def test_a_host_that_waits_to_start_an_exchange_is_watched(ranks: RankPool) -> None:
    for outcome in ranks.run(4, start_slowly, expect_failure=True, fresh=True, timeout=60):
        if outcome.rank != ODD:
            seconds, kind, message = outcome.result
            assert kind == "PlanMoEError", message
            assert f"rank {ODD} has not been heard of" in message, message
            assert "waits in the start of an exchange" in message, message
            assert seconds < 12


def agree(action: Any, hosts: bool, timeout_seconds: int = 3) -> tuple[float, str, str]:
    """On what tasks took, or from host to host as beside NCCL, while the odd rank does something else."""
    with patch.object(watchdog_module, "SILENCE_SECONDS", 4.0):
        return _agree(action, hosts, timeout_seconds)


def _agree(action: Any, hosts: bool, timeout_seconds: int) -> tuple[float, str, str]:
    group = Model({"timeout_seconds": timeout_seconds}).layers[0].group
    if hosts:
        connect_hosts([group], PlanMoEConfig())
    dist.barrier()

    def add_up() -> None:
        with group.working("agreeing", 0):
            if dist.get_rank() == ODD:
                action()
            if hosts:
                group.any_rank_says(False, "adding up what tasks took")
            else:
                group.sum_of_ranks(torch.ones(3), "adding up what tasks took")

    found = seconds_until_error(add_up)
    done()
    return found


@pytest.mark.parametrize("hosts", [False, True])
def test_a_rank_that_dies_as_others_agree(ranks: RankPool, hosts: bool) -> None:
    for outcome in ranks.run(4, agree, die, hosts, 30, expect_failure=True, fresh=True, timeout=60):
        if outcome.rank != ODD:
            seconds, kind, message = outcome.result
            assert kind == "PlanMoEError", message
            lost = f"rank {ODD} has not been heard of" if hosts else f"with rank {ODD} of the expert-parallel group"
            assert lost in message.splitlines()[0], message
            assert "adding up what tasks took" in message, message
            assert seconds < 12


@pytest.mark.parametrize("hosts", [False, True])
@pytest.mark.parametrize("action", [hang, run_out_of_memory], ids=lambda action: action.__name__)
def test_agreements_are_watched(ranks: RankPool, action: Any, hosts: bool) -> None:
    for rank, (seconds, kind, message) in enumerate(ranks.run(4, agree, action, hosts, fresh=True, timeout=60)):
        if rank == ODD and action is run_out_of_memory:
            assert kind == "OutOfMemoryError"
            continue
        assert kind == "PlanMoEError", (rank, kind, message)
        words = f"rank {ODD} stopped in agreeing" if action is run_out_of_memory else "adding up what tasks took"
        assert words in message, message
        assert seconds < (12 if rank != ODD else 40)


def ask_twice() -> str:
    """The odd rank waits for an answer, then, as others wait for the next one, does not say where it is."""
    group = Model({"timeout_seconds": 60}).layers[0].group
    connect_hosts([group], PlanMoEConfig())
    dist.barrier()
    try:
        if dist.get_rank() != ODD:
            time.sleep(2 * watchdog_module.PERIOD_SECONDS + 0.2)
        group.any_rank_says(False, "layer 5")
        if dist.get_rank() == ODD:
            ctypes.PyDLL(None).usleep(2_500_000)  # its watchdog cannot run meanwhile
        group.any_rank_says(False, "layer 6")
    except RuntimeError as error:
        return str(error)
    return "fine"


def test_where_a_rank_was_before_is_no_mismatch(ranks: RankPool) -> None:
    assert ranks.run(4, ask_twice, fresh=True, timeout=60) == ["fine"] * 4


def gather() -> tuple[float, str, str]:
    """The rows of tensor-parallel ranks, of which the odd one is late."""
    group = Model({"timeout_seconds": 3}).layers[0].group
    split = TensorParallelSplit(group, layer=0)
    orders = [order_rows(torch.zeros(1, 2), torch.zeros(1, 2), group.size, Chunking(1), group.size)] * group.size
    dist.barrier()
    if dist.get_rank() == ODD:
        time.sleep(8)
    return seconds_until_error(lambda: gather_rows(torch.ones(2, HIDDEN), orders, split))


def test_gathering_between_tensor_parallel_ranks_is_watched(ranks: RankPool) -> None:
    for _, kind, message in ranks.run(4, gather, fresh=True, timeout=60):
        assert kind == "PlanMoEError", message
        assert "the exchange of rows between tensor-parallel ranks" in message, message


def leave_when_done(silence: float = 3.0) -> tuple[float, str, str]:
    """Rank 0 waits for rows of all others, of which the odd one has ended, and then is silent, and rank 3 is late."""
    with patch.object(watchdog_module, "SILENCE_SECONDS", silence):
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
        watchdog._monitor._stop_all(Reason(1, "error", "rank 1 waits; the store has not answered"))
    if dist.get_rank() == ODD:
        time.sleep(6)
    found = seconds_until_error(lambda: model.forward(*batch()))
    time.sleep(2 if dist.get_rank() == ODD else 8)  # nobody ends before the others know
    return found


def test_a_reason_found_while_the_store_was_silent_is_told_later(ranks: RankPool) -> None:
    for rank, (seconds, kind, message) in enumerate(ranks.run(4, stop_while_the_store_is_silent, fresh=True)):
        assert (kind, message) == ("PlanMoEError", "rank 1 waits; the store has not answered"), rank
        assert seconds < 5, rank
