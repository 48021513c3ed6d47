"""The pipelined schedule is ScheMoE's order, and every chunk goes through its tasks once and in order."""

from __future__ import annotations

import pytest

from planmoe_ds.schedule import Kind, pipelined


@pytest.mark.parametrize("num_chunks", range(1, 17))
def test_every_chunk_goes_through_its_tasks_in_order(num_chunks: int) -> None:
    for chunk in range(num_chunks):
        assert [task.kind for task in pipelined(num_chunks) if task.chunk == chunk] == list(Kind)


def test_pipelined_order() -> None:
    names = [f"{task.kind.name} {task.chunk}" for task in pipelined(2)]
    assert names == [
        "DISPATCH 0",
        "DISPATCH 1",
        "EXPERT 0",
        "EXPERT 1",
        "COLLECT 0",
        "COLLECT 1",
    ]
