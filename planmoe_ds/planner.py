"""Decides the order of a layer's tasks: at once where the scheduler needs no costs, else from the first calls' times.

All ranks of a group follow one order. Times are averaged over them, the first rank decides and tells the others, all in
the same call of the layer. The order of chunks is the order in which weight gradients, and tokens' sums over chunks of
experts, are added up: an order that follows times gives other bits in the next run.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from planmoe_ds.backend import Clock, make_scheduler
from planmoe_ds.errors import PlanMoEConfigError
from planmoe_ds.executor import LinkUse, Measurement, Order, costs_from, link_use, mean_chunk
from planmoe_ds.group import ExpertGroup
from planmoe_ds.plan_store import PlanStore
from planmoe_ds.scheduling import (
    AbstractScheduler,
    ChunkCosts,
    ExchangeCosts,
    Schedule,
    TaskGraph,
    layer_graph,
    timetable,
)
from planmoe_ds.scheduling.pipelined import PipelinedScheduler
from planmoe_ds.trace import Phase

WARM_UP = 2  # calls that nothing is learnt from
MEASURED = 3  # calls that are timed before the order is decided
REPLAN_EVERY = 200  # calls between later looks
DRIFT = 0.25  # share by which a chunk's time must have changed for a new order

_UNKNOWN = ChunkCosts(0.0, ExchangeCosts(), 0.0, 0.0, 0.0, ExchangeCosts(), 0.0)


@dataclass
class Patience:
    """Places of the parameters whose gradients may wait, None until a chunk's graph was looked at.

    Like the check for foreign leaves this takes the experts' graphs to use parameters alike in every call.
    """

    places: frozenset[int] | None = None


@dataclass(frozen=True)
class CallOrders:
    """The orders of one layer call, which weight gradients may wait, and where times are kept, if they are taken."""

    forward: Order
    backward: Order
    patience: Patience = field(default_factory=Patience)
    measurement: Measurement | None = None


class LayerPlanner:
    """One layer's orders, for a fixed number of chunks.

    fresh: learns whatever the scheduler, and from this run's calls alone. learns: False keeps the first order, whatever
    the scheduler would make of the calls' times.
    """

    def __init__(
        self,
        scheduler: str,
        group: ExpertGroup,
        num_chunks: int,
        max_in_flight: int | None,
        store: PlanStore | None = None,
        *,
        fresh: bool = False,
        learns: bool = True,
    ) -> None:
        self._scheduler = make_scheduler(scheduler)
        self._store = store
        self._group = group
        self.num_chunks = num_chunks
        self.num_drifts = 0  # times that a new order was needed
        self._max_in_flight = max_in_flight
        self._calls = 0
        self._facts: Mapping[str, str] = {}
        self._planned_for: float | None = None
        self._measurements: list[Measurement] = []
        self._learns = learns and (self._scheduler.uses_costs or fresh) and group.size > 1
        self._loads = store is not None and not fresh
        self._use_of_links: LinkUse = link_use(group)
        first = PipelinedScheduler() if self._scheduler.uses_costs else self._scheduler
        forward, backward = (self._graph(None, backward=backward) for backward in (False, True))
        self._orders = CallOrders(_order(forward, first), _order(backward, first))
        # weight gradients apart, to be timed
        self._apart = Order(tuple(sorted(self._orders.backward.tasks, key=lambda task: task.kind.value == "W")))
        self.costs: tuple[list[ChunkCosts] | None, list[ChunkCosts] | None] = (None, None)
        self.host_seconds = 0.0  # to start both passes on an accelerator, as learnt with `costs`

    @property
    def is_settled(self) -> bool:
        """Whether nothing is left to be learnt before drift."""
        return not self._learns or self.costs[0] is not None

    def next_call(self, facts: Mapping[str, str]) -> CallOrders:
        """The orders of the layer's next call; every rank of the group asks at the same time.

        facts: what its costs depend on, by name; the same in every call.
        """
        if not self._learns:
            return self._orders
        if self._loads:
            self._loads = False
            assert self._store is not None
            kept = self._store.load(self._group, facts, self.num_chunks)
            if kept is not None and self.resume(kept):
                return self._orders
        self._facts = facts
        number, self._calls = self._calls, self._calls + 1
        if number >= WARM_UP + MEASURED:
            number = WARM_UP + MEASURED - 1 + (number - WARM_UP - MEASURED) % REPLAN_EVERY + 1
        if number == WARM_UP + MEASURED and self._measurements:
            self._decide()
        is_first_look = WARM_UP <= number < WARM_UP + MEASURED
        if not is_first_look and number != WARM_UP + MEASURED + REPLAN_EVERY - 1:
            return self._orders
        measurement = Measurement(Clock(self._group.comm.device), self._use_of_links)
        self._measurements.append(measurement)
        backward = self._apart if is_first_look else self._orders.backward
        return replace(self._orders, backward=backward, measurement=measurement)

    def resume(self, costs: torch.Tensor) -> bool:
        """Follow costs that were learnt before, float64 [2, num_chunks, 10]; whether they were complete."""
        if not self._use(costs):
            return False
        self._calls = WARM_UP + MEASURED + 1  # there is nothing to learn before drift is looked for
        return True

    def schedules(self) -> dict[Phase, Schedule]:
        """The orders in force at the costs that were learnt; empty while nothing was."""
        found: dict[Phase, Schedule] = {}
        passes: tuple[tuple[Phase, Order], ...] = (
            ("forward", self._orders.forward),
            ("backward", self._orders.backward),
        )
        for (phase, order), costs in zip(passes, self.costs, strict=True):
            if costs is not None:
                graph = self._graph(costs, backward=phase == "backward")
                places = {(task.kind, task.chunk): place for place, task in enumerate(graph.tasks)}
                found[phase] = timetable(graph, [places[task.kind, task.chunk] for task in order.tasks])
        return found

    def _decide(self) -> None:
        vectors = [self._average(taken.vector(self.num_chunks)) for taken in self._measurements]
        self.host_seconds = self._seconds_to_start([taken.host_seconds for taken in self._measurements])
        self._measurements = []
        costs = torch.stack(vectors).nanmedian(dim=0).values
        if self._use(costs) and self._store is not None:
            self._store.save(self._group, self._facts, costs)

    def _use(self, vector: torch.Tensor | None) -> bool:
        """Order the tasks anew for these costs; whether that was needed and possible."""
        forward, backward = (None, None) if vector is None else costs_from([vector], serial=self._use_of_links.serial)
        if forward is None:
            return False
        now = mean_chunk([*forward, *(backward or [])])
        if self._planned_for is not None and abs(now / self._planned_for - 1) <= DRIFT:
            return False
        self.num_drifts += self._planned_for is not None
        self._planned_for = now
        self.costs = forward, backward
        graphs = [self._graph(forward, backward=False)]
        if backward is not None:
            graphs.append(self._graph(backward, backward=True))
        orders = [Order(tuple(graph.tasks[place] for place in self._agreed(graph))) for graph in graphs]
        backward_order = orders[1] if backward is not None else self._orders.backward
        self._orders = replace(self._orders, forward=orders[0], backward=backward_order)
        return True

    def _graph(self, costs: list[ChunkCosts] | None, *, backward: bool) -> TaskGraph:
        if costs is None:
            unknown = ChunkCosts(**{**vars(_UNKNOWN), "weights": 0.0 if backward else None})
            costs = [unknown] * self.num_chunks
        return layer_graph(costs, self._max_in_flight)

    def _seconds_to_start(self, host_seconds: list[float]) -> float:
        """Of the group's ranks; 0 where the host itself computes, since the tasks' times are all of it."""
        if self._group.comm.device.type == "cpu":
            return 0.0
        return float(self._average(torch.tensor(statistics.median(host_seconds), dtype=torch.float64)))

    def _average(self, vector: torch.Tensor) -> torch.Tensor:
        """Over the group's ranks."""
        return self._group.sum_of_ranks(vector, "adding up what tasks took") / self._group.size

    def _agreed(self, graph: TaskGraph) -> list[int]:
        """The order that the group's first rank decides on."""
        order = torch.zeros(len(graph.tasks), dtype=torch.int64)
        if self._group.rank == 0:
            order = torch.tensor(_schedule(graph, self._scheduler).order)
        return self._group.told_by_first(order, "agreeing on the order of tasks").tolist()


def _order(graph: TaskGraph, scheduler: AbstractScheduler) -> Order:
    return Order(_schedule(graph, scheduler).tasks)


def _schedule(graph: TaskGraph, scheduler: AbstractScheduler) -> Schedule:
    """Its order with times; PlanMoEConfigError where it is none that tasks can follow."""
    order = scheduler.order(graph)
    try:
        return timetable(graph, order)
    except ValueError as error:
        raise PlanMoEConfigError(
            f"the scheduler {type(scheduler).__name__} gave an order that cannot be followed: {error}. order() returns "
            "places in graph.tasks, each once, no task before one that it waits for"
        ) from error
