"""Measures what the links between ranks cost, in a few seconds, and keeps the result for the next run.

Every rank exchanges with all its peers over one class of links, as a layer's all-to-all does; then over both classes at
once. Sizes grow until one exchange takes a noticeable time; see `costs.py` for the model that is fitted.
"""

from __future__ import annotations

import logging
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from planmoe_ds.backend import Comm, Exchange, make_comm
from planmoe_ds.costs import (
    ClusterCosts,
    LinkCost,
    StaleCacheError,
    cache_path,
    fingerprint,
    fit_link_cost,
    load_costs,
    network_settings,
    save_costs,
)
from planmoe_ds.threads import batch_threads
from planmoe_ds.topology import LinkClass, Topology, find_topology

_logger = logging.getLogger(__name__)

_ROW_BYTES = 1024
_SMALLEST_PAIR_BYTES = 4 << 10
_MOST_BYTES_PER_RANK = 128 << 20
_GROWTH = 4
_LONGEST_SECONDS = 0.25  # of one exchange
_MANY, _FEW, _FEW_FROM_SECONDS = 7, 3, 0.02  # repeats of short exchanges, of long ones, where long begins


@dataclass(frozen=True)
class ProbeReport:
    """Costs, the cache file for them, and whether they come from there; rank 0 knows whether the file has them now."""

    costs: ClusterCosts
    path: Path
    from_cache: bool
    is_kept: bool = True


def run_probe(
    device: torch.device, topology: Topology | None = None, *, refresh: bool = False, folder: Path | None = None
) -> ProbeReport:
    """The costs of this job's links, from the cache unless `refresh`; every rank of the world calls this.

    Rank 0 reads and writes the cache, in `folder` or the user's cache folder. A file that cannot be used is not:
    the links are measured again and a warning says why.
    """
    topology = find_topology() if topology is None else topology
    facts: list[tuple[str, dict[str, str]]] = [("", {})] * dist.get_world_size()
    dist.all_gather_object(facts, (socket.gethostname(), network_settings(os.environ)))
    hostnames, settings = zip(*facts, strict=True)
    mark = fingerprint(hostnames, topology, dist.get_backend(), _device_name(device), settings)
    path = cache_path(mark, os.environ) if folder is None else folder / cache_path(mark, {}).name
    shared: list[object] = [_look_up(path, mark) if dist.get_rank() == 0 and not refresh else None]
    dist.broadcast_object_list(shared, device=device if dist.get_backend() == "nccl" else None)
    if isinstance(shared[0], ClusterCosts):
        return ProbeReport(shared[0], path, from_cache=True)
    costs = _measure(topology, device, mark)
    is_kept = dist.get_rank() != 0 or _keep(costs, path)
    return ProbeReport(costs, path, from_cache=False, is_kept=is_kept)


def _look_up(path: Path, mark: str) -> ClusterCosts | None:
    try:
        return load_costs(path, mark)
    except StaleCacheError as error:
        _logger.warning("planmoe probe: the cached costs are not used, the links are measured again: %s", error)
        return None


def _keep(costs: ClusterCosts, path: Path) -> bool:
    try:
        save_costs(costs, path)
    except OSError as error:
        _logger.warning("planmoe probe: %s cannot be written (%s), the next run measures again", path, error)
        return False
    return True


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _measure(topology: Topology, device: torch.device, mark: str) -> ClusterCosts:
    with _communicators(topology, device) as (direct, pipe):
        alone = {link: _measure_alone(direct, topology, link, device) for link in LinkClass if topology.has(link)}
        both: dict[LinkClass, LinkCost] = {}
        overlap = None
        if len(alone) == len(LinkClass):
            both = _measure_both(pipe, topology, alone, device)
            overlap = _measure_overlap(direct, topology, both, device)
    return ClusterCosts(
        fingerprint=mark,
        backend=dist.get_backend(),
        node_of_rank=list(topology.node_of_rank),
        intra=alone.get(LinkClass.INTRA),
        inter=alone.get(LinkClass.INTER),
        intra_while_both=both.get(LinkClass.INTRA),
        inter_while_both=both.get(LinkClass.INTER),
        direct_overlap=overlap,
    )


@contextmanager
def _communicators(topology: Topology, device: torch.device) -> Iterator[tuple[Comm, Comm]]:
    """`direct` and `pipe` over process groups of their own, for a while."""
    with batch_threads():
        groups = [dist.new_group() for _ in range(2)]
        nodes = list(topology.node_of_rank)
        comms = [make_comm(name, groups, nodes, device) for name in ("direct", "pipe")]
    try:
        yield comms[0], comms[1]
    finally:
        comms.clear()
        for group in groups:
            dist.destroy_process_group(group)


def _measure_alone(comm: Comm, topology: Topology, link: LinkClass, device: torch.device) -> LinkCost:
    """Exchanges over one class of links, larger and larger."""
    sizes, seconds = [], []
    pair_bytes = _SMALLEST_PAIR_BYTES
    while True:
        run = _prepare(comm, topology, {link: pair_bytes}, device)
        sizes.append(_busiest_bytes(topology, link, pair_bytes))
        seconds.append(_repeat(partial(_timed, run, device))[0])
        too_slow = seconds[-1] * _GROWTH > _LONGEST_SECONDS
        if len(sizes) > 1 and (too_slow or sizes[-1] * _GROWTH > _MOST_BYTES_PER_RANK):
            return fit_link_cost(sizes, seconds)
        pair_bytes *= _GROWTH


def _measure_both(
    comm: Comm, topology: Topology, alone: dict[LinkClass, LinkCost], device: torch.device
) -> dict[LinkClass, LinkCost]:
    """Exchanges over both classes at once, with as much for each as takes them equally long alone."""
    sizes: dict[LinkClass, list[int]] = {link: [] for link in LinkClass}
    seconds: dict[LinkClass, list[float]] = {link: [] for link in LinkClass}
    target = 4 * max(cost.alpha_seconds for cost in alone.values()) + 1e-4
    while True:
        pair_bytes = {link: _pair_bytes_for(target, topology, link, alone[link]) for link in LinkClass}
        run = _prepare(comm, topology, pair_bytes, device)
        taken = _repeat(partial(_lane_seconds, run, device))
        for link, lane_seconds in zip(LinkClass, taken, strict=True):
            sizes[link].append(_busiest_bytes(topology, link, pair_bytes[link]))
            seconds[link].append(lane_seconds)
        full = any(listed[-1] * _GROWTH > _MOST_BYTES_PER_RANK for listed in sizes.values())
        enough = all(len(set(listed)) > 1 for listed in sizes.values())
        if enough and (full or max(taken) * _GROWTH > _LONGEST_SECONDS):
            return {link: fit_link_cost(sizes[link], seconds[link]) for link in LinkClass}
        target *= _GROWTH


def _measure_overlap(comm: Comm, topology: Topology, both: dict[LinkClass, LinkCost], device: torch.device) -> float:
    """How much of the shorter class's time one exchange over both hides, from one that takes both equally long."""
    fill = _MOST_BYTES_PER_RANK * min(cost.beta_seconds_per_byte for cost in both.values())
    target = min(_LONGEST_SECONDS / _GROWTH, fill)
    pair_bytes = {link: _pair_bytes_for(target, topology, link, cost) for link, cost in both.items()}
    seconds = _repeat(partial(_timed, _prepare(comm, topology, pair_bytes, device), device))[0]
    legs = [cost.seconds(_busiest_bytes(topology, link, pair_bytes[link])) for link, cost in both.items()]
    return min(1.0, max(0.0, (sum(legs) - seconds) / min(legs)))


def _pair_bytes_for(seconds: float, topology: Topology, link: LinkClass, cost: LinkCost) -> int:
    """Whole rows per pair that take about `seconds` on the busiest rank."""
    rows = seconds / cost.beta_seconds_per_byte / _busiest_bytes(topology, link, 1) / _ROW_BYTES
    return max(1, round(rows)) * _ROW_BYTES


def _busiest_bytes(topology: Topology, link: LinkClass, pair_bytes: int) -> int:
    """What the rank with most peers over these links sends."""
    return max(sum(topology.peers(rank, link)) for rank in range(topology.num_ranks)) * pair_bytes


def _prepare(
    comm: Comm, topology: Topology, pair_bytes: dict[LinkClass, int], device: torch.device
) -> Callable[[], Exchange]:
    """A function that exchanges `pair_bytes` (whole rows) with every peer of each class."""
    rows = [0] * topology.num_ranks
    for link, size in pair_bytes.items():
        for peer, reached in enumerate(topology.peers(comm.rank, link)):
            rows[peer] += size // _ROW_BYTES if reached else 0
    send = torch.zeros(sum(rows), _ROW_BYTES, dtype=torch.uint8, device=device)
    recv = torch.empty_like(send)

    def run() -> Exchange:
        exchange = comm.start(send, rows, recv, rows)
        exchange.wait()
        return exchange

    return run


def _timed(run: Callable[[], Exchange], device: torch.device) -> list[float]:
    """Duration of the whole exchange."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return [time.perf_counter() - start]


def _lane_seconds(run: Callable[[], Exchange], device: torch.device) -> list[float]:
    """Duration of each class's leg, in the order of LinkClass; 0 where this rank has no peers of the class."""
    exchange = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    lanes = {lane: (end - start) * 1e-9 for lane, start, end in exchange.spans()}
    return [lanes.get(link.value, 0.0) for link in LinkClass]


def _repeat(measure: Callable[[], Sequence[float]]) -> list[float]:
    """Medians over repeats of the slowest rank's seconds, the same on every rank; the first one warms up."""
    taken = [_slowest(measure()) for _ in range(2)][1:]
    repeats = _FEW if max(taken[0]) > _FEW_FROM_SECONDS else _MANY
    taken += [_slowest(measure()) for _ in range(repeats - 1)]
    return [statistics.median(values) for values in zip(*taken, strict=True)]


def _slowest(seconds: Sequence[float]) -> list[float]:
    """The largest of every rank's values, element by element; ranks leave this together."""
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else None
    values = torch.tensor(list(seconds), dtype=torch.float64, device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return [float(value) for value in values]
