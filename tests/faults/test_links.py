"""Links of an emulated cluster that are cut or crawl: ranks on both sides say so, and a slow link is no fault."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cluster import ClusterSpec, run_on_cluster

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

ON_RANK = Path(__file__).with_name("on_link.py")
TWO_BY_TWO = ClusterSpec.even(2, 2, "100mbit", "1gbit")
BACKENDS = pytest.mark.parametrize("backend", ["gloo", pytest.param("nccl", marks=pytest.mark.gpu)])


def run(backend: str, *words: str) -> tuple[list[dict[str, Any]], float]:
    """What every rank found, by rank, and the seconds of the whole run."""
    start = time.monotonic()
    environment = {"BACKEND": backend}
    done = run_on_cluster(TWO_BY_TWO, [sys.executable, str(ON_RANK), *words], 90, environment=environment)
    if done.skip_reason is not None:
        pytest.skip(done.skip_reason)
    assert done.returncode == 0, done.stderr
    lines = [line.removeprefix("found ") for line in done.stderr.splitlines() if line.startswith("found ")]
    found = sorted((json.loads(line) for line in lines), key=lambda rank: rank["rank"])
    assert [rank["rank"] for rank in found] == [0, 1, 2, 3], done.stderr
    return found, time.monotonic() - start


@BACKENDS
def test_a_cut_link_ends_every_rank_on_both_sides(backend: str) -> None:
    """The store is on the first node: the ranks of the second one cannot ask it any more."""
    found, seconds = run(backend, "cut")
    for rank in found:
        assert rank["kind"] == "PlanMoEError", rank
        assert rank["seconds"] < 25, rank
    for rank in found[:2]:
        assert "has not been heard of for 5 s: it died or hangs" in rank["message"], rank
        assert "rank 2" in rank["message"] or "rank 3" in rank["message"], rank
    for rank in found[2:]:
        assert "the link to it is cut" in rank["message"], rank
        assert f"rank {rank['rank']} waits in layer" in rank["message"], rank
    assert seconds < 80, "the processes did not end"


@BACKENDS
def test_a_link_at_one_percent_is_slow_and_nothing_else(backend: str) -> None:
    found, _ = run(backend, "slow", "1mbit")
    usual, _ = run(backend, "none")
    assert all(rank["kind"] == "" for rank in found), found
    assert found[2]["seconds"] > usual[2]["seconds"]
    assert [rank["sums"] for rank in found] == [rank["sums"] for rank in usual]
