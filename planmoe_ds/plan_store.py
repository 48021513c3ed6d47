"""Where a layer's learnt costs are kept between runs: the group's first rank reads and writes, the others are told."""

from __future__ import annotations

import logging
import math
import socket
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from planmoe_ds.errors import PlanMoEConfigError
from planmoe_ds.executor import COLUMNS, costs_from, vector_of
from planmoe_ds.group import ExpertGroup
from planmoe_ds.scheduling.stored import StoredPlanError, load_plan, save_plan

_logger = logging.getLogger(__name__)
_NONE, _FOUND, _REFUSED = 0.0, 1.0, 2.0


@dataclass(frozen=True)
class PlanStore:
    """One layer's file in a folder; `model` says what its costs depend on, in words."""

    folder: Path
    layer: int
    model: str

    def load(self, group: ExpertGroup, num_chunks: int) -> torch.Tensor | None:
        """Costs, float64 [2, num_chunks, 10], or None without a file; every rank of the group calls this.

        PlanMoEConfigError on every rank when the file cannot be used.
        """
        message = torch.full((1 + 2 * num_chunks * COLUMNS,), math.nan, dtype=torch.float64)
        error: StoredPlanError | None = None
        if group.rank == 0:
            try:
                plan = load_plan(self._path, _cluster(group), self.model, num_chunks)
                message[0] = _NONE if plan is None else _FOUND
                if plan is not None:
                    message[1:] = vector_of(*plan.costs(num_chunks)).flatten()
            except StoredPlanError as found:
                error = found
                message[0] = _REFUSED
        message = message.to(group.comm.device)
        dist.broadcast(message, group.global_ranks[0], group=group.comm.groups[0])
        if message[0] == _REFUSED:
            reason = f"rank {group.global_ranks[0]} cannot use {self._path}" if error is None else str(error)
            raise PlanMoEConfigError(f"planmoe.plans: {reason}") from error
        return None if message[0] == _NONE else message[1:].cpu().reshape(2, num_chunks, COLUMNS)

    def save(self, group: ExpertGroup, vector: torch.Tensor) -> None:
        """Keep what was learnt; a folder that cannot be written is worth a warning."""
        forward, backward = costs_from([vector])
        if group.rank != 0 or forward is None:
            return
        try:
            save_plan(self._path, _cluster(group), self.model, forward, backward)
        except OSError as error:
            _logger.warning("planmoe: %s cannot be written (%s), the next run learns again", self._path, error)

    @property
    def _path(self) -> Path:
        return self.folder / f"layer-{self.layer}.json"


def _cluster(group: ExpertGroup) -> str:
    """What the costs of exchanges depend on: asked on the group's first rank only."""
    nodes = ", ".join(str(node) for node in group.comm.node_of_rank)
    backend = dist.get_backend(group.comm.groups[0])
    return f"{socket.gethostname()}: ranks on nodes {nodes}; {backend}, {group.comm.device.type}"
