"""benchmarks/alltoall.py: what it exchanges, what it concludes, and a small run of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks._exchange_cases import TOKENS_PER_RANK, even_case, make_cases, routed_case
from benchmarks._exchange_report import ONLY_INTER, ONLY_INTRA, SERIAL, STOCK, results, spread
from benchmarks.cluster import SKIP

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20


def test_even_cases() -> None:
    case = even_case(3, 4096)
    assert (case.rows, case.row_bytes, case.largest_bytes) == ([[4] * 3] * 3, 1024, 3 * 4096)
    assert even_case(2, 512).row_bytes == 512


@pytest.mark.parametrize("top_k", [1, 2, 6, 8])
@pytest.mark.parametrize("skewed", [False, True])
def test_routed_cases_send_every_copy_of_every_token(top_k: int, skewed: bool) -> None:
    case = routed_case(4, top_k, skewed)
    assert [sum(row) for row in case.rows] == [TOKENS_PER_RANK * top_k] * 4
    assert case == routed_case(4, top_k, skewed)
    shares = [sum(row[rank] for row in case.rows) / (4 * TOKENS_PER_RANK * top_k) for rank in range(4)]
    if skewed:
        assert shares[0] > 1.1 * shares[3]
    else:
        assert max(shares) < 1.2 * min(shares)


def test_all_cases_have_names_of_their_own() -> None:
    names = [case.name for case in make_cases(4, [4096, MIB], [1, 8])]
    assert names == ["4 KiB", "1 MiB", "uniform k=1", "uniform k=8", "skewed k=1", "skewed k=8"]


def measured(pair_bytes: int | None, **seconds: float) -> dict[str, object]:
    names = {"stock": STOCK, "pipe": "pipe", "serial": SERIAL, "intra": ONLY_INTRA, "inter": ONLY_INTER}
    return {"case": "", "pair_bytes": pair_bytes, "seconds": {names[key]: [value] for key, value in seconds.items()}}


def test_results_are_the_worst_cases() -> None:
    small = measured(4096, stock=1.0, pipe=1.02, serial=2.0, intra=0.2, inter=0.4)
    large = measured(MIB, stock=8.0, pipe=4.2, serial=6.0, intra=2.0, inter=4.0)
    larger = measured(4 * MIB, stock=32.0, pipe=16.0, serial=24.0, intra=8.0, inter=16.0)
    routed = measured(None, stock=1.0, pipe=9.0, serial=9.0, intra=1.0, inter=1.0)
    found = results([{"name": "a", "cases": [small, large]}, {"name": "b", "cases": [larger, routed]}])
    assert found["pipe_vs_all_to_all_single"] == pytest.approx(1.02)
    assert found["pipe_over_bound"] == pytest.approx(1.05)
    assert found["overlap_gain_over_possible"] == pytest.approx(6.0 / 4.2 / 1.5)
    assert "pipe_over_bound" not in results([{"name": "a", "cases": [small]}])


def test_spread() -> None:
    assert spread([1.0]) == 0
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(1.0)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_small_run(tmp_path: Path) -> None:
    file = tmp_path / "times.json"
    options = ["--clusters", "2x1@1gbit/1gbit", "--sizes=4", "--top-k=2", "--rounds=2", "--seconds=0"]
    line = [sys.executable, str(ROOT / "benchmarks/alltoall.py"), *options, "--json", str(file)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    if done.returncode == SKIP:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    results_at_the_end = [line.split("=")[0] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert done.stdout.splitlines()[-1].startswith("RESULT ")
    assert {"RESULT pipe_vs_all_to_all_single", "RESULT dedup_inter_bytes_over_minimum"} <= set(results_at_the_end)
    cases = json.loads(file.read_text())["clusters"][0]["cases"]
    assert [case["case"] for case in cases] == ["4 KiB", "uniform k=2", "skewed k=2"]
    assert {STOCK, "direct", "pipe", SERIAL, ONLY_INTRA, ONLY_INTER} <= set(cases[0]["seconds"])
    assert all(len(seconds) == 2 for seconds in cases[0]["seconds"].values())
