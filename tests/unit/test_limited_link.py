"""The benchmarks' limit of what emulated hosts send: what it asks of tc and ip, and that nothing of it stays."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks._nccl import ROOT, limited_link

TOLD = (
    ["tc qdisc add dev lo root tbf rate 13.8gbit"],
    [
        "ip address add 127.1.0.1/32 dev lo label lo:gloo",
        "tc qdisc add dev lo root handle 1: htb",
        "tc class add dev lo parent 1: classid 1:1 htb rate 13.8gbit",
    ],
)
UNDONE = ["tc qdisc del dev lo root"], ["tc qdisc del dev lo root", "ip address del 127.1.0.1/32 dev lo"]


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
    return log


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
    told = calls.read_text().splitlines()
    for line, expected in zip(told, TOLD[fair], strict=False):
        assert line.startswith(expected)
    assert told[-len(UNDONE[fair]) :] == UNDONE[fair]


def test_a_kernel_without_what_it_takes(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFUSED", "htb")
    with pytest.raises(
        SystemExit, match="--gbit --fair: the kernel did not take `tc qdisc add dev lo root handle 1: htb"
    ):
        limited_link(2, 6.9, fair=True).__enter__()
    assert calls.read_text().splitlines()[-2:] == UNDONE[True]


def test_who_may_not(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(SystemExit, match="takes root"), limited_link(2, 6.9):
        pass
    assert not calls.exists()


IN_A_NAMESPACE = """
import socket, subprocess
from benchmarks._nccl import limited_link

def sent(way):
    shown = subprocess.run(["tc", "-s", "class", "show", "dev", "lo"], stdout=-1, text=True).stdout
    return int(shown.split(f"class htb {way} ")[1].split("Sent ")[1].split()[0])

subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
with limited_link(2, 1.0, fair=True):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(bytes(1000), ("127.1.0.1", 9))
        sender.sendto(bytes(3000), ("127.0.0.1", 9))
        print(sent("1:2"), sent("1:3"))
"""


def test_gloo_has_a_queue_of_its_own() -> None:
    if os.geteuid() != 0 or not all(map(shutil.which, ("unshare", "tc", "ip"))):
        pytest.skip("takes root, unshare, tc and ip")
    command = ["unshare", "--net", sys.executable, "-c", IN_A_NAMESPACE]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if "the kernel did not take" in ran.stderr or "unshare" in ran.stderr:
        pytest.skip(ran.stderr.splitlines()[-1])
    assert ran.returncode == 0, ran.stderr
    small, large = map(int, ran.stdout.split())
    assert 1000 <= small < 3000 <= large
