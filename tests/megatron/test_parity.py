"""30 steps against Megatron's own all-to-all: bit for bit in exact mode with one chunk, rounding level otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.harness.ranks import RankPool
from tests.megatron.cases import CASES, EXACT, TWO_CHUNKS, Case

pytestmark = pytest.mark.distributed

ROUNDING = 2e-3  # of parameters after 30 steps of Adam, whose first steps magnify rounding; losses agree to 1e-5
CHUNKED_CASES = {"EP4", "TP2 EP2 ETP2", "PP2 EP2", "drop and pad", "recompute moe", "shared expert, overlap"}


def compare(case: Case, sections: dict[str, tuple[dict[str, Any], float]]) -> dict[str, str]:
    """On the ranks."""
    from tests.megatron.training import DEVICE
    from tests.megatron.training import compare as compare_trainings

    if DEVICE.type == "cuda" and case.config.get("moe_router_topk", 2) > 2:
        # Megatron adds more than two outputs up with atomics there, in any order.
        sections = {name: (settings, max(bound, ROUNDING)) for name, (settings, bound) in sections.items()}

    return compare_trainings(case, sections)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_training(megatron_ranks: RankPool, case: Case) -> None:
    sections = {"exact": (EXACT, 0.0)}
    if case.name in CHUNKED_CASES:
        sections["two chunks"] = (TWO_CHUNKS, ROUNDING)
    for results in megatron_ranks.run(case.ranks, compare, case, sections, timeout=150):
        assert results == dict.fromkeys(sections, "")


@pytest.mark.parametrize("comm", ["pipe", "hierarchical", "dedup"])
def test_other_exchanges(megatron_ranks: RankPool, comm: str) -> None:
    case = Case("EP4", steps=5)
    sections = {comm: ({"comm": comm, "ranks_per_node": 2, "chunks": 2}, ROUNDING)}
    for results in megatron_ranks.run(4, compare, case, sections, timeout=90):
        assert results == {comm: ""}


def count_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def test_nothing_stays_behind_on_the_ranks(megatron_ranks: RankPool) -> None:
    """Threads of process groups that a training leaves behind would slow down every later test."""
    case = Case("EP2", ranks=2, expert=2, steps=1)
    megatron_ranks.run(2, compare, case, {"exact": (EXACT, 0.0)})
    assert max(megatron_ranks.run(2, count_threads)) < 40
