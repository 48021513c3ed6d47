"""The trace writers: what the Chrome JSON says about each span, and that the picture is a picture."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from planmoe_ds.trace import LANES, Lane, Phase, Span, draw_timeline, write_chrome_trace

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
ORIGIN_NS = 7_000_000_000


def make_span(lane: Lane, start_ns: int, end_ns: int, *, chunk: int = 0, phase: Phase = "forward") -> Span:
    return Span(
        name=f"{lane} {chunk}",
        lane=lane,
        layer=1,
        chunk=chunk,
        phase=phase,
        start_ns=ORIGIN_NS + start_ns,
        end_ns=ORIGIN_NS + end_ns,
    )


@pytest.fixture
def spans() -> list[Span]:
    return [
        make_span("inter", 3_000, 9_000, chunk=1),
        make_span("compute", 0, 2_500),
        make_span("wait", 2_500, 9_000, chunk=-1),
        make_span("exchange", 12_000, 15_000, phase="backward"),
    ]


def read_events(path: Path) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return events


def test_chrome_trace_has_one_complete_event_per_span(spans: list[Span], tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write_chrome_trace(spans, path, rank=3)
    events = [event for event in read_events(path) if event["ph"] == "X"]
    assert [event["name"] for event in events] == ["compute 0", "wait -1", "inter 1", "exchange 0"]
    assert [event["ts"] for event in events] == [0.0, 2.5, 3.0, 12.0]
    assert [event["dur"] for event in events] == [2.5, 6.5, 6.0, 3.0]
    assert {event["pid"] for event in events} == {3}
    assert events[3]["args"] == {"layer": 1, "chunk": 0, "phase": "backward"}


def test_chrome_trace_names_one_thread_per_lane(spans: list[Span], tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write_chrome_trace(spans, path)
    events = read_events(path)
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert sorted(names.values()) == sorted(["compute", "wait", "inter", "exchange"])
    lane_of_event = {event["name"].split()[0]: names[event["tid"]] for event in events if event["ph"] == "X"}
    assert all(name == lane for name, lane in lane_of_event.items())


def test_chrome_trace_without_spans_is_still_valid(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write_chrome_trace([], path)
    assert [event["name"] for event in read_events(path)] == ["process_name"]


def test_timeline_is_a_png(spans: list[Span], tmp_path: Path) -> None:
    path = tmp_path / "timeline.png"
    draw_timeline(spans, path, "one step")
    content = path.read_bytes()
    assert content.startswith(PNG_SIGNATURE)
    assert len(content) > 5_000


@pytest.mark.parametrize("lane", LANES)
def test_timeline_draws_each_lane_alone_and_many_chunks(lane: Lane, tmp_path: Path) -> None:
    spans = [make_span(lane, 100 * chunk, 100 * chunk + 80, chunk=chunk) for chunk in range(-1, 16)]
    draw_timeline(spans, tmp_path / "timeline.png", lane)
    assert (tmp_path / "timeline.png").stat().st_size > 5_000


def test_timeline_accepts_spans_of_no_length(tmp_path: Path) -> None:
    draw_timeline([make_span("compute", 5, 5)], tmp_path / "timeline.png", "nothing took any time")
    assert (tmp_path / "timeline.png").exists()


def test_timeline_without_spans_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no spans"):
        draw_timeline([], tmp_path / "timeline.png", "empty")
    assert not (tmp_path / "timeline.png").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"lane": "gpu"}, "lane 'gpu'"), ({"end_ns": 0}, "before its start")],
    ids=["unknown lane", "ends before it starts"],
)
def test_bad_spans_are_named(change: dict[str, Any], message: str, spans: list[Span], tmp_path: Path) -> None:
    broken = dataclasses.replace(spans[0], **change)
    with pytest.raises(ValueError, match=message):
        write_chrome_trace([*spans, broken], tmp_path / "trace.json")
    with pytest.raises(ValueError, match=message):
        draw_timeline([*spans, broken], tmp_path / "timeline.png", "broken")


def test_spans_are_frozen(spans: list[Span]) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        spans[0].layer = 2  # type: ignore[misc]
