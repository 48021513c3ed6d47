"""The ranks that share a layer's experts, and the compiled exchange between them."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.distributed as dist

from planmoe_ds.backend import (
    ChunkRows,
    Comm,
    Exchange,
    ExchangeSpec,
    Itinerary,
    LaunchLedger,
    RowRoutes,
    RowSums,
)
from planmoe_ds.choose import Choice
from planmoe_ds.costs import ClusterCosts
from planmoe_ds.headers import AGREEMENT_PHASE
from planmoe_ds.watchdog import NO_NUMBER, Watchdog

_POLL_SECONDS = 20e-6  # at first
_LONGEST_POLL_SECONDS = 1e-3


@dataclass(frozen=True)
class Arrival:
    """Rows on their way: `rows` is valid once `exchange` (None: nothing travels) was waited for."""

    rows: torch.Tensor
    exchange: Exchange | None


@dataclass(frozen=True)
class Sides:
    """Wire rows, uint8 [rows, W], from or to the ranks of this node (near) and of others (far).

    extra: columns of rows that stay on this rank, which need not lie behind their values.
    """

    near: torch.Tensor
    far: torch.Tensor
    extra: torch.Tensor | None = None


@dataclass(frozen=True)
class SideRows:
    """Numbers of rows for every rank of the group; zero for the ranks of the other side."""

    near: list[int]
    far: list[int]


@dataclass(frozen=True)
class SidedArrival:
    """Both sides' rows on their way."""

    rows: Sides
    exchange: Exchange | None


@dataclass
class Hosts:
    """How a group's hosts ask each other apart from its exchanges: the same ranks over gloo, if they can at all.

    num_asked: how often they did.
    """

    over_gloo: dist.ProcessGroup | None = None
    num_asked: int = 0


def hosts_of(number: int) -> int:
    """The number under which the hosts of group `number` wait for each other: their questions count by themselves."""
    return -2 - number


@dataclass(frozen=True)
class ExpertGroup:
    """A set of ranks with an all-to-all of its own; group ranks throughout.

    ledger: the launches of all groups of this process; number: this group's among them, the same on every rank;
    choice: the all-to-all in use, and why; costs: of the cluster's links, where something is left to be chosen by them;
    counts_width: int64 numbers that the widest counts of any layer take; watchdog: None in a world of one rank; job: a
    number that all ranks of the job have and hardly any other job.
    """

    comm: Comm
    global_ranks: tuple[int, ...]
    ledger: LaunchLedger
    number: int
    choice: Choice
    costs: ClusterCosts | None = None
    counts_width: int = 0
    watchdog: Watchdog | None = None
    job: int = 0
    hosts: Hosts = field(default_factory=Hosts)

    @property
    def rank(self) -> int:
        """This process's rank in the group."""
        return self.comm.rank

    @cached_property
    def size(self) -> int:
        """Number of ranks."""
        return self.comm.size

    @cached_property
    def is_near(self) -> torch.Tensor:
        """A bool [P]: the ranks on this rank's node, itself among them."""
        nodes = torch.tensor(self.comm.node_of_rank)
        return nodes == nodes[self.rank]

    @cached_property
    def _waits_to_start(self) -> bool:
        """Whether the host waits for peers while it starts an exchange: for what passes through this rank."""
        return self.choice.name == "hierarchical" and self.comm.device.type != "cpu"

    @cached_property
    def _tables(self) -> dict[tuple[int, ...], torch.Tensor]:
        return {}

    def routing_tables(self, chunk_of_rank: tuple[int, ...] = ()) -> torch.Tensor:
        """int32 [3, P] on the group's device: every rank's list, each list's first hop, each rank's place on its node.

        Rows go in lists, one per first hop: those of this node first. A fourth row, where it is given: every rank's
        chunk.
        """
        if chunk_of_rank not in self._tables:
            self._tables[chunk_of_rank] = self._make_tables(chunk_of_rank)
        return self._tables[chunk_of_rank]

    def _make_tables(self, chunk_of_rank: tuple[int, ...]) -> torch.Tensor:
        hops, nodes = self.comm.first_hops, self.comm.node_of_rank
        lists = sorted(set(hops), key=lambda hop: (nodes[hop] != nodes[self.rank], hop))
        list_of_rank = [lists.index(hop) for hop in hops]
        place = [nodes[:rank].count(node) for rank, node in enumerate(nodes)]
        padded = lists + [-1] * (self.size - len(lists))
        rows = [list_of_rank, padded, place] + ([list(chunk_of_rank)] if chunk_of_rank else [])
        return torch.tensor(rows, dtype=torch.int32).to(self.comm.device)

    def waiting(self, exchange: Exchange, what: str) -> AbstractContextManager[None]:
        """Wait for an exchange inside; PlanMoEError, the same on every rank, when one of them cannot go on."""
        if self.watchdog is None:
            return nullcontext()
        on_device = None if self.comm.device.type == "cpu" else exchange
        return self.watchdog.waiting(self.number, exchange.number, what, on_device)

    def working(self, what: str, phase: int) -> AbstractContextManager[None]:
        """Start exchanges inside: of `phase` (see Comm.set_phase). An error that leaves is told to all ranks."""
        self.comm.set_phase(phase)
        return nullcontext() if self.watchdog is None else self.watchdog.reporting(self.number, what)

    def check(self) -> None:
        """Raise the reason to stop, if there is one; on an accelerator once it has done all that was started."""
        if self.comm.device.type != "cpu":
            torch.get_device_module(self.comm.device).synchronize(self.comm.device)
        if self.watchdog is not None:
            self.watchdog.check()

    def told_by_all(self, values: torch.Tensor, what: str) -> torch.Tensor:
        """Every rank's values, of one shape and dtype, [P, *shape] on the CPU; collective, watched as exchanges are."""
        if self.size == 1:
            return values.detach().cpu().unsqueeze(0)
        row, ones = values.detach().reshape(1, -1).to(self.comm.device), [1] * self.size
        self.comm.set_phase(AGREEMENT_PHASE)
        arrival = self.exchange(row.repeat(self.size, 1), ones, ones)
        assert arrival.exchange is not None
        with self.waiting(arrival.exchange, what):
            arrival.exchange.wait()
            return arrival.rows.cpu().view(self.size, *values.shape)

    def sum_of_ranks(self, values: torch.Tensor, what: str) -> torch.Tensor:
        """The sum of every rank's values, added in the order of ranks; see told_by_all."""
        return self.told_by_all(values, what).sum(0)

    def told_by_first(self, values: torch.Tensor, what: str) -> torch.Tensor:
        """The values of the group's first rank; the others' say shape and dtype; see told_by_all."""
        return self.told_by_all(values, what)[0]

    def any_rank_says(self, says: bool, what: str) -> bool:
        """Whether any rank does; collective. Where hosts can ask each other, this waits behind no exchange."""
        told = torch.tensor([says], dtype=torch.int32)
        if self.hosts.over_gloo is None:
            return bool(self.told_by_all(told, what).any())
        number, self.hosts.num_asked = self.hosts.num_asked, self.hosts.num_asked + 1
        with nullcontext() if self.watchdog is None else self.watchdog.waiting(hosts_of(self.number), number, what):
            work = dist.all_reduce(told, dist.ReduceOp.MAX, group=self.hosts.over_gloo, async_op=True)
            assert work is not None
            pause = _POLL_SECONDS
            while not work.is_completed():
                if self.watchdog is not None:
                    self.watchdog.check()
                time.sleep(pause)
                pause = min(1.2 * pause, _LONGEST_POLL_SECONDS)
            try:
                work.wait()
            except RuntimeError:  # a connection is lost, and gloo does not say to whom
                if self.watchdog is not None:
                    self.watchdog.check_for_silence()
                raise
        return bool(told)

    def counts_filler(self, width: int) -> int:
        """Numbers to add to counts of this width, so that those of all layers are equally wide."""
        return max(0, self.counts_width - width)

    def launch_digests(self) -> list[int]:
        """For every rank, a digest of the order in which this one launched the exchanges of groups they share."""
        return self.ledger.digests(self.global_ranks)

    def exchange(
        self, send: torch.Tensor, send_rows: list[int], recv_rows: list[int], into: torch.Tensor | None = None
    ) -> Arrival:
        """Start moving `send` [sum(send_rows), W]; returns rows [sum(recv_rows), W] on their way, `into` if given."""
        if self.size == 1:
            return Arrival(send, None)
        recv = send.new_empty((sum(recv_rows), send.shape[1])) if into is None else into
        with self._starting():
            return Arrival(recv, self.comm.start(send, send_rows, recv, recv_rows))

    def buffer(self, num_rows: int, width: int) -> torch.Tensor:
        """uint8 [num_rows, width] to send or receive; it is used again once nobody holds it."""
        return self.comm.take_buffer(num_rows, width)

    def exchange_sides(self, send: Sides, send_rows: SideRows, recv_rows: SideRows) -> SidedArrival:
        """Start moving wire rows [sum(send_rows), W] to the ranks of this node and of others as one exchange."""
        if self.size == 1:
            return SidedArrival(send, None)
        recv = self._buffers(sum(recv_rows.near), sum(recv_rows.far), send)
        parts = [
            ExchangeSpec(send.far, send_rows.far, recv.far, recv_rows.far),
            ExchangeSpec(send.near, send_rows.near, recv.near, recv_rows.near),
        ]
        with self._starting():
            return SidedArrival(recv, self.comm.start_parts(parts))

    def dispatch(self, send: Sides, itinerary: Itinerary, routes: RowRoutes) -> SidedArrival:
        """Start a chunk's way out; returns rows as long as those of `send`."""
        if self.size == 1:
            return SidedArrival(send, None)
        recv = self._buffers(sum(itinerary.near_received), sum(itinerary.far_received), send)
        with self._starting():
            return SidedArrival(recv, self.comm.dispatch(_chunk_rows(send, recv), itinerary, routes))

    def combine(self, send: Sides, itinerary: Itinerary, sums: RowSums, far_width: int) -> SidedArrival:
        """Start a chunk's way back; far rows return `far_width` bytes wide."""
        if self.size == 1:
            return SidedArrival(send, None)
        recv = Sides(
            self.buffer(sum(itinerary.near_sent), send.near.shape[1]),
            self.buffer(sum(itinerary.far_sent), far_width),
        )
        with self._starting():
            return SidedArrival(recv, self.comm.combine(_chunk_rows(send, recv), itinerary, sums))

    def _buffers(self, num_near: int, num_far: int, like: Sides) -> Sides:
        return Sides(self.buffer(num_near, like.near.shape[1]), self.buffer(num_far, like.far.shape[1]))

    def _starting(self) -> AbstractContextManager[None]:
        """Start an exchange inside."""
        self.ledger.record(self.number, self.global_ranks)
        if self.watchdog is None or not self._waits_to_start:
            return nullcontext()
        return self.watchdog.waiting(self.number, NO_NUMBER, "the start of an exchange")


def _chunk_rows(send: Sides, recv: Sides) -> ChunkRows:
    return ChunkRows(near_send=send.near, far_send=send.far, near_recv=recv.near, far_recv=recv.far)
