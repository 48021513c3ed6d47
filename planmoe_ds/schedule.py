"""The order of a layer's tasks: what the pipeline runs, the same on every rank.

One pass through a layer, forward or backward, is four tasks per chunk:
  DISPATCH  encode the chunk's rows and start their all-to-all
  EXPERT    wait for them and run the experts on them (backward: their gradients)
  COMBINE   encode the results and start the all-to-all back
  COLLECT   wait for them and decode
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """A task's kind, in the order in which one chunk goes through them."""

    DISPATCH = 0
    EXPERT = 1
    COMBINE = 2
    COLLECT = 3


@dataclass(frozen=True)
class Task:
    """One task of one chunk."""

    kind: Kind
    chunk: int


def pipelined(num_chunks: int) -> tuple[Task, ...]:
    """ScheMoE's order (EuroSys 2024), optimal for equal chunks and two resources.

    Every dispatch is under way before the first expert runs, every combine before the first is collected.
    """
    chunks = range(num_chunks)
    order = [Task(Kind.DISPATCH, chunk) for chunk in chunks]
    for chunk in chunks:
        order += [Task(Kind.EXPERT, chunk), Task(Kind.COMBINE, chunk)]
    return (*order, *(Task(Kind.COLLECT, chunk) for chunk in chunks))


def validate(schedule: tuple[Task, ...], num_chunks: int) -> None:
    """Raise ValueError unless every task of every chunk occurs once, after the one it depends on."""
    reached = [-1] * num_chunks
    for task in schedule:
        if not 0 <= task.chunk < num_chunks:
            raise ValueError(f"the schedule names chunk {task.chunk}, the layer has {num_chunks}")
        if task.kind.value != reached[task.chunk] + 1:
            raise ValueError(f"chunk {task.chunk}: {task.kind.name} comes out of order or twice")
        reached[task.chunk] = task.kind.value
    if any(last != Kind.COLLECT.value for last in reached):
        raise ValueError(f"the schedule ends before every chunk is collected (last tasks: {reached})")
