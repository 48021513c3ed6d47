"""The ranks that share a layer's experts, and the compiled exchange between them."""

from __future__ import annotations

import os
import socket
import weakref
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from planmoe_ds.backend import Comm, Exchange, make_comm
from planmoe_ds.config import PlanMoEConfig
from planmoe_ds.errors import PlanMoEMismatchError

NUM_LINKS = 2  # process groups per set of ranks: one for the links inside nodes, one between them


@dataclass(frozen=True)
class Arrival:
    """Rows on their way: `rows` is valid once `exchange` (None: nothing travels) was waited for."""

    rows: torch.Tensor
    exchange: Exchange | None


@dataclass(frozen=True)
class ExpertGroup:
    """A set of ranks with an all-to-all of its own; group ranks throughout."""

    comm: Comm
    global_ranks: tuple[int, ...]

    @property
    def rank(self) -> int:
        """This process's rank in the group."""
        return self.comm.rank

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.comm.size

    def exchange(self, send: torch.Tensor, send_rows: list[int], recv_rows: list[int]) -> Arrival:
        """Start moving `send` [sum(send_rows), W]; returns rows [sum(recv_rows), W] on their way."""
        if self.size == 1:
            return Arrival(send, None)
        recv = send.new_empty((sum(recv_rows), send.shape[1]))
        return Arrival(recv, self.comm.start(send, send_rows, recv, recv_rows))


def connect(my_groups: dict[str, list[int]], config: PlanMoEConfig, device: torch.device) -> dict[str, ExpertGroup]:
    """Create the groups of `my_groups` (name -> global ranks); every rank of the world calls this at the same time.

    planmoe has process groups of its own, so that its traffic never mixes with the framework's collectives.
    """
    everyone: list[dict[str, list[int]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, my_groups)
    _check_membership(everyone)
    timeout = timedelta(seconds=config.timeout_seconds) if config.timeout_seconds is not None else None
    distinct = sorted({tuple(ranks) for groups in everyone for ranks in groups.values()})
    made = {ranks: [dist.new_group(list(ranks), timeout=timeout) for _ in range(NUM_LINKS)] for ranks in distinct}
    nodes = _node_of_rank(config.ranks_per_node)
    milliseconds = round(config.timeout_seconds * 1000) if config.timeout_seconds is not None else 0
    connected: dict[tuple[int, ...], ExpertGroup] = {}
    for ranks in sorted({tuple(ranks) for ranks in my_groups.values()}):
        comm = make_comm(config.comm, made[ranks], [nodes[rank] for rank in ranks], device, milliseconds)
        connected[ranks] = ExpertGroup(comm, ranks)
        weakref.finalize(connected[ranks], comm.close)  # at the latest when the program ends, before the interpreter
    return {name: connected[tuple(ranks)] for name, ranks in my_groups.items()}


def _check_membership(everyone: list[dict[str, list[int]]]) -> None:
    for rank, groups in enumerate(everyone):
        for name, ranks in groups.items():
            if rank not in ranks or any(everyone[peer].get(name) != ranks for peer in ranks):
                named = {peer: everyone[peer].get(name) for peer in ranks}
                raise PlanMoEMismatchError(
                    f"group '{name}': rank {rank} names the ranks {ranks}, its members name {named}; every rank of a "
                    "group must list the same ranks, its own among them"
                )


def _node_of_rank(ranks_per_node: int | None) -> list[int]:
    """Node index of every rank of the world, from the config or from the hosts' names."""
    world_size = dist.get_world_size()
    if ranks_per_node is not None:
        return [rank // ranks_per_node for rank in range(world_size)]
    hosts: list[str] = [""] * world_size
    dist.all_gather_object(hosts, f"{socket.gethostname()}/{os.environ.get('GROUP_RANK', '')}")
    index = {host: number for number, host in enumerate(dict.fromkeys(hosts))}
    return [index[host] for host in hosts]
