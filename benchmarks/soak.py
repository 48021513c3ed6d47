"""Hours of trouble in minutes: training on an emulated cluster while rates change and ranks dawdle at random.

    python benchmarks/soak.py [--minutes 20] [--quick] [--json FILE]

2 nodes of 2 ranks train the GPT-MoE example's model in exact mode. At random steps, a node's links get other rates
(1 % to all of --inter and --intra), or a rank sleeps for up to ten steps' time. Then the same steps run undisturbed.
Found: how much each rank's resident memory grew, first against last fifth after a warm-up of 200 steps (runs below 400
are too short to say), and whether every rank's losses are those of the undisturbed run, bit for bit. Needs what
`python -m benchmarks.cluster check` needs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._example import join_ranks, make_engine, take_step
from benchmarks.cluster import SKIP, ClusterSpec, run_on_cluster
from benchmarks.cluster.spec import bits_per_second

FOLDER = "SOAK_FOLDER"  # set for ranks: where each writes what it found
CHANGE_EVERY = 10  # steps, on average, between changes of a node's rates
SLEEP_EVERY = 15
WARM_UP = 200  # steps in which caches, pools and the allocator still grow
SECTION = {"exactness": "exact", "chunks": 2, "deterministic": True, "timeout_seconds": 120}


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line, the same for the ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20, help="of disturbed training (20)")
    parser.add_argument("--quick", action="store_true", help="half a minute")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--inter", default="200mbit", help="full rate between nodes (200mbit)")
    parser.add_argument("--intra", default="1gbit", help="full rate inside nodes (1gbit)")
    parser.add_argument("--seed", type=int, default=1, help="of weights, data and trouble")
    for name, value in (("layers", 2), ("hidden-size", 64), ("experts", 8), ("top-k", 2), ("sequence-length", 64),
                        ("batch-size", 4)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=0, help=argparse.SUPPRESS)  # undisturbed, so many
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.minutes = 0.5
    return arguments


def disturb(chance: random.Random, arguments: argparse.Namespace, step_seconds: float) -> str | None:
    """Maybe give this rank's node other rates, maybe sleep; says what was done."""
    if os.environ["LOCAL_RANK"] == "0" and chance.random() < 1 / CHANGE_EVERY:
        device, full = chance.choice([("eth0", arguments.inter), ("lo", arguments.intra)])
        rate = round(bits_per_second(full) * 10 ** chance.uniform(-2, 0))
        bucket = max(45_000, rate // 8000)
        words = f"tc qdisc replace dev {device} root tbf rate {rate} burst {bucket} limit {32 << 20}"
        subprocess.run(words.split(), check=True, timeout=20)
        return "rate"
    if chance.random() < 1 / SLEEP_EVERY:
        time.sleep(chance.uniform(0, 10) * step_seconds)
        return "sleep"
    return None


def resident_kib() -> int:
    """This process's memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 10


def train(arguments: argparse.Namespace) -> dict[str, object]:
    """One rank's losses, memory after every step, and troubles."""
    import torch
    import torch.distributed as dist

    sizes = argparse.Namespace(**{**vars(arguments), "steps": 100_000})
    engine = make_engine(sizes, arguments.seed, SECTION)
    chance = random.Random(f"{arguments.seed} {dist.get_rank()}")  # noqa: S311
    undisturbed = arguments.steps > 0
    deadline = time.monotonic() + 60 * arguments.minutes
    losses: list[float] = []
    memory: list[int] = []
    troubles: dict[str, int] = {}
    go_on = torch.ones(1)
    while go_on:
        start = time.monotonic()
        torch.manual_seed(1000 * len(losses) + dist.get_rank())
        inputs = torch.randint(0, 256, (arguments.batch_size, arguments.sequence_length))
        losses.append(take_step(engine, inputs, inputs.roll(-1, 1)))
        engine.planmoe.recorder.take()
        memory.append(resident_kib())
        if not undisturbed:
            what = disturb(chance, arguments, min(1.0, time.monotonic() - start))
            if what is not None:
                troubles[what] = troubles.get(what, 0) + 1
        go_on.fill_(len(losses) < arguments.steps if undisturbed else time.monotonic() < deadline)
        dist.broadcast(go_on, 0)
    return {"losses": losses, "memory": memory, "troubles": troubles}


def run(words: list[str], minutes: float, arguments: argparse.Namespace) -> list[dict[str, list[float]]]:
    """What every rank found in one run on the cluster; exits where none can be had."""
    spec = ClusterSpec.even(2, 2, arguments.inter, arguments.intra)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        environment = {FOLDER: folder, "DS_ACCELERATOR": "cpu", "MALLOC_ARENA_MAX": "2"}
        command = [sys.executable, str(Path(__file__).resolve()), *words]
        done = run_on_cluster(spec, command, 60 * minutes + 300, environment=environment)
        if done.skip_reason is not None:
            print(f"SKIP: {done.skip_reason}", file=sys.stderr)
            sys.exit(SKIP)
        if done.returncode != 0:
            sys.exit(f"the run ended with exit code {done.returncode}:\n{done.stderr[-5000:]}")
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(spec.world_size)]


def growth(memory: list[float]) -> float | None:
    """Of a rank's memory: last fifth over first fifth after the warm-up, minus one; None for a run too short to say."""
    steady = memory[WARM_UP:]
    if len(steady) < WARM_UP:
        return None
    share = len(steady) // 5
    return statistics.median(steady[-share:]) / statistics.median(steady[:share]) - 1


def main() -> None:
    """Be one rank, or run both trainings and print the results."""
    arguments = parse()
    if FOLDER in os.environ:
        join_ranks()
        import torch.distributed as dist

        found = train(arguments)
        (Path(os.environ[FOLDER]) / f"{dist.get_rank()}.json").write_text(json.dumps(found))
        dist.destroy_process_group()
        return
    words = [f"--seed={arguments.seed}", f"--inter={arguments.inter}", f"--intra={arguments.intra}"]
    disturbed = run([*words, f"--minutes={arguments.minutes}"], arguments.minutes, arguments)
    steps = len(disturbed[0]["losses"])
    usual = run([*words, f"--steps={steps}"], 2 * arguments.minutes, arguments)
    equal = [rank["losses"] == other["losses"] for rank, other in zip(disturbed, usual, strict=True)]
    grown = [growth(rank["memory"]) for rank in disturbed]
    for number, rank in enumerate(disturbed):
        print(f"rank {number}: {steps} steps, troubles {rank['troubles']}, loss {rank['losses'][0]:.4f} to "
              f"{rank['losses'][-1]:.4f}, resident memory {rank['memory'][-1] >> 10} MiB, "
              f"grown {'by an unknown share' if grown[number] is None else format(grown[number], '.2%')}, "
              f"losses {'as' if equal[number] else 'NOT as'} undisturbed")  # fmt: skip
    print(f"RESULT soak_minutes={arguments.minutes:g}")
    print(f"RESULT soak_steps={steps}")
    judged = [share for share in grown if share is not None]
    if judged:
        print(f"RESULT soak_memory_growth={max(judged):.4f}")
    print(f"RESULT soak_losses_equal={int(all(equal))}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"disturbed": disturbed, "undisturbed": usual}) + "\n")
    if not all(equal) or max(judged, default=0.0) > 0.02:
        sys.exit("the soak found a leak or a drift")


if __name__ == "__main__":
    main()
