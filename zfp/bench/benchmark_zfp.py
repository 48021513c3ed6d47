"""Speed of the codec on one core against libzfp's serial code (zfpy), in GB/s of float32.

`python zfp/bench/benchmark_zfp.py [--quick] [--json FILE]`. Builds the codec with CMake first, checks that both
streams are the same, and ends with a RESULT line for each requirement. Times are processor seconds of this process, so
that a busy machine disturbs them little; zfpy's encoding includes allocating its result, a few per cent.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import zfpy

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from zfp.tests.codec import Codec, build_library  # noqa: E402


@dataclass(frozen=True)
class Row:
    """One case: GB/s of float32 values, each the best of the repeats, and the slowest repeat over the best."""

    case: str
    rate: float
    codec: str
    encode: float
    decode: float
    spread: float


@dataclass(frozen=True)
class Plan:
    """How much to run."""

    num_values: int
    repeats: int
    rates: tuple[float, ...]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="rate 8 only, fewer values")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    return parser.parse_args()


def time_calls(call: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Processor seconds of the fastest call, and the slowest over it."""
    call()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return min(seconds), max(seconds) / min(seconds)


def measure(case: str, rate: float, codec_name: str, calls: tuple[Callable, Callable], plan: Plan) -> Row:
    """Time (encode, decode)."""
    encode, decode = (time_calls(call, plan.repeats) for call in calls)
    gigabytes = 4 * plan.num_values / 1e9
    return Row(case, rate, codec_name, gigabytes / encode[0], gigabytes / decode[0], max(encode[1], decode[1]))


def measure_field(codec: Codec, case: str, values: np.ndarray, rate: float, plan: Plan) -> list[Row]:
    """Measure libzfp and every kernel on one field."""
    stream = zfpy.compress_numpy(values, rate=rate, write_header=False)
    if codec.encode(values, rate).tobytes() != stream:
        raise SystemExit(f"{case}, rate {rate}: the stream differs from libzfp's; run the tests")
    buffer, decoded = np.frombuffer(stream, np.uint8).copy(), np.empty_like(values)
    encode = partial(zfpy.compress_numpy, values, rate=rate, write_header=False)
    decode = partial(zfpy._decompress, stream, zfpy.type_float, values.shape, out=decoded, rate=rate)
    rows = [measure(case, rate, "libzfp", (encode, decode), plan)]
    for kernel in codec.kernels()[1:]:
        encode = partial(codec.encode_into, values, rate, buffer, kernel)
        decode = partial(codec.decode_into, buffer, rate, decoded, kernel)
        rows.append(measure(case, rate, kernel, (encode, decode), plan))
    return rows


def processor() -> str:
    """The processor's name."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def results(rows: list[Row], best_kernel: str) -> dict[str, float]:
    """The requirements: the best kernel over libzfp, 2-d token rows at rate 8."""
    rate_8 = {row.codec: row for row in rows if row.case == "rows (n, 4)" and row.rate == 8}
    ours, theirs = rate_8[best_kernel], rate_8["libzfp"]
    return {
        "zfp_cpu_encode_vs_libzfp": round(ours.encode / theirs.encode, 2),
        "zfp_cpu_decode_vs_libzfp": round(ours.decode / theirs.decode, 2),
    }


def main() -> None:
    """Run every case and print the figures."""
    arguments = parse_arguments()
    plan = Plan(2**18, 5, (8.0,)) if arguments.quick else Plan(2**20, 9, (4.0, 8.0, 16.0))
    codec = Codec(build_library(ROOT / "build" / "zfp"))
    normal = np.random.default_rng(0).standard_normal(plan.num_values).astype(np.float32)
    side = int(plan.num_values**0.5)
    fields = {"rows (n, 4)": normal.reshape(-1, 4), "square": normal.reshape(side, side), "1-d": normal}
    print(f"{processor()}, one core, {os.cpu_count()} here, load {os.getloadavg()[0]:.1f}; zfpy {zfpy.__version__}")
    print(f"{plan.num_values} normal float32 values, best of {plan.repeats}; best kernel: {codec.best_kernel()}")
    print(f"{'case':12} {'rate':>5} {'codec':8} {'encode':>12} {'decode':>12} {'slowest/best':>13}")
    rows = []
    for case, values in fields.items():
        for rate in plan.rates:
            for row in measure_field(codec, case, values, rate, plan):
                rows.append(row)
                speeds = f"{row.encode:7.2f} GB/s {row.decode:7.2f} GB/s"
                print(f"{row.case:12} {row.rate:5.1f} {row.codec:8} {speeds} {row.spread:13.2f}")
    outcome = results(rows, codec.best_kernel())
    if arguments.json is not None:
        record = {"processor": processor(), "plan": asdict(plan), "rows": [asdict(row) for row in rows], **outcome}
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")
    for name, value in outcome.items():
        print(f"RESULT {name}={value}")


if __name__ == "__main__":
    main()
