"""Process 1 of an emulated cluster: `python -m benchmarks.cluster.supervisor SPEC PROGRAM [ARGUMENT …]`.

launch.py starts it in fresh network, mount and process namespaces. When it ends, however it ends, the kernel kills
every rank and drops every namespace: nothing is left behind.
"""

from __future__ import annotations

import sys

from benchmarks.cluster.namespaces import SetupError
from benchmarks.cluster.network import build_network
from benchmarks.cluster.ranks import start_ranks, wait_for_ranks
from benchmarks.cluster.spec import SKIP, ClusterSpec


def main(spec_json: str, argv: list[str]) -> int:
    """Build the cluster and run `argv` on it; returns the exit code."""
    spec = ClusterSpec.from_json(spec_json)
    try:
        nodes = build_network(spec)
    except (SetupError, OSError) as error:
        print(f"SKIP: this machine cannot emulate a cluster: {error}", file=sys.stderr)
        return SKIP
    try:
        processes = start_ranks(spec, nodes, argv)
    except OSError as error:
        print(f"cluster: cannot start {argv[0]!r}: {error}", file=sys.stderr)
        return 127
    return wait_for_ranks(spec, processes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
