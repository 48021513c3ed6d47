"""benchmarks/guard.py runs and adds up what the guard does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.distributed
def test_the_parts_are_found(tmp_path: Path) -> None:
    path = tmp_path / "guard.json"
    command = [sys.executable, "benchmarks/guard.py", "--quick", "--ranks", "2", "--layers", "2", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert "RESULT guard_overhead=" in done.stdout, done.stdout + done.stderr
    found = json.loads(path.read_text())
    parts = {name for name in found if name.startswith("part ")}
    names = ("_opening", "_check_opening", "_check_counts", "waiting", "working", "_header")
    assert parts == {f"part {name}" for name in names}
    assert all(found[name] > 0 for name in (*parts, "threads", "step", "header bytes"))
