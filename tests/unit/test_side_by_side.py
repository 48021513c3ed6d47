"""The benchmarks' Multi-Process Service: started for ranks that share cards, and ended again."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from benchmarks import _nccl
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
    monkeypatch.setattr(_nccl, "_DEFAULT_PIPES", tmp_path / "default")
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


def test_not_wanted(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with side_by_side(1) as service:
        assert service == {}
    monkeypatch.setenv(PIPES, "/run/another")
    with side_by_side(2) as service:
        assert service == {}
    assert not log.exists()


def test_one_that_runs_is_used(log: Path, tmp_path: Path) -> None:
    (tmp_path / "default").mkdir()
    (tmp_path / "default" / "control").touch()
    with side_by_side(2) as service:
        assert service == {PIPES: str(tmp_path / "default")}
    assert not log.exists()


def test_one_that_does_not_end(log: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = subprocess.run

    def slow(*args: Any, timeout: float | None = None, **options: Any) -> Any:
        if timeout is not None:
            raise subprocess.TimeoutExpired("quit", timeout)
        return run(*args, **options)

    monkeypatch.setattr(subprocess, "run", slow)
    with side_by_side(2):
        pass
    assert log.read_text().split() == ["-d"]
    assert "did not end in 30 s" in capsys.readouterr().err


def test_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(PIPES, raising=False)
    with side_by_side(4) as service:
        assert service == {}
