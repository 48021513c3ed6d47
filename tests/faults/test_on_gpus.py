"""The main faults over NCCL: the same errors as on CPU ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import planmoe_ds.watchdog as watchdog_module
from tests.deepspeed import test_checkpoints
from tests.faults import test_death, test_files, test_late, test_mismatch, test_numbers
from tests.faults.layers import hang
from tests.harness.ranks import RankPool

pytestmark = [pytest.mark.gpu, pytest.mark.distributed, pytest.mark.slow]

SECONDS = 30.0  # communicators are made and torn down
TWO_NODES = {"ranks_per_node": 2}


@pytest.mark.parametrize("place", test_death.PLACES, ids=lambda place: place.__name__)
@pytest.mark.parametrize("comm", ["direct", "hierarchical", "dedup"])
def test_a_killed_rank(gpu_ranks: RankPool, comm: str, place: Any) -> None:
    arguments = place, test_death.die, {"comm": comm, **TWO_NODES}, 5.0
    outcomes = gpu_ranks.run(4, test_death.run_case, *arguments, expect_failure=True, fresh=True, timeout=120)
    for outcome in outcomes:
        if outcome.rank != test_death.ODD:
            seconds, kind, message = outcome.result
            assert kind == "PlanMoEError", message
            assert f"rank {test_death.ODD}" in message
            assert seconds < SECONDS, message


@pytest.mark.parametrize("comm", ["hierarchical", "dedup"])
def test_a_killed_rank_of_every_node(gpu_ranks: RankPool, comm: str) -> None:
    function = test_death.lose_a_rank_of_every_node
    for outcome in gpu_ranks.run(4, function, comm, expect_failure=True, fresh=True, timeout=120):
        if outcome.rank not in test_death.ONE_OF_EVERY_NODE:
            seconds, kind, message = outcome.result
            assert kind == "PlanMoEError", message
            assert any(f"rank {rank} " in message.splitlines()[0] for rank in test_death.ONE_OF_EVERY_NODE), message
            # hierarchical's host waits there for what passes through its rank
            assert ("waits in the start of an exchange" in message) is (comm == "hierarchical"), message
            assert seconds < SECONDS, message


def test_an_error_of_one_rank_reaches_all(gpu_ranks: RankPool) -> None:
    arguments = test_death.in_an_expert, test_death.run_out_of_memory, TWO_NODES, 60.0
    outcomes = gpu_ranks.run(4, test_death.run_case, *arguments, expect_failure=True, fresh=True, timeout=120)
    for outcome in outcomes:
        seconds, kind, message = outcome.result
        assert kind == ("OutOfMemoryError" if outcome.rank == test_death.ODD else "PlanMoEError"), message
        assert seconds < SECONDS


@pytest.mark.parametrize("case", test_mismatch.CASES, ids=lambda case: case.__name__)
def test_every_rank_learns_what_differs(gpu_ranks: RankPool, case: Any) -> None:
    outcomes = gpu_ranks.run(4, test_mismatch.run_case, case, TWO_NODES, fresh=True, timeout=120)
    for seconds, kind, message in outcomes:
        assert kind == "PlanMoEMismatchError", message
        assert seconds < SECONDS
        # NCCL knows no tags: rank 2's plan meets the others' gradients.
        mixed = case is test_mismatch.evaluate_before_backward and "sent something else than the opening" in message
        assert mixed or all(words in message for words in test_mismatch.CASES[case]), message


def test_another_capacity_is_no_fault(gpu_ranks: RankPool) -> None:
    assert max(gpu_ranks.run(4, test_mismatch.with_another_capacity, TWO_NODES, timeout=120)) < 1e-6


def test_a_rank_that_hangs_is_named(gpu_ranks: RankPool) -> None:
    arguments = test_death.in_forward, hang, {"timeout_seconds": 3, **TWO_NODES}, 60.0
    outcomes = gpu_ranks.run(4, test_death.run_case, *arguments, expect_failure=True, fresh=True, timeout=120)
    for outcome in outcomes:
        seconds, kind, message = outcome.result
        assert kind == "PlanMoEError", (outcome.rank, kind, message)
        assert f"rank {test_death.ODD} was last in layer 0 forward" in message, message
        assert seconds < (SECONDS if outcome.rank != test_death.ODD else SECONDS + 25)


def test_a_rank_that_ends_its_program(gpu_ranks: RankPool) -> None:
    outcomes = gpu_ranks.run(4, test_death.end_the_program, fresh=True, timeout=120)
    for rank, (seconds, kind, message) in enumerate(outcomes):
        if rank == test_death.ODD:
            assert kind == ""
            continue
        assert kind == "PlanMoEError", (rank, kind, message)
        assert f"rank {test_death.ODD} ended its program" in message
        assert seconds < SECONDS


def test_a_rank_that_ends_when_nobody_needs_it(gpu_ranks: RankPool) -> None:
    silence = watchdog_module.SILENCE_SECONDS  # rank 3 is late by less
    outcomes = gpu_ranks.run(4, test_late.leave_when_done, silence, fresh=True, timeout=120)
    assert [found[1:] for found in outcomes] == [("", "")] * 4


def test_a_rank_that_is_gone_while_it_waits_like_the_others(gpu_ranks: RankPool) -> None:
    for rank, (seconds, kind, message) in enumerate(
        gpu_ranks.run(4, test_late.freeze_while_waiting, fresh=True, timeout=120)
    ):
        assert kind == "PlanMoEError", (rank, message)
        assert rank == test_death.ODD or f"rank {test_death.ODD} has not been heard of" in message, message
        assert seconds < SECONDS


def test_weights_are_not_saved_after_a_rank_died(gpu_ranks: RankPool, tmp_path: Path) -> None:
    arguments = test_checkpoints.save_after_a_death, str(tmp_path)
    for outcome in gpu_ranks.run(4, *arguments, expect_failure=True, fresh=True, timeout=120):
        if outcome.rank != 1:
            message, files = outcome.result
            assert "rank 1 " in message.splitlines()[0], message
            assert files == []


def test_a_straggler(gpu_ranks: RankPool) -> None:
    for usual, slow, usual_seconds, slow_seconds in gpu_ranks.run(4, test_death.straggle, timeout=120):
        assert slow == usual
        assert slow_seconds > usual_seconds


def test_a_damaged_plan_is_refused_on_every_rank(gpu_ranks: RankPool, tmp_path: Path) -> None:
    gpu_ranks.run(4, test_files.learn, str(tmp_path), fresh=True, timeout=120)
    path = tmp_path / "layer-0-from-rank-0.json"
    path.write_bytes(path.read_bytes()[:40])
    for _, kind, message in gpu_ranks.run(4, test_files.step, str(tmp_path), fresh=True, timeout=120):
        assert kind == "PlanMoEConfigError", message
        assert path.name in message


@pytest.mark.parametrize("codec", test_numbers.CODECS)
def test_what_is_not_finite_arrives_so(gpu_ranks: RankPool, codec: str) -> None:
    for found in gpu_ranks.run(4, test_numbers.poison_all, codec, "dedup", timeout=120):
        assert set(found.values()) == {(True, True)}, found


def test_extreme_loads(gpu_ranks: RankPool) -> None:
    assert gpu_ranks.run(4, test_numbers.extreme_loads, timeout=120) == [True] * 4
