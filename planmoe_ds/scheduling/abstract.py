"""What a scheduler is: subclass, define order(), register with planmoe_ds.register_scheduler."""

from __future__ import annotations

from collections.abc import Sequence

from planmoe_ds.scheduling.graph import TaskGraph


class AbstractScheduler:
    """Puts the tasks of a layer's pass in order; made without arguments, asked on one rank, obeyed by all of them."""

    uses_costs = True
    """Whether the order depends on how long tasks take: then it is decided anew once that was measured."""

    def order(self, graph: TaskGraph) -> Sequence[int]:
        """Places in graph.tasks, each once, no task before one that it waits for."""
        raise NotImplementedError(f"{type(self).__name__} must define order()")
