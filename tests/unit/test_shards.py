"""pytest --shard I/N: all shards together are all tests, each once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def collect(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "--collect-only", *options]
    return subprocess.run([*command, "tests/unit/test_trace.py"], cwd=ROOT, capture_output=True, text=True, check=False)


def names(*options: str) -> list[str]:
    found = [line for line in collect(*options).stdout.splitlines() if "::" in line]
    assert found
    return found


def test_every_test_is_in_one_shard() -> None:
    first, second = names("--shard", "1/2"), names("--shard", "2/2")
    assert sorted(first + second) == sorted(names())
    assert abs(len(first) - len(second)) <= 1


def test_a_shard_that_is_none() -> None:
    assert "got '3/2', expected I/N with 1 <= I <= N" in collect("--shard", "3/2").stderr
