"""All-to-alls, compressors and schedulers by name, compiled or plugged in, and the rest of the compiled backend."""

from __future__ import annotations

import torch
import torch.distributed as dist

from planmoe_ds.native import _C
from planmoe_ds.plugins import PLUGINS
from planmoe_ds.scheduling.abstract import AbstractScheduler

ChunkRows = _C.ChunkRows
Clock = _C.Clock
Comm = _C.Comm
Compressor = _C.Compressor
Exchange = _C.Exchange
ExchangeSpec = _C.ExchangeSpec
Itinerary = _C.Itinerary
LaunchLedger = _C.LaunchLedger
OrderedTokens = _C.OrderedTokens
RowRoutes = _C.RowRoutes
RowSums = _C.RowSums
Spread = _C.Spread
Stamp = _C.Stamp
TokenOrder = _C.TokenOrder
aligned = _C.aligned
build_info = _C.build_info
decide_gate = _C.decide_gate
dot_rows = _C.dot_rows
find_experts = _C.find_experts
fold_rows = _C.fold_rows
gate_gradient = _C.gate_gradient
gate_runs_on = _C.gate_runs_on
gather_bytes = _C.gather_bytes
order_tokens = _C.order_tokens
order_tokens_on_device = _C.order_tokens_on_device
pack_columns = _C.pack_columns
routes_on_device = _C.routes_on_device
spread_rows = _C.spread_rows
sum_rows = _C.sum_rows
sums_on_device = _C.sums_on_device
unpack_add = _C.unpack_add

__all__ = [
    "ChunkRows",
    "Clock",
    "Comm",
    "Compressor",
    "Exchange",
    "ExchangeSpec",
    "Itinerary",
    "LaunchLedger",
    "OrderedTokens",
    "RowRoutes",
    "RowSums",
    "Spread",
    "Stamp",
    "TokenOrder",
    "aligned",
    "build_info",
    "comm_names",
    "compressor_names",
    "decide_gate",
    "dot_rows",
    "find_experts",
    "fold_rows",
    "gate_gradient",
    "gate_runs_on",
    "gather_bytes",
    "make_comm",
    "make_compressor",
    "make_scheduler",
    "order_tokens",
    "order_tokens_on_device",
    "pack_columns",
    "routes_on_device",
    "scheduler_names",
    "spread_rows",
    "sum_rows",
    "sums_on_device",
    "unpack_add",
]


def make_comm(
    name: str, groups: list[dist.ProcessGroup], node_of_rank: list[int], device: torch.device, timeout_ms: int = 0
) -> Comm:
    """The all-to-all `name` over `groups`, process groups of the same ranks, one a link; node_of_rank: by group rank.

    timeout_ms bounds every wait; 0: the groups' own timeout. ValueError for an unknown name (it lists all), a group
    without this rank, and numbers that do not fit the group.
    """
    plugin = PLUGINS.comms.find(name)
    for place, group in enumerate(groups):
        if not isinstance(group, dist.ProcessGroup):
            raise ValueError(  # noqa: TRY004
                f"groups[{place}] is {group!r}, expected a process group with this rank, {dist.get_rank()}, in it"
            )
    if plugin is None:
        return _C.make_comm(name, groups, node_of_rank, device, timeout_ms)
    return plugin(groups, node_of_rank, device, timeout_ms)


def make_compressor(name: str) -> Compressor:
    """The codec `name`, or `name:setting`; ValueError for an unknown one, listing all, and for a bad setting."""
    base, colon, _ = name.partition(":")
    plugin = PLUGINS.compressors.find(base)
    if plugin is None:
        return _C.make_compressor(name)
    if colon:
        raise ValueError(f"compressor '{base}' takes no setting, got '{name}'")
    return plugin()


def make_scheduler(name: str) -> AbstractScheduler:
    """The scheduler `name`; ValueError for an unknown one, listing all."""
    plugin = PLUGINS.schedulers.find(name)
    assert plugin is not None
    return plugin()


def comm_names() -> list[str]:
    """All-to-alls that make_comm knows, sorted."""
    return PLUGINS.comms.names()


def compressor_names() -> list[str]:
    """Compressors that make_compressor knows, sorted."""
    return PLUGINS.compressors.names()


def scheduler_names() -> list[str]:
    """Schedulers that make_scheduler knows, sorted."""
    return PLUGINS.schedulers.names()
