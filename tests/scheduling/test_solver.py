"""The solver against every order there is, and against what is known in closed form."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planmoe_ds.scheduling import ChunkCosts, ExchangeCosts, Kind, Resource, TaskGraph, layer_graph, solve, timetable
from planmoe_ds.scheduling.pipelined import PipelinedScheduler
from tests.scheduling.exhaustive import least_makespan, makespan_of
from tests.scheduling.instances import random_chunks, random_graph, random_layer


def check_optimal(graph: TaskGraph) -> None:
    least = least_makespan(graph.tasks)
    found = solve(graph, seconds=0)
    assert found.is_optimal
    assert found.makespan == pytest.approx(least, abs=1e-9)
    assert makespan_of(graph.tasks, found.order) == pytest.approx(found.makespan, abs=1e-9)
    root_bound = solve(graph, seconds=0, max_nodes=1).lower_bound
    assert root_bound <= least + 1e-9


@pytest.mark.parametrize("block", range(10))
def test_equal_to_exhaustive_search_on_layers(block: int) -> None:
    rng = random.Random(block)
    for _ in range(100):
        check_optimal(random_layer(rng))


@pytest.mark.parametrize("block", range(10))
def test_equal_to_exhaustive_search_on_any_graph(block: int) -> None:
    rng = random.Random(1000 + block)
    for _ in range(300):
        check_optimal(random_graph(rng))


@settings(max_examples=200)
@given(st.randoms(use_true_random=False))
def test_equal_to_exhaustive_search_on_shrinking_layers(rng: random.Random) -> None:
    check_optimal(random_layer(rng))


@settings(max_examples=100)
@given(st.randoms(use_true_random=False), st.integers(3, 16), st.booleans(), st.sampled_from([None, 1, 2, 3]))
def test_never_below_the_bound_nor_above_the_seed(
    rng: random.Random, num_chunks: int, backward: bool, window: int | None
) -> None:
    graph = layer_graph(random_chunks(rng, num_chunks, backward=backward), window)
    seed = timetable(graph, PipelinedScheduler().order(graph))
    found = solve(graph, 0.02, [seed.order])
    busiest = max(graph.resource_seconds(resource) for resource in Resource)
    assert busiest - 1e-9 <= found.lower_bound <= found.makespan <= seed.makespan + 1e-9
    assert makespan_of(graph.tasks, found.order) == pytest.approx(found.makespan)
    assert found.gap >= 0
    assert found.is_optimal == (found.gap < 1e-9)


def equal_chunks(num_chunks: int, codec: float, exchange: float, work: float, last: float) -> TaskGraph:
    costs = ExchangeCosts(inter=exchange)
    return layer_graph([ChunkCosts(codec, costs, 0.0, work, 0.0, costs, last)] * num_chunks)


@settings(max_examples=200)
@given(st.integers(1, 8), *[st.integers(0, 20)] * 4)
def test_schemoes_order_is_optimal_for_equal_chunks(
    num_chunks: int, codec: int, exchange: int, work: int, last: int
) -> None:
    codec, last = min(codec, exchange), min(last, exchange)  # ScheMoE's own assumption: codecs do not outlast the links
    graph = equal_chunks(num_chunks, codec, exchange, work, last)
    order = PipelinedScheduler().order(graph)
    found = solve(graph, 2.0, [order])
    assert timetable(graph, order).makespan <= found.makespan * (1 + 1e-9) or not found.is_optimal


@pytest.mark.parametrize("num_chunks", [2, 3, 4, 8, 16])
def test_closed_form_where_the_links_are_the_limit(num_chunks: int) -> None:
    graph = equal_chunks(num_chunks, codec=1, exchange=10, work=6, last=1)
    found = solve(graph)
    assert found.makespan == pytest.approx(1 + 2 * num_chunks * 10 + 1)
    assert found.is_optimal


@pytest.mark.parametrize("num_chunks", [2, 3, 4, 8, 16])
def test_closed_form_where_the_processor_is_the_limit(num_chunks: int) -> None:
    graph = equal_chunks(num_chunks, codec=5, exchange=4, work=20, last=5)
    found = solve(graph)
    assert found.makespan == pytest.approx(num_chunks * 30)
    assert found.is_optimal


def test_weight_gradients_fill_the_gap() -> None:
    """ANCHORS: a = dgrad = wgrad = 1, two chunks: 5 instead of 6."""
    costs = ExchangeCosts(inter=1.0)
    split = layer_graph([ChunkCosts(0, costs, 0, 1, 0, costs, 0, weights=1)] * 2)
    joined = layer_graph([ChunkCosts(0, costs, 0, 2, 0, costs, 0)] * 2)
    assert solve(split).makespan == pytest.approx(5)
    assert solve(joined).makespan == pytest.approx(6)


def test_at_most_the_chunks_in_flight() -> None:
    rng = random.Random(5)
    for window in (1, 2, 3):
        graph = layer_graph(random_chunks(rng, 6, backward=True), max_in_flight=window)
        for order in (solve(graph).order, PipelinedScheduler().order(graph)):
            started: dict[int, int] = {}
            most = 0
            for place in order:
                chunk = graph.tasks[place].chunk
                started[chunk] = started.get(chunk, 0) + 1
                in_flight = [c for c, count in started.items() if count < len(Kind)]
                most = max(most, len(in_flight))
            assert most <= window


def test_critical_path_has_no_gaps() -> None:
    rng = random.Random(11)
    for _ in range(50):
        found = solve(layer_graph(random_chunks(rng, 4, backward=True)), 0.05)
        path = found.critical_path
        assert max(found.ends) <= found.makespan
        seconds = sum(found.ends[place] - found.starts[place] for place in path)
        waits = sum(found.graph.tasks[place].latency for place in path)
        assert seconds + waits >= found.makespan - 1e-9


def test_fast_enough_for_training() -> None:
    rng = random.Random(3)
    for num_chunks, limit in ((8, 0.05), (16, 1.0)):
        graph = layer_graph(random_chunks(rng, num_chunks, backward=True))
        seconds = []
        for _ in range(5):  # the machine may be busy; the benchmark measures
            start = time.perf_counter()
            solve(graph, 0.9 * limit)
            seconds.append(time.perf_counter() - start)
            if seconds[-1] < 3 * limit:
                break
        assert min(seconds) < 3 * limit
