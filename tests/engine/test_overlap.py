"""While the experts work on one chunk, another chunk's all-to-all is in flight: forward and backward, CPU and gloo."""

from __future__ import annotations

import time
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

from planmoe_ds.group import ExpertGroup, SidedArrival
from planmoe_ds.trace import Span
from tests.engine.support import make_layer, routes_of, run_layer
from tests.harness.ranks import RankPool

pytestmark = pytest.mark.distributed

ATTEMPTS = 10  # the rank that comes late to its experts finds that everything has arrived, and which one varies
SECONDS = 0.05  # an expert's work, by sleeping: the cores stay free, so what is seen is concurrency and nothing else


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows):  # type: ignore[no-untyped-def]
        time.sleep(SECONDS)
        return rows.clone()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        time.sleep(SECONDS)
        return grad.clone()


class SleepingExpert(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(hidden))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return _Sleep.apply(rows) * self.scale


def trace_one_step(chunks: int) -> list[Span]:
    hidden, num_tokens = 1024, 16384
    layer = make_layer({"chunks": chunks, "comm": "direct"})
    experts = [SleepingExpert(hidden)]
    tokens = torch.randn(num_tokens, hidden, requires_grad=True)
    routes = routes_of(torch.randint(0, dist.get_world_size(), (1, num_tokens)), dist.get_world_size())
    run_layer(layer, tokens, routes, experts).sum().backward()  # connects
    dist.barrier()
    layer.recorder.start_trace()
    run_layer(layer, tokens, routes, experts).sum().backward()
    return layer.recorder.stop_trace()


def overlap_ns(first: Span, second: Span) -> int:
    return max(0, min(first.end_ns, second.end_ns) - max(first.start_ns, second.start_ns))


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_chunks_overlap(ranks: RankPool, phase: str) -> None:
    """Every rank hides most of some dispatch and of some combine behind the experts' work on other chunks."""
    best = dict.fromkeys(((rank, name) for rank in range(2) for name in ("dispatch", "combine")), 0.0)
    for _ in range(ATTEMPTS):
        for rank, spans in enumerate(ranks.run(2, trace_one_step, 4)):
            mine = [span for span in spans if span.phase == phase and span.chunk >= 0]
            experts = [span for span in mine if span.lane == "compute"]
            assert sorted({span.chunk for span in experts}) == [0, 1, 2, 3]
            for span in (span for span in mine if span.lane == "exchange"):
                best[rank, span.name] = max(best[rank, span.name], hidden_share(span, experts))
        if min(best.values()) > 0.5:
            return
    pytest.fail(f"shares hidden at best, by rank and exchange: {best}")


def hidden_share(exchange: Span, experts: list[Span]) -> float:
    """Share of an exchange's time during which the experts worked on another chunk."""
    hidden = sum(overlap_ns(exchange, work) for work in experts if work.chunk != exchange.chunk)
    return hidden / (exchange.end_ns - exchange.start_ns)


def test_one_chunk_does_not_overlap(ranks: RankPool) -> None:
    for spans in ranks.run(2, trace_one_step, 1):
        experts = [span for span in spans if span.lane == "compute"]
        exchanges = [span for span in spans if span.lane == "exchange"]
        assert not any(overlap_ns(exchange, work) for exchange in exchanges for work in experts)


def trace_with_a_late_node(seconds: float) -> list[Span]:
    """One step of two chunks as two nodes of two ranks; the second node sends the second chunk so much later."""
    num_tokens, size = 256, dist.get_world_size()
    layer = make_layer({"chunks": 2, "comm": "dedup", "ranks_per_node": 2, "scheduler": "pipelined"})
    experts = [nn.Linear(16, 16)]
    torch.manual_seed(dist.get_rank())
    routes = routes_of(torch.stack([torch.randperm(size)[:2] for _ in range(num_tokens)], dim=1), size)
    tokens = torch.randn(num_tokens, 16)
    run_layer(layer, tokens, routes, experts)  # connects
    send, calls = ExpertGroup.dispatch, 0

    def dispatch(*values: Any) -> SidedArrival:
        nonlocal calls
        calls += 1
        if calls == 2 and dist.get_rank() >= 2:
            time.sleep(seconds)
        return send(*values)

    dist.barrier()
    layer.recorder.start_trace()
    with patch.object(ExpertGroup, "dispatch", dispatch):
        run_layer(layer, tokens, routes, experts)
    return layer.recorder.stop_trace()


def test_sums_do_not_wait_behind_what_is_passed_on(ranks: RankPool) -> None:
    """Inside a node the first chunk's sums travel while the second chunk is still on its way from the other node."""
    seconds = 2.0
    for spans in ranks.run(4, trace_with_a_late_node, seconds)[:2]:
        passed_on = [span for span in spans if (span.lane, span.name, span.chunk) == ("onward", "dispatch", 1)]
        sums = [span for span in spans if (span.lane, span.name, span.chunk) == ("intra", "combine", 0)]
        assert passed_on
        assert sums
        first = min(span.start_ns for span in spans)
        assert min(span.start_ns for span in passed_on) - first > seconds * 0.8e9  # not timed from when it was posted
        assert min(span.end_ns for span in sums) - first < seconds * 0.8e9
