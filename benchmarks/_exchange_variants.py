"""The ways to carry an exchange that the all-to-all benchmark compares, and how one is timed; runs on every rank."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from benchmarks._exchange_cases import Case
from benchmarks._exchange_report import ONLY_INTER, ONLY_INTRA, ROUND_TRIP, SERIAL, STOCK, STOCK_BATCH
from benchmarks._exchange_routed import RoutedRun, least_inter_bytes, prepare
from planmoe_ds.backend import Comm, comm_names, make_comm
from planmoe_ds.connect import num_links
from planmoe_ds.threads import batch_threads

ISSUES = 100  # exchanges started to see what starting costs


@dataclass(frozen=True)
class Buffers:
    """This rank's part of a case: `send` [sum(send_rows), W] and `recv` [sum(recv_rows), W], bytes."""

    send: torch.Tensor
    send_rows: list[int]
    recv: torch.Tensor
    recv_rows: list[int]

    def only(self, peers: list[bool]) -> Buffers:
        """The rows to and from the peers marked True."""
        send, send_rows = _rows_of(self.send, self.send_rows, peers)
        recv, recv_rows = _rows_of(self.recv, self.recv_rows, peers)
        return Buffers(send, send_rows, recv, recv_rows)


def _rows_of(tensor: torch.Tensor, counts: list[int], peers: list[bool]) -> tuple[torch.Tensor, list[int]]:
    kept = [count if keep else 0 for count, keep in zip(counts, peers, strict=True)]
    return tensor.new_zeros(sum(kept), tensor.shape[1]), kept


def make_buffers(case: Case, device: torch.device) -> Buffers:
    """Rows whose bytes tell the sending rank and the place."""
    rank = dist.get_rank()
    send_rows, recv_rows = case.rows[rank], [row[rank] for row in case.rows]
    send = torch.arange(sum(send_rows) * case.row_bytes, device=device).add_(rank * 7).to(torch.uint8)
    recv = torch.zeros(sum(recv_rows), case.row_bytes, dtype=torch.uint8, device=device)
    return Buffers(send.view(-1, case.row_bytes), send_rows, recv, recv_rows)


class Variants:
    """Process groups and communicators of every variant; collective to make."""

    def __init__(self, node_of_rank: list[int], device: torch.device) -> None:
        here = node_of_rank[dist.get_rank()]
        self.node_of_rank = node_of_rank
        self.device = device
        self.same_node = [node == here for node in node_of_rank]
        self.other_node = [node != here for node in node_of_rank]
        self.stock_group = dist.new_group()
        with batch_threads():  # as planmoe_ds.connect.connect does
            self.batch_group = dist.new_group()
            groups = [dist.new_group() for _ in range(num_links("auto"))]
            self.comms: dict[str, Comm] = {name: make_comm(name, groups, node_of_rank, device) for name in comm_names()}

    def bind(self, buffers: Buffers) -> dict[str, Callable[[], None]]:
        """Name -> a function that carries out the exchange and returns when this rank's part is done."""
        direct = self.comms["direct"]
        intra, inter = buffers.only(self.same_node), buffers.only(self.other_node)

        def stock(group: dist.ProcessGroup) -> None:
            dist.all_to_all_single(buffers.recv, buffers.send, buffers.recv_rows, buffers.send_rows, group=group)

        def serial() -> None:
            _carry(direct, intra)
            _carry(direct, inter)

        runs: dict[str, Callable[[], None]] = {
            STOCK: partial(stock, self.stock_group),
            STOCK_BATCH: partial(stock, self.batch_group),
        }
        for name, comm in self.comms.items():
            runs[name] = partial(_carry, comm, buffers)
        runs[SERIAL] = serial
        runs[ONLY_INTRA] = partial(_carry, direct, intra)
        runs[ONLY_INTER] = partial(_carry, direct, inter)
        return runs

    def issue_seconds(self, buffers: Buffers) -> float:
        """Median time that a rank's own thread works to start an exchange, per message; the slowest rank's; collective.

        Every peer has two messages, one received and one sent.

        Of the processor, not of the clock: where ranks outnumber cores, others run in between.
        """
        comm, times = self.comms["direct"], []
        for _ in range(ISSUES):
            start = time.thread_time()
            exchange = comm.start(buffers.send, buffers.send_rows, buffers.recv, buffers.recv_rows)
            times.append(time.thread_time() - start)
            exchange.wait()
        per_message = torch.tensor([statistics.median(times) / max(1, 2 * (dist.get_world_size() - 1))])
        dist.all_reduce(per_message, op=dist.ReduceOp.MAX)
        return float(per_message)

    def bind_routed(self, case: Case, buffers: Buffers) -> tuple[dict[str, Callable[[], None]], dict[str, float]]:
        """A layer's rows out and back, by stock (one row per route) and by every algorithm, and facts about dedup.

        dedup_bytes: bytes between nodes over the least; dedup_memory: see RoutedRun.extra_bytes_over_received.
        """
        routed: dict[str, RoutedRun] = {name: prepare(case, comm, self.device) for name, comm in self.comms.items()}
        stock = self.bind(buffers)[STOCK]

        def stock_both_ways() -> None:
            stock()
            stock()  # the way back has the same rows

        runs = {STOCK + ROUND_TRIP: stock_both_ways}
        runs |= {name + ROUND_TRIP: run.both_ways for name, run in routed.items()}
        least = least_inter_bytes(case, self.node_of_rank)
        dedup = routed["dedup"]
        ratio = dedup.inter_bytes() / least if least > 0 else 1.0
        return runs, {"dedup_bytes": ratio, "dedup_memory": dedup.extra_bytes_over_received()}

    def check(self, buffers: Buffers) -> None:
        """Every algorithm delivers what all_to_all_single does; RuntimeError names one that does not."""
        runs = self.bind(buffers)
        runs[STOCK]()
        expected = buffers.recv.clone()
        for name in self.comms:
            buffers.recv.zero_()
            runs[name]()
            if not torch.equal(buffers.recv, expected):
                raise RuntimeError(f"{name} delivered other bytes than {STOCK}")


def _carry(comm: Comm, buffers: Buffers) -> None:
    comm.start(buffers.send, buffers.send_rows, buffers.recv, buffers.recv_rows).wait()


def time_run(run: Callable[[], None], times: int, device: torch.device) -> float:
    """Seconds of one exchange on the slowest rank, from `times` of them in a row; collective."""
    dist.barrier()
    start = time.perf_counter()
    for _ in range(times):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = torch.tensor([(time.perf_counter() - start) / times], dtype=torch.float64, device=device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds)
