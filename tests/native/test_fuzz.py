"""The row codecs and the zfp codec under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O0", "-g", "-ffp-contract=off"]
ZFP = [str(path) for path in sorted((ROOT / "zfp" / "src").glob("*.cpp"))]
PROGRAMS = {
    "row codecs": ["-std=c++20", f"-I{ROOT}/csrc", f"{ROOT}/tests/native/row_codecs_fuzz.cpp"],
    "zfp": ["-std=c++17", f"-I{ROOT}/zfp/include", f"-I{ROOT}/zfp/src", f"{ROOT}/zfp/tests/fuzz_test.cpp", *ZFP],
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_nothing_is_read_or_written_out_of_bounds(name: str, tmp_path: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "fuzz"
    subprocess.run([compiler, *SANITIZERS, *PROGRAMS[name], "-o", str(program)], check=True)
    done = subprocess.run([str(program), "500"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "500 iterations" in done.stdout
