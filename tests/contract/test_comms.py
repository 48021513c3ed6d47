"""Every all-to-all keeps the contract of csrc/comm/abstract.h; torch's all_to_all_single is the oracle."""

from __future__ import annotations

import os
import time
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from planmoe_ds.backend import comm_names, make_comm
from tests.contract.plugins import plugged_in
from tests.contract.traffic import Case, bytes_sent, cases, new_comm, new_groups, specs, start
from tests.engine.support import drop_groups, rank_device
from tests.harness.ranks import RankPool

pytestmark = pytest.mark.distributed

COMPILED = ["dedup", "direct", "hierarchical", "pipe"]
IN_PYTHON = ["installed", "python"]
NAMES = sorted(COMPILED + IN_PYTHON)
NODES = {  # node of every rank
    1: [(0,)],
    2: [(0, 0), (0, 1)],
    3: [(0, 0, 0), (0, 1, 2), (0, 0, 1), (3, 1, 1)],
    4: [(0, 0, 0, 0), (0, 1, 2, 3), (0, 0, 1, 1), (0, 0, 0, 1), (0, 1, 0, 1)],
    8: [(0,) * 8, tuple(range(8)), (0, 0, 0, 0, 1, 1, 1, 1), (0,) * 3 + (1,) * 5, (0, 1, 1, 2, 2, 2, 0, 1)],
}


def compare_with_torch(names: list[str], nodes: tuple[int, ...], generated: list[Case], package: str | None) -> None:
    rank, size, on_gpu = dist.get_rank(), dist.get_world_size(), rank_device().type == "cuda"
    with plugged_in(package):
        groups = new_groups()
        for name in names:
            comm = make_comm(name, groups, list(nodes), rank_device())
            assert (comm.rank, comm.size, comm.node_of_rank) == (rank, size, list(nodes))
            in_flight = []
            for number, case in enumerate(generated):
                parts = specs(case, number)
                exchange = start(comm, parts)
                if on_gpu:  # NCCL does not promise that two communicators make progress side by side
                    exchange.wait()
                    torch.cuda.synchronize()
                expected = [torch.zeros_like(recv) for _, _, recv, _ in parts]
                for (send, send_rows, _, recv_rows), theirs in zip(parts, expected, strict=True):  # ours is in flight
                    dist.all_to_all_single(theirs.view(torch.uint8), send.view(torch.uint8), recv_rows, send_rows)
                in_flight.append((case, exchange, parts, expected))
            for case, exchange, parts, expected in reversed(in_flight):  # waiting order does not matter
                exchange.wait()
                for (_, _, recv, _), theirs in zip(parts, expected, strict=True):
                    assert torch.equal(recv, theirs), (name, case)
                assert exchange.bytes_sent == bytes_sent(name, nodes, rank, case), (name, case)
                assert all(begin <= end for _, begin, end in exchange.spans()), name
            comm.close()
    drop_groups()


def test_every_algorithm_has_a_row(package: str) -> None:
    with plugged_in(package):
        assert comm_names() == NAMES


generated_cases = settings(
    max_examples=2,
    phases=[Phase.generate],  # shrinking would run into ranks that hang
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("nodes", [nodes for listed in NODES.values() for nodes in listed], ids=str)
@generated_cases
@given(data=st.data())
def test_equals_all_to_all_single(ranks: RankPool, package: str, nodes: tuple[int, ...], data: st.DataObject) -> None:
    generated = data.draw(st.lists(cases(len(nodes)), min_size=8, max_size=8))
    ranks.run(len(nodes), compare_with_torch, NAMES, nodes, generated, package)


def compare_over_nccl(recorded: bool, nodes: tuple[int, ...], generated: list[Case]) -> None:
    group_class = dist.ProcessGroupNCCL
    tell, asked = group_class._comm_ptr, []

    def told(group: dist.ProcessGroupNCCL) -> int:
        asked.append(group)
        return int(tell(group))

    sizes = {"TORCH_FR_BUFFER_SIZE": "2000" if recorded else "0"}
    with patch.dict(os.environ, sizes), patch.object(group_class, "_comm_ptr", told):
        compare_with_torch(COMPILED, nodes, generated, None)
    links = 7 + (len(set(nodes)) > 1)  # one of direct, two of each other one, one more of dedup between nodes
    assert len(asked) == (0 if recorded or len(nodes) == 1 else links)


@pytest.mark.gpu
@pytest.mark.parametrize("recorded", [False, True], ids=["NCCL's calls", "the group's calls"])
@pytest.mark.parametrize("nodes", [nodes for listed in NODES.values() for nodes in listed], ids=str)
@generated_cases
@given(data=st.data())
def test_equals_all_to_all_single_over_nccl(
    gpu_ranks: RankPool, recorded: bool, nodes: tuple[int, ...], data: st.DataObject
) -> None:
    generated = data.draw(st.lists(cases(len(nodes)), min_size=20, max_size=20))
    gpu_ranks.run(len(nodes), compare_over_nccl, recorded, nodes, generated)


def evaluate_then_train() -> None:
    """Buffers that an evaluation under inference_mode leaves can be written to afterwards."""
    comm = make_comm("direct", new_groups(), [0], rank_device())
    with torch.inference_mode():
        place = comm.take_buffer(8, 4096).data_ptr()
    again = comm.take_buffer(8, 4096)
    assert again.data_ptr() == place
    again.copy_(torch.ones(8, 4096, dtype=torch.uint8))
    comm.close()


def test_buffers_outlive_inference_mode(ranks: RankPool) -> None:
    ranks.run(1, evaluate_then_train)


def refuse_bad_requests(package: str) -> None:
    good, rank = torch.zeros(4, 3), dist.get_rank()
    cases = [
        ((good, [1, 1], torch.zeros(4, 3), [2, 2]), "send_rows add up to 2 rows, send has 4"),
        ((good, [2, 2], torch.zeros(4, 3), [2, 1]), "recv_rows add up to 3 rows, recv has 4"),
        ((good, [4], torch.zeros(4, 3), [2, 2]), "send_rows has 1 entries, the group has 2"),
        ((good, [5, -1], torch.zeros(4, 3), [2, 2]), r"must not be negative, got \[5, -1\]"),
        ((good, [1 << 62] * 2, torch.zeros(4, 3), [2, 2]), "send_rows add up to 4611686018427387904 rows or more"),
        ((good, [2, 2], torch.zeros(4, 3).double(), [2, 2]), "send is Float, recv is Double: .* one dtype"),
        ((good, [2, 2], torch.zeros(4, 2), [2, 2]), "send rows are 3 wide, recv rows are 2"),
        ((torch.zeros(3, 4).t(), [2, 2], torch.zeros(4, 3), [2, 2]), r"contiguous, got strides \[1, 4\]"),
        ((torch.zeros(4), [2, 2], torch.zeros(4, 3), [2, 2]), "2-d .* got 1-d"),
        ((torch.zeros(4, 3, device="meta"), [2, 2], torch.zeros(4, 3), [2, 2]), "send is on meta, .* works on cpu"),
        ((good, [2, 2], torch.zeros(4, 3, device="meta"), [2, 2]), "recv is on meta, .* works on cpu"),
        ((good, [4, 0], torch.zeros(4, 3), [0, 4]), f"rank {rank} sends itself"),
    ]
    with plugged_in(package):
        for name in NAMES:
            comm = new_comm(name)
            for arguments, words in cases:
                with pytest.raises(ValueError, match=words):
                    start(comm, [arguments])
                with pytest.raises(ValueError, match=words):  # nothing of the good part may be on its way
                    start(comm, [(good, [2, 2], torch.zeros(4, 3), [2, 2]), arguments])
            recv = torch.ones(4, 3)
            comm.start(good, [2, 2], recv, [2, 2]).wait()  # still usable
            assert recv.eq(0).all()


def test_bad_requests(ranks: RankPool, package: str) -> None:
    ranks.run(2, refuse_bad_requests, package)


def refuse_bad_options(package: str) -> None:
    world, first = new_groups(), dist.new_group([0])
    device = torch.device("cpu")
    with plugged_in(package):
        with pytest.raises(ValueError, match=f"unknown all-to-all algorithm 'pip'; known: {', '.join(NAMES)}"):
            make_comm("pip", world, [0, 0], device)
        for name in NAMES:
            cases = [
                (world, [0], "node_of_rank has 1 entries, the group has 2 ranks"),
                (world, [0, 0, 1], "node_of_rank has 3 entries, the group has 2 ranks"),
                (world, [0, -1], r"node_of_rank must not be negative, got \[0, -1\]"),
                ([], [], "at least one process group"),
            ]
            if dist.get_rank() == 1:
                cases.append(([first, first], [0], r"groups\[0\] .* with this rank, 1, in it"))
            elif name in ("dedup", "hierarchical", "pipe"):
                cases.append(([world[0], first], [0, 0], r"groups\[1\] must be over the same ranks as groups\[0\]"))
                cases.append((world[:1], [0, 0], "2 or more process groups over the same ranks, got 1"))
            if dist.get_rank() == 0 and name == "dedup":
                cases.append((world[:2], [0, 1], "3 or more process groups over the same ranks, got 2"))
            for groups, nodes, words in cases:
                with pytest.raises(ValueError, match=words):
                    make_comm(name, groups, nodes, device)
            with pytest.raises(ValueError, match="timeout_ms must not be negative, got -1"):
                make_comm(name, world, [0, 0], device, -1)
            recv = torch.ones(2, 3)
            comm = make_comm(name, world, [0, 0], device)
            comm.start(torch.zeros(2, 3), [1, 1], recv, [1, 1]).wait()
            assert recv.eq(0).all()


def test_bad_options(ranks: RankPool, package: str) -> None:
    ranks.run(2, refuse_bad_options, package)


def wait_for_an_absent_peer(package: str, names: list[str], nodes: tuple[int, ...]) -> dict[str, float]:
    """Seconds by name that a wait for the last rank takes, which never starts anything."""
    size, seconds = dist.get_world_size(), {}
    ones, rows = [1] * size, torch.zeros(size, 4)
    with plugged_in(package):
        comms = {name: new_comm(name, nodes, timeout_ms=1500) for name in names}
        if dist.get_rank() == size - 1:
            time.sleep(3.5 * len(names))
            return {}
        for name, comm in comms.items():
            start = time.monotonic()
            words = f"with rank {size - 1} of the expert-parallel group did not finish" if name in COMPILED else ""
            with pytest.raises(RuntimeError, match=words):
                comm.start(rows, ones, rows.clone(), ones).wait()
            if name in COMPILED:  # later ones fail at once instead of waiting again
                with pytest.raises(RuntimeError, match="did not finish"):
                    comm.start(rows, ones, rows.clone(), ones).wait()
            seconds[name] = time.monotonic() - start
    return seconds


@pytest.mark.parametrize(("names", "nodes"), [(NAMES, (0, 0)), (["dedup", "hierarchical", "pipe"], (0, 0, 1))])
def test_a_wait_is_bounded(ranks: RankPool, package: str, names: list[str], nodes: tuple[int, ...]) -> None:
    waited = ranks.run(len(nodes), wait_for_an_absent_peer, package, names, nodes, fresh=True)[:-1]
    assert all(1.3 < value < 2.9 for seconds in waited for value in seconds.values()), waited


def close_and_start(package: str) -> None:
    rows = torch.zeros(2, 3)
    with plugged_in(package):
        for name in NAMES:
            comm = new_comm(name)
            comm.start(rows, [1, 1], torch.ones(2, 3), [1, 1]).wait()
            comm.close()
            comm.close()
            with pytest.raises(ValueError, match="was closed"):
                comm.start(rows, [1, 1], torch.ones(2, 3), [1, 1])


def test_a_closed_one_starts_nothing(ranks: RankPool, package: str) -> None:
    ranks.run(2, close_and_start, package)


def pass_rows_of_a_liar(num_rows: int) -> str:
    """Rank 1 only tells the ranks of its node how many rows it would pass through them."""
    groups, tag_of_counts = new_groups(5000), 2 * 128  # the second tag, 128 phases each; see csrc/comm/abstract.cpp
    comm = make_comm("hierarchical", groups, [0, 0, 1, 1], rank_device(), 5000)
    if dist.get_rank() == 1:
        sent = dist.isend(torch.tensor([num_rows]), 0, group=groups[0], tag=tag_of_counts)
        dist.irecv(torch.zeros(1, dtype=torch.long), 0, group=groups[0], tag=tag_of_counts).wait()
        sent.wait()
        return ""
    rows = torch.zeros(4, 3)
    with pytest.raises(RuntimeError) as caught:
        comm.start(rows, [1] * 4, rows.clone(), [1] * 4).wait()
    return str(caught.value)


@pytest.mark.parametrize("num_rows", [-1, (1 << 46) + 1])
def test_counts_of_rows_that_pass_here_are_checked(ranks: RankPool, num_rows: int) -> None:
    first = ranks.run(4, pass_rows_of_a_liar, num_rows, fresh=True)[0]
    assert f"rank 1 of the group says that {num_rows} rows of its pass through rank 0, which cannot be" in first
