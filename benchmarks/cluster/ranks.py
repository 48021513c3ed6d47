"""Starts one process per rank inside the nodes and waits for all of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from benchmarks.cluster.namespaces import Namespace
from benchmarks.cluster.network import address
from benchmarks.cluster.spec import ClusterSpec

MASTER_PORT = 29500  # the nodes' ports are their own: nothing else can hold it
_POLL_SECONDS = 0.02
_GRACE_SECONDS = 2.0  # after one rank failed, for the others to say what they saw


def start_ranks(spec: ClusterSpec, nodes: Sequence[Namespace], argv: Sequence[str]) -> list[subprocess.Popen[bytes]]:
    """One process per rank, in rank order; rank 0 has this process's standard output, the others have none."""
    processes = []
    for rank, node in enumerate(spec.node_of_rank):
        environment = {**os.environ, **rank_environment(spec, rank)}
        with nodes[node].entered():
            stdout = None if rank == 0 else subprocess.DEVNULL
            processes.append(subprocess.Popen(argv, env=environment, stdin=subprocess.DEVNULL, stdout=stdout))
    return processes


def rank_environment(spec: ClusterSpec, rank: int) -> dict[str, str]:
    """What a launcher tells a rank, under torchrun's names."""
    node = spec.node_of_rank[rank]
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(spec.world_size),
        "LOCAL_RANK": str(rank - spec.node_of_rank.index(node)),
        "LOCAL_WORLD_SIZE": str(spec.ranks_per_node[node]),
        "GROUP_RANK": str(node),
        "GROUP_WORLD_SIZE": str(len(spec.ranks_per_node)),
        "MASTER_ADDR": address(0),
        "MASTER_PORT": str(MASTER_PORT),
        "GLOO_SOCKET_IFNAME": "eth0",
        "NCCL_SOCKET_IFNAME": "eth0",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }


def wait_for_ranks(spec: ClusterSpec, processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """0, or the exit code of the first rank that failed, after saying which; kills nobody."""
    while True:
        codes = [process.poll() for process in processes]
        failed = next((rank for rank, code in enumerate(codes) if code), None)
        if failed is not None:
            break
        if all(code == 0 for code in codes):
            return 0
        time.sleep(_POLL_SECONDS)
    code = processes[failed].returncode
    how = f"ended with exit code {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"
    print(f"cluster: rank {failed} on node {spec.node_of_rank[failed]} {how}", file=sys.stderr, flush=True)
    deadline = time.monotonic() + _GRACE_SECONDS
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(_POLL_SECONDS)
    return code if code > 0 else 128 - code
