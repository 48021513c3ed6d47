"""The tasks of one pass through a layer, forward or backward, and what waits for what.

Every chunk goes through the tasks of `Kind` in their order; backward, the experts' work is split into the gradient of
their input, which the next tasks need, and the gradients of their weights, which nothing waits for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import Enum, IntEnum
from functools import cached_property

from planmoe_ds.native import _C

MOST_CHUNKS = 16


class Kind(Enum):
    """A task's kind, in the order in which one chunk goes through them; the value is its name in the literature."""

    ENCODE = "C1"
    DISPATCH = "A1"
    DECODE = "D1"
    EXPERT = "E"
    ENCODE_BACK = "C2"
    COMBINE = "A2"
    COLLECT = "D2"
    WEIGHTS = "W"  # backward: gradients of the experts' weights, any time after EXPERT

    __hash__ = object.__hash__  # Enum's own runs in Python, and every task is looked up by its kind

    @property
    def is_exchange(self) -> bool:
        """Whether it occupies links instead of the processor."""
        return self in (Kind.DISPATCH, Kind.COMBINE)


class Resource(IntEnum):
    """What works on one task at a time."""

    COMPUTE = 0
    INTRA = 1  # links inside nodes
    INTER = 2  # links between nodes


@dataclass(frozen=True)
class Task:
    """A task of a graph: seconds on each resource that it occupies, and the places in the graph of what it waits for.

    serial: its legs run one after the other, otherwise side by side. latency: seconds between its end and the start of
    what waits for it. twin: place of an interchangeable task that comes first in every order, None without one.
    """

    kind: Kind
    chunk: int
    legs: tuple[tuple[Resource, float], ...]
    after: tuple[int, ...]
    serial: bool = False
    latency: float = 0.0
    twin: int | None = None

    def __str__(self) -> str:
        return f"{self.kind.value}({self.chunk})"


@dataclass(frozen=True)
class TaskGraph:
    """Tasks with what they wait for; ValueError for bad costs, unknown tasks and cycles, naming them."""

    tasks: tuple[Task, ...]

    def __post_init__(self) -> None:
        for task in self.tasks:
            for resource, seconds in task.legs:
                _check_seconds(f"{task} on {resource.name.lower()}", seconds)
            _check_seconds(f"the latency of {task}", task.latency)
        _check_acyclic(self.tasks)
        assert self.problem is not None

    @cached_property
    def problem(self) -> _C.ScheduleProblem:
        """The graph as the compiled solver takes it."""
        return _C.ScheduleProblem(
            len(Resource),
            [
                _C.ScheduleTask(
                    [(int(resource), seconds) for resource, seconds in task.legs], list(task.after),
                    serial=task.serial, latency=task.latency, twin=-1 if task.twin is None else task.twin,
                )
                for task in self.tasks
            ],
        )  # fmt: skip

    def resource_seconds(self, resource: Resource) -> float:
        """How long a resource is busy."""
        return sum(seconds for task in self.tasks for used, seconds in task.legs if used is resource)


@dataclass(frozen=True)
class ExchangeCosts:
    """Seconds of an exchange on the links of each class; see Task for `serial` and `latency`."""

    intra: float = 0.0
    inter: float = 0.0
    serial: bool = False
    latency: float = 0.0


@dataclass(frozen=True)
class ChunkCosts:
    """Seconds of one chunk's tasks; `weights` is None where weight gradients are not a task of their own."""

    encode: float
    dispatch: ExchangeCosts
    decode: float
    expert: float
    encode_back: float
    combine: ExchangeCosts
    collect: float
    weights: float | None = None

    def check(self, chunk: int) -> None:
        """ValueError naming a cost that is negative or not finite."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, ExchangeCosts):
                for name in ("intra", "inter", "latency"):
                    _check_seconds(f"chunk {chunk}: {field.name}.{name}", getattr(value, name))
            elif value is not None:
                _check_seconds(f"chunk {chunk}: {field.name}", value)


def _check_seconds(what: str, seconds: float) -> None:
    if not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError(f"{what} takes {seconds} seconds, expected a finite number that is not negative")


def _check_acyclic(tasks: Sequence[Task]) -> None:
    waits: dict[int, set[int]] = {}
    for place, task in enumerate(tasks):
        unknown = [before for before in task.after if not 0 <= before < len(tasks)]
        if unknown:
            raise ValueError(f"{task} waits for task {unknown[0]}, there are tasks 0 to {len(tasks) - 1}")
        waits[place] = set(task.after)
    while waits:
        ready = [place for place, before in waits.items() if not before & waits.keys()]
        if not ready:
            stuck = ", ".join(str(tasks[place]) for place in waits)
            raise ValueError(f"tasks wait for each other, so none of them can start: {stuck}")
        for place in ready:
            del waits[place]


def layer_graph(chunks: Sequence[ChunkCosts], max_in_flight: int | None = None) -> TaskGraph:
    """The graph of one pass through a layer: 1 to 16 chunks, equal or not.

    max_in_flight: chunk i is encoded only when chunk i - max_in_flight has finished all its tasks, which bounds the
    buffers and activations held at once. Raises ValueError for other numbers and for bad costs.
    """
    if not 1 <= len(chunks) <= MOST_CHUNKS:
        raise ValueError(f"a layer has {len(chunks)} chunks, expected 1 to {MOST_CHUNKS}")
    if max_in_flight is not None and max_in_flight < 1:
        raise ValueError(f"max_in_flight is {max_in_flight}, expected 1 or more")
    window = len(chunks) if max_in_flight is None else max_in_flight
    tasks: list[Task] = []
    first_task: list[int] = []
    last_tasks: list[tuple[int, ...]] = []
    for chunk, costs in enumerate(chunks):
        costs.check(chunk)
        twin = _twin_of(chunks, chunk, window)
        first_task.append(len(tasks))
        for kind, cost in _tasks_of(costs):
            place = len(tasks) - first_task[chunk]
            if kind is Kind.WEIGHTS:
                after: tuple[int, ...] = (first_task[chunk] + list(Kind).index(Kind.EXPERT),)
            elif place > 0:
                after = (len(tasks) - 1,)
            else:
                after = last_tasks[chunk - window] if chunk >= window else ()
            tasks.append(_make_task(kind, chunk, cost, after, None if twin is None else first_task[twin] + place))
        last = len(tasks) - 1
        last_tasks.append((last,) if costs.weights is None else (last - 1, last))
    return TaskGraph(tuple(tasks))


def _tasks_of(costs: ChunkCosts) -> list[tuple[Kind, float | ExchangeCosts]]:
    found = [(kind, getattr(costs, kind.name.lower())) for kind in Kind]
    return [(kind, cost) for kind, cost in found if cost is not None]


def _twin_of(chunks: Sequence[ChunkCosts], chunk: int, window: int) -> int | None:
    """The last earlier chunk with the same costs; with a window chunks are only alike when all are."""
    if window < len(chunks) and any(costs != chunks[0] for costs in chunks):
        return None
    return next((other for other in range(chunk - 1, -1, -1) if chunks[other] == chunks[chunk]), None)


def _make_task(kind: Kind, chunk: int, cost: float | ExchangeCosts, after: tuple[int, ...], twin: int | None) -> Task:
    if isinstance(cost, ExchangeCosts):
        legs = ((Resource.INTRA, cost.intra), (Resource.INTER, cost.inter))
        return Task(kind, chunk, legs, after, cost.serial, cost.latency, twin)
    return Task(kind, chunk, ((Resource.COMPUTE, cost),), after, twin=twin)
