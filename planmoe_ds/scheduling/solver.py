"""The order with the least makespan, and what an order takes; the search itself is csrc/scheduler/solve.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from planmoe_ds.native import _C
from planmoe_ds.scheduling.graph import Task, TaskGraph

SECONDS = 1.0  # time for a search unless told otherwise
_BOUND_ONLY = 1  # nodes


@dataclass(frozen=True)
class Schedule:
    """An order of a graph's tasks and what it takes if every task takes as long as the graph says.

    order: places in graph.tasks; every rank launches its exchanges in this one order. starts, ends: seconds by place,
    from its first leg's start to its last leg's end. lower_bound: no order takes less. is_optimal: nor less than this.
    leg_starts: by place and leg. critical_path: places of tasks that follow each other without a gap from start to end.
    """

    graph: TaskGraph
    order: tuple[int, ...]
    starts: tuple[float, ...]
    ends: tuple[float, ...]
    makespan: float
    lower_bound: float
    is_optimal: bool
    critical_path: tuple[int, ...]
    leg_starts: tuple[tuple[float, ...], ...]

    @property
    def gap(self) -> float:
        """How much longer than the lower bound it is, at most, as a share of the bound."""
        return self.makespan / self.lower_bound - 1 if self.lower_bound > 0 else 0.0

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks in order."""
        return tuple(self.graph.tasks[place] for place in self.order)


def solve(
    graph: TaskGraph,
    seconds: float = SECONDS,
    seeds: Sequence[Sequence[int]] = (),
    max_nodes: int = 0,
) -> Schedule:
    """The best order found in `seconds` (0: however long it takes), never worse than any order of `seeds`.

    ValueError for a negative time and for seeds that are not orders of the graph.
    """
    if not seconds >= 0 or max_nodes < 0:
        raise ValueError(f"a search gets {seconds} seconds and {max_nodes} nodes, expected 0 (no limit) or more")
    solution = _C.solve_schedule(graph.problem, [list(seed) for seed in seeds], seconds, max_nodes)
    order = _launch_early(graph, _by_start(graph, solution.order))
    return _schedule(graph, order, solution.lower_bound, solution.is_optimal)


def timetable(graph: TaskGraph, order: Sequence[int]) -> Schedule:
    """What an order takes; ValueError where it is not one of the graph."""
    bound = _C.solve_schedule(graph.problem, [list(order)], 0.0, _BOUND_ONLY).lower_bound
    found = _schedule(graph, tuple(order), bound, is_optimal=False)
    return _schedule(graph, tuple(order), bound, is_optimal=found.makespan <= bound * (1 + 1e-9))


def _schedule(graph: TaskGraph, order: tuple[int, ...], bound: float, is_optimal: bool) -> Schedule:
    table = _C.simulate_schedule(graph.problem, list(order))
    return Schedule(
        graph=graph,
        order=order,
        starts=tuple(min(legs) for legs in table.starts),
        ends=tuple(table.ends),
        makespan=table.makespan,
        lower_bound=min(bound, table.makespan),
        is_optimal=is_optimal,
        critical_path=_critical_path(graph, order, table),
        leg_starts=tuple(tuple(legs[: len(task.legs)]) for legs, task in zip(table.starts, graph.tasks, strict=True)),
    )


def _by_start(graph: TaskGraph, order: Sequence[int]) -> list[int]:
    """The same order on every resource, as one list by time."""
    table = _C.simulate_schedule(graph.problem, list(order))
    return sorted(order, key=lambda place: min(table.starts[place]))  # stable: ties stay as they were


def _launch_early(graph: TaskGraph, order: Sequence[int]) -> tuple[int, ...]:
    """Exchanges move to where all that they wait for has run: a link starts them in turn, when it is free."""
    exchanges = [place for place in order if graph.tasks[place].kind.is_exchange]
    found: list[int] = []
    done: set[int] = set()

    def launch() -> None:
        while exchanges and done.issuperset(graph.tasks[exchanges[0]].after):
            done.add(exchanges[0])
            found.append(exchanges.pop(0))

    launch()
    for place in order:
        if not graph.tasks[place].kind.is_exchange:
            found.append(place)
            done.add(place)
            launch()
    return tuple(found)


def _critical_path(graph: TaskGraph, order: Sequence[int], table: _C.Timetable) -> tuple[int, ...]:
    """From the task that ends last back to the start, from each task to one whose end it waited for."""
    if not order:
        return ()
    before_on_link = _predecessors(graph, order)
    finish = {place: table.ends[place] + graph.tasks[place].latency for place in order}
    path = [max(order, key=lambda place: finish[place])]
    while True:
        task = graph.tasks[path[-1]]
        waited = [(finish[place], place) for place in task.after]
        waited += [(table.ends[place], place) for place in before_on_link[path[-1]]]
        if not waited or max(waited)[0] <= 0:
            return tuple(reversed(path))
        path.append(max(waited)[1])


def _predecessors(graph: TaskGraph, order: Sequence[int]) -> dict[int, list[int]]:
    """What came directly before each task on its resources."""
    last: dict[int, int] = {}
    found: dict[int, list[int]] = {}
    for place in order:
        resources = [int(resource) for resource, _ in graph.tasks[place].legs]
        found[place] = [last[resource] for resource in resources if resource in last]
        last.update(dict.fromkeys(resources, place))
    return found
