"""Where a layer's learnt costs are kept between runs: the group's first rank reads and writes, the others are told."""

from __future__ import annotations

import logging
import math
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from planmoe_ds.errors import PlanMoEConfigError
from planmoe_ds.executor import COLUMNS, costs_from, vector_of
from planmoe_ds.group import ExpertGroup
from planmoe_ds.scheduling.graph import MOST_CHUNKS
from planmoe_ds.scheduling.stored import StoredPlanError, load_plan, save_plan

_logger = logging.getLogger(__name__)
_NONE, _REFUSED = 0, -1  # else the number of chunks


@dataclass(frozen=True)
class PlanStore:
    """A layer's files in a folder, one per group of ranks. facts: what its costs depend on besides the cluster."""

    folder: Path
    layer: int

    def load(self, group: ExpertGroup, facts: Mapping[str, str], num_chunks: int | None = None) -> torch.Tensor | None:
        """Costs, float64 [2, chunks, 10], or None without a file; every rank of the group calls this.

        num_chunks: how many chunks they must have, None: as many as they have. PlanMoEConfigError on every rank when
        the file cannot be used.
        """
        message = torch.full((1 + 2 * MOST_CHUNKS * COLUMNS,), math.nan, dtype=torch.float64)
        error: StoredPlanError | None = None
        if group.rank == 0:
            try:
                plan = load_plan(self._path(group), _cluster(group), facts, num_chunks)
                message[0] = _NONE
                if plan is not None:
                    costs = vector_of(*plan.costs())
                    message[0] = costs.shape[1]
                    message[1 : 1 + costs.numel()] = costs.flatten()
            except StoredPlanError as found:
                error = found
                message[0] = _REFUSED
        message = group.told_by_first(message, "reading a stored plan")
        if message[0] == _REFUSED:
            reason = f"rank {group.global_ranks[0]} cannot use {self._path(group)}" if error is None else str(error)
            raise PlanMoEConfigError(f"planmoe.plans: {reason}") from error
        stored = int(message[0])
        return None if stored == _NONE else message[1 : 1 + 2 * stored * COLUMNS].reshape(2, stored, COLUMNS)

    def save(self, group: ExpertGroup, facts: Mapping[str, str], vector: torch.Tensor) -> None:
        """Keep what was learnt; a folder that cannot be written is worth a warning."""
        forward, backward = costs_from([vector])
        if group.rank != 0 or forward is None:
            return
        try:
            save_plan(self._path(group), _cluster(group), facts, forward, backward)
        except OSError as error:
            _logger.warning("planmoe: %s cannot be written (%s), the next run learns again", self._path(group), error)

    def _path(self, group: ExpertGroup) -> Path:
        """Of one group: layers of other pipeline stages have the same numbers, and other groups other costs."""
        return self.folder / f"layer-{self.layer}-from-rank-{group.global_ranks[0]}.json"


def _cluster(group: ExpertGroup) -> dict[str, str]:
    """What the costs of exchanges depend on: asked on the group's first rank only."""
    return {
        "first host": socket.gethostname(),
        "nodes of the ranks": ", ".join(str(node) for node in group.comm.node_of_rank),
        "backend": str(dist.get_backend(group.comm.groups[0])),
        "device": group.comm.device.type,
    }
