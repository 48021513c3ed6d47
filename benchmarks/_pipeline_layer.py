"""One MoE layer on an emulated cluster under each scheduler: executed against predicted; runs on every rank."""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from planmoe_ds.codecs import Codecs, LinkCodecs
from planmoe_ds.config import parse_config
from planmoe_ds.connect import connect
from planmoe_ds.experts import LocalExperts
from planmoe_ds.layer import ExpertParallelLayer
from planmoe_ds.plan import Routes
from planmoe_ds.planner import MEASURED, WARM_UP, CallOrders
from planmoe_ds.recorder import Recorder
from planmoe_ds.scheduling import ChunkCosts, Kind, Schedule, Task, layer_graph, timetable

SCHEDULERS = ("sequential", "pipelined", "optimal")
UNPIPELINED = "one chunk (unpipelined)"


@dataclass
class LayerRow:
    """Medians over rounds of the slowest rank's forward and backward; what the schedule predicts and its bound."""

    variant: str
    milliseconds: float
    spread: float
    predicted: float = 0.0
    bound: float = 0.0


class _Sleep(torch.autograd.Function):
    """Identity whose forward and backward take `seconds[0]` and `seconds[1]` per row."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, count: int, seconds: tuple[float, float]) -> torch.Tensor:
        ctx.seconds = count * seconds[1]
        time.sleep(count * seconds[0])
        return rows.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        time.sleep(ctx.seconds)
        return grad, None, None


class SleepingExpert(nn.Module):
    """A linear layer's times without its work: forward, input gradient and weight gradient sleep equally long."""

    planmoe_linear = True

    def __init__(self, seconds_per_row: float) -> None:
        super().__init__()
        self.seconds = seconds_per_row
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        count = rows.shape[-2]
        through = _Sleep.apply(rows, count, (self.seconds, self.seconds))
        return through + _Sleep.apply(self.bias, count, (0.0, self.seconds))


class Bench:
    """Layers of all variants over one batch; collective to make."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        world = dist.get_world_size()
        generator = torch.Generator().manual_seed(dist.get_rank())
        self.tokens = torch.randn(arguments.tokens, arguments.hidden, requires_grad=True)
        experts = torch.stack([torch.randperm(world, generator=generator)[:1] for _ in range(arguments.tokens)], 1)
        weights = torch.ones(1, arguments.tokens)
        slots = torch.arange(arguments.tokens).unsqueeze(0)
        self.routes = Routes(experts, slots, weights, world, arguments.tokens)
        self.seconds_per_row = 0.0
        self.layers = {UNPIPELINED: self._layer("sequential", 1)}
        self.layers |= {name: self._layer(name, arguments.chunks) for name in SCHEDULERS}

    def _layer(self, scheduler: str, chunks: int) -> ExpertParallelLayer:
        config = parse_config({"comm": self.arguments.comm, "chunks": chunks, "scheduler": scheduler})
        device = torch.device("cpu")
        group = connect({"experts": list(range(dist.get_world_size()))}, config, device)["experts"]
        codecs = Codecs(*[LinkCodecs.everywhere("none") for _ in range(3)])
        return ExpertParallelLayer(index=0, config=config, group=group, codecs=codecs, recorder=Recorder(device))

    def step(self, layer: ExpertParallelLayer) -> float:
        """Seconds of forward and backward on the slowest rank."""
        expert = SleepingExpert(self.seconds_per_row)
        experts = LocalExperts([expert], expert)
        dist.barrier()
        start = time.perf_counter()
        layer.forward(self.tokens, self.routes, experts).backward(self.tokens.detach())
        seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        return float(seconds)

    def calibrate(self) -> tuple[float, float]:
        """Let the experts take as long as the exchanges of one chunk do; returns both, seconds."""
        layer = self.layers[UNPIPELINED]
        self.step(layer)
        communication = statistics.median(self.step(layer) for _ in range(3))
        rows = torch.tensor(float(self.arguments.tokens))
        self.seconds_per_row = communication / (3 * float(rows))
        return communication, self.seconds_per_row * 3 * float(rows)

    def learn(self) -> tuple[list[ChunkCosts], list[ChunkCosts]]:
        """Let the scheduler `optimal` see its first calls; the costs it found, the same on every rank."""
        layer = self.layers["optimal"]
        for _ in range(WARM_UP + MEASURED + 1):
            self.step(layer)
        forward, backward = layer._planner.costs
        assert forward is not None
        assert backward is not None
        return forward, backward

    def schedules(self, name: str, costs: tuple[list[ChunkCosts], list[ChunkCosts]]) -> list[Schedule]:
        """What a variant's orders take at these costs."""
        orders: CallOrders = self.layers[name]._planner._orders
        found = []
        for order, chunks in ((orders.forward, costs[0]), (orders.backward, costs[1])):
            graph = layer_graph(chunks)
            place = {(task.kind, task.chunk): index for index, task in enumerate(graph.tasks)}
            found.append(timetable(graph, [place[_key(task)] for task in order.tasks]))
        return found


def _key(task: Task) -> tuple[Kind, int]:
    return task.kind, task.chunk


def measure_layer(arguments: argparse.Namespace) -> dict[str, Any]:
    """All variants in turn, round after round; the same result on every rank."""
    bench = Bench(arguments)
    communication, compute = bench.calibrate()
    costs = bench.learn()
    seconds: dict[str, list[float]] = {name: [] for name in bench.layers}
    for turn in range(arguments.rounds + 1):
        for name, layer in bench.layers.items():
            taken = bench.step(layer)
            if turn > 0:
                seconds[name].append(taken)
    rows = []
    for name, taken_seconds in seconds.items():
        quartiles = statistics.quantiles(taken_seconds, n=4)
        row = LayerRow(name, statistics.median(taken_seconds) * 1e3, (quartiles[2] - quartiles[0]) * 1e3)
        if name in SCHEDULERS:
            schedules = bench.schedules(name, costs)
            row.predicted = sum(schedule.makespan for schedule in schedules) * 1e3
            row.bound = sum(schedule.lower_bound for schedule in schedules) * 1e3
        rows.append(row)
    return {
        "communication_ms": communication * 1e3,
        "compute_ms": compute * 1e3,
        "rows": [asdict(row) for row in rows],
        "costs": [[asdict(chunk) for chunk in chunks] for chunks in costs],
    }


def print_layer_part(cluster: str, measured: dict[str, Any]) -> None:
    """A table and RESULT lines."""
    print(
        f"\none layer, forward and backward, {cluster}: exchanges alone {measured['communication_ms']:.0f} ms, experts "
        f"(sleeping) {measured['compute_ms']:.0f} ms"
    )
    print(f"{'scheduler':<26}{'ms':>8}{'± IQR':>8}{'speed-up':>10}{'predicted':>11}{'bound':>8}{'ms/predicted':>14}")
    rows = {row["variant"]: LayerRow(**row) for row in measured["rows"]}
    stock = rows[UNPIPELINED]
    for row in rows.values():
        predicted = (
            f"{row.predicted:11.0f}{row.bound:8.0f}{row.milliseconds / row.predicted:14.3f}" if row.predicted else ""
        )
        print(
            f"{row.variant:<26}{row.milliseconds:8.0f}{row.spread:8.1f}{stock.milliseconds / row.milliseconds:10.2f}"
            f"{predicted}"
        )
    best = rows["optimal"]
    print(f"RESULT layer_speedup_vs_unpipelined={stock.milliseconds / best.milliseconds:.3f}")
    print(f"RESULT layer_speedup_of_schemoe_order={stock.milliseconds / rows['pipelined'].milliseconds:.3f}")
    print(f"RESULT executed_over_predicted={best.milliseconds / best.predicted:.3f}")
    print(f"RESULT efficiency_bound_over_executed={best.bound / best.milliseconds:.3f}")
