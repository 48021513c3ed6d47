"""optimal: the order with the least makespan, by branch and bound."""

from __future__ import annotations

from collections.abc import Sequence

from planmoe_ds.scheduling.abstract import AbstractScheduler
from planmoe_ds.scheduling.graph import TaskGraph
from planmoe_ds.scheduling.pipelined import PipelinedScheduler
from planmoe_ds.scheduling.solver import solve

FEW_CHUNKS, SECONDS_FOR_FEW, SECONDS_FOR_MANY = 8, 0.045, 0.9


class OptimalScheduler(AbstractScheduler):
    """Never worse than ScheMoE's order; the best found where the search runs out of time."""

    def order(self, graph: TaskGraph) -> Sequence[int]:
        """What solve() finds in a time that training does not notice."""
        num_chunks = len({task.chunk for task in graph.tasks})
        seconds = SECONDS_FOR_FEW if num_chunks <= FEW_CHUNKS else SECONDS_FOR_MANY
        return solve(graph, seconds, [PipelinedScheduler().order(graph)]).order
