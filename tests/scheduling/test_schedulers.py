"""The contract of every scheduler, built in or registered, and what graphs refuse."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence

import pytest

import planmoe_ds
from planmoe_ds import backend
from planmoe_ds.config import parse_config
from planmoe_ds.errors import PlanMoEConfigError
from planmoe_ds.plugins import PLUGINS
from planmoe_ds.scheduling import ChunkCosts, ExchangeCosts, Kind, Resource, Task, TaskGraph, layer_graph, solve
from planmoe_ds.scheduling.pipelined import PipelinedScheduler
from tests.scheduling.exhaustive import makespan_of
from tests.scheduling.instances import random_chunks

NAMES = ["optimal", "pipelined", "sequential"]
COSTS = ChunkCosts(1, ExchangeCosts(1, 2), 1, 3, 1, ExchangeCosts(1, 2), 1, 2)


def names_of(graph: TaskGraph, order: Sequence[int]) -> str:
    return " ".join(str(graph.tasks[place]) for place in order)


def test_names() -> None:
    assert backend.scheduler_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("window", [None, 1, 2])
@pytest.mark.parametrize("backward", [False, True])
def test_contract(name: str, window: int | None, backward: bool) -> None:
    scheduler = backend.make_scheduler(name)
    rng = random.Random(7)
    for num_chunks in range(1, 9):
        graph = layer_graph(random_chunks(rng, num_chunks, backward=backward), window)
        order = list(scheduler.order(graph))
        assert sorted(order) == list(range(len(graph.tasks)))
        makespan_of(graph.tasks, order)  # fails on a task that comes before one that it waits for


def test_optimal_is_never_worse_than_the_others() -> None:
    rng = random.Random(8)
    for _ in range(40):
        graph = layer_graph(random_chunks(rng, rng.randint(1, 8), backward=rng.random() < 0.5))
        spans = {name: makespan_of(graph.tasks, backend.make_scheduler(name).order(graph)) for name in NAMES}
        assert spans["optimal"] <= min(spans.values()) + 1e-9


def test_sequential_order() -> None:
    graph = layer_graph([COSTS] * 2)
    assert names_of(graph, backend.make_scheduler("sequential").order(graph)) == (
        "C1(0) A1(0) D1(0) E(0) W(0) C2(0) A2(0) D2(0) C1(1) A1(1) D1(1) E(1) W(1) C2(1) A2(1) D2(1)"
    )


def test_pipelined_order() -> None:
    graph = layer_graph([dataclasses.replace(COSTS, weights=None)] * 2)
    assert names_of(graph, PipelinedScheduler().order(graph)) == (
        "C1(0) A1(0) C1(1) A1(1) D1(0) E(0) C2(0) A2(0) D1(1) E(1) C2(1) A2(1) D2(0) D2(1)"
    )


def test_a_registered_scheduler_is_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PLUGINS.schedulers, "_classes", dict(PLUGINS.schedulers._classes))

    @planmoe_ds.register_scheduler("backwards")
    class Backwards(planmoe_ds.AbstractScheduler):
        def order(self, graph: TaskGraph) -> Sequence[int]:
            return sorted(range(len(graph.tasks)), key=lambda place: (-graph.tasks[place].chunk, place))

    assert isinstance(backend.make_scheduler("backwards"), Backwards)
    assert parse_config({"scheduler": "backwards"}).scheduler == "backwards"
    with pytest.raises(ValueError, match="registered twice"):
        planmoe_ds.register_scheduler("optimal")(Backwards)


def test_unknown_scheduler() -> None:
    with pytest.raises(ValueError, match="unknown scheduler 'fastest'; known: optimal, pipelined, sequential"):
        backend.make_scheduler("fastest")
    with pytest.raises(PlanMoEConfigError, match="did you mean 'optimal'"):
        parse_config({"scheduler": "optimum"})


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(ChunkCosts)])
def test_bad_costs_are_named(field: str, bad: float) -> None:
    value = ExchangeCosts(inter=bad) if field in ("dispatch", "combine") else bad
    with pytest.raises(ValueError, match=rf"chunk 1: {field}.* takes {bad} seconds"):
        layer_graph([COSTS, dataclasses.replace(COSTS, **{field: value})])


@pytest.mark.parametrize(("num_chunks", "window"), [(0, None), (17, None), (2, 0)])
def test_bad_numbers(num_chunks: int, window: int | None) -> None:
    with pytest.raises(ValueError, match="expected 1"):
        layer_graph([COSTS] * num_chunks, window)


def compute(chunk: int, after: tuple[int, ...], seconds: float = 1.0) -> Task:
    return Task(Kind.EXPERT, chunk, ((Resource.COMPUTE, seconds),), after)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ((compute(0, (1,)), compute(1, (0,)), compute(2, ())), r"none of them can start: E\(0\), E\(1\)"),
        ((compute(0, (0,)),), r"none of them can start: E\(0\)"),
        ((compute(0, (3,)),), r"E\(0\) waits for task 3, there are tasks 0 to 0"),
        ((compute(0, (), -2.0),), r"E\(0\) on compute takes -2.0 seconds"),
        ((Task(Kind.DISPATCH, 0, ((Resource.INTER, 1.0),), (), latency=math.nan),), r"latency of A1\(0\) takes nan"),
        ((Task(Kind.EXPERT, 0, (), ()),), "task 0 occupies no resource"),
        ((Task(Kind.EXPERT, 0, ((Resource.INTRA, 1.0), (Resource.INTRA, 1.0)), ()),), "two legs on resource 1"),
        ((dataclasses.replace(compute(0, ()), twin=4),), "names task 4 as its twin"),
    ],
)
def test_bad_graphs_are_named(tasks: tuple[Task, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskGraph(tasks)


def test_bad_searches_are_named() -> None:
    graph = layer_graph([COSTS])
    with pytest.raises(ValueError, match="-1 seconds"):
        solve(graph, -1)
    with pytest.raises(ValueError, match="before task"):
        solve(graph, 1, [list(reversed(range(8)))])
    with pytest.raises(ValueError, match="has 2 tasks, there are 8"):
        solve(graph, 1, [[0, 1]])
    with pytest.raises(ValueError, match="named twice"):
        solve(graph, 1, [[0] * 8])
