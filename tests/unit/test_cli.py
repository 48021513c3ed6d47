"""The `planmoe` command: what it prints and how it ends."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import planmoe_ds
from planmoe_ds import doctor
from planmoe_ds.cli import app
from planmoe_ds.doctor import Finding

GOOD = Finding("torch", "ok", "2.13.0", required=True)
OPTIONAL_PROBLEM = Finding("NVIDIA apex", "problem", detail="another project", advice="pip uninstall apex")
BLOCKING = Finding("planmoe_ds._C", "problem", detail="not built", advice="build it", required=True)


@pytest.mark.parametrize(
    ("findings", "exit_code"),
    [([GOOD], 0), ([GOOD, OPTIONAL_PROBLEM], 0), ([GOOD, BLOCKING], 1)],
    ids=["good", "optional problem", "blocking problem"],
)
@pytest.mark.parametrize("options", [[], ["--json"]], ids=["table", "json"])
def test_doctor(findings: list[Finding], exit_code: int, options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "collect", lambda: findings)
    result = CliRunner().invoke(app, ["doctor", *options])
    assert result.exit_code == exit_code
    for finding in findings:
        assert finding.component in result.output
        assert finding.advice in result.output
    if options:
        assert json.loads(result.output)["usable"] is (exit_code == 0)


def test_help_names_the_commands() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert "doctor" in result.output


def test_unknown_command_is_an_error() -> None:
    result = CliRunner().invoke(app, ["docter"])
    assert result.exit_code == 2
    assert "docter" in result.output


@pytest.mark.slow
def test_doctor_runs_where_the_backend_is_not_built(tmp_path: Path) -> None:
    """The command that explains a failed build has to run after a failed build."""
    source = Path(planmoe_ds.__file__).parent
    shutil.copytree(source, tmp_path / "planmoe_ds", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    child = subprocess.run(
        [sys.executable, "-m", "planmoe_ds.doctor", "--json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert child.stdout, f"it did not even start: {child.stderr}"
    assert child.returncode == 1
    backend = {finding["component"]: finding for finding in json.loads(child.stdout)["findings"]}["planmoe_ds._C"]
    assert (backend["status"], backend["detail"]) == ("problem", "not built")
