"""pipelined: ScheMoE's order (EuroSys 2024), optimal for equal chunks and two resources."""

from __future__ import annotations

from collections.abc import Sequence

from planmoe_ds.scheduling.abstract import AbstractScheduler
from planmoe_ds.scheduling.graph import Kind, TaskGraph

_WAVE = {
    Kind.ENCODE: 0,
    Kind.DISPATCH: 0,
    Kind.DECODE: 1,
    Kind.EXPERT: 1,
    Kind.WEIGHTS: 1,  # with the rest of the experts' backward
    Kind.ENCODE_BACK: 1,
    Kind.COMBINE: 1,
    Kind.COLLECT: 2,
}
_RANK = {kind: place for place, kind in enumerate(_WAVE)}


class PipelinedScheduler(AbstractScheduler):
    """Every dispatch is under way before the first expert runs, every combine before the first is collected.

    With a limit on chunks in flight, the chunks within it go first, then the next ones.
    """

    uses_costs = False

    def order(self, graph: TaskGraph) -> Sequence[int]:
        """By group of chunks that may be in flight together, then wave, chunk and task."""
        tasks = graph.tasks
        first = [place for place, task in enumerate(tasks) if task.kind is Kind.ENCODE]
        limited = [tasks[place].chunk for place in first if tasks[place].after]
        window = min(limited, default=len(first))

        def key(place: int) -> tuple[int, int, int, int]:
            task = tasks[place]
            return task.chunk // window, _WAVE[task.kind], task.chunk, _RANK[task.kind]

        return sorted(range(len(tasks)), key=key)
