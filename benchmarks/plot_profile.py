"""Draws what a card did in one step, stream by stream, from a trace of benchmarks/train_nccl.py.

python -m benchmarks.plot_profile TRACE.json PICTURE.png [--milliseconds FIRST LAST]
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

KINDS = {
    "exchange (NCCL)": ("nccl",),
    "matrix product": ("gemm", "cutlass", "cublas", "nvjet", "sm90_xmma"),
    "planmoe's rows and codecs": ("planmoe",),
    "attention": ("flash", "fmha"),
}
OTHER = "other"
COLOURS = ["tab:blue", "tab:red", "tab:green", "tab:orange", "lightgray"]
LEAST_SHARE = 0.002  # of the step, that a stream must be busy to be drawn


def kind_of(kernel: str) -> str:
    """Which of KINDS a kernel's name tells."""
    name = kernel.lower()
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), OTHER)


def read_kernels(path: Path) -> dict[int, list[tuple[float, float, str]]]:
    """Of every stream: start and duration in milliseconds, and kind, by start."""
    events = json.loads(path.read_text())["traceEvents"]
    kernels = [event for event in events if event.get("cat") == "kernel"]
    begin = min(event["ts"] for event in kernels)
    streams: dict[int, list[tuple[float, float, str]]] = defaultdict(list)
    for event in sorted(kernels, key=lambda event: event["ts"]):
        place = (event["ts"] - begin) / 1e3, event["dur"] / 1e3, kind_of(event["name"])
        streams[event["args"]["stream"]].append(place)
    return streams


def draw(streams: dict[int, list[tuple[float, float, str]]], path: Path, window: list[float] | None) -> None:
    """One lane per busy stream, the busiest computing first."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    end = max(start + time for spans in streams.values() for start, time, _ in spans)
    first, last = window or [0.0, end]
    busy = {stream: sum(time for _, time, _ in spans) for stream, spans in streams.items()}
    shown = [stream for stream in sorted(busy, key=lambda stream: (len(streams[stream]) < 200, -busy[stream]))
             if busy[stream] > LEAST_SHARE * end]  # fmt: skip
    figure, axes = pyplot.subplots(figsize=(14, 0.7 * len(shown) + 1.4))
    colours = dict(zip([*KINDS, OTHER], COLOURS, strict=True))
    labels: dict[str, Any] = {}
    for lane, stream in enumerate(shown):
        for kind, colour in colours.items():
            spans = [(start, time) for start, time, found in streams[stream] if found == kind]
            if spans:
                labels[kind] = axes.broken_barh(spans, (lane - 0.4, 0.8), facecolors=colour, linewidth=0)
    axes.set_yticks(range(len(shown)), [f"stream {stream}" for stream in shown])
    axes.invert_yaxis()
    axes.set_xlim(first, last)
    axes.set_xlabel("milliseconds")
    axes.legend(labels.values(), labels.keys(), loc="upper center", bbox_to_anchor=(0.5, 1.25), ncols=5, frameon=False)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main() -> None:
    """Read, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--milliseconds", type=float, nargs=2, help="first and last to show")
    options = parser.parse_args()
    draw(read_kernels(options.trace), options.picture, options.milliseconds)


if __name__ == "__main__":
    main()
