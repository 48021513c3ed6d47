"""The example's pretraining with a fault: FAULT=name broken_pretrain.py [arguments of pretrain_deepspeed.py].

die: rank 1 is killed in step 5 of the first attempt. small_files: from step 3 on, rank 1 may write small files only.
slow_save: the second save takes long, and says so on stderr.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "gpt_moe"
SLOW_SECONDS = 30
SMALL_BYTES = 20_000  # less than the weights of the tests' model


def die(step: int) -> None:
    if step == 5 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)


def small_files(step: int) -> None:
    if step == 3 and os.environ["RANK"] == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_BYTES, SMALL_BYTES))


def slow_save(step: int) -> None:
    if step != 3:
        return
    import torch

    save = torch.save

    def save_slowly(*arguments: Any, **options: Any) -> None:
        save(*arguments, **options)
        print("a file is written", file=sys.stderr, flush=True)
        time.sleep(SLOW_SECONDS)

    torch.save = save_slowly


def nothing(_step: int) -> None:
    pass


def prepare_device() -> None:
    """On GPUs the same bits twice, and ranks share a card where there are fewer."""
    import torch

    if os.environ["DS_ACCELERATOR"] == "cuda":
        os.environ["LOCAL_RANK"] = str(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True, warn_only=True)


def main() -> None:
    """Run the script as it is, its train_step() preceded by the fault."""
    sys.path.insert(0, str(EXAMPLE))
    prepare_device()
    import pretrain_deepspeed as pretrain  # type: ignore[import-not-found]
    from launch_env import run_on_this_rank  # type: ignore[import-not-found]

    fault, train_step = globals()[os.environ.get("FAULT", "nothing")], pretrain.train_step

    def broken_step(engine: Any, options: Any, data: Any, step: int) -> Any:
        fault(step)
        return train_step(engine, options, data, step)

    pretrain.train_step = broken_step
    sys.exit(run_on_this_rank(pretrain.run, "pretrain_deepspeed.py"))


if __name__ == "__main__":
    main()
