"""sequential: chunk after chunk, nothing at the same time; what a framework without overlap does."""

from __future__ import annotations

from collections.abc import Sequence

from planmoe_ds.scheduling.abstract import AbstractScheduler
from planmoe_ds.scheduling.graph import Kind, TaskGraph

_TASKS = list(Kind)
_RANK = {kind: float(place) for place, kind in enumerate(_TASKS)}
_RANK[Kind.WEIGHTS] = _RANK[Kind.EXPERT] + 0.5  # with the rest of the experts' backward


class SequentialScheduler(AbstractScheduler):
    """All tasks of a chunk, then those of the next."""

    uses_costs = False

    def order(self, graph: TaskGraph) -> Sequence[int]:
        """By chunk, then by the tasks' order in a chunk."""
        tasks = graph.tasks
        return sorted(range(len(tasks)), key=lambda place: (tasks[place].chunk, _RANK[tasks[place].kind]))
