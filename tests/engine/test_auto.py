"""Chunks and order "auto": what injected times make of them, in the same call on every rank, and what is said."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from planmoe_ds.auto_planner import ChoiceLog
from planmoe_ds.executor import Measurement, vector_of
from planmoe_ds.planner import DRIFT, MEASURED, REPLAN_EVERY, WARM_UP, LayerPlanner
from planmoe_ds.scheduling import ChunkCosts, ExchangeCosts
from tests.engine.support import make_layer, routes_of, run_layer
from tests.engine.test_schedules import HIDDEN, TwoLinears
from tests.harness.ranks import RankPool

pytestmark = pytest.mark.distributed

LEARNING = WARM_UP + MEASURED + 1  # calls with a number of chunks before it is left
AUTO = {"comm": "auto", "chunks": "auto", "scheduler": "auto"}
EVEN = (1.0, 1.0, 0.001)  # seconds of experts, of exchanges, and of what every chunk costs anew
LOCAL = (1.0, 0.0001, 0.001)
ANEW = (0.2, 0.2, 0.5)


def injected(num_chunks: int, times: tuple[float, float, float]) -> torch.Tensor:
    """What a call would have measured; ranks measure differently."""
    work, exchange, anew = times
    factor = 1 + 0.2 * dist.get_rank()
    leg = ExchangeCosts(0.0, (exchange / num_chunks + anew) * factor)
    expert = (work / num_chunks + anew) * factor
    chunk = ChunkCosts(anew, leg, anew, expert, anew, leg, anew, expert)
    return vector_of([chunk] * num_chunks, [chunk] * num_chunks)


def decide(
    settings: dict[str, object], times: Sequence[tuple[float, float, float]], num_calls: int = 2 * LEARNING + 1
) -> tuple[list[int], str]:
    """Chunks of every call, and what this rank said; `times` follow each other, the last ones stay."""
    layer = make_layer({**AUTO, **settings})
    layer.log.speaks = dist.get_rank() == 0
    world = dist.get_world_size()
    tokens = torch.randn(60, HIDDEN, requires_grad=True)
    routes = routes_of(torch.arange(60).unsqueeze(0) % world, world)
    experts = [TwoLinears()]
    found, said = [], io.StringIO()

    def vector(_: Measurement, num_chunks: int) -> torch.Tensor:
        return injected(num_chunks, times[0] if len(found) < num_calls - REPLAN_EVERY else times[-1])

    with mock.patch.object(Measurement, "vector", vector), contextlib.redirect_stderr(said):
        for _ in range(num_calls):
            found.append(layer.num_chunks)
            run_layer(layer, tokens, routes, experts).sum().backward()
    return found, said.getvalue()


@pytest.mark.parametrize(
    ("times", "chunks", "words"),
    [(EVEN, {2, 4, 8}, "1 chunk would lose"), (LOCAL, {1}, "would gain less than 3%"), (ANEW, {1}, "would lose")],
)
def test_times_decide(ranks: RankPool, times: tuple[float, float, float], chunks: set[int], words: str) -> None:
    (mine, said), *others = ranks.run(4, decide, {"ranks_per_node": 2}, [times])
    assert mine[: 2 * LEARNING] == [1] * LEARNING + [4] * LEARNING
    assert mine[-1] in chunks
    assert all(theirs == mine for theirs, _ in others)
    assert said.count("planmoe: ") == 1
    assert words in said
    assert all(theirs == "" for _, theirs in others)


def test_drift_decides_anew_on_all_ranks_in_the_same_call(ranks: RankPool) -> None:
    assert max(EVEN) > (1 + DRIFT) * min(EVEN)
    num_calls = 3 * LEARNING + REPLAN_EVERY + 2 * LEARNING + 2
    (mine, said), (theirs, _) = ranks.run(2, decide, {}, [EVEN, ANEW], num_calls, timeout=240)
    assert mine == theirs
    assert mine[2 * LEARNING] > 1
    again = mine.index(1, 2 * LEARNING)
    assert mine[again : again + 2 * LEARNING] == [1] * LEARNING + [4] * LEARNING
    assert mine[again + 2 * LEARNING] == 1
    assert "times drifted: the next calls decide anew" in said
    assert said.count("forward and backward") == 2


def decide_beside_a_busy_host(seconds: float) -> list[int]:
    """As decide(), where the host takes `seconds` a chunk to start a layer's tasks on its device."""

    def to_start(planner: LayerPlanner, host_seconds: list[float]) -> float:
        assert len(host_seconds) == MEASURED
        assert min(host_seconds) > 0
        return seconds * planner.num_chunks

    with mock.patch.object(LayerPlanner, "_seconds_to_start", to_start):
        return decide({"ranks_per_node": 2}, [EVEN])[0]


def test_the_host_counts(ranks: RankPool) -> None:
    idle, busy = (ranks.run(2, decide_beside_a_busy_host, seconds)[0][-1] for seconds in (0.0, 10.0))
    assert idle > 1
    assert busy == 1


def test_what_is_fixed_stays(ranks: RankPool) -> None:
    (mine, said), _ = ranks.run(2, decide, {"chunks": 3}, [EVEN])
    assert set(mine) == {3}
    assert "3 chunks in optimal order" in said
    (mine, said), _ = ranks.run(2, decide, {"scheduler": "pipelined"}, [EVEN])
    assert mine[-1] > 1
    assert "in pipelined order" in said


def test_exact_results_need_one_chunk(ranks: RankPool) -> None:
    (mine, said), _ = ranks.run(2, decide, {"exactness": "exact"}, [EVEN])
    assert set(mine) == {1}
    assert "1 chunk in" in said


def test_one_rank_has_nothing_to_choose(ranks: RankPool) -> None:
    assert ranks.run(1, decide, {}, [EVEN]) == [([1] * (2 * LEARNING + 1), "")]


def test_what_was_chosen_is_kept(ranks: RankPool, tmp_path: Path) -> None:
    (mine, _), _ = ranks.run(2, decide, {"plans": str(tmp_path)}, [EVEN], 3 * LEARNING + 1)
    (again, said), _ = ranks.run(2, decide, {"plans": str(tmp_path)}, [LOCAL], 4)
    assert again[1:] == [mine[-1]] * 3
    assert "kept from an earlier run" in said


def test_layers_that_decide_alike_share_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    log = ChoiceLog(speaks=True, num_waiting=3)
    log.report(0, "2 chunks", "why")
    log.report(1, "1 chunk", "because")
    assert capsys.readouterr().err == ""
    log.report(2, "2 chunks", "other")
    assert capsys.readouterr().err.splitlines() == [
        "planmoe: MoE layers 0, 2: 2 chunks: why",
        "planmoe: MoE layers 1: 1 chunk: because",
    ]
    log.report(1, "times drifted", "again")
    assert "MoE layers 1: times drifted" in capsys.readouterr().err
