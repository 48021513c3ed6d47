"""Runs a program on an emulated cluster, once per rank.

    python -m benchmarks.cluster run --nodes 2 --ranks-per-node 2 --inter 400mbit --intra 2gbit -- python script.py

Every rank finds torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK, …) and GLOO_SOCKET_IFNAME; rank 0's output is
shown. Exit code: 0, that of the first rank that failed, 124 when out of time, 77 (with the reason) when this machine
cannot emulate a cluster. `check` only says whether it can.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks.cluster import ClusterSpec, run_on_cluster


def _rate(text: str) -> str | None:
    return None if text == "none" else text


def parse_arguments(words: list[str]) -> tuple[ClusterSpec, list[str], float]:
    """What to build, what to run on it and for how long; exits with an explanation when the line is wrong."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.cluster", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["run", "check"])
    parser.add_argument("--nodes", type=int, help="default: 2, or as many as --ranks-per-node lists")
    parser.add_argument("--ranks-per-node", default="2", help="one number, or one per node: 4,2,2 (default: 2)")
    parser.add_argument("--inter", type=_rate, default="400mbit", help="rate of a node's card, or none (400mbit)")
    parser.add_argument("--intra", type=_rate, default="2gbit", help="rate inside a node, or none (2gbit)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for the whole run (default: 600)")
    end = words.index("--") if "--" in words else len(words)
    arguments, program = parser.parse_args(words[:end]), words[end + 1 :]
    if arguments.action == "run" and not program:
        parser.error("nothing to run: end the line with `-- program argument …`")
    try:
        counts = [int(count) for count in arguments.ranks_per_node.split(",")]
        counts = counts * (arguments.nodes or 2) if len(counts) == 1 else counts
        if arguments.nodes not in (None, len(counts)):
            parser.error(f"--nodes is {arguments.nodes}, --ranks-per-node lists {len(counts)}")
        spec = ClusterSpec(ranks_per_node=tuple(counts), inter=arguments.inter, intra=arguments.intra)
    except ValueError as error:
        parser.error(str(error))
    return spec, program if arguments.action == "run" else ["true"], arguments.timeout


def main() -> int:
    """Run, and return the exit code."""
    spec, program, timeout = parse_arguments(sys.argv[1:])
    return run_on_cluster(spec, program, timeout, capture=False).returncode


if __name__ == "__main__":
    sys.exit(main())
