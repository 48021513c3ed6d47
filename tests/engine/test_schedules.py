"""Whatever the order of the tasks: the same outputs and gradients; weight gradients apart; chunks in flight bounded."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import planmoe_ds
from planmoe_ds.config import PlanMoEConfig
from planmoe_ds.connect import connect
from planmoe_ds.errors import PlanMoEConfigError, PlanMoEError
from planmoe_ds.executor import Order, vector_of
from planmoe_ds.gradients import ExpertGraph, linear_calls, splittable, used_once
from planmoe_ds.plan_store import PlanStore
from planmoe_ds.planner import DRIFT, MEASURED, WARM_UP, CallOrders
from planmoe_ds.plugins import PLUGINS
from planmoe_ds.scheduling import ChunkCosts, ExchangeCosts, Kind, TaskGraph, layer_graph
from tests.engine.support import make_layer, rank_device, routes_of, run_layer
from tests.harness.ranks import RankPool

HIDDEN = 16


class TwoLinears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(HIDDEN, 24), nn.Linear(24, HIDDEN)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.second(torch.nn.functional.gelu(self.first(rows)))


class Mixed(TwoLinears):
    """Has parameters that cannot wait: a norm, and a weight that is used again outside its module."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.tied = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        rows = self.tied(self.norm(rows))
        return super().forward(torch.nn.functional.linear(rows, self.tied.weight))


def random_order(rng: random.Random, graph: TaskGraph) -> Order:
    """Any order that the graph allows."""
    left, done, found = set(range(len(graph.tasks))), set[int](), []
    while left:
        ready = sorted(place for place in left if done.issuperset(graph.tasks[place].after))
        place = rng.choice(ready)
        left.discard(place)
        done.add(place)
        found.append(graph.tasks[place])
    return Order(tuple(found))


def run_orders(
    chunks: int, settings: dict[str, object], seeds: Sequence[int], dtype: torch.dtype = torch.float64, top_k: int = 2
) -> list[list[torch.Tensor]]:
    """Outputs and all gradients of one batch, for the configured order and for random ones."""
    torch.manual_seed(dist.get_rank())
    world = dist.get_world_size()
    layer = make_layer({"chunks": chunks, **settings})
    experts = [TwoLinears().to(dtype), Mixed().to(dtype)]
    tokens = torch.randn(40, HIDDEN, dtype=dtype, device=rank_device(), requires_grad=True)
    weights = torch.rand(top_k, 40, dtype=dtype, requires_grad=True)
    routes = routes_of(torch.randint(0, 2 * world, (top_k, 40)), 2 * world, weights)
    costs = ChunkCosts(0, ExchangeCosts(), 0, 0, 0, ExchangeCosts(), 0)
    graphs = [layer_graph([ChunkCosts(**{**vars(costs), "weights": w})] * chunks) for w in (None, 0.0)]
    results = []
    for seed in [None, *seeds]:
        if seed is not None:
            rng = random.Random(seed)  # the same on every rank
            orders = CallOrders(random_order(rng, graphs[0]), random_order(rng, graphs[1]))
            layer._planner.next_call = lambda facts, orders=orders: orders  # type: ignore[method-assign]
        output = run_layer(layer, tokens, routes, experts)
        parameters = [p for expert in experts for p in expert.parameters()]
        grads = torch.autograd.grad(output.square().sum(), [tokens, weights, *parameters])
        results.append([output.detach(), *grads])
    return results


@pytest.mark.distributed
@pytest.mark.parametrize("settings", [{}, {"comm": "pipe", "ranks_per_node": 1}, {"exactness": "exact"}])
@pytest.mark.parametrize("chunks", [1, 3])
def test_any_order_gives_the_same_gradients(ranks: RankPool, chunks: int, settings: dict[str, object]) -> None:
    for results in ranks.run(2, run_orders, chunks, settings, [1, 2, 3, 4]):
        for other in results[1:]:
            for mine, theirs in zip(results[0], other, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def gradients_in_two_parts(make: Callable[[], nn.Module], split: bool) -> tuple[list[torch.Tensor | None], int]:
    torch.manual_seed(0)
    expert = make()
    parameters: list[torch.Tensor] = list(expert.parameters())
    leaf = torch.randn(1, 1, 7, HIDDEN, requires_grad=True)
    with linear_calls() as calls:
        output = expert(leaf)
    linears = splittable(calls, {id(p): place for place, p in enumerate(parameters)})
    alone = used_once(output, linears, parameters)
    linears = [linear for linear in linears if alone.issuperset(linear.parameters)]
    graph = ExpertGraph((leaf,), output, linears)
    totals: list[torch.Tensor | None] = [None] * len(parameters)
    grad, _ = graph.input_gradient(torch.ones_like(output), parameters, totals, split=split, keep=False)
    left = sum(total is None for total in totals)
    graph.weight_gradients(parameters, totals, keep=False)
    return [grad, *totals], left


class Tied(TwoLinears):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return super().forward(super().forward(rows))


class InPlace(TwoLinears):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu_(self.first(rows)))


class Checkpointed(TwoLinears):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(super().forward, rows, use_reentrant=False)


@pytest.mark.parametrize(("make", "waiting"), [(TwoLinears, 4), (Mixed, 4), (Tied, 0), (InPlace, 4), (Checkpointed, 0)])
def test_weight_gradients_apart_are_the_same_bit_for_bit(make: Callable[[], nn.Module], waiting: int) -> None:
    together, none_left = gradients_in_two_parts(make, split=False)
    apart, left = gradients_in_two_parts(make, split=True)
    assert none_left == 0
    assert left == waiting
    for mine, theirs in zip(together, apart, strict=True):
        assert mine is not None
        assert theirs is not None
        assert torch.equal(mine, theirs)


def most_in_flight(name: str, window: int | None) -> tuple[int, int]:
    """Most bytes of exchange buffers in use at once, and chunks between their first and last task."""
    layer = make_layer({"chunks": 8, "scheduler": name, "max_in_flight": window, "comm": "direct"})
    world = dist.get_world_size()
    tokens = torch.randn(4096, 64, requires_grad=True)
    routes = routes_of(torch.randint(0, world, (1, 4096), generator=torch.Generator().manual_seed(3)), world)
    experts = [nn.Linear(64, 64)]
    for _ in range(WARM_UP + MEASURED + 1):
        run_layer(layer, tokens, routes, experts).sum().backward()
    layer.group.comm.take_peak_bytes()
    run_layer(layer, tokens, routes, experts).sum().backward()
    most = 0
    for order in (layer._planner.next_call({}).forward, layer._planner.next_call({}).backward):
        left = {task.chunk: sum(other.chunk == task.chunk for other in order.tasks) for task in order.tasks}
        open_chunks: set[int] = set()
        for task in order.tasks:
            open_chunks.add(task.chunk)
            most = max(most, len(open_chunks))
            left[task.chunk] -= 1
            if left[task.chunk] == 0:
                open_chunks.discard(task.chunk)
    return layer.group.comm.take_peak_bytes(), most


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["optimal", "pipelined"])
def test_chunks_in_flight_bound_the_buffers(ranks: RankPool, name: str) -> None:
    whole = ranks.run(2, most_in_flight, "pipelined", None)
    for (peak, most), (all_bytes, all_chunks) in zip(ranks.run(2, most_in_flight, name, 2), whole, strict=True):
        assert most <= 2 < all_chunks
        assert peak <= 0.5 * all_bytes


def learn(costs_differ: bool) -> list[tuple[str, ...]]:
    """The orders of the calls before and after they are decided, on this rank."""
    layer = make_layer({"chunks": 3, "scheduler": "optimal"})
    world = dist.get_world_size()
    tokens = torch.randn(600, HIDDEN, requires_grad=True)
    first = torch.arange(600) < (500 if costs_differ else 600)
    routes = routes_of(torch.where(first, 0, world - 1).unsqueeze(0), world)
    seen = []
    experts = [TwoLinears()]
    for _ in range(WARM_UP + MEASURED + 2):
        run_layer(layer, tokens, routes, experts).sum().backward()
        orders = layer._planner._orders
        seen.append(tuple(str(task) for order in (orders.forward, orders.backward) for task in order.tasks))
    assert layer._planner.costs[0] is not None
    assert layer._planner.costs[1] is not None
    assert all(costs.expert > 0 and costs.dispatch.intra > 0 for costs in layer._planner.costs[1])
    return seen


@pytest.mark.distributed
def test_all_ranks_follow_the_order_that_was_learnt(ranks: RankPool) -> None:
    mine, theirs = ranks.run(2, learn, True)
    assert mine == theirs
    assert len(set(mine[: WARM_UP + MEASURED])) == 1
    assert mine[-1] == mine[-2]


def stored(folder: str, chunks: int, top_k: int = 1) -> int:
    """Calls after which the order no longer is the first one."""
    layer = make_layer({"chunks": chunks, "scheduler": "optimal", "plans": folder})
    world = dist.get_world_size()
    tokens = torch.randn(60, HIDDEN, requires_grad=True)
    routes = routes_of(torch.arange(60).expand(top_k, -1) % world, world)
    first = layer._planner._orders
    for call in range(WARM_UP + MEASURED + 2):
        run_layer(layer, tokens, routes, [TwoLinears()]).sum().backward()
        if layer._planner._orders is not first:
            return call
    raise AssertionError("no order was decided")


@pytest.mark.distributed
def test_what_was_learnt_is_kept(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(2, stored, str(tmp_path), 3) == [WARM_UP + MEASURED] * 2
    assert ranks.run(2, stored, str(tmp_path), 3) == [0] * 2
    path = tmp_path / "layer-0-from-rank-0.json"
    path.write_text(path.read_text().replace('"nodes of the ranks": "0, 0"', '"nodes of the ranks": "0, 1"'))
    outcomes = ranks.run(2, stored, str(tmp_path), 3, expect_failure=True)
    assert [outcome.error for outcome in outcomes] == ["PlanMoEConfigError"] * 2
    assert "is a plan for another cluster: nodes of the ranks is 0, 0 and was 0, 1" in outcomes[0].message
    assert "rank 0 cannot use" in outcomes[1].message


def paths_of_two_groups(folder: str) -> str:
    """Of the first layer, on ranks that are in different groups."""
    rank = dist.get_rank()
    group = connect({"half": [0, 1] if rank < 2 else [2, 3]}, PlanMoEConfig(), rank_device())["half"]
    return PlanStore(Path(folder), 0)._path(group).name


@pytest.mark.distributed
def test_every_group_has_a_plan_of_its_own(ranks: RankPool, tmp_path: Path) -> None:
    names = ranks.run(4, paths_of_two_groups, str(tmp_path))
    assert names == ["layer-0-from-rank-0.json"] * 2 + ["layer-0-from-rank-2.json"] * 2


@pytest.mark.distributed
def test_what_another_model_learnt_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, stored, str(tmp_path), 3)
    outcomes = ranks.run(2, stored, str(tmp_path), 3, 2, expect_failure=True)
    assert [outcome.error for outcome in outcomes] == ["PlanMoEConfigError"] * 2
    assert "is a plan for another model: top-k is 2 and was 1" in outcomes[0].message


def drift(factors: Sequence[float]) -> list[bool]:
    """Whether costs that changed by each factor made a new order."""
    layer = make_layer({"chunks": 2, "scheduler": "optimal"})
    costs = ChunkCosts(1.0, ExchangeCosts(1.0, 2.0), 1.0, 3.0, 1.0, ExchangeCosts(1.0, 2.0), 1.0, 2.0)
    vector = vector_of([costs] * 2, [costs] * 2)
    return [layer._planner._use(vector * factor) for factor in factors]


@pytest.mark.distributed
def test_drift_makes_a_new_order(ranks: RankPool) -> None:
    within, beyond = 1 + 0.9 * DRIFT, 1 + 1.1 * DRIFT
    assert ranks.run(2, drift, [1.0, within, 1 / within, beyond, 1.0]) == [[True, False, False, True, False]] * 2


def backwards(seed: int) -> float:
    """A scheduler of the user's own, whose order differs from rank to rank unless one of them decides."""

    class Shuffled(planmoe_ds.AbstractScheduler):
        def order(self, graph: TaskGraph) -> Sequence[int]:
            order = random_order(random.Random(dist.get_rank() + seed), graph)
            return [graph.tasks.index(task) for task in order.tasks]

    PLUGINS.schedulers.add(f"shuffled-{seed}", Shuffled)
    layer = make_layer({"chunks": 3, "scheduler": f"shuffled-{seed}"})
    tokens = torch.ones(60, HIDDEN, requires_grad=True)
    routes = routes_of(torch.arange(60).unsqueeze(0) % dist.get_world_size(), dist.get_world_size())
    for _ in range(WARM_UP + MEASURED + 2):
        output = run_layer(layer, tokens, routes, [nn.Identity()])
        output.sum().backward()
    assert {task.kind for task in layer._planner.next_call({}).backward.tasks} == set(Kind)
    return float(output.sum())


def order_that_cannot_be(uses_costs: bool) -> str:
    """What a layer says of a scheduler that names one task only."""

    class Stuck(planmoe_ds.AbstractScheduler):
        def order(self, graph: TaskGraph) -> Sequence[int]:
            return [0] * len(graph.tasks)

    Stuck.uses_costs = uses_costs
    PLUGINS.schedulers.add("stuck", Stuck)
    try:
        layer = make_layer({"chunks": 2, "scheduler": "stuck"})
        tokens = torch.ones(60, HIDDEN, requires_grad=True)
        routes = routes_of(torch.arange(60).unsqueeze(0) % dist.get_world_size(), dist.get_world_size())
        for _ in range(WARM_UP + MEASURED + 2):
            run_layer(layer, tokens, routes, [nn.Identity()]).sum().backward()
    except (PlanMoEError, PlanMoEConfigError) as error:
        return str(error)
    return ""


@pytest.mark.distributed
@pytest.mark.parametrize("uses_costs", [False, True])
def test_an_order_that_cannot_be_followed_names_its_scheduler(ranks: RankPool, uses_costs: bool) -> None:
    for message in ranks.run(2, order_that_cannot_be, uses_costs, fresh=True):
        assert "scheduler Stuck gave an order that cannot be followed: " in message
        assert "unknown or named twice" in message


@pytest.mark.distributed
def test_one_rank_decides(ranks: RankPool) -> None:
    assert ranks.run(2, backwards, 5) == [60 * HIDDEN] * 2
