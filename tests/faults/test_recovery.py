"""The example after a rank was killed, a disk was full, a save was ended: it goes on from a whole checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.example.conftest import ROOT, TINY_MODEL, TINY_RUN, environment_of_ranks

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(600)]

SCRIPT = Path(__file__).with_name("broken_pretrain.py")
STEPS, SAVE_EVERY = 6, 2
SECONDS = 240  # on a busy machine; about 15 on a quiet one
EXACT = '{"exactness": "exact", "chunks": 1}'


@dataclass(frozen=True)
class Example:
    """The example on two ranks of one kind of device, with a DeepSpeed config of the test's own."""

    device: str
    config: Path

    def start(
        self, output: Path, fault: str = "nothing", *launcher: str, more: tuple[str, ...] = ()
    ) -> subprocess.Popen[str]:
        """Begin a run."""
        steps = ("--steps", str(STEPS), "--save-every", str(SAVE_EVERY))
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *launcher),
            *(str(SCRIPT), *TINY_MODEL, *TINY_RUN, *steps, "--output", str(output)),
            *("--deepspeed_config", str(self.config), "--planmoe", EXACT, *more),
        ]
        environment = {**environment_of_ranks(), "DS_ACCELERATOR": self.device, "FAULT": fault}
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, output: Path, fault: str = "nothing", *launcher: str) -> str:
        """What a run that succeeds printed."""
        process = self.start(output, fault, *launcher)
        printed = finish(process)
        assert process.returncode == 0, printed
        return printed


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def example(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Example:
    """With the example's config but a constant learning rate."""
    path = tmp_path_factory.mktemp("config") / "ds_config.json"
    settings = {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
        "steps_per_print": 10**9,
    }
    path.write_text(json.dumps(settings), encoding="utf-8")
    return Example(request.param, path)


def kill_all(process: subprocess.Popen[str]) -> None:
    """The launcher and its ranks, as when a machine goes down."""
    words = list(process.args)  # type: ignore[arg-type]
    output = str(words[words.index("--output") + 1])
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found = output in path.read_text().split("\0")
        except OSError:  # it ended meanwhile
            continue
        if found:
            os.kill(int(path.parent.name), signal.SIGKILL)


def finish(process: subprocess.Popen[str]) -> str:
    """What it printed; it ends in time."""
    try:
        printed, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        kill_all(process)
        pytest.fail(f"still running after {SECONDS} s: {process.communicate()[0]}")
    return printed


def parameters(output: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint's files."""
    folder = output / "checkpoints" / f"step{step}"
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.pt")):
        content = torch.load(path, weights_only=False, map_location="cpu")  # DeepSpeed's files hold objects of its own
        found |= {f"{path.name}: {name}": tensor for name, tensor in _tensors(content, "")}
    assert found
    return found


def _tensors(content: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(content, torch.Tensor):
        yield name, content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from _tensors(value, f"{name}.{key}")
    elif isinstance(content, list | tuple):
        for place, value in enumerate(content):
            yield from _tensors(value, f"{name}.{place}")


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert list(first) == list(second)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def latest(output: Path) -> str:
    return (output / "checkpoints" / "latest").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, example: Example) -> Path:
    """The output of a run without a fault."""
    output = tmp_path_factory.mktemp("undisturbed")
    example.run(output)
    return output


def test_an_elastic_restart_ends_with_the_same_parameters(undisturbed: Path, tmp_path: Path, example: Example) -> None:
    printed = example.run(tmp_path, "die", "--max-restarts=1")
    assert "resuming after step 4" in printed
    assert_same(parameters(undisturbed), parameters(tmp_path))


def test_a_rank_that_cannot_write_says_so_and_the_last_checkpoint_stays(
    undisturbed: Path, tmp_path: Path, example: Example
) -> None:
    process = example.start(tmp_path, "small_files")
    printed = finish(process)
    assert process.returncode != 0
    assert f"rank 1 cannot write the checkpoint of step 4 into {tmp_path / 'checkpoints'}" in printed, printed
    assert "the one of step2 is whole, and the same command goes on from it" in printed
    assert latest(tmp_path) == "step2"
    printed = example.run(tmp_path)
    assert "resuming after step 2" in printed
    assert_same(parameters(undisturbed), parameters(tmp_path))
    assert not (tmp_path / "checkpoints" / "unfinished").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_save_that_is_ended_leaves_the_checkpoint_before(
    undisturbed: Path, tmp_path: Path, example: Example, number: signal.Signals
) -> None:
    process = example.start(tmp_path, "slow_save")
    assert process.stdout is not None
    for line in process.stdout:
        if "a file is written" in line:
            break
    start_of_end = time.monotonic()
    if number == signal.SIGKILL:
        kill_all(process)
    else:
        process.send_signal(number)
    finish(process)
    assert time.monotonic() - start_of_end < 20
    assert process.returncode != 0
    assert list((tmp_path / "checkpoints" / "unfinished" / "step4").iterdir())
    assert latest(tmp_path) == "step2"
    printed = example.run(tmp_path)
    assert "resuming after step 2" in printed
    assert_same(parameters(undisturbed), parameters(tmp_path))


def test_another_ep_size_is_refused(undisturbed: Path, example: Example) -> None:
    process = example.start(undisturbed, more=("--ep-size", "1"))
    printed = finish(process)
    assert process.returncode != 0
    assert "holds a checkpoint of another run (ep_size was 2, now 1)" in printed, printed
    assert latest(undisturbed) == f"step{STEPS}"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mount.returncode != 0:
        pytest.skip(f"cannot mount a small disk: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk(small_disk: Path, example: Example) -> None:
    process = example.start(small_disk)
    printed = finish(process)
    assert process.returncode != 0
    assert "cannot write the checkpoint of step" in printed, printed
    assert f"into {small_disk / 'checkpoints'}" in printed
    assert "Make room" in printed
    assert os.path.ismount(small_disk)


def test_the_megatron_example_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """What it reads back is read without running code; see tests/faults/test_files.py."""
    sizes = "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --num-experts 4 --seq-length 32"
    run_length = "--train-iters 4 --save-interval 2 --micro-batch-size 2 --eval-iters 1 --sample-bytes 4"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *(str(ROOT / "examples/gpt_moe/pretrain_megatron.py"), *sizes.split(), *run_length.split()),
        *("--moe-token-dispatcher", "planmoe", "--save", str(tmp_path)),
    ]
    found = []
    for _ in range(2):
        done = subprocess.run(
            command, cwd=ROOT, env=environment_of_ranks(), capture_output=True, text=True, timeout=SECONDS, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert latest(tmp_path) == "step4"
        found.append(parameters(tmp_path, 4))
        (tmp_path / "checkpoints" / "latest").write_text("step2", encoding="utf-8")
    assert "resuming after step 2" in done.stdout
    assert_same(*found)
