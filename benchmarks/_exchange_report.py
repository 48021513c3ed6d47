"""Tables and results of the all-to-all benchmark."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks._exchange_cases import KIB

STOCK = "all_to_all_single"
STOCK_BATCH = "… batch"
ROUND_TRIP = " ⇄"  # a layer's rows out and back
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


def print_round_trips(cluster: Cluster) -> None:
    """A layer's rows out and back: medians in milliseconds, and how much faster than stock on the same routing."""
    cases = [case for case in cluster["cases"] if "dedup_bytes" in case]
    if not cases:
        return
    names = [name for name in cases[0]["seconds"] if name.endswith(ROUND_TRIP)]
    print(f"\n{cluster['name']}: a layer's rows out and back, median ms; in brackets times faster than {STOCK}")
    width = max(max(len(name) for name in names) + 1, 17)
    print(f"{'case':<14}" + "".join(f"{name:>{width}}" for name in names) + f"{'dedup bytes/least':>19}{'spread':>8}")
    for case in cases:
        middle = medians(case)
        cells = [f"{middle[name] * 1e3:.1f} ({middle[STOCK + ROUND_TRIP] / middle[name]:.2f})" for name in names]
        noise = max(spread(case["seconds"][name]) for name in names)
        row = "".join(f"{cell:>{width}}" for cell in cells)
        print(f"{case['case']:<14}{row}{case['dedup_bytes']:19.3f}{noise:8.0%}")


def print_table(cluster: Cluster) -> None:
    """Medians in milliseconds; the algorithms over all_to_all_single and the best one over the bound."""
    names = [name for name in cluster["cases"][0]["seconds"] if not name.endswith(ROUND_TRIP)]
    print(f"\n{cluster['name']}: median ms; in brackets over {STOCK}; spread = largest interquartile range / median")
    width = max(max(len(name) for name in names) + 1, 16)
    print(f"{'case':<14}" + "".join(f"{name:>{width}}" for name in names) + f"{'pipe/bound':>12}{'spread':>8}")
    for case in cluster["cases"]:
        middle = medians(case)
        cells = [f"{middle[name] * 1e3:.2f} ({middle[name] / middle[STOCK]:.2f})" for name in names]
        noise = max(spread(case["seconds"][name]) for name in names)
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
    for nodes in (2, 4):
        speedups = [
            medians(case)[STOCK + ROUND_TRIP] / medians(case)["dedup" + ROUND_TRIP]
            for cluster in clusters
            if cluster["name"].startswith(f"{nodes}x")
            for case in cluster["cases"]
            if case["case"] == "uniform k=8"
        ]
        if speedups:
            found[f"dedup_speedup_{nodes}nodes_k8"] = min(speedups)
    for key, name, factor in (
        ("dedup_bytes", "dedup_inter_bytes_over_minimum", 1.0),
        ("dedup_memory", "dedup_extra_memory_over_received", 1.0),
        ("issue_seconds_per_message", "issue_us_per_message", 1e6),
    ):
        values = [case[key] * factor for cluster in clusters for case in cluster["cases"] if key in case]
        if values:
            found[name] = max(values)
    return found


def _pipe(case: dict[str, Any]) -> float:
    return medians(case)["pipe"]


def _overlap_gain(case: dict[str, Any]) -> float:
    """(not overlapped / pipe) over what the two links' times allow."""
    middle = medians(case)
    possible = (middle[ONLY_INTRA] + middle[ONLY_INTER]) / bound(case)
    return middle[SERIAL] / middle["pipe"] / possible
