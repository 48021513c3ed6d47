"""Prints what "auto" chooses for a top-4 layer: `python auto_choice.py EXACTNESS`, on every rank."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from planmoe_ds.choose import LayerTraffic
from planmoe_ds.config import parse_config
from planmoe_ds.connect import connect


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    config = parse_config({"comm": "auto", "exactness": sys.argv[1]})
    traffic = LayerTraffic(tokens_per_rank=2048, row_bytes=2048, top_k=4, num_experts=16)
    world = list(range(dist.get_world_size()))
    group = connect({"experts": world}, config, torch.device("cpu"), {"experts": traffic})["experts"]
    if group.rank == 0:
        print(f"{group.choice.name}|{group.choice.reason}")
    group.comm.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
