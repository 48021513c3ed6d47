"""A cluster on one machine: nodes as network namespaces, links with a rate; `python -m benchmarks.cluster run --help`.

Example:
    >>> from benchmarks.cluster import ClusterSpec, run_on_cluster
    >>> spec = ClusterSpec(ranks_per_node=(2, 2), inter="400mbit", intra="2gbit")
    >>> run = run_on_cluster(spec, [sys.executable, "script.py"], timeout=60)
    >>> run.returncode, run.stdout, run.skip_reason
"""

from benchmarks.cluster.launch import ClusterRun, run_on_cluster
from benchmarks.cluster.spec import SKIP, TIMED_OUT, ClusterSpec

__all__ = ["SKIP", "TIMED_OUT", "ClusterRun", "ClusterSpec", "run_on_cluster"]
