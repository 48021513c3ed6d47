"""Ranks over NCCL for benchmarks: on one host, or as emulated hosts with TCP sockets between them.

Ranks share the GPUs where there are fewer: NCCL must then be 2.30 or newer, with NCCL_MULTI_RANK_GPU_ENABLE=1. They run
side by side under CUDA's Multi-Process Service, started for them where it is installed, unless they are to take
turns: an exchange that waits for its peer then keeps the card from that peer. CUDA_DEVICE_MAX_CONNECTIONS is 32 unless
set: with few, as with 2, MPS's own default, exchanges over the two links queue behind each other. Ranks that share a
card share 64: four with 32 each did not start.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
_PIPES, _DEFAULT_PIPES = "CUDA_MPS_PIPE_DIRECTORY", Path("/tmp/nvidia-mps")  # noqa: S108 - the service's own
_GLOO_ADDRESS, _GLOO_LABEL = "127.1.0.1/32", "lo:gloo"
_REMOVE_QUEUES = "tc qdisc del dev lo root"
_RECEIVERS = Path("/sys/class/net/lo/queues/rx-0/rps_cpus")  # the mask of CPUs among which the kernel deals connections


def add_cluster(parser: argparse.ArgumentParser) -> None:
    """The options that say how many ranks there are, and what lies between them."""
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--hosts", type=int, default=1, help="emulated hosts; TCP sockets between them")
    parser.add_argument("--gbit", type=float, help="limit what a host sends to the others, per second (root, tc)")
    parser.add_argument("--fair", action="store_true", help="gloo's messages do not queue behind NCCL's on that link")
    parser.add_argument("--take-turns", action="store_true", help="ranks that share a card do not run side by side")


def launch(options: argparse.Namespace, *arguments: str) -> int:
    """Run this program again as the ranks of `add_cluster`'s options, with more arguments; the exit code.

    SIGTERM ends the program from here on as an exception does: the limit of a link must not outlive it.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    ranks_per_card = -(-options.ranks // max(1, torch.cuda.device_count()))
    connections = {"CUDA_DEVICE_MAX_CONNECTIONS": str(min(32, max(8, 64 // ranks_per_card)))}
    environment = {**connections, **os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.ranks}"]
    command = [sys.executable, *launcher, *sys.argv, *arguments]
    link = limited_link(options.hosts, options.gbit, fair=options.fair)
    service = side_by_side(1 if options.take_turns else ranks_per_card)
    with tempfile.TemporaryDirectory() as folder, service as its_variables, link as its_address:
        environment["XDG_CACHE_HOME"] = folder  # what links cost elsewhere is nothing to emulated hosts
        ranks = subprocess.Popen(command, env={**environment, **its_variables, **its_address})
        try:
            return ranks.wait()
        except BaseException:
            ranks.terminate()
            raise


@contextmanager
def side_by_side(ranks_per_card: int) -> Iterator[dict[str, str]]:
    """Inside, a Multi-Process Service for ranks that share cards; the variables by which they find it.

    One of their own, or the one that runs. None where no card is shared, where the environment names one already, and
    where the service is not installed or does not start: the ranks then take turns.
    """
    control = shutil.which("nvidia-cuda-mps-control")
    if control is None or ranks_per_card == 1 or _PIPES in os.environ:
        yield {}
        return
    if (_DEFAULT_PIPES / "control").exists():
        yield {_PIPES: str(_DEFAULT_PIPES)}
        return
    with tempfile.TemporaryDirectory(prefix="mps-", ignore_cleanup_errors=True) as folder:
        service = {_PIPES: folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        environment = {**os.environ, **service}
        if subprocess.run([control, "-d"], env=environment, check=False).returncode != 0:
            yield {}
            return
        try:
            yield service
        finally:
            try:
                subprocess.run([control], input=b"quit\n", env=environment, check=False, timeout=30)
            except subprocess.TimeoutExpired:
                print("the Multi-Process Service did not end in 30 s: end nvidia-cuda-mps-control", file=sys.stderr)


@contextmanager
def limited_link(hosts: int, gbit: float | None, *, fair: bool = False) -> Iterator[dict[str, str]]:
    """Inside, each emulated host sends at most so many gigabits a second to the others; as root, with tc.

    The ranks' traffic between hosts goes through the loopback device, and nothing else of size does. It waits in one
    queue. `fair`: what hosts tell each other over gloo has a queue of its own that goes first, at an address of its
    own: nearly as where queues are fair to connections (fq_codel) or another network carries it. Every connection is
    received on one CPU (see `_received_in_order`). Yields the variables by which ranks find that address.
    """
    if gbit is None:
        yield {}
        return
    tools = ["tc", "ip"] if fair else ["tc"]
    if os.geteuid() != 0 or not all(map(shutil.which, tools)):
        sys.exit(f"--gbit limits the loopback device: that takes root and iproute2's {' and '.join(tools)}")
    rate = f"{hosts * gbit:g}gbit"
    root = "tc qdisc add dev lo root"
    steps = [(f"{root} tbf rate {rate} burst 1mb limit 64mb", _REMOVE_QUEUES)]
    if fair:
        limits = f"ceil {rate} burst 1mb cburst 1mb quantum 60000"
        steps = [
            (f"{root} handle 1: htb default 3", _REMOVE_QUEUES),
            (f"tc class add dev lo parent 1: classid 1:1 htb rate {rate} {limits}", ""),
            (f"tc class add dev lo parent 1:1 classid 1:2 htb rate {rate} prio 0 {limits}", ""),
            (f"tc class add dev lo parent 1:1 classid 1:3 htb rate 1mbit prio 1 {limits}", ""),
            ("tc qdisc add dev lo parent 1:3 bfifo limit 64mb", ""),
            (f"tc filter add dev lo parent 1: protocol ip u32 match ip dst {_GLOO_ADDRESS} flowid 1:2", ""),
            (f"ip address add {_GLOO_ADDRESS} dev lo label {_GLOO_LABEL}", f"ip address del {_GLOO_ADDRESS} dev lo"),
        ]
    with _received_in_order(), ExitStack() as undo:
        for command, opposite in steps:
            if subprocess.run(command.split(), check=False).returncode != 0:
                sys.exit(f"--gbit{' --fair' * fair}: the kernel did not take `{command}`")
            if opposite:
                undo.callback(subprocess.run, opposite.split(), check=False)
        yield {"GLOO_SOCKET_IFNAME": _GLOO_LABEL} if fair else {}


@contextmanager
def _received_in_order() -> Iterator[None]:
    """Inside, each connection over the loopback device is received on one CPU.

    Packets that come out of a queue are otherwise received on the CPU that happened to serve it, and overtake each
    other on the way. A connection whose first packets do so may be reset: NCCL's ncclRemoteError.
    """
    digits = f"{(1 << (os.cpu_count() or 1)) - 1:x}"
    digits = digits.zfill(-(-len(digits) // 8) * 8)
    before = None
    try:
        old = _RECEIVERS.read_text()
        _RECEIVERS.write_text(",".join(digits[at : at + 8] for at in range(0, len(digits), 8)))
        before = old
    except OSError as error:
        print(f"--gbit: packets may overtake each other, and connections be reset: {error}", file=sys.stderr)
    try:
        yield
    finally:
        if before is not None:
            _RECEIVERS.write_text(before)


def start(hosts: int) -> torch.device:
    """Join the group; NCCL takes the ranks for processes of `hosts` hosts. This rank's device."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if size % hosts:
        sys.exit(f"{size} ranks cannot be divided among {hosts} hosts")
    if hosts > 1:
        os.environ["NCCL_HOSTID"] = f"host{rank // (size // hosts)}"
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "=lo")  # no name that begins so
    number = rank % torch.cuda.device_count()
    os.environ["LOCAL_RANK"] = str(number)  # DeepSpeed takes it for the device
    torch.cuda.set_device(number)
    dist.init_process_group("nccl", timeout=timedelta(minutes=3))
    return torch.device("cuda", number)


def drop_groups() -> None:
    """Destroy all process groups but the world's, each of which holds memory of the card; collective.

    A rank that is ahead must not close connections over which others still receive, nor make new ones before they are
    closed everywhere.
    """
    torch.cuda.synchronize()
    dist.barrier()
    gc.collect()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    dist.barrier()


def forget_deepspeed_groups() -> None:
    """Those of the last variant: each holds memory of the card."""
    from deepspeed.utils import groups

    drop_groups()
    groups._EXPERT_PARALLEL_GROUP.clear()
    groups._EXPERT_DATA_PARALLEL_GROUP.clear()
    groups._WORLD_GROUP = None


def describe_ranks(options: argparse.Namespace) -> str:
    """Ranks, hosts, cards, NCCL, and the limit of the link."""
    cards = min(torch.cuda.device_count(), dist.get_world_size())
    version = ".".join(map(str, torch.cuda.nccl.version()))
    sharing = "" if cards == dist.get_world_size() else ", side by side" if _PIPES in os.environ else ", taking turns"
    name = f"{cards} x {torch.cuda.get_device_name()}{sharing}"
    link = "" if options.gbit is None else f", {options.gbit:g} Gbit/s out of each host{', fair' * options.fair}"
    return f"{dist.get_world_size()} ranks as {options.hosts} hosts on {name}, NCCL {version}{link}"


def median_ms(call: Callable[[], object], rounds: int, warm_up: int = 2) -> float:
    """Milliseconds of the slowest rank, each round begun together."""
    times = []
    for round_number in range(warm_up + rounds):
        dist.barrier()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        slowest = torch.tensor(begin.elapsed_time(end), device="cuda")
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        if round_number >= warm_up:
            times.append(float(slowest))
    return statistics.median(times)


def median_host_ms(call: Callable[[], object], rounds: int) -> float:
    """Milliseconds that this rank's host takes to start the work, from an idle device on, each round begun together."""
    times = []
    for _ in range(rounds):
        dist.barrier()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    torch.cuda.synchronize()
    return statistics.median(times) * 1e3
