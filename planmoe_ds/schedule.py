"""The order of a layer's tasks: what the pipeline runs, the same on every rank.

One pass through a layer, forward or backward, is three tasks per chunk:
  DISPATCH  encode the chunk's rows and start their all-to-all
  EXPERT    wait for them, run the experts on them (backward: their gradients) and start the results' all-to-all back
  COLLECT   wait for them and decode
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """A task's kind, in the order in which one chunk goes through them."""

    DISPATCH = 0
    EXPERT = 1
    COLLECT = 2


@dataclass(frozen=True)
class Task:
    """One task of one chunk."""

    kind: Kind
    chunk: int


@functools.cache
def pipelined(num_chunks: int) -> tuple[Task, ...]:
    """ScheMoE's order (EuroSys 2024), optimal for equal chunks and two resources.

    Every dispatch is under way before the first expert runs, every combine before the first is collected.
    """
    chunks = range(num_chunks)
    order = [Task(Kind.DISPATCH, chunk) for chunk in chunks]
    order += [Task(Kind.EXPERT, chunk) for chunk in chunks]
    return (*order, *(Task(Kind.COLLECT, chunk) for chunk in chunks))
