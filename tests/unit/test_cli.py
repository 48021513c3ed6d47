"""The `planmoe` command: what it prints and how it ends."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import planmoe_ds
from planmoe_ds import doctor, probe_command
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
    assert "probe" in result.output


@pytest.mark.parametrize("counts", ["", "0", "2,0", "2,", "-1", "two", "1.5"])
def test_probe_with_ranks_that_are_no_numbers(counts: str) -> None:
    result = CliRunner().invoke(app, ["probe", f"--ranks-per-node={counts}"])
    assert result.exit_code == 2
    assert "--ranks-per-node" in result.output


@pytest.mark.parametrize(("options", "counts"), [([], None), (["2"], 2), (["4,4,2"], [4, 4, 2])])
def test_probe_hands_on_its_options(options: list[str], counts: object, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, dict[str, bool]]] = []
    monkeypatch.setattr(probe_command, "run", lambda given, **flags: calls.append((given, flags)) or 3)
    words = [word for option in options for word in ("--ranks-per-node", option)]
    assert CliRunner().invoke(app, ["probe", *words, "--refresh"]).exit_code == 3
    assert calls == [(counts, {"refresh": True, "as_json": False})]


def probe(folder: Path, num_ranks: int, *options: str) -> subprocess.CompletedProcess[str]:
    """`planmoe probe` under torchrun, with `folder` for its cache."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    return subprocess.run(
        [sys.executable, *launcher, "-m", "planmoe_ds.cli", "probe", *options],
        env={**os.environ, "XDG_CACHE_HOME": str(folder), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.distributed
def test_probe_under_a_launcher(tmp_path: Path) -> None:
    start = time.monotonic()
    first = probe(tmp_path, 2)
    first_seconds = time.monotonic() - start
    assert first.returncode == 0, first.stderr
    assert "1 node of 2 ranks, gloo" in first.stdout
    assert "measured now, kept in" in first.stdout
    (file,) = (tmp_path / "planmoe").iterdir()
    start = time.monotonic()
    second = probe(tmp_path, 2, "--json")
    assert first_seconds - (time.monotonic() - start) < 30  # of measuring: both start and end alike
    assert json.loads(second.stdout) == json.loads(file.read_text())


@pytest.mark.slow
@pytest.mark.distributed
def test_probe_of_uneven_nodes_and_spoiled_caches(tmp_path: Path) -> None:
    options = ("--ranks-per-node", "2,1")
    assert "2 nodes of 2 and 1 ranks, gloo" in probe(tmp_path, 3, *options).stdout
    assert "kept from an earlier run" in probe(tmp_path, 3, *options).stdout
    (file,) = (tmp_path / "planmoe").iterdir()
    file.write_text("{")
    spoiled = probe(tmp_path, 3, *options, "--json")
    assert "the links are measured again" in spoiled.stderr
    assert json.loads(spoiled.stdout) == json.loads(file.read_text())
    unwritable = tmp_path / "file"
    unwritable.touch()
    done = probe(unwritable, 3, *options)
    assert done.returncode == 0
    assert "measured now, not kept" in done.stdout
    assert "the next run measures again" in done.stderr


@pytest.mark.distributed
def test_probe_with_ranks_that_do_not_add_up(tmp_path: Path) -> None:
    done = probe(tmp_path, 2, "--ranks-per-node", "3,1")
    assert done.returncode != 0
    assert done.stderr.count("planmoe probe: ranks_per_node is [3, 1], which adds up to 4") == 1


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
