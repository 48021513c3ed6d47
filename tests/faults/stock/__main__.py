"""Run the faults of tests/faults with stock DeepSpeed and stock Megatron, and with planmoe on.

Every fault runs on four ranks over gloo, in processes of their own, the cut and the slow link on an emulated cluster;
printed is what the ranks ended with and after how many seconds. A rank that has not ended after --seconds counts as
hanging. docs/reliability.md has a run.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator

from benchmarks.cluster import ClusterSpec, run_on_cluster
from tests.faults.stock import saves, steps
from tests.faults.stock.layers import FRAMEWORKS
from tests.harness.ranks import RankPool, RankTimeout

RANKS = 4
LINKS = {"a link cut": ("cut",), "a link at 1 % of its rate": ("slow", "1mbit"), "no change of a link": ("none",)}
FAULTS = (*steps.FAULTS, *saves.SAVES, *LINKS)


def watch(function: Callable[..., steps.Found], *arguments: object, seconds: float) -> dict[int, steps.Found]:
    """What every rank ended with; those that hang are there with the seconds."""
    pool = RankPool(preload=False)
    found: dict[int, steps.Found] = {}
    try:
        outcomes = pool.run(RANKS, function, *arguments, expect_failure=True, bare=True, timeout=seconds)
    except RankTimeout as error:
        outcomes = error.outcomes
        found = {rank: steps.Found("hangs", seconds) for rank in error.stuck}
    finally:
        pool.close()
    for outcome in outcomes:
        failed = steps.Found(f"{outcome.error}: {outcome.message}", outcome.seconds)
        found[outcome.rank] = failed if outcome.failed else outcome.result
    return found


def lines(found: dict[int, steps.Found], usual: dict[int, steps.Found]) -> Iterator[str]:
    """A line per rank; `usual`: without the fault."""
    for rank, it in sorted(found.items()):
        notes = [f"{it.spoiled_rows} rows of 32 not finite"] if it.spoiled_rows else []
        if it.sums and usual and it.sums != usual[rank].sums:
            notes.append("results differ from those without the fault")
        yield f"  rank {rank}: {it.seconds:.1f} s: {', '.join([it.what, *notes])}"


def on_cluster(framework: str, words: tuple[str, ...], seconds: float) -> Iterator[str]:
    """The ranks that ended say so."""
    spec = ClusterSpec.even(2, 2, "100mbit", "1gbit")
    done = run_on_cluster(spec, [sys.executable, "-m", "tests.faults.stock.link", framework, *words], seconds + 20)
    told = sorted(line.removeprefix("found ") for line in done.stderr.splitlines() if line.startswith("found "))
    yield from (f"  {line}" for line in told)
    if len(told) < RANKS:
        yield f"  {RANKS - len(told)} ranks hang after {seconds:g} s" if not done.skip_reason else done.skip_reason


@functools.cache
def without_fault(framework: str, planmoe: bool, capacity: bool) -> dict[int, steps.Found]:
    """To compare results with."""
    name = "nothing, with a capacity" if capacity else "nothing"
    return watch(steps.on_rank, framework, name, planmoe, seconds=120)


def show(framework: str, fault: str, seconds: float) -> None:
    """One fault, stock and, where planmoe has a part in it, with planmoe."""
    if fault in LINKS:
        report(f"{framework}, {fault}", on_cluster(framework, LINKS[fault], seconds))
        return
    if fault in saves.SAVES:
        with tempfile.TemporaryDirectory() as folder:
            found = watch(saves.save_twice, framework, fault, folder, seconds=seconds)
            report(f"{framework}, {fault}", lines(found, {}))
            report("  then", lines(watch(saves.load, framework, fault, folder, seconds=seconds), {}))
        return
    for planmoe in (False, True):
        it = steps.FAULTS[fault]
        usual = {} if it.on_all_ranks else without_fault(framework, planmoe, it.capacity)
        found = watch(steps.on_rank, framework, fault, planmoe, seconds=seconds)
        report(f"{framework}{' with planmoe' if planmoe else ''}, {fault}", lines(found, usual))


def report(title: str, rows: Iterator[str]) -> None:
    """Print it while the rest runs."""
    print("\n".join([f"{title}:", *rows]), flush=True)


def main() -> None:
    """Print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="after which a rank counts as hanging (60)")
    parser.add_argument("--frameworks", nargs="+", choices=FRAMEWORKS, default=list(FRAMEWORKS))
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS), metavar="FAULT")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for framework in arguments.frameworks:
        for fault in arguments.faults:
            show(framework, fault, arguments.seconds)


if __name__ == "__main__":
    main()
