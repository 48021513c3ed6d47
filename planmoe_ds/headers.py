"""What ranks tell each other about a layer call before they act on it: every disagreement becomes one error.

A header of int64 travels with the counts of every call. Its length never changes, and the counts behind it fill up to a
width that is the same for all layers of a group, so that ranks in different layers still understand each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache

import torch

from planmoe_ds.errors import PlanMoEMismatchError

_PHASES = ("without gradients", "with gradients", "inside backward")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
PLAN_PHASE = 0  # of the exchange that carries headers: ranks in different layers must understand each other
AGREEMENT_PHASE = 127  # of exchanges in which a group's ranks tell each other a few numbers


@dataclass(frozen=True, kw_only=True)
class Header:
    """What the ranks of a group must have in common for one layer call; every field is one int64.

    job: a number of the job's own; call: how many calls of this layer came before; phase: index into _PHASES; dtype: of
    the tokens; settings: a digest of the config and of planmoe's version.
    """

    job: int = 0
    layer: int
    phase: int = 1
    call: int = 0
    num_chunks: int = 1
    hidden_size: int
    dtype: int = 0
    routes_per_token: int
    num_experts: int
    settings: int = 0

    def numbers(self) -> list[int]:
        """What tells a header from anything else, then all fields."""
        return [mark(), *vars(self).values()]


def pass_phase(layer: int, phase: str) -> int:
    """Of exchanges that carry rows (see Comm.set_phase): passes of neighbouring layers, and both directions, differ."""
    return 1 + 2 * (layer % 63) + (phase == "backward")


def in_backward() -> bool:
    """Whether autograd runs a backward pass on this thread: a layer's call is then one that is recomputed."""
    return torch._C._current_graph_task_id() != -1


def phase_now() -> int:
    """The header's phase of a call that starts now."""
    if in_backward():
        return _PHASES.index("inside backward")
    return _PHASES.index("with gradients" if torch.is_grad_enabled() else "without gradients")


def dtype_code(dtype: torch.dtype) -> int:
    """The header's dtype; ValueError for one that no layer takes."""
    if dtype not in _DTYPES:
        raise ValueError(f"tokens are {dtype}, expected one of {', '.join(str(one) for one in _DTYPES)}")
    return _DTYPES.index(dtype)


@cache
def digest(text: str) -> int:
    """A positive int64 that tells texts apart."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def mark() -> int:
    """What a header begins with, and hardly anything else."""
    return digest("a header")


def check_headers(received: Sequence[Sequence[int]], mine: Header, global_ranks: Sequence[int]) -> None:
    """Compare the headers of all ranks of a group; PlanMoEMismatchError says who has what.

    The first field that differs is named: job, layer and phase come first, because all others follow from them. Over
    NCCL, which knows no tags, what arrives may be no header at all.
    """
    elsewhere = [rank for rank, header in zip(global_ranks, received, strict=True) if header[0] != mark()]
    if elsewhere:
        where = f"layer {mine.layer}, {_name('phase', mine.phase)}"
        raise PlanMoEMismatchError(
            f"ranks {elsewhere} sent something else than the opening of {where}: they are in another exchange."
            f"{_ADVICE['phase']}, and call the same layers in the same order"
        )
    for place, name in enumerate((field.name for field in fields(Header)), start=1):
        values = [header[place] for header in received]
        if any(value != getattr(mine, name) for value in values):
            who = "; ".join(
                f"rank {rank}: {_name(name, value)}" for rank, value in zip(global_ranks, values, strict=True)
            )
            raise PlanMoEMismatchError(
                f"ranks of one expert-parallel group disagree on {_TITLES.get(name, name)}: {who}."
                f"{_ADVICE.get(name, '')}"
            )


def check_launches(
    received: Sequence[int], mine: Sequence[int], layer: int, global_ranks: Sequence[int], rank: int
) -> None:
    """Compare digests of launch orders, one per peer; PlanMoEMismatchError names the ranks that differ."""
    differing = [global_ranks[place] for place, theirs in enumerate(received) if theirs != mine[place]]
    if differing:
        raise PlanMoEMismatchError(
            f"before layer {layer}, rank {global_ranks[rank]} launched the exchanges that it shares with "
            f"ranks {differing} in another order than they did: two in flight could wait for each other for ever. "
            "Every rank must call the same layers in the same order"
        )


_TITLES = {
    "job": "the job they belong to",
    "layer": "the layer they are in",
    "phase": "what they do",
    "call": "how often they called the layer",
    "settings": "planmoe's settings or version",
}
_ADVICE = {
    "job": " Give every job a store of its own: another MASTER_PORT, or rendezvous id",
    "layer": " Every rank must call the same layers in the same order",
    "phase": " Every rank must train and evaluate at the same time",
    "call": " A rank skipped the layer, or called it once more",
    "settings": " Install one planmoe_ds everywhere and give every rank one config",
}


def _name(field: str, value: int) -> str:
    if field == "phase" and 0 <= value < len(_PHASES):
        return _PHASES[value]
    if field == "dtype" and 0 <= value < len(_DTYPES):
        return str(_DTYPES[value]).removeprefix("torch.")
    if field == "job":
        return f"{value:014x}"
    if field == "settings":
        return f"digest {value:014x}"
    return str(value)
