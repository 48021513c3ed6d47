"""Does a lossy wire cost loss? The GPT-MoE example trained with every codec in all directions, over several seeds.

    python benchmarks/convergence.py [--quick] [--json FILE] [--plot docs/convergence.png] [--steps 300 …]

Every run of a seed has the same initial weights and the same batches; the codecs also encode rows that stay on a rank.
A codec's final loss (mean over the last tenth of the steps, then a validation loss) is compared with the spread that
the seeds alone have without a codec, and, seed by seed, with the run without a codec.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks._example import join_ranks, make_engine, run_as_ranks, take_step  # noqa: E402

CODECS = ("none", "int8", "fp8", "zfp:8", "hadamard_int8", "int4")
WITHIN_SPREAD = ("int8", "hadamard_int8", "zfp:8")  # what the project promises
FULL = {
    "ranks": 2, "seeds": 3, "steps": 300, "layers": 4, "hidden_size": 96, "experts": 8, "top_k": 2, "batch_size": 8,
    "sequence_length": 96,
}  # fmt: skip
QUICK = {**FULL, "seeds": 2, "steps": 12, "layers": 2, "hidden_size": 32, "experts": 4, "sequence_length": 32}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, few steps: shows that it runs, no more")
    parser.add_argument("--json", type=Path, help="write configuration, losses and results there")
    parser.add_argument("--plot", type=Path, help="draw the losses there")
    parser.add_argument("--codecs", default=",".join(CODECS), help="the first one is what others are compared with")
    for name, default in FULL.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"(default: {default})")
    arguments = parser.parse_args()
    for name, default in (QUICK if arguments.quick else FULL).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
    return arguments


def train(arguments: argparse.Namespace, data: Any, codec: str, seed: int) -> dict[str, Any]:
    """Losses of one run, means over the ranks: every step's, and a validation loss at the end."""
    import torch
    import torch.distributed as dist

    from model import language_loss

    engine = make_engine(arguments, seed, {"compression": codec, "chunks": 2})
    shape, size = (arguments.batch_size, arguments.sequence_length), dist.get_world_size()
    torch.manual_seed(seed)  # the router draws from it
    losses = [
        take_step(engine, *data.batch("training", step * size + dist.get_rank(), shape, seed))
        for step in range(arguments.steps)
    ]
    engine.eval()
    held_out = []
    with torch.no_grad():
        for index in range(8):
            inputs, targets = data.batch("validation", index * size + dist.get_rank(), shape, seed)
            held_out.append(float(language_loss(engine(inputs)[0], targets)))
    total = torch.tensor([*losses, statistics.fmean(held_out)], dtype=torch.float64)
    dist.all_reduce(total)
    *losses, validation = (total / size).tolist()
    engine.destroy()
    return {"codec": codec, "seed": seed, "losses": losses, "validation": validation}


def final_loss(run: dict[str, Any]) -> float:
    """Mean over the last tenth of the steps."""
    losses = run["losses"]
    return statistics.fmean(losses[-max(1, len(losses) // 10) :])


def summarize(runs: list[dict[str, Any]], codecs: list[str]) -> list[dict[str, Any]]:
    """One row per codec: final and validation loss over the seeds, and what they lie above those of the first codec."""
    of = {codec: [run for run in runs if run["codec"] == codec] for codec in codecs}
    plain = [final_loss(run) for run in of[codecs[0]]]
    plain_validation = [run["validation"] for run in of[codecs[0]]]
    spread = max(plain) - min(plain)
    rows = []
    for codec in codecs:
        final, validation = [final_loss(run) for run in of[codec]], [run["validation"] for run in of[codec]]
        rows.append(
            {
                "codec": codec,
                "final": statistics.fmean(final),
                "lowest": min(final),
                "highest": max(final),
                "above": statistics.fmean(final) - statistics.fmean(plain),
                "largest_pair": max(abs(mine - theirs) for mine, theirs in zip(final, plain, strict=True)),
                "validation": statistics.fmean(validation),
                "validation_above": statistics.fmean(validation) - statistics.fmean(plain_validation),
                "spread": spread,
                "within_spread": abs(statistics.fmean(final) - statistics.fmean(plain)) <= spread / 2,
            }
        )
    return rows


def draw(runs: list[dict[str, Any]], codecs: list[str], path: Path) -> None:
    """Losses over steps: the seeds' mean as a line, their spread as a band, for every codec."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (whole, difference) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    width = max(1, len(runs[0]["losses"]) // 20)

    def smooth(values: list[float]) -> list[float]:
        return [statistics.fmean(values[max(0, end - width) : end]) for end in range(1, len(values) + 1)]

    plain = {run["seed"]: smooth(run["losses"]) for run in runs if run["codec"] == codecs[0]}
    for codec in codecs:
        curves = {run["seed"]: smooth(run["losses"]) for run in runs if run["codec"] == codec}
        above = [
            [mine - theirs for mine, theirs in zip(curve, plain[seed], strict=True)] for seed, curve in curves.items()
        ]
        for axes, lines in ((whole, list(curves.values())), (difference, above)):
            columns = list(zip(*lines, strict=True))
            steps = range(len(columns))
            (line,) = axes.plot(steps, [statistics.fmean(column) for column in columns], label=codec, linewidth=1)
            axes.fill_between(steps, [*map(min, columns)], [*map(max, columns)], color=line.get_color(), alpha=0.15)
    whole.set(xlabel="step", ylabel="training loss (running mean)", title="mean and range of the seeds")
    difference.set(xlabel="step", ylabel=f"loss above '{codecs[0]}'", title="same seed, same batches")
    whole.legend()
    figure.savefig(path, dpi=110)


def report(arguments: argparse.Namespace, runs: list[dict[str, Any]], codecs: list[str]) -> None:
    """The table, the plot, the JSON file, the RESULT lines."""
    rows = summarize(runs, codecs)
    settings = {key: str(value) for key, value in vars(arguments).items()}
    print(f"configuration: {settings}; {len(os.sched_getaffinity(0))} cores, gloo, float32")
    print(f"seeds alone, '{codecs[0]}': final losses differ by {rows[0]['spread']:.4f}")
    print(f"{'codec':<15}{'final':>9}{'lowest':>9}{'highest':>9}{'above':>10}{'worst pair':>12}{'validation':>12}")
    for row in rows:
        print(
            f"{row['codec']:<15}{row['final']:9.4f}{row['lowest']:9.4f}{row['highest']:9.4f}{row['above']:+10.4f}"
            f"{row['largest_pair']:12.4f}{row['validation']:12.4f}  "
            f"{'within' if row['within_spread'] else 'OUTSIDE'} the seed spread"
        )
    if arguments.plot:
        draw(runs, codecs, arguments.plot)
    if arguments.json:
        arguments.json.write_text(json.dumps({"configuration": settings, "rows": rows, "runs": runs}, indent=1))
    for row in rows[1:]:
        print(f"RESULT loss_above_none_{row['codec'].replace(':', '_')}={row['above']:.5f}")
    print(f"RESULT seed_spread={rows[0]['spread']:.5f}")
    promised = [row for row in rows if row["codec"] in WITHIN_SPREAD]
    print(f"RESULT promised_codecs_within_spread={int(all(row['within_spread'] for row in promised))}")


def main() -> None:
    """Launch the ranks, or be one of them."""
    arguments = parse_arguments()
    run_as_ranks(arguments.ranks)
    join_ranks()
    import torch.distributed as dist

    from data import load_bytes

    data, codecs = load_bytes([], arguments.sequence_length), arguments.codecs.split(",")
    runs = [train(arguments, data, codec, seed) for seed in range(1, arguments.seeds + 1) for codec in codecs]
    if dist.get_rank() == 0:
        report(arguments, runs, codecs)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
