"""Makes the process groups of sets of ranks, chooses their all-to-alls, and has them watched."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from planmoe_ds.backend import Comm, LaunchLedger, comm_names, make_comm
from planmoe_ds.choose import Choice, LayerTraffic, choose_comm
from planmoe_ds.choose_chunks import CANDIDATES
from planmoe_ds.compression import AUTO
from planmoe_ds.config import Exactness, PlanMoEConfig
from planmoe_ds.costs import ClusterCosts
from planmoe_ds.errors import PlanMoEMismatchError
from planmoe_ds.group import ExpertGroup, hosts_of
from planmoe_ds.job_store import job_number, job_timeout
from planmoe_ds.probe import run_probe
from planmoe_ds.threads import batch_threads
from planmoe_ds.topology import Topology, find_topology
from planmoe_ds.watchdog import Watchdog

_NCCL_MARGIN = timedelta(seconds=60)
_NUM_LINKS = {"direct": 1, "dedup": 3, AUTO: 3}  # process groups per set of ranks, one a link; others: two


def num_links(comm: str) -> int:
    """Process groups that the all-to-all `comm` gets; "auto": every rank must make as many, whatever it chooses."""
    return _NUM_LINKS.get(comm, 2)


def connect(
    my_groups: dict[str, list[int]],
    config: PlanMoEConfig,
    device: torch.device,
    traffic: Mapping[str, LayerTraffic] | None = None,
) -> dict[str, ExpertGroup]:
    """Create the groups of `my_groups` (name -> global ranks); every rank of the world calls this at the same time.

    planmoe has process groups of its own, so that its traffic never mixes with the framework's collectives.
    traffic: what layers send in a group, by name, for the all-to-all "auto"; "auto" is "direct" for groups without.
    """
    everyone: list[dict[str, list[int]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, my_groups)
    _check_membership(everyone)
    limit = _limit(config)
    # NCCL's own watchdog ends the process and names no rank: planmoe's comes first
    timeout = limit if device.type == "cpu" else limit + _NCCL_MARGIN
    distinct = sorted({tuple(ranks) for groups in everyone for ranks in groups.values()})
    topology = find_topology(config.ranks_per_node)
    loads = {tuple(my_groups[name]): load for name, load in (traffic or {}).items()}
    costs = _probe(distinct, topology, config, device)
    choices = _choose(distinct, loads, topology, config, costs)
    milliseconds = round(config.timeout_seconds * 1000) if config.timeout_seconds is not None else 0
    ledger = LaunchLedger(dist.get_world_size())
    mine = sorted({tuple(ranks) for ranks in my_groups.values()})
    comms: dict[tuple[int, ...], Comm] = {}
    with batch_threads():
        made = {
            ranks: [dist.new_group(list(ranks), timeout=timeout) for _ in range(num_links(config.comm))]
            for ranks in distinct
        }
        for ranks in mine:
            nodes = list(topology.subset(ranks).node_of_rank)
            comms[ranks] = make_comm(choices[ranks].name, made[ranks], nodes, device, milliseconds)
    numbers = {ranks: distinct.index(ranks) for ranks in mine}
    watchdog, job = None, 0
    if dist.get_world_size() > 1:
        job = job_number()
        members = {place: ranks for ranks, number in numbers.items() for place in (number, hosts_of(number))}
        watchdog = Watchdog(list(comms.values()), members, limit.total_seconds())
    connected: dict[tuple[int, ...], ExpertGroup] = {}
    for ranks, comm in comms.items():
        width = _counts_width(comm, loads.get(ranks), _most_chunks(config))
        connected[ranks] = ExpertGroup(comm, ranks, ledger, numbers[ranks], choices[ranks], costs, width, watchdog, job)
        weakref.finalize(connected[ranks], comm.close)  # at the latest when the program ends
    return {name: connected[tuple(ranks)] for name, ranks in my_groups.items()}


def connect_hosts(groups: Sequence[ExpertGroup], config: PlanMoEConfig) -> None:
    """Let the hosts of these groups ask each other; every rank of the world calls this at the same time.

    groups: those of this rank whose hosts have something to ask.
    """
    everyone: list[set[tuple[int, ...]]] = [set() for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, {group.global_ranks for group in groups if group.size > 1})
    for ranks in sorted(set().union(*everyone)):
        with batch_threads():
            made = dist.new_group(list(ranks), timeout=_limit(config), backend="gloo")
        for group in groups:
            if group.global_ranks == ranks:
                group.hosts.over_gloo = made


def _limit(config: PlanMoEConfig) -> timedelta:
    """Of every wait for a peer."""
    return job_timeout() if config.timeout_seconds is None else timedelta(seconds=config.timeout_seconds)


def _most_chunks(config: PlanMoEConfig) -> int:
    return max(CANDIDATES) if isinstance(config.chunks, str) else config.chunks


def _counts_width(comm: Comm, load: LayerTraffic | None, num_chunks: int) -> int:
    """Numbers that a rank tells a peer about a layer of at most so many experts and chunks; see plan.py's counts."""
    if load is None:
        return 0
    per_chunk = load.num_experts // comm.size + 1 + max(1, comm.num_pieces)
    if comm.passes_on:
        largest = max(comm.node_of_rank.count(node) for node in comm.node_of_rank)
        per_chunk += comm.num_pieces * (1 + largest)
    return num_chunks * per_chunk


def _probe(
    distinct: list[tuple[int, ...]], topology: Topology, config: PlanMoEConfig, device: torch.device
) -> ClusterCosts | None:
    """What the links cost, where "auto" needs to know."""
    crosses = any(topology.subset(ranks).num_nodes > 1 for ranks in distinct)
    asks_codecs = config.compression == AUTO and (crosses or config.resolved_exactness is Exactness.LOSSY)
    if (config.comm == AUTO and crosses) or (asks_codecs and topology.num_ranks > 1):
        return run_probe(device, topology).costs
    return None


def _choose(
    distinct: list[tuple[int, ...]],
    loads: dict[tuple[int, ...], LayerTraffic],
    topology: Topology,
    config: PlanMoEConfig,
    costs: ClusterCosts | None,
) -> dict[tuple[int, ...], Choice]:
    """The all-to-all of every group that this rank is in, or might be asked about.

    Every rank decides alike, because all have the same costs and a group's ranks have the same layers.
    """
    if config.comm != AUTO:
        return dict.fromkeys(distinct, Choice(config.comm, "as the config says", {}))
    choices = dict.fromkeys(distinct, Choice("direct", "direct: no layer's traffic is known", {}))
    exact = config.resolved_exactness is Exactness.EXACT
    for ranks, load in loads.items():
        places = topology.subset(ranks)
        if places.num_nodes == 1 or costs is None:
            choices[ranks] = Choice("direct", "direct: one node: nothing crosses between nodes", {})
        else:
            choices[ranks] = choose_comm(costs, places, load, comm_names(), exact=exact)
    return choices


def _check_membership(everyone: list[dict[str, list[int]]]) -> None:
    for rank, groups in enumerate(everyone):
        for name, ranks in groups.items():
            if rank not in ranks or any(everyone[peer].get(name) != ranks for peer in ranks):
                named = {peer: everyone[peer].get(name) for peer in ranks}
                raise PlanMoEMismatchError(
                    f"group '{name}': rank {rank} names the ranks {ranks}, its members name {named}; every rank of a "
                    "group must list the same ranks, its own among them"
                )
