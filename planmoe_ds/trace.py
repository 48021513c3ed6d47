"""Spans of what ran when, and two ways to look at them: a Chrome/Perfetto trace file and a picture."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Lane = Literal["compute", "wait", "exchange", "intra", "onward", "inter"]
Phase = Literal["forward", "backward"]

LANES: tuple[str, ...] = get_args(Lane)
"""Rows of the picture, from top to bottom; "onward": inside a node, what came from others and is passed on."""

CHUNK_COLOURS = ("#2f6fb3", "#e08a1e", "#3a9a6b", "#b3477d", "#7a62b8", "#58a9d6", "#b8a21c", "#8a5a3c")
"""One colour per chunk; chunk 8 starts over with the first."""
NO_CHUNK_COLOUR = "#8d949c"
WAIT_COLOUR = "#d9534a"
BACKWARD_HATCH = "////"
BAR_HEIGHT = 0.72


@dataclass(frozen=True)
class Span:
    """One piece of work on one lane of one rank: times in nanoseconds of one monotonic clock, chunk -1 for none."""

    name: str
    lane: Lane
    layer: int
    chunk: int
    phase: Phase
    start_ns: int
    end_ns: int


def write_chrome_trace(spans: Iterable[Span], path: str | Path, rank: int = 0) -> None:
    """Write spans as a Chrome/Perfetto JSON trace: a process per rank, a thread per lane, times in µs from 0.

    Raises ValueError for a span on an unknown lane or one that ends before it starts.
    """
    ordered = _checked(spans)
    origin_ns = min((span.start_ns for span in ordered), default=0)
    events = chrome_events(ordered, rank, f"rank {rank}", origin_ns)
    text = json.dumps({"displayTimeUnit": "ms", "traceEvents": events}, indent=1)
    Path(path).write_text(text + "\n", encoding="utf-8")


def chrome_events(spans: Iterable[Span], process: int, name: str, origin_ns: int) -> list[dict[str, object]]:
    """One process's events, times in µs from `origin_ns`; ValueError as for write_chrome_trace."""
    ordered = _checked(spans)
    events: list[dict[str, object]] = [
        {"ph": "M", "name": "process_name", "pid": process, "tid": 0, "args": {"name": name}}
    ]
    for lane in _lanes_of(ordered):
        thread = {"ph": "M", "pid": process, "tid": LANES.index(lane)}
        events.append({**thread, "name": "thread_name", "args": {"name": lane}})
        events.append({**thread, "name": "thread_sort_index", "args": {"sort_index": LANES.index(lane)}})
    events.extend(_complete_event(span, origin_ns, process) for span in ordered)
    return events


def draw_timeline(spans: Iterable[Span], path: str | Path, title: str) -> None:
    """Draw spans as a PNG: a row per lane, a colour per chunk, backward work hatched, milliseconds from 0.

    Raises ValueError for no spans, an unknown lane, or a span that ends before it starts.
    """
    from matplotlib.figure import Figure  # a second to import, and only pictures need it

    ordered = _checked(spans)
    if not ordered:
        raise ValueError("draw_timeline got no spans: record at least one step between start_trace and stop_trace")
    lanes = _lanes_of(ordered)
    figure = Figure(figsize=(13.0, 1.9 + 0.62 * len(lanes)), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    origin_ns = min(span.start_ns for span in ordered)
    _shade_layers(axes, ordered, origin_ns)
    for span in ordered:
        _draw_span(axes, span, lanes.index(span.lane), origin_ns)
    _dress_axes(axes, lanes, ordered, origin_ns, title)
    _add_legend(figure, ordered)
    figure.savefig(path, format="png")


def _checked(spans: Iterable[Span]) -> list[Span]:
    """Return the spans in order of start; ValueError names the first one that cannot be shown."""
    ordered = sorted(spans, key=lambda span: (span.start_ns, span.end_ns))
    for span in ordered:
        if span.lane not in LANES:
            raise ValueError(f"span {span.name!r} is on lane {span.lane!r}: expected one of {', '.join(LANES)}")
        if span.end_ns < span.start_ns:
            raise ValueError(f"span {span.name!r} ends at {span.end_ns} ns, before its start at {span.start_ns} ns")
    return ordered


def _lanes_of(spans: Sequence[Span]) -> list[str]:
    used = {span.lane for span in spans}
    return [lane for lane in LANES if lane in used]


def _complete_event(span: Span, origin_ns: int, rank: int) -> dict[str, object]:
    return {
        "ph": "X",
        "name": span.name,
        "cat": span.phase,
        "pid": rank,
        "tid": LANES.index(span.lane),
        "ts": (span.start_ns - origin_ns) / 1e3,
        "dur": (span.end_ns - span.start_ns) / 1e3,
        "args": {"layer": span.layer, "chunk": span.chunk, "phase": span.phase},
    }


def _colour_of(span: Span) -> str:
    if span.lane == "wait":
        return WAIT_COLOUR
    return NO_CHUNK_COLOUR if span.chunk < 0 else CHUNK_COLOURS[span.chunk % len(CHUNK_COLOURS)]


def _draw_span(axes: Axes, span: Span, row: int, origin_ns: int) -> None:
    start_ms, width_ms = (span.start_ns - origin_ns) / 1e6, (span.end_ns - span.start_ns) / 1e6
    axes.barh(
        row,
        width_ms,
        left=start_ms,
        height=BAR_HEIGHT,
        color=_colour_of(span),
        edgecolor="white",
        linewidth=0.5,
        hatch=BACKWARD_HATCH if span.phase == "backward" else None,
        zorder=3,
    )


def _layer_passes(spans: Sequence[Span]) -> Iterator[tuple[int, str, int, int]]:
    """Yield (layer, phase, start_ns, end_ns) for every unbroken run of spans of one layer and phase."""
    run: list[Span] = []
    for span in spans:
        if run and (span.layer, span.phase) != (run[0].layer, run[0].phase):
            yield run[0].layer, run[0].phase, run[0].start_ns, max(one.end_ns for one in run)
            run = []
        run.append(span)
    if run:
        yield run[0].layer, run[0].phase, run[0].start_ns, max(one.end_ns for one in run)


def _shade_layers(axes: Axes, spans: Sequence[Span], origin_ns: int) -> None:
    total_ns = max(span.end_ns for span in spans) - origin_ns
    for layer, phase, start_ns, end_ns in _layer_passes(spans):
        start_ms, end_ms = (start_ns - origin_ns) / 1e6, (end_ns - origin_ns) / 1e6
        axes.axvspan(start_ms, end_ms, color="#eef3f8" if phase == "forward" else "#f7f0e8", zorder=0)
        if end_ns - start_ns > 0.07 * total_ns:
            middle_ms = (start_ms + end_ms) / 2
            axes.text(
                middle_ms, -0.56, f"layer {layer} {phase}", ha="center", va="bottom", fontsize=8.5, color="#4a5058"
            )


def _dress_axes(axes: Axes, lanes: Sequence[str], spans: Sequence[Span], origin_ns: int, title: str) -> None:
    total_ms = (max(span.end_ns for span in spans) - origin_ns) / 1e6
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=10)
    axes.set_xlim(0.0, total_ms * 1.005 if total_ms > 0 else 1.0)
    axes.set_ylim(len(lanes) - 0.45, -0.95)
    axes.set_yticks(range(len(lanes)), lanes)
    axes.set_xlabel("milliseconds")
    axes.grid(axis="x", color="#d6dbe0", linewidth=0.6, zorder=1)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _add_legend(figure: Figure, spans: Sequence[Span]) -> None:
    from matplotlib.patches import Patch

    handles = []
    for chunk in sorted({span.chunk for span in spans if span.lane != "wait"}):
        colour = NO_CHUNK_COLOUR if chunk < 0 else CHUNK_COLOURS[chunk % len(CHUNK_COLOURS)]
        handles.append(Patch(facecolor=colour, label="whole layer" if chunk < 0 else f"chunk {chunk}"))
    if any(span.lane == "wait" for span in spans):
        handles.append(Patch(facecolor=WAIT_COLOUR, label="waiting"))
    for phase, hatch in (("forward", None), ("backward", BACKWARD_HATCH)):
        if any(span.phase == phase for span in spans):
            handles.append(Patch(facecolor="#c9d0d6", edgecolor="white", hatch=hatch, label=phase))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
