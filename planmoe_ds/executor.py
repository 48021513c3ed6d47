"""Runs the tasks of a pass in their order, and takes their times when asked to."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from planmoe_ds.backend import Clock, Exchange, Stamp
from planmoe_ds.choose import SERIAL_COMMS
from planmoe_ds.group import ExpertGroup
from planmoe_ds.scheduling import ChunkCosts, ExchangeCosts, Kind, Task
from planmoe_ds.trace import Phase

Step = Callable[[int], None]  # runs one task of a chunk

COLUMNS = 10  # numbers per chunk in a vector of costs; NaN: not measured
_COMPUTE_COLUMN = {
    Kind.ENCODE: 0,
    Kind.DECODE: 3,
    Kind.EXPERT: 4,
    Kind.ENCODE_BACK: 5,
    Kind.COLLECT: 8,
    Kind.WEIGHTS: 9,
}
_EXCHANGE_COLUMN = {Kind.DISPATCH: 1, Kind.COMBINE: 6}  # intra, then inter


@dataclass(frozen=True)
class Order:
    """The order of one pass's tasks, the same on every rank.

    splits: chunks whose weight gradients have other tasks between themselves and the input's gradient.
    """

    tasks: tuple[Task, ...]
    splits: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        follows = zip(self.tasks, self.tasks[1:], strict=False)
        joined = {
            first.chunk
            for first, second in follows
            if (first.kind, second.kind, first.chunk) == (Kind.EXPERT, Kind.WEIGHTS, second.chunk)
        }
        apart = {task.chunk for task in self.tasks if task.kind is Kind.WEIGHTS} - joined
        object.__setattr__(self, "splits", frozenset(apart))


@dataclass(frozen=True)
class LinkUse:
    """What the times of an exchange say of the links.

    serial: legs inside nodes come before those between them, see ExchangeCosts; crosses: whether ranks are on other
    nodes.
    """

    serial: bool
    crosses: bool


def link_use(group: ExpertGroup) -> LinkUse:
    """How the exchanges of a group use its links."""
    crosses = not bool(group.is_near.all())
    return LinkUse(crosses and group.choice.name in SERIAL_COMMS, crosses)


class Measurement:
    """Times of one call's tasks: taken as they run, read later, when the device has finished them.

    host_seconds: what the host took for the passes; where an accelerator computes, only to start the tasks.
    """

    def __init__(self, clock: Clock, use: LinkUse) -> None:
        self._clock = clock
        self._use = use
        self.host_seconds = 0.0
        self._spans: list[tuple[Phase, Kind, int, Stamp, Stamp]] = []
        self._exchanges: list[tuple[Phase, Kind, int, Exchange]] = []

    @contextmanager
    def span(self, phase: Phase, kind: Kind, chunk: int) -> Iterator[None]:
        """Time the enclosed work."""
        start = self._clock.stamp()
        yield
        self._spans.append((phase, kind, chunk, start, self._clock.stamp()))

    def add_exchange(self, phase: Phase, kind: Kind, chunk: int, exchange: Exchange) -> None:
        """An exchange that was waited for."""
        self._exchanges.append((phase, kind, chunk, exchange))

    def vector(self, num_chunks: int) -> torch.Tensor:
        """Seconds, float64 [2, num_chunks, 10]: forward, backward; NaN where nothing was measured."""
        found = torch.full((2, num_chunks, COLUMNS), math.nan, dtype=torch.float64)
        for phase, kind, chunk, start, end in self._spans:
            found[_row(phase), chunk, _COMPUTE_COLUMN[kind]] = (end.ns() - start.ns()) * 1e-9
        for phase, kind, chunk, exchange in self._exchanges:
            column = _EXCHANGE_COLUMN[kind]
            found[_row(phase), chunk, column : column + 2] = torch.tensor(link_seconds(exchange.spans(), self._use))
        return found


def _row(phase: Phase) -> int:
    return 0 if phase == "forward" else 1


def link_seconds(spans: Sequence[tuple[str, int, int]], use: LinkUse) -> tuple[float, float]:
    """Seconds on the links inside nodes and between them, from spans (lane, start, end) in nanoseconds.

    A link takes exchanges in turn, so one that waits there for its parts on the other link keeps the next ones waiting:
    it is busy from its first part's start to its last one's end. What is passed on ("onward") keeps nothing waiting.
    """
    if any(lane == "exchange" for lane, _, _ in spans):  # both classes as one
        whole = _busy_seconds(_hull(spans))
        return (0.0, whole) if use.crosses else (whole, 0.0)
    intra, inter = ([span for span in spans if span[0] == lane] for lane in ("intra", "inter"))
    if use.serial and intra:
        arrived = max(end for _, _, end in intra)
        inter = [(lane, max(start, arrived), max(end, arrived)) for lane, start, end in inter]
    passed_on = [(start, end) for lane, start, end in spans if lane == "onward"]
    return _busy_seconds([*_hull(intra), *passed_on]), _busy_seconds(_hull(inter))


def _busy_seconds(times: Sequence[tuple[int, int]]) -> float:
    """Seconds in which there is at least one, from (start, end) in nanoseconds."""
    total, reached = 0, 0
    for start, end in sorted(times):
        total += max(0, end - max(start, reached))
        reached = max(reached, end)
    return total * 1e-9


def _hull(spans: Sequence[tuple[str, int, int]]) -> list[tuple[int, int]]:
    """From the first start to the last end, if there is any."""
    return [(min(start for _, start, _ in spans), max(end for _, _, end in spans))] if spans else []


def costs_from(
    vectors: Sequence[torch.Tensor], *, serial: bool = False
) -> tuple[list[ChunkCosts] | None, list[ChunkCosts] | None]:
    """Medians over calls as costs, forward and backward; None for a pass that was not measured.

    serial: see ExchangeCosts.
    """
    if not vectors:
        return None, None
    medians = torch.stack(list(vectors)).nanmedian(dim=0).values
    return _costs(medians[0], backward=False, serial=serial), _costs(medians[1], backward=True, serial=serial)


def _costs(medians: torch.Tensor, *, backward: bool, serial: bool) -> list[ChunkCosts] | None:
    if bool(medians[:, 0].isnan().any()):
        return None
    rows = [[0.0 if math.isnan(value) else value for value in row] for row in medians.tolist()]
    return [_chunk_costs(row, backward=backward, serial=serial) for row in rows]


def vector_of(forward: Sequence[ChunkCosts], backward: Sequence[ChunkCosts] | None) -> torch.Tensor:
    """The inverse of costs_from for one call."""
    missing = [[math.nan] * COLUMNS] * len(forward)
    rows = [_row_of(chunk) for chunk in forward]
    return torch.tensor(
        [rows, missing if backward is None else [_row_of(chunk) for chunk in backward]], dtype=torch.float64
    )


def _row_of(chunk: ChunkCosts) -> list[float]:
    out, home = chunk.dispatch, chunk.combine
    weights = math.nan if chunk.weights is None else chunk.weights
    return [
        chunk.encode, out.intra, out.inter, chunk.decode, chunk.expert, chunk.encode_back, home.intra, home.inter,
        chunk.collect, weights,
    ]  # fmt: skip


def _chunk_costs(row: Sequence[float], *, backward: bool, serial: bool) -> ChunkCosts:
    return ChunkCosts(
        encode=row[0],
        dispatch=ExchangeCosts(row[1], row[2], serial),
        decode=row[3],
        expert=row[4],
        encode_back=row[5],
        combine=ExchangeCosts(row[6], row[7], serial),
        collect=row[8],
        weights=row[9] if backward else None,
    )


def mean_chunk(chunks: Sequence[ChunkCosts]) -> float:
    """Seconds of all tasks of a chunk, on average; what drifts."""
    return statistics.fmean(
        sum(value.intra + value.inter if isinstance(value, ExchangeCosts) else value or 0.0 for value in _fields(chunk))
        for chunk in chunks
    )


def _fields(chunk: ChunkCosts) -> list[float | ExchangeCosts | None]:
    return [getattr(chunk, name) for name in chunk.__dataclass_fields__]


@dataclass(frozen=True)
class Steps:
    """What every kind of task does, and what it waits for before."""

    run: Mapping[Kind, Step]
    wait: Mapping[Kind, Step]


def run_tasks(order: Order, steps: Steps, phase: Phase, measurement: Measurement | None) -> None:
    """Run every task; those that compute are timed, without their waits, where a measurement is under way."""
    begin = time.perf_counter()
    for task in order.tasks:
        if task.kind in steps.wait:
            steps.wait[task.kind](task.chunk)
        if measurement is None or task.kind.is_exchange:
            steps.run[task.kind](task.chunk)
        else:
            with measurement.span(phase, task.kind, task.chunk):
                steps.run[task.kind](task.chunk)
    if measurement is not None:
        measurement.host_seconds += time.perf_counter() - begin
