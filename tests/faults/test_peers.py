"""What peers say is checked before buffers are made of it, and planmoe opens no door of its own."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

import planmoe_ds.layer as layer_module
from planmoe_ds.connect import num_links
from planmoe_ds.counts import Counts
from planmoe_ds.rows import Integers
from planmoe_ds.wire import TokenColumns, token_columns
from tests.engine.support import drop_groups
from tests.faults.layers import Model, batch, seconds_until_error
from tests.harness.ranks import RankPool

pytestmark = pytest.mark.distributed

ODD = 1
LARGEST = torch.iinfo(torch.int64).max
Spoil = Callable[[torch.Tensor], object]
SPOILED: dict[str, Spoil] = {
    "negative": lambda counts: counts[0].fill_(-3),
    "one negative": lambda counts: counts[0, 0].sub_(100),
    "huge": lambda counts: counts[0].fill_(1 << 45),
    "sums that overflow": lambda counts: counts[0].fill_(LARGEST),
    "sums that overflow to what was": lambda counts: counts[0, :2].add_(torch.tensor([LARGEST, LARGEST])),
    "more rows than experts want": lambda counts: counts[0].copy_(torch.arange(counts.shape[1])),
    "random": lambda counts: counts[0].random_(),
}


def tell(name: str, settings: dict[str, object]) -> tuple[float, str, str]:
    """Rank ODD tells rank 0 spoiled counts about its second layer."""
    model = Model(settings)
    hidden = model.layer(0, *batch())
    pack = Counts.pack

    def spoil(counts: Counts) -> Integers:
        packed = pack(counts)
        if dist.get_rank() == ODD:
            SPOILED[name](torch.from_numpy(packed))
        return packed

    dist.barrier()
    with patch.object(Counts, "pack", spoil):
        return seconds_until_error(lambda: model.layer(1, hidden, batch()[1]))


def tell_all(settings: dict[str, object]) -> dict[str, tuple[float, str, str]]:
    found = {}
    for name in SPOILED:
        found[name] = tell(name, settings)
        dist.barrier()
        drop_groups()
    return found


@pytest.mark.parametrize("settings", [{}, {"comm": "dedup", "ranks_per_node": 2}], ids=["direct", "dedup"])
def test_counts_that_cannot_be(ranks: RankPool, settings: dict[str, object]) -> None:
    for rank, found in enumerate(ranks.run(4, tell_all, settings, fresh=True, timeout=150)):
        for name, (seconds, kind, message) in found.items():
            assert kind == "PlanMoEMismatchError", (name, rank, kind, message)
            assert f"layer 1: what ranks [{ODD}] say that they send to rank 0 cannot be" in message, (name, message)
            assert seconds < 8, (name, rank, seconds)


def send_to_place(place: int) -> tuple[float, str, str]:
    """Rank ODD's rows say that they belong so far from where its rows begin in the experts' buffer."""
    model = Model({"exactness": "exact", "chunks": 1})
    hidden = model.layer(0, *batch())

    def columns(*arguments: Any) -> TokenColumns:
        usual = token_columns(*arguments)
        if dist.get_rank() == ODD:
            places = usual.bytes_T[:, usual.place_column : usual.id_column]
            places.copy_(torch.full((places.shape[0], usual.top_k), place, dtype=torch.int32).view(torch.uint8))
        return usual

    dist.barrier()
    with patch.object(layer_module, "token_columns", columns):
        return seconds_until_error(lambda: model.layer(1, hidden, batch()[1]))


@pytest.mark.parametrize("place", [1 << 30, -(1 << 30)])
def test_places_that_are_not_there(ranks: RankPool, place: int) -> None:
    for rank, (seconds, kind, message) in enumerate(ranks.run(4, send_to_place, place, fresh=True, timeout=60)):
        assert kind in ("RuntimeError", "PlanMoEError"), (rank, message)
        assert "a peer sent a row for place" in message, (rank, message)
        assert seconds < 8, (rank, seconds)


def listening() -> int:
    """Sockets of this process that wait for connections."""
    own = {str(file.readlink()) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()}
    listens = "0A"
    lines = [
        line.split()
        for table in ("tcp", "tcp6", "udp", "udp6")
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]
    ]
    return sum(fields[3] == listens and f"socket:[{fields[9]}]" in own for fields in lines)


def doors() -> tuple[int, int]:
    """Listening sockets that come with planmoe's groups, watchdog and one step, and with as many groups of torch's."""
    start = listening()
    for _ in range(num_links("direct")):
        dist.barrier(group=dist.new_group())
    of_torch = listening() - start
    drop_groups()
    start = listening()
    model = Model()
    model.forward(*batch()).sum().backward()
    of_planmoe = listening() - start
    del model
    gc.collect()
    return of_planmoe, of_torch


def test_nothing_new_listens(ranks: RankPool) -> None:
    for of_planmoe, of_torch in ranks.run(2, doors, fresh=True):
        assert of_planmoe <= of_torch
