"""Executed against predicted: spans of a schedule, the comparison, the files, and what is refused."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from planmoe_ds.cli import app
from planmoe_ds.execution import compare, load_execution, predicted_spans, save_execution
from planmoe_ds.scheduling import ChunkCosts, ExchangeCosts, Schedule, layer_graph, solve
from planmoe_ds.trace import Span


@pytest.fixture
def schedule() -> Schedule:
    exchange = ExchangeCosts(intra=0.001, inter=0.004, serial=True)
    return solve(layer_graph([ChunkCosts(0.001, exchange, 0.0, 0.003, 0.0, exchange, 0.001)] * 2))


def test_predicted_spans_fill_the_makespan(schedule: Schedule) -> None:
    spans = predicted_spans(schedule, 3, "forward", origin_ns=50)
    assert min(span.start_ns for span in spans) == 50
    assert max(span.end_ns for span in spans) == pytest.approx(50 + schedule.makespan * 1e9, abs=3)
    assert {span.lane for span in spans} == {"compute", "intra", "inter"}
    assert sum(s.end_ns - s.start_ns for s in spans if s.lane == "inter") == pytest.approx(4 * 4e6, abs=8)
    for lane in ("compute", "intra", "inter"):
        mine = sorted((s.start_ns, s.end_ns) for s in spans if s.lane == lane)
        assert all(end <= start + 2 for (_, end), (start, _) in pairwise(mine))


def test_what_was_saved_is_compared(schedule: Schedule, tmp_path: Path) -> None:
    twice = [Span(s.name, s.lane, 0, s.chunk, "forward", 2 * s.start_ns, 2 * s.end_ns)
             for s in predicted_spans(schedule, 0, "forward")]  # fmt: skip
    plan = Span("plan", "wait", 0, -1, "forward", -(10**9), -1)
    save_execution(tmp_path / "run.json", [plan, *twice], {0: {"forward": schedule}})
    spans, predictions = load_execution(tmp_path / "run.json")
    (report,) = compare(spans, predictions)
    assert report.measured == pytest.approx(2 * schedule.makespan, rel=1e-6)
    assert report.predicted == schedule.makespan
    assert report.efficiency == pytest.approx(schedule.lower_bound / schedule.makespan / 2, rel=1e-6)


def test_command_writes_trace_and_pictures(schedule: Schedule, tmp_path: Path) -> None:
    save_execution(tmp_path / "run.json", predicted_spans(schedule, 0, "forward"), {0: {"forward": schedule}})
    found = CliRunner().invoke(app, ["trace", str(tmp_path / "run.json"), "--out", str(tmp_path / "out")])
    assert found.exit_code == 0, found.output
    assert "efficiency (lower bound / measured): 100.0%" in found.stdout
    assert "above 100 %" not in found.stdout
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["executed.png", "predicted.png", "trace.json"]
    events = json.loads((tmp_path / "out" / "trace.json").read_text())["traceEvents"]
    assert {event["args"]["name"] for event in events if event["name"] == "process_name"} == {"executed", "predicted"}


def test_what_ran_faster_than_learnt_is_explained(schedule: Schedule, tmp_path: Path) -> None:
    spans = predicted_spans(schedule, 0, "forward")
    faster = [Span(s.name, s.lane, 0, s.chunk, "forward", s.start_ns // 2, s.end_ns // 2) for s in spans]
    save_execution(tmp_path / "run.json", faster, {0: {"forward": schedule}})
    found = CliRunner().invoke(app, ["trace", str(tmp_path / "run.json"), "--out", str(tmp_path / "out")])
    assert found.exit_code == 0, found.output
    assert "efficiency (lower bound / measured): 200.0%\nabove 100 %: tasks took less time than when" in found.stdout


def traced(**changes: object) -> str:
    """A file of one span, but for the changes, and a prediction without anything."""
    span = asdict(Span("compute", "compute", 0, 0, "forward", 0, 5)) | changes
    return json.dumps({"version": 1, "spans": [span], "predictions": [{}]})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "was not written by"),
        ('{"version": 1}', "was not written by"),
        ('{"version": 2, "spans": [], "predictions": []}', "has version 2"),
        ('{"version": 1, "spans": [], "predictions": []}', "has no spans"),
        (traced(), "predictions.0.layer: "),
        (traced(start_ns="soon"), "spans.0.start_ns: "),
        (traced(lane="road"), "spans.0.lane: "),
        (traced(phase="sideways"), "spans.0.phase: "),
        (traced(end_ns=-1).replace("{}", ""), "'compute' that ends before it starts"),
    ],
)
def test_other_files_are_refused(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(content)
    found = CliRunner().invoke(app, ["trace", str(tmp_path / "run.json")])
    assert found.exit_code == 2
    assert words in found.stderr
    assert CliRunner().invoke(app, ["trace", str(tmp_path / "none.json")]).exit_code == 2


def test_pictures_that_cannot_be_written(schedule: Schedule, tmp_path: Path) -> None:
    save_execution(tmp_path / "run.json", predicted_spans(schedule, 0, "forward"), {0: {"forward": schedule}})
    found = CliRunner().invoke(app, ["trace", str(tmp_path / "run.json"), "--out", str(tmp_path / "run.json")])
    assert found.exit_code == 2
    assert "pictures cannot be written to" in found.stderr
