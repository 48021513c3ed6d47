"""The benchmarks' limit of what emulated hosts send: what it asks of tc and ip, and that nothing of it stays."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import _nccl
from benchmarks._nccl import ROOT, launch, limited_link

LIMITS = "ceil 13.8gbit burst 1mb cburst 1mb quantum 60000"
TOLD = (
    ["tc qdisc add dev lo root tbf rate 13.8gbit burst 1mb limit 64mb", "tc qdisc del dev lo root"],
    [
        "tc qdisc add dev lo root handle 1: htb default 3",
        f"tc class add dev lo parent 1: classid 1:1 htb rate 13.8gbit {LIMITS}",
        f"tc class add dev lo parent 1:1 classid 1:2 htb rate 13.8gbit prio 0 {LIMITS}",
        f"tc class add dev lo parent 1:1 classid 1:3 htb rate 1mbit prio 1 {LIMITS}",
        "tc qdisc add dev lo parent 1:3 bfifo limit 64mb",
        "tc filter add dev lo parent 1: protocol ip u32 match ip dst 127.1.0.1/32 flowid 1:2",
        "ip address add 127.1.0.1/32 dev lo label lo:gloo",
        "ip address del 127.1.0.1/32 dev lo",
        "tc qdisc del dev lo root",
    ],
)


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a tc and an ip of our own were called with; they refuse what holds the word REFUSED."""
    log = tmp_path / "log"
    for name in ("tc", "ip"):
        program = tmp_path / name
        program.write_text(
            f'#!/bin/sh\necho {name} "$@" >>{log}\n[ "$2" = del ] && exit 0\n'
            'for word in "$@"; do [ "$word" = "$REFUSED" ] && exit 2; done; exit 0\n'
        )
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("REFUSED", "nothing")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(_nccl, "_RECEIVERS", tmp_path / "rps_cpus")
    (tmp_path / "rps_cpus").write_text("0\n")
    return log


@pytest.mark.parametrize(("cpus", "mask"), [(2, "00000003"), (16, "0000ffff"), (40, "000000ff,ffffffff")])
def test_connections_are_dealt_among_cpus(calls: Path, monkeypatch: pytest.MonkeyPatch, cpus: int, mask: str) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cpus)
    receivers = calls.parent / "rps_cpus"
    with limited_link(2, 6.9):
        assert receivers.read_text() == mask
    assert receivers.read_text() == "0\n"


def test_where_that_cannot_be_had(calls: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (calls.parent / "rps_cpus").unlink()
    with limited_link(2, 6.9):
        pass
    assert "connections be reset: [Errno 2]" in capfd.readouterr().err
    assert calls.read_text().splitlines() == TOLD[False]


def test_unlimited(calls: Path) -> None:
    with limited_link(2, None) as variables:
        assert variables == {}
    assert not calls.exists()


@pytest.mark.parametrize("fair", [False, True])
def test_both_hosts_share_the_loopback_device(calls: Path, fair: bool) -> None:
    def fail_inside() -> None:
        with limited_link(2, 6.9, fair=fair) as variables:
            assert variables.get("GLOO_SOCKET_IFNAME") == ("lo:gloo" if fair else None)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert calls.read_text().splitlines() == TOLD[fair]


@pytest.mark.parametrize(("word", "undone"), [("htb", []), ("bfifo", ["tc qdisc del dev lo root"])])
def test_a_kernel_without_what_it_takes(
    calls: Path, monkeypatch: pytest.MonkeyPatch, word: str, undone: list[str]
) -> None:
    """What others may have made is left alone."""
    monkeypatch.setenv("REFUSED", word)
    with pytest.raises(SystemExit, match=f"--gbit --fair: the kernel did not take `tc qdisc add dev lo .*{word}"):
        limited_link(2, 6.9, fair=True).__enter__()
    told = calls.read_text().splitlines()
    assert word in told[-len(undone) - 1]
    assert told[len(told) - len(undone) :] == undone


def test_who_may_not(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(SystemExit, match="takes root"), limited_link(2, 6.9):
        pass
    assert not calls.exists()


def test_a_program_that_is_told_to_end_takes_its_ranks_and_the_limit_along(
    calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = tmp_path / "began"
    script = tmp_path / "rank.py"
    script.write_text(f"import os, time\nopen({str(began)!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)\n")
    monkeypatch.setattr(sys, "argv", [str(script)])

    def tell() -> None:
        wait_for(lambda: began.exists() and began.read_text())
        os.kill(os.getpid(), signal.SIGTERM)

    teller = threading.Thread(target=tell)
    before = signal.getsignal(signal.SIGTERM)
    teller.start()
    try:
        with pytest.raises(SystemExit):
            launch(Namespace(ranks=1, hosts=2, gbit=6.9, fair=True, take_turns=True))
    finally:
        signal.signal(signal.SIGTERM, before)
        teller.join()
    assert calls.read_text().splitlines() == TOLD[True]
    wait_for(lambda: not Path(f"/proc/{began.read_text()}").exists())


def wait_for(condition: Callable[[], object]) -> None:
    """For at most 30 seconds."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


IN_A_NAMESPACE = """
import socket, subprocess
from benchmarks._nccl import _RECEIVERS, limited_link

def sent(way):
    shown = subprocess.run(["tc", "-s", "class", "show", "dev", "lo"], stdout=-1, text=True).stdout
    return int(shown.split(f"class htb {way} ")[1].split("Sent ")[1].split()[0])

subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
subprocess.run(["mount", "-t", "sysfs", "sysfs", "/sys"], check=True)  # this network's devices
before = _RECEIVERS.read_text()
with limited_link(2, 1.0, fair=True):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(bytes(1000), ("127.1.0.1", 9))
        sender.sendto(bytes(3000), ("127.0.0.1", 9))
        print(sent("1:2"), sent("1:3"), int(_RECEIVERS.read_text().replace(",", ""), 16))
assert _RECEIVERS.read_text() == before
"""


def test_what_the_kernel_makes_of_it() -> None:
    can = "unshare --net --mount tc qdisc add dev lo root htb"
    if os.geteuid() != 0 or not all(map(shutil.which, ("unshare", "tc", "ip"))):
        pytest.skip("takes root, unshare, tc and ip")
    if subprocess.run(can.split(), check=False).returncode != 0:
        pytest.skip(f"the kernel does not take `{can}`")
    command = ["unshare", "--net", "--mount", sys.executable, "-c", IN_A_NAMESPACE]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    small, large, receivers = map(int, ran.stdout.split())
    assert 1000 <= small < 3000 <= large
    assert receivers or "packets may overtake each other" in ran.stderr
