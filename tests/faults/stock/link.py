"""Stock's layers on a cluster whose link breaks: `python -m tests.faults.stock.link FRAMEWORK ACTION [RATE]` per rank.

ACTION as in tests/faults/on_link.py. Every rank prints a line on stderr when it ends: "found", its number, what with,
and after how many seconds.
"""

from __future__ import annotations

import sys
import time

import torch
import torch.distributed as dist

from tests.faults.on_link import disturb
from tests.faults.stock.layers import FRAMEWORKS, HIDDEN, TOP_K
from tests.faults.stock.steps import first_line

STEPS, STEP = 6, 2


def main() -> None:
    """Six steps; the link changes before the third."""
    framework, action = sys.argv[1:3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    layers = FRAMEWORKS[framework](None, HIDDEN, TOP_K, capacity=False)
    start = time.monotonic()
    what = "no error"
    try:
        for step in range(STEPS):
            if step == STEP:
                dist.barrier()
                disturb(action, *sys.argv[3:])
                start = time.monotonic()
            tokens = torch.randn(64, 4, HIDDEN, requires_grad=True)
            layers.functions[1](layers.functions[0](tokens)).sum().backward()
    except RuntimeError as error:
        what = first_line(error)
    print(f"\nfound rank {dist.get_rank()}: {time.monotonic() - start:.1f} s: {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
