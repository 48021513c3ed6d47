"""What ran against what was predicted: a file of both, a Chrome trace, pictures and the efficiency of every pass."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from planmoe_ds.errors import first_problem
from planmoe_ds.scheduling import Resource, Schedule
from planmoe_ds.trace import Lane, Phase, Span, chrome_events, draw_timeline

_LANE: dict[Resource, Lane] = {Resource.COMPUTE: "compute", Resource.INTRA: "intra", Resource.INTER: "inter"}
_VERSION = 1


@dataclass(frozen=True)
class PassReport:
    """One layer's pass: median seconds over the traced steps, the schedule's prediction and its lower bound."""

    layer: int
    phase: Phase
    measured: float
    predicted: float
    bound: float

    @property
    def efficiency(self) -> float:
        """Lower bound over measured: 1 is what no order can beat."""
        return self.bound / self.measured if self.measured > 0 else 1.0


def predicted_spans(schedule: Schedule, layer: int, phase: Phase, origin_ns: int = 0) -> list[Span]:
    """A schedule as spans, exchanges on the lanes of the links that they use."""
    spans = []
    for task, starts in zip(schedule.graph.tasks, schedule.leg_starts, strict=True):
        for (resource, seconds), start in zip(task.legs, starts, strict=True):
            if seconds > 0:
                times = (origin_ns + round(moment * 1e9) for moment in (start, start + seconds))
                spans.append(Span(task.kind.name.lower(), _LANE[resource], layer, task.chunk, phase, *times))
    return spans


def save_execution(
    path: str | Path,
    spans: Sequence[Span],
    schedules: Mapping[int, Mapping[Phase, Schedule]],
    loads: Mapping[int, Sequence[int]] | None = None,
) -> None:
    """Write spans and, by layer and phase, predictions; OSError where the file cannot be written.

    loads: routes to every expert, by layer.
    """
    predictions = [
        {
            "layer": layer,
            "phase": phase,
            "makespan": schedule.makespan,
            "lower_bound": schedule.lower_bound,
            "spans": [asdict(span) for span in predicted_spans(schedule, layer, phase)],
        }
        for layer, by_phase in schedules.items()
        for phase, schedule in by_phase.items()
    ]
    content = {
        "version": _VERSION,
        "spans": [asdict(span) for span in spans],
        "predictions": predictions,
        "loads": loads or {},
    }
    Path(path).write_text(json.dumps(content))


@dataclass(frozen=True)
class _Prediction:
    layer: int
    phase: Phase
    makespan: float
    lower_bound: float
    spans: list[Span]


@dataclass(frozen=True)
class _File:
    version: int
    spans: list[Span]
    predictions: list[_Prediction]


def load_execution(path: Path) -> tuple[list[Span], list[dict[str, Any]]]:
    """Spans and predictions; ValueError says what is wrong with the file."""
    try:
        content = TypeAdapter(_File).validate_json(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise ValueError(f"{path} was not written by engine.planmoe.save_trace: {first_problem(error)}") from error
    if content.version != _VERSION:
        raise ValueError(f"{path} has version {content.version}, this planmoe reads {_VERSION}: trace again")
    if not content.spans:
        raise ValueError(f"{path} has no spans: call engine.planmoe.recorder.start_trace() a step before save_trace")
    for span in [*content.spans, *(span for entry in content.predictions for span in entry.spans)]:
        if span.end_ns < span.start_ns:
            raise ValueError(f"{path} has a span '{span.name}' that ends before it starts: trace again")
    return content.spans, [vars(entry) for entry in content.predictions]


def load_routing(path: Path) -> tuple[float, ...]:
    """Routes to every expert of the layer whose busiest expert stands out most; ValueError says what is wrong."""
    try:
        loads = [tuple(float(count) for count in load) for load in json.loads(path.read_text())["loads"].values()]
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} was not written by engine.planmoe.save_trace: {error!r}") from error
    loads = [load for load in loads if sum(load) > 0]
    if not loads:
        raise ValueError(f"{path} has no routes: call engine.planmoe.recorder.start_trace() a step before save_trace")
    return max(loads, key=lambda load: max(load) * len(load) / sum(load))


def passes(spans: Sequence[Span]) -> Iterator[tuple[int, Phase, list[Span]]]:
    """Every unbroken run of spans of one layer and phase, without the planning before it."""
    run: list[Span] = []
    for span in sorted(spans, key=lambda span: span.start_ns):
        if span.name == "plan":
            continue
        if run and (span.layer, span.phase) != (run[0].layer, run[0].phase):
            yield run[0].layer, run[0].phase, run
            run = []
        run.append(span)
    if run:
        yield run[0].layer, run[0].phase, run


def compare(spans: Sequence[Span], predictions: Sequence[Mapping[str, Any]]) -> list[PassReport]:
    """Every predicted pass against the median of those that ran; passes that never ran are left out."""
    seconds: dict[tuple[int, Phase], list[float]] = {}
    for layer, phase, run in passes(spans):
        seconds.setdefault((layer, phase), []).append((max(s.end_ns for s in run) - run[0].start_ns) * 1e-9)
    reports = []
    for entry in predictions:
        taken = seconds.get((entry["layer"], entry["phase"]))
        if taken is not None:
            median = statistics.median(taken)
            reports.append(PassReport(entry["layer"], entry["phase"], median, entry["makespan"], entry["lower_bound"]))
    return reports


def write_pictures(spans: Sequence[Span], predictions: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """The trace for Perfetto (executed and predicted as two processes) and a picture of each; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    last: dict[tuple[int, Phase], list[Span]] = {(layer, phase): run for layer, phase, run in passes(spans)}
    aligned: list[Span] = []  # with the pass that ran last
    for entry in predictions:
        run = last.get((entry["layer"], entry["phase"]))
        origin = run[0].start_ns if run else 0
        aligned += [
            Span(s.name, s.lane, s.layer, s.chunk, s.phase, s.start_ns + origin, s.end_ns + origin)
            for s in entry["spans"]
        ]
    executed = [span for run in last.values() for span in run]
    origin_ns = min((span.start_ns for span in [*executed, *aligned]), default=0)
    events = [
        event
        for process, name, shown in ((0, "executed", executed), (1, "predicted", aligned))
        for event in chrome_events(shown, process, name, origin_ns)
    ]
    files = [folder / "trace.json"]
    files[0].write_text(json.dumps({"displayTimeUnit": "ms", "traceEvents": events}, indent=1) + "\n")
    for name, shown in (("executed", executed), ("predicted", aligned)):
        if shown:
            files.append(folder / f"{name}.png")
            draw_timeline(shown, files[-1], name)
    return files


def run_command(path: Path, folder: Path) -> int:
    """`planmoe trace`: print every pass's efficiency and write the pictures; returns the exit code."""
    import sys

    try:
        spans, predictions = load_execution(path)
    except ValueError as error:
        print(f"planmoe trace: {error}", file=sys.stderr)
        return 2
    print(f"{'layer':>5} {'pass':<9}{'measured ms':>12}{'predicted':>11}{'bound':>9}{'efficiency':>12}")
    reports = compare(spans, predictions)
    for report in reports:
        times = f"{report.measured * 1e3:12.2f}{report.predicted * 1e3:11.2f}{report.bound * 1e3:9.2f}"
        print(f"{report.layer:>5} {report.phase:<9}{times}{report.efficiency:12.0%}")
    if reports:
        total = sum(report.bound for report in reports) / sum(report.measured for report in reports)
        print(f"efficiency (lower bound / measured): {total:.1%}")
        if any(report.efficiency > 1.005 for report in reports):
            print("above 100 %: tasks took less time than when the scheduler learnt the times that the bound is for")
    else:
        print("nothing was predicted: only the schedulers optimal and auto learn what tasks cost")
    try:
        for file in write_pictures(spans, predictions, folder):
            print(file)
    except OSError as error:
        print(f"planmoe trace: pictures cannot be written to {folder}: {error.strerror}", file=sys.stderr)
        return 2
    return 0
