"""What the ranks of a group tell each other before a layer call's rows leave, in one message per pair of ranks.

A message opens with the launches that the peer should have made, the header and notes; then come the numbers of rows.
Numbers that the host works with are NumPy's, whose small arrays cost it a fraction of torch's. Shape legend: see
plan.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from planmoe_ds.backend import TokenOrder, order_tokens, order_tokens_on_device, routes_on_device
from planmoe_ds.choose import least_piece
from planmoe_ds.chunking import Chunking
from planmoe_ds.errors import PlanMoEMismatchError
from planmoe_ds.group import ExpertGroup
from planmoe_ds.headers import Header, check_headers, check_launches
from planmoe_ds.recorder import Label, Recorder
from planmoe_ds.rows import Integers

Shape = tuple[int, ...]

MOST_BYTES = 1 << 46  # of rows in one message: more is an error


@dataclass(frozen=True)
class Order:
    """The rows that this rank sends, by chunk: see TokenOrder in csrc/kernels/routing.h.

    near_return, far_return: int32 [X, or 1 where chunks divide tokens, T, S], accelerators only.
    """

    near_token: list[torch.Tensor]
    far_token: list[torch.Tensor]
    near_sent_XP: Integers
    far_sent_XPB: Integers
    near_return: torch.Tensor | None = None
    far_return: torch.Tensor | None = None


@dataclass(frozen=True)
class Counts:
    """What ranks tell each other; the first dimension is the peer."""

    expert_rows_PXL: Integers
    near_PX: Integers
    far_PXB: Integers  # rows that end at the receiver of this message
    passed_PXB: Integers | None = None  # rows that it passes on
    fan_PXBG: Integers | None = None

    def pack(self) -> Integers:
        """[P, width]."""
        return np.concatenate([values.reshape(len(values), -1) for values in self.values()], axis=1)

    def values(self) -> list[Integers]:
        """Those that there are, in the order of a message."""
        return [values for values in vars(self).values() if values is not None]


@dataclass(frozen=True)
class Agreement:
    """What this rank sends, what it receives, and the largest of everybody's notes."""

    order: Order
    received: Counts
    notes: tuple[int, ...]


@dataclass(frozen=True)
class Talk:
    """One layer call's exchange of messages.

    num_experts: E; row_bytes: of one token on the wire between nodes; notes: numbers to tell the other ranks, as many
    on every rank; first_note: the first of them where it is on the tokens' device still, int32 [1].
    """

    num_experts: int
    chunking: Chunking
    header: Header
    row_bytes: int
    notes: tuple[int, ...]
    group: ExpertGroup
    recorder: Recorder
    label: Label
    first_note: torch.Tensor | None = None

    def agree(self, expert_KT: torch.Tensor) -> Agreement:
        """Order this rank's tokens and exchange the counts.

        Raises PlanMoEMismatchError when ranks are in different layers, launched their exchanges in different orders,
        or say what cannot be; ValueError for routes to experts that do not exist.
        """
        return self._on_device(expert_KT) if routes_on_device(expert_KT) else self._on_host(expert_KT)

    def _on_host(self, expert_KT: torch.Tensor) -> Agreement:
        group = self.group
        order = order_tokens(expert=expert_KT.long().cpu().contiguous(), **self._order_settings())
        sent = _counts(order, group.size, group.comm.passes_on)
        opening, counts = self._opening(), sent.pack()
        if self.first_note is not None:
            opening[:, -len(self.notes)] = int(self.first_note)
        filler = np.zeros((group.size, group.counts_filler(counts.shape[1])), dtype=np.int64)
        message = torch.from_numpy(np.concatenate([opening, counts, filler], axis=1))
        _, received = self._exchange(torch.stack([message, message]).to(expert_KT.device))
        notes = self._check_opening(received, opening)
        tokens = Order(order.near_token, order.far_token, order.near_sent.numpy(), order.far_sent.numpy())
        told = received[:, opening.shape[1] :]
        counts_of = _unpack(told, [values.shape for values in sent.values()])
        self._check_counts(told, counts_of)
        return Agreement(tokens, counts_of, notes)

    def _on_device(self, expert_KT: torch.Tensor) -> Agreement:
        """The same without the host, which waits once, for the counts of all ranks."""
        group, shapes, opening = self.group, self._count_shapes(), self._opening()
        first, width = opening.shape[1], sum(map(_width, shapes))
        invalid_column = first + width  # the first of the filler, on every rank
        columns = invalid_column + 1 + group.counts_filler(width)
        blank = torch.zeros((group.size, columns), dtype=torch.int64, pin_memory=True)
        blank.numpy()[:, :first] = opening
        both = torch.empty((2, *blank.shape), dtype=blank.dtype, device=expert_KT.device)
        message = both[0].copy_(blank, non_blocking=True)
        if self.first_note is not None:
            message[:, first - len(self.notes)] = self.first_note
        ordered = order_tokens_on_device(
            expert=expert_KT,
            **self._order_settings(),
            tables=group.routing_tables(self.chunking.chunk_of_rank),
            message=message,
            first_column=first,
        )
        mine, theirs = self._exchange(both)
        invalid = int(mine[0, invalid_column])
        if invalid:
            raise ValueError(f"{invalid} routes lead to experts that do not exist, there are {self.num_experts}")
        notes = self._check_opening(theirs, opening)
        sent, received = (_unpack(side[:, first:], shapes) for side in (mine, theirs))
        self._check_counts(theirs[:, first:], received)
        far_sent = (sent.far_PXB if sent.passed_PXB is None else sent.passed_PXB).swapaxes(0, 1)
        near_sent = sent.near_PX.T
        sizes = np.stack([near_sent.sum(1), far_sent.sum((1, 2))], axis=1).ravel().tolist()
        pieces = ordered.tokens[: sum(sizes)].split(sizes)
        order = Order(
            list(pieces[::2]), list(pieces[1::2]), near_sent, far_sent, ordered.near_return, ordered.far_return
        )
        return Agreement(order, received, notes)

    def _order_settings(self) -> dict[str, Any]:
        comm = self.group.comm
        return {
            "num_experts": self.num_experts,
            **self.chunking.settings(),
            "rank": self.group.rank,
            "node_of_rank": comm.node_of_rank,
            "first_hop": comm.first_hops,
            "num_pieces": comm.num_pieces,
            "rows_per_piece": max(1, least_piece(comm.device.type) // self.row_bytes),
        }

    def _count_shapes(self) -> list[Shape]:
        comm, size, num_chunks = self.group.comm, self.group.size, self.chunking.num_chunks
        pieces = max(1, comm.num_pieces)
        experts_per_rank = self.num_experts // size
        shapes: list[Shape] = [(size, num_chunks, experts_per_rank), (size, num_chunks), (size, num_chunks, pieces)]
        if comm.passes_on:
            nodes = comm.node_of_rank
            largest = max(nodes.count(node) for node in nodes)
            shapes += [(size, num_chunks, pieces), (size, num_chunks, pieces, largest)]
        return shapes

    def _opening(self) -> Integers:
        """[P, width]."""
        shared = [*self.header.numbers(), *self.notes]
        return np.array([[launches, *shared] for launches in self.group.launch_digests()], dtype=np.int64)

    def _exchange(self, both: torch.Tensor) -> tuple[Integers, Integers]:
        """This rank's message, the first of int64 [2, P, width], and what its peers sent, which becomes the second."""
        group, ones = self.group, [1] * self.group.size
        arrival = group.exchange(both[0], ones, ones, into=both[1])
        if arrival.exchange is None:
            sent = both[0].cpu().numpy()
            return sent, sent
        self.recorder.wait(arrival.exchange, self.label, group)
        with group.waiting(arrival.exchange, self.label.describe()):  # here the host waits for accelerators
            sent, received = both.cpu().numpy()  # the one host copy of a layer call
            return sent, received

    def _check_opening(self, received: Integers, opening: Integers) -> tuple[int, ...]:
        """Compare all ranks' messages, [P, width], with this rank's opening; the largest of everybody's notes."""
        group, first_count = self.group, opening.shape[1]
        first_note = first_count - len(self.notes)
        if not np.array_equal(received[:, :first_note], opening[:, :first_note]):
            check_headers(received[:, 1:first_note].tolist(), self.header, group.global_ranks)
            told, made = received[:, 0].tolist(), opening[:, 0].tolist()
            check_launches(told, made, self.header.layer, group.global_ranks, group.rank)
        return tuple(received[:, first_note:first_count].max(0).tolist())

    def _check_counts(self, message: Integers, received: Counts) -> None:
        """Sizes of buffers are made from what peers say: PlanMoEMismatchError names those whose numbers cannot be.

        message: [P, width], with all of `received`.
        """
        if self._can_be(message, received):
            return
        ranks = self.group.global_ranks
        wrong = []
        for place, rank in enumerate(ranks):
            own = Counts(*(values[place : place + 1] for values in received.values()))
            if not self._can_be(message[place], own):
                wrong.append(rank)
        raise PlanMoEMismatchError(
            f"layer {self.header.layer}: what ranks {wrong} say that they send to rank {ranks[self.group.rank]} cannot "
            "be: numbers of rows are negative, do not fit together, or are more than any machine holds. The message "
            "was damaged on its way, or planmoe is not the same there"
        )

    def _can_be(self, message: Integers, received: Counts) -> bool:
        if message.min() < 0 or message.max() > MOST_BYTES // self.row_bytes:  # so that no sum of them overflows
            return False
        return _fit_together(received, self.header.routes_per_token)


def _counts(order: TokenOrder, num_ranks: int, passes_on: bool) -> Counts:
    """What this rank tells every peer."""
    num_chunks = order.expert_rows.shape[0]
    experts = order.expert_rows.numpy().reshape(num_chunks, num_ranks, -1).swapaxes(0, 1)
    near, far = order.near_sent.numpy().T, order.far_final.numpy().swapaxes(0, 1)
    if not passes_on:
        return Counts(experts, near, far)
    return Counts(experts, near, far, order.far_sent.numpy().swapaxes(0, 1), order.fan.numpy().swapaxes(0, 1))


def _unpack(message: Integers, shapes: list[Shape]) -> Counts:
    """Counts from [P, width or more]."""
    found, first = [], 0
    for shape in shapes:
        width = _width(shape)
        found.append(message[:, first : first + width].reshape(shape))
        first += width
    return Counts(*found)


def _width(shape: Shape) -> int:
    """Numbers for each peer."""
    return math.prod(shape[1:])


def _fit_together(received: Counts, top_k: int) -> bool:
    """Whether numbers of rows, experts' rows and rows passed on can belong together.

    A token that a rank sends is for one expert of the receiver at least and for each route's at most; a rank that
    passes rows on gives each rank of its node as many at most.
    """
    entries_PX = received.expert_rows_PXL.sum(-1)
    rows_PX = received.near_PX + received.far_PXB.sum(-1)
    spare = [entries_PX - rows_PX, top_k * rows_PX - entries_PX]
    if received.passed_PXB is not None and received.fan_PXBG is not None:
        spare.append(received.passed_PXB - received.fan_PXBG.max(-1))
    return all(values.min() >= 0 for values in spare)
