"""The benchmarks' limit of what emulated hosts send: what it asks tc for, and that nothing of it stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks._nccl import limited_link


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a tc of our own was called with; it knows the kinds of queues that KINDS names."""
    log, program = tmp_path / "log", tmp_path / "tc"
    program.write_text(
        f'#!/bin/sh\necho "$@" >>{log}\n[ "$2" = del ] && exit 0\n'
        'for kind in $KINDS; do for word in "$@"; do [ "$word" = "$kind" ] && exit 0; done; done; exit 2\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("KINDS", "tbf fq_codel")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return log


def test_unlimited(calls: Path) -> None:
    with limited_link(2, None):
        pass
    assert not calls.exists()


@pytest.mark.parametrize("fair", [False, True])
def test_both_hosts_share_the_loopback_device(calls: Path, fair: bool) -> None:
    with pytest.raises(RuntimeError, match="inside"), limited_link(2, 6.9, fair=fair):
        raise RuntimeError("inside")
    told = calls.read_text().splitlines()
    assert "root handle 1: tbf rate 13.8gbit" in told[0]
    assert ["parent 1:1 fq_codel" in line for line in told[1:-1]] == [True] * fair
    assert told[-1] == "qdisc del dev lo root"


def test_a_kernel_without_fair_queues(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KINDS", "tbf")
    with pytest.raises(SystemExit, match="sch_fq_codel"), limited_link(2, 6.9, fair=True):
        pass
    assert calls.read_text().splitlines()[-1] == "qdisc del dev lo root"


def test_who_may_not(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(SystemExit, match="takes root"), limited_link(2, 6.9):
        pass
    assert not calls.exists()
