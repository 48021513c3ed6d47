"""How fast the solver is, and what its order gains over ScheMoE's, on random instances."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass

from planmoe_ds.scheduling import ChunkCosts, ExchangeCosts, TaskGraph, layer_graph, solve, timetable
from planmoe_ds.scheduling.optimal import SECONDS_FOR_FEW, SECONDS_FOR_MANY
from planmoe_ds.scheduling.pipelined import PipelinedScheduler


@dataclass(frozen=True)
class SolverRow:
    """Instances with one number of chunks: milliseconds, instances solved to optimality, gaps, gain over ScheMoE."""

    name: str
    median_ms: float
    worst_ms: float
    optimal: float
    worst_gap: float
    mean_gain: float
    worst_gain: float
    best_gain: float


def random_instance(rng: random.Random, num_chunks: int, *, backward: bool) -> TaskGraph:
    """Unequal chunks: every task's cost is drawn apart, three resources about equally busy on average."""

    def draw(scale: float) -> float:
        return scale * rng.uniform(0.1, 1.0)

    return layer_graph(
        [
            ChunkCosts(
                encode=draw(0.2),
                dispatch=ExchangeCosts(intra=draw(1.0), inter=draw(1.0)),
                decode=draw(0.2),
                expert=draw(1.0),
                encode_back=draw(0.2),
                combine=ExchangeCosts(intra=draw(1.0), inter=draw(1.0)),
                collect=draw(0.2),
                weights=draw(1.0) if backward else None,
            )
            for _ in range(num_chunks)
        ]
    )


def measure_solver(name: str, num_chunks: int, count: int, *, backward: bool) -> SolverRow:
    """Solve `count` instances as the scheduler `optimal` does."""
    rng = random.Random(f"{name} {num_chunks}")  # noqa: S311
    limit = SECONDS_FOR_FEW if num_chunks <= 8 else SECONDS_FOR_MANY
    milliseconds, gaps, gains, optimal = [], [], [], 0
    for _ in range(count):
        graph = random_instance(rng, num_chunks, backward=backward)
        theirs = timetable(graph, PipelinedScheduler().order(graph))
        start = time.perf_counter()
        ours = solve(graph, limit, [theirs.order])
        milliseconds.append((time.perf_counter() - start) * 1e3)
        gaps.append(ours.gap)
        gains.append(theirs.makespan / ours.makespan - 1)
        optimal += ours.is_optimal
    return SolverRow(
        name, statistics.median(milliseconds), max(milliseconds), optimal / count, max(gaps), statistics.fmean(gains),
        min(gains), max(gains),
    )  # fmt: skip


def run_solver_part(quick: bool) -> list[SolverRow]:
    """The cases of the table; the first one has the 1,000 instances."""
    many, some, few = (100, 20, 3) if quick else (1000, 200, 20)
    return [
        measure_solver("forward, 4 chunks", 4, many, backward=False),
        measure_solver("backward, 4 chunks", 4, some, backward=True),
        measure_solver("forward, 8 chunks", 8, some, backward=False),
        measure_solver("backward, 8 chunks", 8, some, backward=True),
        measure_solver("forward, 16 chunks", 16, few, backward=False),
        measure_solver("backward, 16 chunks", 16, few, backward=True),
    ]


def print_solver_part(rows: list[SolverRow]) -> None:
    """A table and RESULT lines."""
    print("solver against ScheMoE's order, random instances with unequal chunks, three resources")
    print(f"{'':<22}{'ms':>8}{'worst':>8}{'optimal':>9}{'gap <':>8}{'gain':>8}{'least':>8}{'most':>8}")
    for row in rows:
        print(
            f"{row.name:<22}{row.median_ms:8.2f}{row.worst_ms:8.1f}{row.optimal:9.1%}{row.worst_gap:8.2%}"
            f"{row.mean_gain:8.1%}{row.worst_gain:8.1%}{row.best_gain:8.1%}"
        )
    eight = [row for row in rows if "8 chunks" in row.name]
    print(f"RESULT solver_ms_8_chunks={max(row.worst_ms for row in eight):.1f}")
    print(f"RESULT solver_ms_16_chunks={max(row.worst_ms for row in rows if '16 chunks' in row.name):.1f}")
    print(f"RESULT gain_over_schemoe_order={rows[0].mean_gain:.4f}")
    print(f"RESULT worst_gain_over_schemoe_order={min(row.worst_gain for row in rows):.4f}")
