"""Breaks a link of the emulated cluster while two layers train: `python on_link.py ACTION [RATE]`, on every rank.

ACTION: cut, slow or none. Every rank prints a line of JSON on stderr: its number, the sums of its gradients, and
seconds, class and message of the error that it met. BACKEND: of the process group, gloo unless set.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from unittest.mock import patch

import torch
import torch.distributed as dist

import planmoe_ds.watchdog as watchdog_module
from tests.faults.layers import Model, batch, notice, seconds_until_error

BAD_NODE = "1"
ACTIONS = {
    "cut": "ip link set eth0 down",
    "slow": "tc qdisc replace dev eth0 root tbf burst 41768 limit 33554432 rate",  # and the rate
}


def disturb(action: str, *rate: str) -> None:
    """The first rank of the last node acts on its node's card."""
    if action in ACTIONS and os.environ["GROUP_RANK"] == BAD_NODE and os.environ["LOCAL_RANK"] == "0":
        subprocess.run([*ACTIONS[action].split(), *rate], check=True)


def train(model: Model, action: str, sums: list[float]) -> None:
    for step in range(6):
        if step == 2:
            disturb(action, *sys.argv[2:])
        tokens, experts = batch(256)
        model.forward(tokens, experts).sum().backward()
        assert tokens.grad is not None
        sums.append(float(tokens.grad.sum()))
    notice(model)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group(os.environ.get("BACKEND", "gloo"))
    with patch.object(watchdog_module, "SILENCE_SECONDS", 5.0):
        model = Model({"comm": "dedup", "timeout_seconds": 10})
        dist.barrier()
        sums: list[float] = []
        seconds, kind, message = seconds_until_error(lambda: train(model, sys.argv[1], sums))
    line = json.dumps({"rank": dist.get_rank(), "seconds": seconds, "kind": kind, "message": message, "sums": sums})
    sys.stderr.write(f"\nfound {line}\n")  # at once: other ranks write there, too
    sys.stderr.flush()


if __name__ == "__main__":
    main()
