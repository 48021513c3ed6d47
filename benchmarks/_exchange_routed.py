"""Routed cases through planmoe's engine: a layer's rows out to the experts' ranks and their sums back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from benchmarks._exchange_cases import Case
from planmoe_ds.backend import Comm, Exchange, LaunchLedger
from planmoe_ds.choose import Choice
from planmoe_ds.chunking import Chunking
from planmoe_ds.codecs import LinkCodecs
from planmoe_ds.counts import Talk
from planmoe_ds.group import ExpertGroup, SidedArrival
from planmoe_ds.headers import Header
from planmoe_ds.plan import BufferRequest, ChunkPlan, build_plan
from planmoe_ds.recorder import Label, Recorder
from planmoe_ds.wire import Spreads, TokenColumns, Wire, token_columns


@dataclass(frozen=True)
class RoutedRun:
    """One algorithm on one case: float32 tokens [T, H] and expert outputs [rows, H] of one chunk."""

    wire: Wire
    chunk: ChunkPlan
    columns: TokenColumns
    tokens: torch.Tensor
    outputs: torch.Tensor
    spreads: Spreads

    def out(self) -> Exchange:
        """Pack the tokens and send them; returns the finished exchange."""
        return _finished(self.wire.send_tokens(self.chunk, self.tokens, self.columns)())

    def back(self) -> Exchange:
        """Sum up the outputs of each token and send the sums."""
        return _finished(self.wire.send_sums(self.chunk, self.outputs, self.spreads, weighted=True)())

    def both_ways(self) -> None:
        """Rows out and sums back."""
        self.out()
        self.back()

    def inter_bytes(self) -> int:
        """Most bytes that all ranks together send between nodes, out or back; collective."""
        sent = torch.tensor([run().bytes_sent_on("inter") for run in (self.out, self.back)])
        dist.all_reduce(sent)
        return int(sent.max())

    def extra_bytes_over_received(self) -> float:
        """Bytes needed beside what is sent and received, over the received ones, where each is most; collective."""
        self.wire.group.comm.take_peak_bytes()
        self.out()
        peak = self.wire.group.comm.take_peak_bytes()
        width = self.wire.token_width(self.columns)
        sides = (self.chunk.near, self.chunk.far)
        received = sum(side.num_received for side in sides) * width
        own = received + sum(side.token.shape[0] for side in sides) * width
        most = torch.tensor([max(0, peak - own), received])
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return int(most[0]) / int(most[1])


def prepare(case: Case, comm: Comm, device: torch.device) -> RoutedRun:
    """Plan the case and carry it out once; collective."""
    assert case.experts is not None
    rank, world_size = dist.get_rank(), dist.get_world_size()
    expert_KT = case.experts[rank].to(device)
    top_k, num_tokens = expert_KT.shape
    num_experts = world_size * case.experts_per_rank
    tokens = torch.randn(num_tokens, case.row_bytes // 4, device=device)
    group = ExpertGroup(comm, tuple(range(world_size)), LaunchLedger(world_size), 0, Choice("", "", {}))
    talk = Talk(
        num_experts=num_experts,
        chunking=Chunking(1),
        header=Header(layer=0, hidden_size=tokens.shape[1], routes_per_token=top_k, num_experts=num_experts),
        row_bytes=case.row_bytes,
        notes=(),
        group=group,
        recorder=Recorder(device),
        label=Label("plan", 0, -1, "forward"),
    )
    plan = build_plan(expert_KT, talk, BufferRequest())
    columns = token_columns(expert_KT, torch.ones(expert_KT.shape, device=device), num_experts, None)
    wire = Wire(group, plan, LinkCodecs.everywhere("none"), tokens.shape[1], tokens.dtype)
    chunk = plan.chunks[0]
    arrived = wire.send_tokens(chunk, tokens, columns)()
    _finished(arrived)
    spreads = wire.find_spreads(chunk, arrived.rows, columns)
    outputs = wire.spread(chunk, arrived.rows, spreads, weighted=False)
    return RoutedRun(wire, chunk, columns, tokens, outputs, spreads)


def _finished(arrival: SidedArrival) -> Exchange:
    assert arrival.exchange is not None
    arrival.exchange.wait()
    return arrival.exchange


def least_inter_bytes(case: Case, node_of_rank: list[int]) -> int:
    """One row per token and other node that has one of its experts, over all ranks."""
    assert case.experts is not None
    nodes = torch.tensor(node_of_rank)
    rows = 0
    for rank, expert_KT in enumerate(case.experts):
        node_KT = nodes[expert_KT // case.experts_per_rank]
        rows += sum(int((node_KT == node).any(0).sum()) for node in set(node_of_rank) - {node_of_rank[rank]})
    return rows * case.row_bytes
