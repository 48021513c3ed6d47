"""Pretraining as a user runs it: it learns, reports, resumes where it stopped, and explains mistakes."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from tests.example.conftest import TINY_MODEL, TINY_RUN, Launch, torchrun

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
NUM_STEPS = 8

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def read_steps(output: Path) -> list[dict[str, float]]:
    with (output / "report" / "metrics.csv").open(newline="", encoding="utf-8") as stream:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(stream)]


@pytest.fixture(scope="module")
def deepspeed_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config without a schedule, so that the learning rate does not depend on where a run is cut in two."""
    config = {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
        "steps_per_print": 1_000_000_000,
        "planmoe": {"chunks": 2},
    }
    path = tmp_path_factory.mktemp("config") / "ds_config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished_output(tmp_path_factory: pytest.TempPathFactory, deepspeed_config: Path) -> Path:
    """The output folder of one uninterrupted run of NUM_STEPS steps, saved half-way too."""
    output = tmp_path_factory.mktemp("pretrain") / "output"
    options = ["--steps", NUM_STEPS, "--save-every", NUM_STEPS // 2, "--output", output]
    done = torchrun("pretrain_deepspeed.py", [*TINY_MODEL, *TINY_RUN, *options, "--deepspeed_config", deepspeed_config])
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"step     {NUM_STEPS}/{NUM_STEPS}" in done.stdout
    return output


def test_it_learns_and_sends_less_than_stock(finished_output: Path) -> None:
    steps = read_steps(finished_output)
    assert [step["step"] for step in steps] == list(range(1, NUM_STEPS + 1))
    assert steps[0]["loss"] == pytest.approx(5.545, abs=0.2)
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    assert all(0 < step["bytes_sent"] < step["stock_bytes"] for step in steps)
    assert all(0.0 < step["exposed_seconds"] < step["seconds"] for step in steps)


def test_the_report_is_complete(finished_output: Path) -> None:
    report = finished_output / "report"
    for picture in ("loss.png", "timeline.png"):
        assert (report / picture).read_bytes().startswith(PNG_SIGNATURE)
    metrics = json.loads((report / "metrics.json").read_text(encoding="utf-8"))
    assert 0.0 < metrics["validation_loss"] < 5.545
    assert len(metrics["steps"]) == NUM_STEPS
    events = json.loads((report / "timeline.json").read_text(encoding="utf-8"))["traceEvents"]
    phases = {event["args"]["phase"] for event in events if event["ph"] == "X"}
    assert phases == {"forward", "backward"}
    summary = (report / "summary.md").read_text(encoding="utf-8")
    assert "validation loss" in summary
    assert "timeline.png" in summary


def test_a_resumed_run_repeats_the_uninterrupted_one(
    finished_output: Path, deepspeed_config: Path, tmp_path: Path, pretrain: Launch
) -> None:
    output = tmp_path / "output"
    shutil.copytree(finished_output, output)
    middle = NUM_STEPS // 2
    (output / "checkpoints" / "latest").write_text(f"step{middle}", encoding="utf-8")
    done = pretrain(["--steps", NUM_STEPS, "--output", output, "--deepspeed_config", deepspeed_config])
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"resuming after step {middle}" in done.stdout
    resumed, whole = read_steps(output), read_steps(finished_output)
    assert [step["step"] for step in resumed] == [step["step"] for step in whole]
    assert [step["loss"] for step in resumed] == pytest.approx([step["loss"] for step in whole], rel=1e-6)


def test_a_complete_run_is_evaluated(finished_output: Path, deepspeed_config: Path, pretrain: Launch) -> None:
    before = read_steps(finished_output)
    done = pretrain(["--steps", NUM_STEPS, "--output", finished_output, "--deepspeed_config", deepspeed_config])
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"complete at step {NUM_STEPS}" in done.stdout
    assert "validation loss" in done.stdout
    assert read_steps(finished_output) == before


def test_a_folder_of_another_model_is_refused(finished_output: Path, pretrain: Launch) -> None:
    done = pretrain(["--output", finished_output, "--top-k", 1])
    assert done.returncode != 0
    assert "top_k was 2, now 1" in done.stderr
    assert "--resume never" in done.stderr


def test_it_runs_on_stock_deepspeed(tmp_path: Path, pretrain: Launch) -> None:
    output = tmp_path / "output"
    done = pretrain(["--steps", 2, "--output", output, "--planmoe", "off"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "off (stock DeepSpeed)" in done.stdout
    assert (output / "report" / "loss.png").exists()
    assert not (output / "report" / "timeline.png").exists()


def test_four_ranks_share_the_experts(tmp_path: Path) -> None:
    options = ["--steps", 2, "--output", tmp_path / "output", "--planmoe", '{"compression": "int8", "chunks": 1}']
    done = torchrun("pretrain_deepspeed.py", [*TINY_MODEL, *TINY_RUN, *options], num_ranks=4)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 on cpu, experts shared by 4" in done.stdout
    assert '"inter":"int8","intra":"int8"' in done.stdout


def test_a_misspelt_planmoe_key_is_told_without_a_traceback(tmp_path: Path, pretrain: Launch) -> None:
    done = pretrain(["--steps", 2, "--output", tmp_path / "output", "--planmoe", '{"chunk": 2}'])
    assert done.returncode != 0
    assert done.stderr.count("pretrain_deepspeed.py: error:") == 1
    assert "did you mean 'chunks'" in done.stderr
