"""Every .cu file compiles with nvcc for the oldest and the newest architecture named in setup.py."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "csrc").rglob("*.cu"), *(ROOT / "zfp" / "src").glob("*.cu")])


def architectures() -> list[str]:
    """The oldest and the newest, as nvcc writes them."""
    named = re.findall(r"(\d+)\.(\d)", re.search(r'ARCHITECTURES = "(.*?)"', (ROOT / "setup.py").read_text()).group(1))  # type: ignore[union-attr]
    return [f"{major}{minor}" for major, minor in (named[0], named[-1])]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not here")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_it_compiles(source: Path, tmp_path: Path) -> None:
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures()]
    include = f"-I{ROOT / 'zfp' / 'include'}"
    hardly_optimised = ["-O1", "-Xcicc", "-O0", "-Xptxas", "-O0"]  # a third of the time
    flags = ["-std=c++17", *hardly_optimised, f"--threads={len(targets)}", include]
    command = ["nvcc", *flags, *targets, "-c", str(source), "-o", str(tmp_path / "out.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
