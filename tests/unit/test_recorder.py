"""Totals are whole, whether a trace runs, and however many events nobody has asked for."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

import planmoe_ds.recorder as recorder_module
from planmoe_ds.recorder import Label, Recorder

LABEL = Label("experts", 0, 0, "forward")


def record(recorder: Recorder, count: int) -> None:
    for _ in range(count):
        with recorder.span("compute", LABEL):
            pass


def test_a_trace_leaves_the_totals_whole() -> None:
    recorder = Recorder(torch.device("cpu"))
    record(recorder, 5)
    recorder.start_trace()
    record(recorder, 7)
    spans = recorder.stop_trace()
    record(recorder, 2)
    assert len(spans) == 7
    total = recorder.take().expert_seconds
    assert total > sum(span.end_ns - span.start_ns for span in spans) * 1e-9
    assert recorder.take().expert_seconds == 0


@pytest.mark.parametrize("traced", [False, True])
def test_events_that_nobody_asks_for_are_added_up(traced: bool) -> None:
    recorder = Recorder(torch.device("cpu"))
    if traced:
        recorder.start_trace()
    with (
        patch.object(recorder_module, "MAX_PENDING", 8),
        patch.object(recorder_module, "_span", wraps=recorder_module._span) as read,
    ):
        record(recorder, 100)
        assert 90 < read.call_count < 100
        assert len(recorder._spans) < 8
        recorder.take()
        assert read.call_count == 100
    assert len(recorder.stop_trace()) == (100 if traced else 0)
