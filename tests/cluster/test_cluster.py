"""What ranks of the emulated cluster see, how failures show, and that nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.cluster import SKIP, TIMED_OUT, ClusterRun, ClusterSpec, run_on_cluster

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

ROOT = Path(__file__).resolve().parents[2]
TWO_BY_TWO = ClusterSpec.even(2, 2, "1gbit", "1gbit")
NOBODY = 65534


def run(spec: ClusterSpec, *argv: str, timeout: float = 30, **options: dict[str, str]) -> ClusterRun:
    done = run_on_cluster(spec, argv, timeout, **options)
    if done.skip_reason is not None:
        pytest.skip(done.skip_reason)
    return done


def command_line(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.cluster", *arguments]


def processes_with(word: str) -> list[int]:
    """Processes of any namespace whose command line has `word`."""
    return [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/cmdline") if word in words_of(path)]


def words_of(command_line: Path) -> list[str]:
    try:
        return command_line.read_text().split("\0")
    except OSError:  # it ended meanwhile
        return []


def wait_until_gone(word: str) -> None:
    deadline = time.monotonic() + 10
    while processes_with(word):
        assert time.monotonic() < deadline, f"still running: {processes_with(word)}"
        time.sleep(0.05)


def test_what_a_rank_finds() -> None:
    """Uneven nodes; every rank reports on stderr."""
    report = 'echo "$RANK/$WORLD_SIZE $LOCAL_RANK/$LOCAL_WORLD_SIZE $GROUP_RANK $(hostname) $MASTER_ADDR:$MASTER_PORT'
    done = run(ClusterSpec(ranks_per_node=(2, 1)), "sh", "-c", f'{report} $GLOO_SOCKET_IFNAME $COLOUR" >&2',
               environment={"COLOUR": "blue"})  # fmt: skip
    assert sorted(done.stderr.splitlines()) == [
        "0/3 0/2 0 node0 10.77.0.1:29500 eth0 blue",
        "1/3 1/2 0 node0 10.77.0.1:29500 eth0 blue",
        "2/3 0/1 1 node1 10.77.0.1:29500 eth0 blue",
    ]


def test_standard_output_is_rank_zero_s() -> None:
    assert run(TWO_BY_TWO, "sh", "-c", 'echo "rank $RANK"').stdout == "rank 0\n"


def test_torch_runs_on_it() -> None:
    program = (
        "import torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "total = torch.ones(1); dist.all_reduce(total); print(int(total)); dist.destroy_process_group()"
    )
    assert run(TWO_BY_TWO, sys.executable, "-c", program, timeout=90).stdout == "4\n"


def test_a_failing_rank_ends_the_run_and_is_named() -> None:
    start = time.monotonic()
    done = run(TWO_BY_TWO, "sh", "-c", "test $RANK = 2 && exit 5; exec sleep 60")
    assert done.returncode == 5
    assert "rank 2 on node 1 ended with exit code 5" in done.stderr
    assert time.monotonic() - start < 20


def test_a_killed_rank_ends_the_run_and_is_named() -> None:
    done = run(TWO_BY_TWO, "sh", "-c", "test $RANK = 3 && kill -KILL $$; exec sleep 4713.25")
    assert done.returncode == 128 + signal.SIGKILL
    assert "rank 3 on node 1 was killed by SIGKILL" in done.stderr
    wait_until_gone("4713.25")


def test_a_program_that_is_not_there() -> None:
    done = run(TWO_BY_TWO, "no-such-program")
    assert done.returncode == 127
    assert "cannot start 'no-such-program'" in done.stderr


def test_time_is_bounded_and_descendants_end_too() -> None:
    start = time.monotonic()
    done = run(TWO_BY_TWO, "sh", "-c", "echo begun; setsid sleep 4713.5 & sleep 4713.5", timeout=6)
    assert done.returncode == TIMED_OUT
    assert done.stdout == "begun\n"
    assert "took longer than 6 s" in done.stderr
    assert time.monotonic() - start < 24
    wait_until_gone("4713.5")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_the_emulator(number: signal.Signals) -> None:
    run(TWO_BY_TWO, "true")  # skips where there is no emulator
    word = f"4713.{number.value:02}5"
    emulator = subprocess.Popen(command_line("run", "--", "sleep", word), cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while len(processes_with(word)) < 5:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        emulator.send_signal(number)
        emulator.wait(timeout=20)
    wait_until_gone(word)


def test_any_user_can_run_it_where_user_namespaces_are_on() -> None:
    if os.geteuid() != 0:
        pytest.skip("not root: the other tests are about users without privileges then")
    as_nobody = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "sh", "-c", 'exec "$@"', "sh"]
    trial = subprocess.run([*as_nobody, "unshare", "--user", "--map-root-user", "--net", "true"], capture_output=True)
    if trial.returncode != 0:
        pytest.skip(f"user namespaces are off: {trial.stderr.decode().strip()}")
    for python in (sys.executable, "/usr/bin/python3"):
        trial = subprocess.run([*as_nobody, python, "-c", "import benchmarks.cluster"], cwd=ROOT, capture_output=True)
        if trial.returncode == 0:
            break
    else:
        pytest.skip(f"another user cannot run this checkout: {trial.stderr.decode().strip()}")
    program = ["--ranks-per-node", "1", "--", "sh", "-c", "echo $(hostname) of $WORLD_SIZE"]
    line = [*as_nobody, python, "-m", "benchmarks.cluster", "run", *program]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "node0 of 2\n"), done.stderr


def fake_tools(folder: Path, **scripts: str) -> dict[str, str]:
    """An environment whose PATH holds these shell scripts and nothing else."""
    for name, text in scripts.items():
        path = folder / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    return {**os.environ, "PATH": str(folder)}


def test_missing_tools_skip_with_what_to_install(tmp_path: Path) -> None:
    environment = fake_tools(tmp_path, unshare="exit 0", setpriv="exit 0", mount="exit 0")
    done = subprocess.run(command_line("check"), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == SKIP
    assert "SKIP: this machine cannot emulate a cluster: ip, tc not found; as root: apt-get install -y iproute2" in (
        done.stderr
    )


def test_a_refusal_skips_with_its_words(tmp_path: Path) -> None:
    refusal = "echo 'unshare failed: Operation not permitted' >&2; exit 1"
    environment = fake_tools(tmp_path, ip="exit 0", tc="exit 0", setpriv=refusal, unshare=refusal, mount="exit 0")
    done = subprocess.run(command_line("check"), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == SKIP
    assert "as an unprivileged user: unshare failed: Operation not permitted" in done.stderr
    assert "It needs root with CAP_SYS_ADMIN and CAP_NET_ADMIN, or user namespaces" in done.stderr


def test_a_network_that_cannot_be_built_skips_with_the_command(tmp_path: Path) -> None:
    run(TWO_BY_TWO, "true")  # skips where there is no emulator
    environment = fake_tools(tmp_path, tc="echo 'Error: Specified qdisc kind is unknown.' >&2; exit 2")
    environment["PATH"] += f":{os.environ['PATH']}"
    done = subprocess.run(command_line("check"), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == SKIP
    assert "SKIP: this machine cannot emulate a cluster: `tc qdisc" in done.stderr
    assert "Specified qdisc kind is unknown" in done.stderr
