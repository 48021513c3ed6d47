"""What the guard costs: headers and counts checked, waits watched, and the watchdog's own threads.

    python benchmarks/guard.py [--quick] [--json FILE]

Trains the GPT-MoE example on --ranks ranks of this machine. Every second step runs without the checks and without the
watchdog's bookkeeping (headers still travel: they are `header bytes` of a step). A difference of 1 % is smaller than
what steps scatter by on a busy machine, so the cost is also added up from its parts, on rank 0: each part is called
again, many times, with what a step gave it, and the threads' processor time is read from the system.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._example import join_ranks, make_engine, run_as_ranks, take_step

WARM_UP, REPEATS = 4, 200
PARTS = ("_opening", "_check_opening", "_check_counts")
THREADS = ("planmoe-watchdog", "planmoe-clock")


class Calls:
    """How often guarded functions were called, and what they were given last."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.last: dict[str, Callable[[], Any]] = {}

    def note(self, name: str, again: Callable[[], Any]) -> None:
        """One call."""
        self.counts[name] = self.counts.get(name, 0) + 1
        self.last[name] = again


@contextlib.contextmanager
def watched(calls: Calls) -> Iterator[None]:
    """Count what the guard does."""
    from planmoe_ds.counts import Talk
    from planmoe_ds.group import ExpertGroup
    from planmoe_ds.layer import ExpertParallelLayer

    with contextlib.ExitStack() as stack:

        def follow(owner: Any, name: str, empty: bool = False) -> None:
            function = getattr(owner, name)

            def call(*arguments: Any) -> Any:
                def again() -> None:
                    with function(*arguments):
                        pass

                calls.note(name, again if empty else lambda: function(*arguments))
                return function(*arguments)

            stack.enter_context(patch.object(owner, name, call))

        for name in PARTS:
            follow(Talk, name)
        for name in ("waiting", "working"):
            follow(ExpertGroup, name, empty=True)
        follow(ExpertParallelLayer, "_header")
        yield


@contextlib.contextmanager
def unguarded() -> Iterator[None]:
    """Nothing is checked and no wait is told to the watchdog."""
    from planmoe_ds.counts import Talk
    from planmoe_ds.group import ExpertGroup

    def notes(talk: Any, received: Any, opening: Any) -> tuple[int, ...]:
        first = opening.shape[1] - len(talk.notes)
        return tuple(received[:, first : opening.shape[1]].max(0).tolist())

    def working(group: Any, _what: str, phase: int) -> Any:
        group.comm.set_phase(phase)
        return contextlib.nullcontext()

    with (
        patch.object(Talk, "_check_opening", notes),
        patch.object(Talk, "_check_counts", lambda *_: None),
        patch.object(ExpertGroup, "waiting", lambda *_: contextlib.nullcontext()),
        patch.object(ExpertGroup, "working", working),
    ):
        yield


def seconds_of(part: Callable[[], Any]) -> float:
    """The median time of one call."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        part()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def thread_seconds() -> float:
    """Processor time of the watchdog's threads so far."""
    return sum(
        time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
        for thread in threading.enumerate()
        if thread.name in THREADS and thread.ident is not None
    )


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds and shares on this rank."""
    import torch
    import torch.distributed as dist

    engine = make_engine(arguments, 1, {"chunks": 2})
    torch.manual_seed(dist.get_rank())
    shape = (arguments.batch_size, arguments.sequence_length)
    calls = Calls()
    times: dict[bool, list[float]] = {True: [], False: []}
    began, ran_before = time.perf_counter(), thread_seconds()
    for step in range(WARM_UP + arguments.steps):
        guarded = step % 2 == 0
        inputs = torch.randint(0, 256, shape)
        how = watched(calls) if step == 0 else contextlib.nullcontext() if guarded else unguarded()
        dist.barrier()
        start = time.perf_counter()
        with how:
            take_step(engine, inputs, inputs)
        dist.barrier()
        if step >= WARM_UP:
            times[guarded].append(time.perf_counter() - start)
        engine.planmoe.recorder.take()
    thread_share = (thread_seconds() - ran_before) / (time.perf_counter() - began)
    step_seconds = statistics.median(times[True])
    parts = {name: calls.counts[name] * seconds_of(again) for name, again in calls.last.items()}
    layers = calls.counts["_opening"]
    result = {
        "step": step_seconds,
        "step without": statistics.median(times[False]),
        "interquartile range": _spread(times[True]),
        **{f"part {name}": seconds for name, seconds in parts.items()},
        "threads": thread_share,
        "overhead": sum(parts.values()) / step_seconds + thread_share,
        "header bytes": layers * calls.last["_opening"]().nbytes,
    }
    dist.barrier()
    return result


def _spread(values: list[float]) -> float:
    quarters = statistics.quantiles(values, n=4)
    return quarters[2] - quarters[0]


def main() -> None:
    """Print the parts and the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (
        ("ranks", 4), ("steps", 60), ("layers", 4), ("hidden-size", 96), ("experts", 8), ("top-k", 2),
        ("sequence-length", 96), ("batch-size", 8),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default: {value}")
    parser.add_argument("--quick", action="store_true", help="16 steps")
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps = 16
    run_as_ranks(arguments.ranks)
    join_ranks()
    import torch.distributed as dist

    result = measure(arguments)
    if dist.get_rank() == 0:
        report(result, arguments.json)
    dist.destroy_process_group()


def report(result: dict[str, float], path: Path | None) -> None:
    """As text, and as JSON where asked for."""
    step = result["step"]
    print(f"a step: {step * 1e3:.1f} ms (interquartile range {result['interquartile range'] * 1e3:.1f} ms), without "
          f"the guard {result['step without'] * 1e3:.1f} ms; medians of alternating steps")  # fmt: skip
    for name, seconds in result.items():
        if name.startswith("part "):
            print(f"  {name.removeprefix('part ').lstrip('_'):<16}{seconds * 1e6:8.0f} µs a step  {seconds / step:.3%}")
    print(f"  {'threads':<16}{'':<20}{result['threads']:.3%} of one processor")
    print(f"  header bytes    {result['header bytes']:8.0f} a step")
    print(f"RESULT guard_interleaved={step / result['step without'] - 1:.4f}")
    print(f"RESULT guard_overhead={result['overhead']:.4f}")
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
