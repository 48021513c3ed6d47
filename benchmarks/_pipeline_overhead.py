"""What running a layer's tasks costs beside the tasks themselves: the executor with tasks that do nothing."""

from __future__ import annotations

import statistics
import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from typing_extensions import override

from planmoe_ds.executor import Order
from planmoe_ds.group import SidedArrival
from planmoe_ds.passes import Pass
from planmoe_ds.planner import CallOrders
from planmoe_ds.recorder import Recorder
from planmoe_ds.scheduling import ChunkCosts, ExchangeCosts, layer_graph, solve
from planmoe_ds.wire import Launch

REPEATS = 2000


class _IdlePass(Pass):
    phase = "backward"
    arrival: Any = SidedArrival(None, None)  # type: ignore[arg-type]

    @override
    def encode(self, chunk: Any) -> Launch:
        return lambda: self.arrival

    @override
    def decode(self, index: int, chunk: Any, arrived: Any) -> Any:
        return None

    @override
    def compute(self, index: int, buffer: Any) -> Any:
        return None

    @override
    def encode_back(self, index: int, chunk: Any, results: Any) -> Launch:
        return lambda: self.arrival

    @override
    def collect(self, chunk: Any, arrived: Any) -> None:
        pass

    @override
    def weights(self, index: int) -> None:
        pass


def overhead_microseconds(num_chunks: int) -> float:
    """Median of a forward and a backward pass together, with the recorder's spans."""
    exchange = ExchangeCosts(1, 3)
    costs = ChunkCosts(0.1, exchange, 0.1, 2, 0.1, exchange, 0.1)
    graphs = [layer_graph([ChunkCosts(**{**vars(costs), "weights": weights})] * num_chunks) for weights in (None, 2)]
    forward, backward = (Order(solve(graph).tasks) for graph in graphs)
    call: Any = SimpleNamespace(
        plan=SimpleNamespace(chunks=[None] * num_chunks),
        orders=CallOrders(forward, backward),
        recorder=Recorder(torch.device("cpu")),
        layer=0,
        group=SimpleNamespace(working=lambda _what, _phase: nullcontext()),
    )
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        _IdlePass(call, [], {}).run(forward)
        _IdlePass(call, [], {}).run(backward)
        taken.append((time.perf_counter() - start) * 1e6)
    return statistics.median(taken)
