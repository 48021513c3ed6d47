"""Quality and speed of the wire codecs, and what int8 does to an exchange's time on an emulated cluster.

    python benchmarks/codecs.py [--quick] [--json FILE] [--no-training] [--no-cluster]

Quality: signal-to-noise in dB and, in brackets, the relative error, on normal rows, rows with outlier channels,
heavy-tailed rows, and what the GPT-MoE example's own MoE layers sent in training. Speed: one core, GB/s of
values, beside libzfp through zfpy and a copy; with a GPU also there. Times are processor seconds, the best of several.
The exchange: all-to-alls of the bytes that rows of float32, bf16 and int8 take, on two emulated nodes, interleaved.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks._example import join_ranks, make_engine, run_as_ranks, take_step  # noqa: E402

CODECS = ("bf16", "int8", "hadamard_int8", "fp8", "int4", "zfp:4", "zfp:8", "zfp:16", "e4m7", "lossless")
OF_BFLOAT16 = ("e4m7", "lossless")  # those that take no other rows
HIDDEN = 4096
CLUSTER = "2x1@400mbit/2gbit"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rows, steps and rounds: under a minute on 2 cores")
    parser.add_argument("--json", type=Path, help="write configuration, tables and results there")
    parser.add_argument("--no-training", action="store_true", help="leave out the example's own tensors")
    parser.add_argument("--no-cluster", action="store_true", help="leave out the emulated cluster")
    parser.add_argument("--capture", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def synthetic(num_rows: int) -> dict[str, Any]:
    """Rows [num_rows, HIDDEN] of three kinds."""
    import torch

    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(num_rows, HIDDEN, generator=generator)
    outliers = torch.nn.functional.layer_norm(
        normal * (1 + 29 * (torch.rand(HIDDEN, generator=generator) < 0.01)), [HIDDEN]
    )
    degrees = 3.0
    chi = torch.distributions.Chi2(torch.tensor(degrees))
    torch.manual_seed(0)
    heavy = normal * (degrees / chi.sample((num_rows, HIDDEN))).sqrt() * 1e-3
    return {"normal": normal, "outlier channels": outliers, "heavy-tailed": heavy}


def capture(arguments: argparse.Namespace) -> None:
    """Be one rank: train the example and save the rows that its MoE layers encode in the last step."""
    import torch
    import torch.distributed as dist

    from data import load_bytes
    from planmoe_ds.guard import Meter

    rows: dict[str, list[Any]] = {}
    measure = Meter.measure

    def keep(self: Any, way: tuple[str, str], codec: Any, values: Any) -> None:
        if values.shape[0] > 0:
            rows.setdefault(way[0], []).append(values.detach().clone())
        measure(self, way, codec, values)

    sizes = {"layers": 2, "hidden_size": 128, "experts": 4, "top_k": 2, "batch_size": 8, "sequence_length": 64}
    sizes["steps"] = 20 if arguments.quick else 200
    settings = argparse.Namespace(**sizes)
    guard = {"interval": settings.steps - 1, "max_error": 1e9}  # measures the first step, and the last one
    engine = make_engine(settings, 1, {"compression": "bf16", "guard": guard, "chunks": 1})
    data = load_bytes([], settings.sequence_length)
    shape = (settings.batch_size, settings.sequence_length)
    for step in range(settings.steps):
        if step == settings.steps - 1:
            Meter.measure = keep  # type: ignore[method-assign]
        take_step(engine, *data.batch("training", step * 2 + dist.get_rank(), shape, 1))
    Meter.measure = measure  # type: ignore[method-assign]
    if dist.get_rank() == 0:
        torch.save({f"example: {way}": torch.cat(parts)[:2048] for way, parts in rows.items()}, arguments.capture)
    dist.destroy_process_group()


def captured(arguments: argparse.Namespace) -> dict[str, Any]:
    """The example's own rows by direction, from a run of two ranks."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.pt"
        command = [sys.executable, __file__, f"--capture={path}", *(["--quick"] if arguments.quick else [])]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return torch.load(path, weights_only=True)


def quality(kinds: dict[str, Any]) -> list[dict[str, Any]]:
    """For every codec: bits per value, and the relative error on every kind of rows; lossless: how often it fits."""
    import torch

    from planmoe_ds.backend import make_compressor

    rows = []
    for name in CODECS:
        codec = make_compressor(name)
        dtype = torch.bfloat16 if name in OF_BFLOAT16 else torch.float32
        row: dict[str, Any] = {"codec": name, "bits": codec.row_bytes(HIDDEN, dtype) * 8 / HIDDEN, "error": {}}
        for kind, values in kinds.items():
            wanted = values.to(dtype)
            if codec.misfits(wanted):
                row["error"][kind] = math.nan
                continue
            decoded = torch.empty_like(wanted)
            codec.decode(codec.encode(wanted), decoded)
            row["error"][kind] = float((decoded.double() - wanted.double()).norm() / wanted.double().norm())
        rows.append(row)
    return rows


def best_seconds(call: Callable[[], object], repeats: int, clock: Callable[[], float] = time.process_time) -> float:
    """Of the fastest call."""
    call()
    seconds = []
    for _ in range(repeats):
        start = clock()
        call()
        seconds.append(clock() - start)
    return min(seconds)


def speed(device: str, quick: bool) -> list[dict[str, Any]]:
    """GB/s of values, encode and decode, for every codec and a copy on "cpu" (one core) or "cuda"."""
    import torch

    from planmoe_ds.backend import make_compressor

    gpu = device == "cuda"
    num_rows, repeats = (16384, 10) if gpu else (256, 5) if quick else (512, 15)
    normal = torch.randn(num_rows, HIDDEN, generator=torch.Generator().manual_seed(0)).to(device)

    def timed(call: Callable[[], object]) -> float:
        def finished() -> None:
            call()
            if gpu:
                torch.cuda.synchronize()

        return best_seconds(finished, repeats, time.perf_counter if gpu else time.process_time)

    target = torch.empty_like(normal)
    copy = normal.numel() * 4 / timed(lambda: target.copy_(normal)) / 1e9
    found = [{"codec": "copy", "device": device, "dtype": "float32", "encode": copy, "decode": copy}]
    for name in CODECS:
        codec = make_compressor(name)
        for dtype in (torch.float32, torch.bfloat16):
            if name in OF_BFLOAT16 and dtype is torch.float32:
                continue
            rows = normal.to(dtype)
            num_bytes = rows.numel() * rows.element_size()
            wire, out = codec.encode(rows), torch.empty_like(rows)
            encode = timed(lambda: codec.encode_into(rows, None, wire))  # noqa: B023  called at once
            decode = timed(lambda: codec.decode(wire, out))  # noqa: B023
            kind = str(dtype).removeprefix("torch.")
            speeds = {"encode": num_bytes / encode / 1e9, "decode": num_bytes / decode / 1e9}
            found.append({"codec": name, "device": device, "dtype": kind, **speeds})
    return found


def libzfp(quick: bool) -> dict[str, Any]:
    """GB/s of LLNL's serial code for the same rows and rate 8: 2-d fields of width 4, all rows in one call."""
    import numpy as np
    import zfpy

    num_values = (64 if quick else 256) * HIDDEN
    values = np.random.default_rng(0).standard_normal(num_values).astype(np.float32).reshape(-1, 4)
    stream, out = zfpy.compress_numpy(values, rate=8, write_header=False), np.empty_like(values)
    encode = best_seconds(lambda: zfpy.compress_numpy(values, rate=8, write_header=False), 5)
    decode = best_seconds(lambda: zfpy._decompress(stream, zfpy.type_float, values.shape, out=out, rate=8), 5)
    speeds = {"encode": 4 * num_values / encode / 1e9, "decode": 4 * num_values / decode / 1e9}
    return {"codec": "libzfp, rate 8", "device": "cpu", "dtype": "float32", **speeds}


def exchange(quick: bool) -> dict[str, float] | None:
    """Median seconds of an exchange between two emulated nodes by codec; None where there can be no such cluster."""
    from benchmarks._codec_exchange import measure_on_cluster

    return measure_on_cluster(CLUSTER, 512 if quick else 2048, HIDDEN // 4, 5 if quick else 9)


def results(tables: dict[str, Any]) -> dict[str, float]:
    """The RESULT lines."""
    by = {(row["codec"], row["device"], row["dtype"]): row for row in tables["speed"]}
    ours, theirs = by["zfp:8", "cpu", "float32"], by["libzfp, rate 8", "cpu", "float32"]
    lossless = next(row for row in tables["quality"] if row["codec"] == "lossless")
    found = {
        "zfp_cpu_encode_vs_libzfp": ours["encode"] / theirs["encode"],
        "zfp_cpu_decode_vs_libzfp": ours["decode"] / theirs["decode"],
        "lossless_ratio": 16 / lossless["bits"],
    }
    times = tables["exchange"]
    if times is not None:
        found["int8_exchange_speedup_vs_bf16"] = times["bf16"] / times["int8"]
        found["int8_exchange_speedup_vs_fp32"] = times["none"] / times["int8"]
        found["int8_speedup_over_byte_ratio_bf16"] = times["bf16"] / times["int8"] / (16 / 8.25)
        found["int8_speedup_over_byte_ratio_fp32"] = times["none"] / times["int8"] / (32 / 8.25)
    return found


def print_tables(tables: dict[str, Any]) -> None:
    """For people."""
    kinds = list(tables["quality"][0]["error"])
    print(f"{'codec':<15}{'bits':>7}" + "".join(f"{kind:>22}" for kind in kinds))
    for row in tables["quality"]:
        cells = [_decibels(row["error"][kind]) for kind in kinds]
        print(f"{row['codec']:<15}{row['bits']:7.3f}" + "".join(f"{cell:>22}" for cell in cells))
    print(f"\n{'codec':<15}{'device':>7}{'dtype':>10}{'encode GB/s':>13}{'decode GB/s':>13}")
    for row in tables["speed"]:
        print(f"{row['codec']:<15}{row['device']:>7}{row['dtype']:>10}{row['encode']:13.2f}{row['decode']:13.2f}")
    if tables["exchange"] is None:
        print("\nno exchange: this machine cannot emulate a cluster, or --no-cluster")
    else:
        print(f"\nexchange on {CLUSTER}: " + ", ".join(f"{k} {v * 1e3:.1f} ms" for k, v in tables["exchange"].items()))


def _decibels(error: float) -> str:
    if math.isnan(error):
        return "does not fit"
    return "exact" if error == 0 else f"{-20 * math.log10(error):.1f} dB ({error:.2%})"


def main() -> None:
    """Measure, print, write; or be a rank of the capture run."""
    arguments = parse_arguments()
    if arguments.capture is not None:
        run_as_ranks(2)
        join_ranks()
        return capture(arguments)
    import torch

    torch.set_num_threads(1)
    kinds = synthetic(64 if arguments.quick else 1024)
    if not arguments.no_training:
        kinds |= captured(arguments)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    tables: dict[str, Any] = {
        "quality": quality(kinds),
        "speed": [libzfp(arguments.quick), *(row for device in devices for row in speed(device, arguments.quick))],
        "exchange": None if arguments.no_cluster else exchange(arguments.quick),
    }
    settings = {key: str(value) for key, value in vars(arguments).items()}
    print(f"configuration: {settings}; {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}")
    print_tables(tables)
    found = results(tables)
    if arguments.json:
        arguments.json.write_text(json.dumps({"configuration": settings, **tables, "results": found}, indent=1))
    for name, value in found.items():
        print(f"RESULT {name}={value:.3f}")
    return None


if __name__ == "__main__":
    main()
