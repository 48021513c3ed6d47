"""How many chunks a layer is cut into, and in which order their tasks run: predicted from timed tasks.

Pure functions: costs of a layer's tasks at one or two numbers of chunks in, the choice out.
A task of one of n chunks takes a + b / n: every chunk starts anew (messages, kernels, smaller GEMMs), the rest divides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

from planmoe_ds.backend import make_scheduler
from planmoe_ds.choose import TIE, in_words
from planmoe_ds.scheduling import ChunkCosts, ExchangeCosts, Schedule, layer_graph, solve, timetable
from planmoe_ds.scheduling.pipelined import PipelinedScheduler

CANDIDATES = (1, 2, 4, 8)
TRIALS = (1, 4)  # numbers of chunks that are timed
_SOLVER_SECONDS = 0.02


@dataclass(frozen=True)
class LayerCosts:
    """Seconds of every chunk's tasks in both passes; no backward where none was timed.

    host: seconds that an accelerator's host takes to start all tasks of both passes, which no order hides.
    """

    forward: Sequence[ChunkCosts]
    backward: Sequence[ChunkCosts] | None
    host: float = 0.0

    def passes(self) -> list[Sequence[ChunkCosts]]:
        """Those that there are."""
        return [self.forward] if self.backward is None else [self.forward, self.backward]


@dataclass(frozen=True)
class ScheduleChoice:
    """Chunks and scheduler, a sentence that says why, and the seconds of a layer predicted for each."""

    num_chunks: int
    scheduler: str
    reason: str
    seconds: Mapping[tuple[int, str], float]


def choose_schedule(
    trials: Mapping[int, LayerCosts],
    candidates: Sequence[int],
    scheduler: str | None = None,
    max_in_flight: int | None = None,
) -> ScheduleChoice:
    """The fastest number of chunks and scheduler; within 3 % the fewest chunks in the simplest order.

    trials: costs by the number of chunks that they were timed at. scheduler: None where it is to be chosen as well.
    ValueError without trials or candidates.
    """
    if not trials or not candidates:
        raise ValueError(f"nothing to choose from: timed at {list(trials)} chunks, candidates {list(candidates)}")
    seconds: dict[tuple[int, str], float] = {}
    for num_chunks in sorted(candidates):
        costs = costs_at(trials, num_chunks)
        for name in _orders(num_chunks) if scheduler is None else (scheduler,):
            passes = [schedule_pass(chunks, name, max_in_flight) for chunks in costs.passes()]
            seconds[num_chunks, name] = max(costs.host, sum(schedule.makespan for schedule in passes))
    limit = min(seconds.values()) * (1 + TIE)
    chosen = next(option for option, predicted in seconds.items() if predicted <= limit)
    return ScheduleChoice(*chosen, _why(chosen, seconds), seconds)


def _orders(num_chunks: int) -> tuple[str, str]:
    """The simplest scheduler, and the one that never loses to it."""
    return ("sequential" if num_chunks == 1 else "pipelined"), "optimal"


def schedule_pass(chunks: Sequence[ChunkCosts], scheduler: str, max_in_flight: int | None = None) -> Schedule:
    """One pass in the order of a scheduler."""
    graph = layer_graph(chunks, max_in_flight)
    if scheduler == "optimal":
        return solve(graph, _SOLVER_SECONDS, [PipelinedScheduler().order(graph)])
    return timetable(graph, make_scheduler(scheduler).order(graph))


def costs_at(trials: Mapping[int, LayerCosts], num_chunks: int) -> LayerCosts:
    """Costs of equal chunks, from those at the smallest and at the largest number of chunks that were timed."""
    few, many = min(trials), max(trials)

    def chunks_of(less: Sequence[ChunkCosts], more: Sequence[ChunkCosts]) -> list[ChunkCosts]:
        first, second = _mean(less), _mean(more)
        at = _combine(lambda *values: _divide(values, (few, many), num_chunks), first, second)
        return [at] * num_chunks

    less, more = trials[few], trials[many]
    host = num_chunks * _divide((less.host / few, more.host / many), (few, many), num_chunks)
    if less.backward is None or more.backward is None:
        return LayerCosts(chunks_of(less.forward, more.forward), None, host)
    return LayerCosts(chunks_of(less.forward, more.forward), chunks_of(less.backward, more.backward), host)


def _divide(values: Sequence[float], at: tuple[int, int], num_chunks: int) -> float:
    """Seconds at `num_chunks`, from those at two numbers of chunks."""
    (less, more), (few, many) = values, at
    if few == many:
        return less * few / num_chunks
    divided = min(max(0.0, (less - more) / (1 / few - 1 / many)), less * few)
    return less - divided / few + divided / num_chunks


def _mean(chunks: Sequence[ChunkCosts]) -> ChunkCosts:
    return _combine(lambda *values: sum(values) / len(values), *chunks)


def _combine(function: Callable[..., float], *chunks: ChunkCosts) -> ChunkCosts:
    """The same function over every cost of the chunks."""
    found: dict[str, float | ExchangeCosts | None] = {}
    for field in fields(ChunkCosts):
        values = [getattr(chunk, field.name) for chunk in chunks]
        if isinstance(values[0], ExchangeCosts):
            parts = {
                name: function(*(getattr(value, name) for value in values)) for name in ("intra", "inter", "latency")
            }
            found[field.name] = ExchangeCosts(serial=values[0].serial, **parts)
        else:
            found[field.name] = None if None in values else function(*values)
    return ChunkCosts(**found)  # type: ignore[arg-type]


def _why(chosen: tuple[int, str], seconds: Mapping[tuple[int, str], float]) -> str:
    """What was predicted for the choice, and what every other choice would gain or lose."""
    mine = seconds[chosen]
    others = []
    for num_chunks in sorted({option[0] for option in seconds} - {chosen[0]}):
        best = min(predicted for option, predicted in seconds.items() if option[0] == num_chunks)
        others.append(f"{_chunks(num_chunks)} {_verdict(best, mine)}")
    others += [
        f"{name} order {_verdict(predicted, mine)}"
        for (num_chunks, name), predicted in seconds.items()
        if num_chunks == chosen[0] and name != chosen[1]
    ]
    return "; ".join([f"{in_words(mine)} predicted, forward and backward", *others])


def _verdict(seconds: float, chosen: float) -> str:
    if seconds > chosen * (1 + TIE):
        return f"would lose ({in_words(seconds)})"
    return f"would gain less than {TIE:.0%} ({in_words(seconds)})"


def _chunks(count: int) -> str:
    return f"{count} chunk" + "s" * (count > 1)
