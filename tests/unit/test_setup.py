"""What setup.py says about CUDA, on made-up machines; nothing is built."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import setuptools
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]


def set_up(monkeypatch: pytest.MonkeyPatch, choice: str, cuda: str | None, toolkit: Path | None) -> None:
    """Run setup.py with a torch of this CUDA and a toolkit there."""
    monkeypatch.setenv("PLANMOE_CUDA", choice)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None if toolkit is None else str(toolkit))
    runpy.run_path(str(ROOT / "setup.py"))


def toolkit(folder: Path, release: str) -> Path:
    (folder / "bin").mkdir(parents=True)
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    nvcc.chmod(0o755)
    (folder / "include").mkdir()
    return folder


@pytest.mark.parametrize(
    ("cuda", "release", "words"),
    [
        (None, "13.0", "is built without CUDA"),
        ("13.0", None, "nvcc was not found; install the CUDA 13.0 toolkit"),
        ("13.0", "12.4", "is of CUDA 13.0, the CUDA of "),
        ("13.0", "", "is not known"),
    ],
)
def test_what_keeps_the_kernels_from_being_built(
    cuda: str | None, release: str | None, words: str,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    home = None if release is None else toolkit(tmp_path / "cuda", release)
    set_up(monkeypatch, "auto", cuda, home)
    said = capsys.readouterr().out
    assert "planmoe_ds: no CUDA kernels: " in said
    assert words in said
    assert "without CUDA kernels" in said.splitlines()[-1]
    with pytest.raises(SystemExit, match="asks for the CUDA kernels, which cannot be built: ") as stopped:
        set_up(monkeypatch, "1", cuda, home)
    assert words in str(stopped.value)


@pytest.mark.parametrize(("choice", "found"), [("auto", "with CUDA kernels"), ("0", "without CUDA kernels")])
def test_the_choice(
    choice: str, found: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    set_up(monkeypatch, choice, "13.0", toolkit(tmp_path / "cuda", "13.1"))
    assert f"{found}" in capsys.readouterr().out.splitlines()[-1]
    with pytest.raises(SystemExit, match="PLANMOE_CUDA is 'yes', expected one of auto, 1, 0"):
        set_up(monkeypatch, "yes", None, None)
