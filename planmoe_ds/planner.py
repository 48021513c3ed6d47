"""Decides the order of a layer's tasks: at once where the scheduler needs no costs, else from the first calls' times.

All ranks of a group follow one order. Times are averaged over them, the first rank decides and tells the others, all in
the same call of the layer. The order of chunks is the order in which weight gradients, and tokens' sums over chunks of
experts, are added up: an order that follows times gives other bits in the next run.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist

from planmoe_ds.backend import Clock, make_scheduler
from planmoe_ds.executor import Measurement, Order, costs_from, mean_chunk
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
    """One layer's orders."""

    def __init__(
        self,
        scheduler: str,
        group: ExpertGroup,
        num_chunks: int,
        max_in_flight: int | None,
        store: PlanStore | None = None,
        *,
        learns: bool = True,
    ) -> None:
        """learns: False keeps the first order, whatever the scheduler would make of the calls' times."""
        self._scheduler = make_scheduler(scheduler)
        self._store = store
        self._group = group
        self._num_chunks = num_chunks
        self._max_in_flight = max_in_flight
        self._calls = 0
        self._planned_for: float | None = None
        self._measurements: list[Measurement] = []
        self._learns = learns and self._scheduler.uses_costs and group.size > 1
        first = PipelinedScheduler() if self._scheduler.uses_costs else self._scheduler
        forward, backward = (self._graph(None, backward=backward) for backward in (False, True))
        self._orders = CallOrders(_order(forward, first), _order(backward, first))
        # weight gradients apart, to be timed
        self._apart = Order(tuple(sorted(self._orders.backward.tasks, key=lambda task: task.kind.value == "W")))
        self.costs: tuple[list[ChunkCosts] | None, list[ChunkCosts] | None] = (None, None)

    def next_call(self) -> CallOrders:
        """The orders of the layer's next call; every rank of the group asks at the same time."""
        if not self._learns:
            return self._orders
        number, self._calls = self._calls, self._calls + 1
        if number == 0 and self._store is not None and self._use(self._store.load(self._group, self._num_chunks)):
            self._calls = WARM_UP + MEASURED + 1  # there is nothing to learn before drift is looked for
            return self._orders
        if number >= WARM_UP + MEASURED:
            number = WARM_UP + MEASURED - 1 + (number - WARM_UP - MEASURED) % REPLAN_EVERY + 1
        if number == WARM_UP + MEASURED and self._measurements:
            self._decide()
        is_first_look = WARM_UP <= number < WARM_UP + MEASURED
        if not is_first_look and number != WARM_UP + MEASURED + REPLAN_EVERY - 1:
            return self._orders
        one_network = self._group.comm.passes_on or not self._orders.forward.tasks
        measurement = Measurement(Clock(self._group.comm.device), one_network=one_network)
        self._measurements.append(measurement)
        backward = self._apart if is_first_look else self._orders.backward
        return replace(self._orders, backward=backward, measurement=measurement)

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
        vectors = [self._average(taken.vector(self._num_chunks)) for taken in self._measurements]
        self._measurements = []
        costs = torch.stack(vectors).nanmedian(dim=0).values
        if self._use(costs) and self._store is not None:
            self._store.save(self._group, costs)

    def _use(self, vector: torch.Tensor | None) -> bool:
        """Order the tasks anew for these costs; whether that was needed and possible."""
        forward, backward = (None, None) if vector is None else costs_from([vector])
        if forward is None:
            return False
        now = mean_chunk([*forward, *(backward or [])])
        if self._planned_for is not None and abs(now / self._planned_for - 1) <= DRIFT:
            return False
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
            costs = [unknown] * self._num_chunks
        return layer_graph(costs, self._max_in_flight)

    def _average(self, vector: torch.Tensor) -> torch.Tensor:
        """Over the group's ranks."""
        total = vector.to(self._group.comm.device)
        dist.all_reduce(total, group=self._group.comm.groups[0])
        return total.cpu() / self._group.size

    def _agreed(self, graph: TaskGraph) -> list[int]:
        """The order that the group's first rank decides on."""
        order = torch.zeros(len(graph.tasks), dtype=torch.int64)
        if self._group.rank == 0:
            order = torch.tensor(timetable(graph, self._scheduler.order(graph)).order)
        order = order.to(self._group.comm.device)
        dist.broadcast(order, self._group.global_ranks[0], group=self._group.comm.groups[0])
        return order.tolist()


def _order(graph: TaskGraph, scheduler: AbstractScheduler) -> Order:
    return Order(timetable(graph, scheduler.order(graph)).tasks)
