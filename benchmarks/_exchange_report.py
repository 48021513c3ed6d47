"""Tables and results of the all-to-all benchmark."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks._exchange_cases import KIB

STOCK = "all_to_all_single"
STOCK_BATCH = "… batch"
SERIAL = "not overlapped"
ONLY_INTRA, ONLY_INTER = "only intra", "only inter"
LEAST_LARGE_PAIR = KIB**2

Cluster = dict[str, Any]  # "name" and "cases", the latter as the ranks measured them


def medians(case: dict[str, Any]) -> dict[str, float]:
    """Median seconds of every variant."""
    return {name: statistics.median(seconds) for name, seconds in case["seconds"].items()}


def spread(seconds: list[float]) -> float:
    """Interquartile range over median."""
    if len(seconds) < 2:
        return 0.0
    quartiles = statistics.quantiles(seconds, n=4)
    return (quartiles[2] - quartiles[0]) / statistics.median(seconds)


def bound(case: dict[str, Any]) -> float:
    """Seconds that the slower class of links needs alone."""
    middle = medians(case)
    return max(middle[ONLY_INTRA], middle[ONLY_INTER])


def print_table(cluster: Cluster) -> None:
    """Medians in milliseconds; the algorithms over all_to_all_single and the best one over the bound."""
    names = list(cluster["cases"][0]["seconds"])
    print(f"\n{cluster['name']}: median ms; in brackets over {STOCK}; spread = largest interquartile range / median")
    width = max(max(len(name) for name in names) + 1, 16)
    print(f"{'case':<14}" + "".join(f"{name:>{width}}" for name in names) + f"{'pipe/bound':>12}{'spread':>8}")
    for case in cluster["cases"]:
        middle = medians(case)
        cells = [f"{value * 1e3:.2f} ({value / middle[STOCK]:.2f})" for value in middle.values()]
        noise = max(spread(seconds) for seconds in case["seconds"].values())
        row = "".join(f"{cell:>{width}}" for cell in cells)
        print(f"{case['case']:<14}{row}{middle['pipe'] / bound(case):12.3f}{noise:8.0%}")


def results(clusters: list[Cluster]) -> dict[str, float]:
    """The worst case of each claim, over all clusters."""
    even = [case for cluster in clusters for case in cluster["cases"] if case["pair_bytes"] is not None]
    large = [case for case in even if case["pair_bytes"] >= LEAST_LARGE_PAIR]
    found = {"pipe_vs_all_to_all_single": max(_pipe(case) / medians(case)[STOCK] for case in even)}
    if large:
        found["pipe_over_bound"] = max(_pipe(case) / bound(case) for case in large)
        found["overlap_gain_over_possible"] = min(_overlap_gain(case) for case in large)
    return found


def _pipe(case: dict[str, Any]) -> float:
    return medians(case)["pipe"]


def _overlap_gain(case: dict[str, Any]) -> float:
    """(not overlapped / pipe) over what the two links' times allow."""
    middle = medians(case)
    possible = (middle[ONLY_INTRA] + middle[ONLY_INTER]) / bound(case)
    return middle[SERIAL] / middle["pipe"] / possible
