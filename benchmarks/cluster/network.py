"""The emulated network: a bridge as the switch, one virtual cable per node, rates by token bucket filters.

Node n has the address 10.77.0.(n+1) on eth0. Ranks of one node reach each other over that node's lo, which has the
intra-node rate. eth0 sends at the inter-node rate; the switch's port towards the node does too, so that it receives at
that rate.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.cluster.namespaces import Namespace, command
from benchmarks.cluster.spec import ClusterSpec, bits_per_second

_MTU = 9000  # also for lo: its usual 65536 is more than a token bucket holds, and what does not fit never passes
_LARGEST_SEGMENT = 32768  # bytes the kernel hands a device at once; smaller buckets could not pass it
_QUEUE_BYTES = 32 << 20
_BUCKET_SECONDS = 1e-3  # a busy machine serves a bucket late; what it holds makes up for that


def address(node: int) -> str:
    """The address of a node on the emulated network."""
    return f"10.77.0.{node + 1}"


def hostname(node: int) -> str:
    """The name of a node; it resolves inside the cluster."""
    return f"node{node}"


def build_network(spec: ClusterSpec) -> list[Namespace]:
    """Turn the namespace of this process into the switch and return the nodes, connected and rated."""
    command("ip", "link", "add", "switch", "mtu", _MTU, "type", "bridge")
    command("ip", "link", "set", "switch", "up")
    _name_nodes(len(spec.ranks_per_node))
    return [_add_node(node, spec) for node in range(len(spec.ranks_per_node))]


def _name_nodes(num_nodes: int) -> None:
    """Lay a hosts file over the machine's, seen by this process and its children only (a mount namespace of theirs)."""
    names = "".join(f"{address(node)} {hostname(node)}\n" for node in range(num_nodes))
    with tempfile.NamedTemporaryFile("w", prefix="hosts-") as file:
        file.write(f"127.0.0.1 localhost\n{names}")
        file.flush()
        Path(file.name).chmod(0o644)
        command("mount", "--bind", file.name, "/etc/hosts")


def _add_node(node: int, spec: ClusterSpec) -> Namespace:
    port = f"port{node}"
    namespace = Namespace.create(hostname(node))
    cable = ("mtu", _MTU, "type", "veth", "peer", "name", "eth0", "mtu", _MTU, "netns", namespace.path)
    command("ip", "link", "add", port, *cable)
    command("ip", "link", "set", port, "master", "switch", "up")
    _rate(port, spec.inter)
    with namespace.entered():
        Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("1")  # one address per node
        command("ip", "addr", "add", f"{address(node)}/24", "dev", "eth0")
        for device, rate in (("lo", spec.intra), ("eth0", spec.inter)):
            command("ip", "link", "set", device, "mtu", _MTU, "gso_max_size", _LARGEST_SEGMENT, "up")
            _rate(device, rate)
    return namespace


def _rate(device: str, rate: str | None) -> None:
    if rate is None:
        return
    bucket = max(_LARGEST_SEGMENT + _MTU, round(bits_per_second(rate) / 8 * _BUCKET_SECONDS))
    settings = ("rate", rate, "burst", bucket, "limit", _QUEUE_BYTES)
    command("tc", "qdisc", "replace", "dev", device, "root", "tbf", *settings)
