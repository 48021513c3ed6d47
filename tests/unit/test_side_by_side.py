"""The benchmarks' Multi-Process Service: started for ranks that share cards, and ended again."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest

from benchmarks._nccl import side_by_side

PIPES = "CUDA_MPS_PIPE_DIRECTORY"


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a control program of our own was called with, and what it read."""
    log, program = tmp_path / "log", tmp_path / "nvidia-cuda-mps-control"
    program.write_text(f'#!/bin/sh\n[ -d "${PIPES}" ] && echo "$@" $([ $# = 0 ] && cat) >>{log}\nexit "${{CODE:-0}}"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv(PIPES, raising=False)
    monkeypatch.delenv("PLANMOE_MPS", raising=False)
    return log


def test_started_and_ended_again(log: Path) -> None:
    with suppress(KeyboardInterrupt), side_by_side(2) as service:
        assert Path(service[PIPES]).is_dir()
        assert log.read_text().split() == ["-d"]
        raise KeyboardInterrupt
    assert log.read_text().split() == ["-d", "quit"]
    assert not Path(service[PIPES]).exists()


def test_does_not_start(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODE", "1")
    with side_by_side(2) as service:
        assert service == {}
    assert log.read_text().split() == ["-d"]


@pytest.mark.parametrize(
    ("ranks_per_card", "variables"), [(1, {}), (2, {"PLANMOE_MPS": "0"}), (2, {PIPES: "/run/another"})]
)
def test_not_wanted(log: Path, monkeypatch: pytest.MonkeyPatch, ranks_per_card: int, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with side_by_side(ranks_per_card) as service:
        assert service == {}
    assert not log.exists()


def test_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(PIPES, raising=False)
    with side_by_side(4) as service:
        assert service == {}
