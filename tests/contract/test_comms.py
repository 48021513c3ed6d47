"""Every registered all-to-all keeps the contract of csrc/comm/abstract.h; torch's all_to_all_single is the oracle."""

from __future__ import annotations

import random
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from planmoe_ds.backend import Comm, comm_names, make_comm
from tests.engine.support import rank_device
from tests.harness.ranks import RankPool

pytestmark = pytest.mark.distributed

NAMES = ["direct", "pipe"]
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8]


def new_comm(name: str, ranks_per_node: int = 8, timeout_ms: int = 0) -> Comm:
    world = list(range(dist.get_world_size()))
    timeout = timedelta(milliseconds=timeout_ms) if timeout_ms else None
    groups = [dist.new_group(world, timeout=timeout) for _ in range(2)]
    return make_comm(name, groups, [rank // ranks_per_node for rank in world], rank_device(), timeout_ms)


def random_matrix(generator: random.Random, size: int) -> list[list[int]]:
    """Rows from rank i to rank j: uniform, skewed, with empty ranks, or everything to one rank."""
    kind = generator.choice(["uniform", "skewed", "empty ranks", "one target", "nothing"])
    matrix = [[generator.randrange(6) for _ in range(size)] for _ in range(size)]
    if kind == "skewed":
        matrix = [[count * (20 if target == 0 else 1) for target, count in enumerate(row)] for row in matrix]
    elif kind == "empty ranks":
        silent = generator.randrange(size)
        matrix[silent] = [0] * size
    elif kind == "one target":
        target = generator.randrange(size)
        matrix = [[count if place == target else 0 for place, count in enumerate(row)] for row in matrix]
    elif kind == "nothing":
        matrix = [[0] * size for _ in range(size)]
    return matrix


def compare_with_torch(name: str, ranks_per_node: int, num_cases: int) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    comm = new_comm(name, ranks_per_node)
    assert (comm.rank, comm.size) == (rank, size)
    device = rank_device()
    generator = random.Random(7)  # the same on every rank
    in_flight = []
    for case in range(num_cases):
        matrix, dtype = random_matrix(generator, size), generator.choice(DTYPES)
        width = generator.choice([1, 3, 64])
        send_rows, recv_rows = matrix[rank], [row[rank] for row in matrix]
        send = torch.randint(0, 100, (sum(send_rows), width), generator=torch.Generator().manual_seed(rank + case))
        send = send.to(device, dtype)
        recv, expected = (torch.zeros(sum(recv_rows), width, dtype=dtype, device=device) for _ in range(2))
        exchange = comm.start(send, send_rows, recv, recv_rows)
        if device.type == "cuda":  # NCCL does not promise that two communicators make progress side by side
            exchange.wait()
            torch.cuda.synchronize()
        # on the CPU while ours is in flight
        dist.all_to_all_single(expected.view(torch.uint8), send.view(torch.uint8), recv_rows, send_rows)
        in_flight.append((exchange, recv, expected, send, send_rows))
    for exchange, recv, expected, send, send_rows in reversed(in_flight):  # waiting order does not matter
        exchange.wait()
        assert torch.equal(recv, expected)
        to_others = sum(send_rows) - send_rows[rank]
        assert exchange.bytes_sent == to_others * send.shape[1] * send.element_size()
        assert all(start <= end for _, start, end in exchange.spans())


def test_every_registered_algorithm_has_a_row() -> None:
    assert sorted(comm_names()) == NAMES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("world_size", "ranks_per_node"), [(1, 1), (2, 1), (2, 2), (3, 2), (4, 1), (4, 2), (4, 4), (8, 4)]
)
def test_equals_all_to_all_single(ranks: RankPool, name: str, world_size: int, ranks_per_node: int) -> None:
    ranks.run(world_size, compare_with_torch, name, ranks_per_node, 40)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("world_size", "ranks_per_node"), [(1, 1), (2, 1), (4, 2), (4, 4)])
def test_equals_all_to_all_single_over_nccl(
    gpu_ranks: RankPool, name: str, world_size: int, ranks_per_node: int
) -> None:
    gpu_ranks.run(world_size, compare_with_torch, name, ranks_per_node, 40)


def refuse_bad_requests(name: str) -> None:
    comm = new_comm(name)
    good = torch.zeros(4, 3)
    cases = [
        ((good, [1, 1], torch.zeros(4, 3), [2, 2]), "send_rows add up to 2 rows, send has 4"),
        ((good, [2, 2], torch.zeros(4, 3), [2, 1]), "recv_rows add up to 3 rows, recv has 4"),
        ((good, [4], torch.zeros(4, 3), [2, 2]), "send_rows has 1 entries, the group has 2"),
        ((good, [5, -1], torch.zeros(4, 3), [2, 2]), "must not be negative"),
        ((good, [2, 2], torch.zeros(4, 3).double(), [2, 2]), "one dtype"),
        ((good, [2, 2], torch.zeros(4, 2), [2, 2]), "send rows are 3 wide, recv rows are 2"),
        ((torch.zeros(3, 4).t(), [2, 2], torch.zeros(4, 3), [2, 2]), "contiguous"),
        ((torch.zeros(4), [2, 2], torch.zeros(4, 3), [2, 2]), "2-d"),
        ((good, [4, 0], torch.zeros(4, 3), [0, 4]), "sends itself"),
    ]
    for arguments, words in cases if dist.get_rank() == 0 else cases[:-1]:
        with pytest.raises(ValueError, match=words):
            comm.start(*arguments)
    recv = torch.ones(4, 3)
    comm.start(good, [2, 2], recv, [2, 2]).wait()  # still usable
    assert recv.eq(0).all()


@pytest.mark.parametrize("name", NAMES)
def test_bad_requests(ranks: RankPool, name: str) -> None:
    ranks.run(2, refuse_bad_requests, name)


def refuse_bad_options() -> None:
    world = [0, 1]
    group = dist.new_group(world)
    alone = dist.new_group([0])
    device = torch.device("cpu")
    with pytest.raises(ValueError, match="unknown all-to-all algorithm 'pip'; known: direct, pipe"):
        make_comm("pip", [group], [0, 0], device)
    with pytest.raises(ValueError, match="node_of_rank has 1 entries, the group has 2"):
        make_comm("direct", [group], [0], device)
    with pytest.raises(ValueError, match="two process groups"):
        make_comm("pipe", [group], [0, 0], device)
    with pytest.raises(ValueError, match="at least one process group"):
        make_comm("direct", [], [], device)
    if dist.get_rank() == 0:
        with pytest.raises(ValueError, match="over the same ranks"):
            make_comm("pipe", [group, alone], [0, 0], device)


def test_bad_options(ranks: RankPool) -> None:
    ranks.run(2, refuse_bad_options)


def wait_for_an_absent_peer(name: str) -> float:
    comm = new_comm(name, timeout_ms=2000)
    if dist.get_rank() == 1:
        time.sleep(4)
        return 0.0
    start = time.monotonic()
    rows = torch.zeros(2, 4)
    exchange = comm.start(rows, [1, 1], torch.zeros(2, 4), [1, 1])
    with pytest.raises(RuntimeError, match="with rank 1 of the expert-parallel group did not finish"):
        exchange.wait()
    with pytest.raises(RuntimeError, match="did not finish"):  # later ones fail at once instead of waiting again
        comm.start(rows, [1, 1], torch.zeros(2, 4), [1, 1]).wait()
    return time.monotonic() - start


@pytest.mark.parametrize("name", NAMES)
def test_a_wait_is_bounded(ranks: RankPool, name: str) -> None:
    seconds = ranks.run(2, wait_for_an_absent_peer, name, fresh=True)[0]
    assert 1.5 < seconds < 3.9


def close_and_start(name: str) -> None:
    comm = new_comm(name)
    rows = torch.zeros(2, 3)
    comm.start(rows, [1, 1], torch.ones(2, 3), [1, 1]).wait()
    comm.close()
    comm.close()
    with pytest.raises(ValueError, match="was closed"):
        comm.start(rows, [1, 1], torch.ones(2, 3), [1, 1])


@pytest.mark.parametrize("name", NAMES)
def test_a_closed_one_starts_nothing(ranks: RankPool, name: str) -> None:
    ranks.run(2, close_and_start, name)
