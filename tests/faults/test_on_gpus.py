"""The main faults over NCCL: the same errors as on CPU ranks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.faults import test_death, test_mismatch, test_numbers
from tests.harness.ranks import RankPool

pytestmark = [pytest.mark.gpu, pytest.mark.distributed, pytest.mark.slow]

SECONDS = 30.0  # communicators are made and torn down
TWO_NODES = {"ranks_per_node": 2}


@pytest.mark.parametrize("place", test_death.PLACES, ids=lambda place: place.__name__)
def test_a_killed_rank(gpu_ranks: RankPool, place: Any) -> None:
    arguments = place, test_death.die, TWO_NODES, 5.0
    outcomes = gpu_ranks.run(4, test_death.run_case, *arguments, expect_failure=True, fresh=True, timeout=120)
    for outcome in outcomes:
        if outcome.rank != test_death.ODD:
            seconds, kind, message = outcome.result
            assert kind == "PlanMoEError", message
            assert f"rank {test_death.ODD}" in message
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


@pytest.mark.parametrize("what", ["tokens", "gates", "gradients"])
def test_what_is_not_finite_arrives_so(gpu_ranks: RankPool, what: str) -> None:
    settings = {"compression": "int8", "comm": "dedup", **TWO_NODES}
    assert gpu_ranks.run(4, test_numbers.poison, settings, float("nan"), what, timeout=120) == [(True, True)] * 4


def test_extreme_loads(gpu_ranks: RankPool) -> None:
    assert gpu_ranks.run(4, test_numbers.extreme_loads, timeout=120) == [True] * 4
