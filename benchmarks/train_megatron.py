"""Step time of a small GPT-MoE with megatron.core: stock alltoall against planmoe on an emulated 2-node cluster.

    python benchmarks/train_megatron.py [--quick] [--json FILE] [--inter 60mbit --intra 300mbit …]

Every variant is a model of its own over the same ranks; step after step each takes its turn, so that noise hits all
alike. "compute alone" is stock with its all-to-alls left out: the bound that no dispatch can beat, and what says how
much of the stock step is communication.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples/gpt_moe")]

STOCK, BOUND, EXACT, EIGHT_BIT = "stock alltoall", "compute alone (bound)", "planmoe dedup", "planmoe dedup, int8"
VARIANTS: dict[str, Any] = {
    STOCK: None,
    BOUND: None,
    "planmoe direct": {"comm": "direct", "chunks": 1},
    EXACT: {"comm": "dedup"},
    EIGHT_BIT: {"comm": "dedup", "compression": "int8"},
}
VOCABULARY = 256


@dataclass
class Row:
    """One variant's medians over steps; the slowest rank's time, rank 0's bytes."""

    variant: str
    milliseconds: float
    spread: float  # interquartile range, milliseconds
    speedup: float  # over stock
    sent_bytes: float | None


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps: about a minute on 2 cores")
    parser.add_argument("--json", type=Path, help="write configuration and rows there")
    parser.add_argument("--inter", default="60mbit", help="rate of a node's card")
    parser.add_argument("--intra", default="300mbit", help="rate inside a node")
    for name, default in {
        "steps": 12, "chunks": 2, "layers": 2, "hidden-size": 128, "ffn-size": 128, "experts": 64, "batch-size": 4,
        "sequence-length": 96, "ranks-per-node": 2,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--top-k", type=int, nargs="+", default=[8, 2], help="experts per token, one table each")
    return parser.parse_args()


def make_model(arguments: argparse.Namespace, top_k: int, section: Any) -> Any:
    """A GPT whose every layer is a MoE, data-parallel, with an optimizer; with or without planmoe."""
    import torch
    import torch.distributed as dist
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from planmoe_ds.integrations.megatron import activate

    torch.manual_seed(1)
    config = TransformerConfig(
        num_layers=arguments.layers, hidden_size=arguments.hidden_size, num_attention_heads=4,
        ffn_hidden_size=arguments.ffn_size, moe_ffn_hidden_size=arguments.ffn_size,
        num_moe_experts=arguments.experts, moe_router_topk=top_k, moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=0.01, moe_token_dispatcher_type="alltoall",
        expert_model_parallel_size=dist.get_world_size(), add_bias_linear=False, use_cpu_initialization=True,
        gradient_accumulation_fusion=False, bias_activation_fusion=False, bias_dropout_fusion=False,
        masked_softmax_fusion=False, apply_rope_fusion=False, persist_layer_norm=False,
    )  # fmt: skip
    model: Any = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_decoder_block_spec(config, use_transformer_engine=False),
        vocab_size=VOCABULARY,
        max_sequence_length=arguments.sequence_length,
        position_embedding_type="rope",
    )
    model = DistributedDataParallel(config, DistributedDataParallelConfig(overlap_grad_reduce=False), model)
    if section is not None:
        settings = {"chunks": arguments.chunks, "ranks_per_node": arguments.ranks_per_node, **section}
        activate(model, settings)
    return model


def take_step(model: Any, tokens: Any, bound: bool) -> float:
    """Forward and backward of the slowest rank, in seconds; the dense gradients' all-reduce is not the subject."""
    import torch
    import torch.distributed as dist

    from benchmarks._stock import without_megatron_all_to_all

    model.zero_grad_buffer()
    positions = torch.arange(tokens.shape[1] - 1).expand(tokens.shape[0], -1)
    dist.barrier()
    start = time.perf_counter()
    with without_megatron_all_to_all(active=bound):
        losses = model(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous())
        losses.mean().backward()
    seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds)


def measure(arguments: argparse.Namespace, top_k: int) -> list[Row]:
    """Interleave all variants; collective."""
    import torch

    models = {name: make_model(arguments, top_k, section) for name, section in VARIANTS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    sent: dict[str, list[int]] = {name: [] for name in VARIANTS}
    for step in range((4 if arguments.quick else arguments.steps) + 1):
        tokens = torch.randint(0, VOCABULARY, (arguments.batch_size, arguments.sequence_length + 1))
        for name, model in models.items():
            elapsed = take_step(model, tokens, name == BOUND)
            session = getattr(model, "planmoe", None)
            if step > 0:
                seconds[name].append(elapsed)
            if session is not None:
                sent[name].append(session.recorder.take().bytes_sent)
    stock = statistics.median(seconds[STOCK])
    rows = []
    for name, values in seconds.items():
        quartiles = statistics.quantiles(values, n=4)
        median = statistics.median(values)
        num_bytes = statistics.median(sent[name]) if sent[name] else None
        rows.append(Row(name, median * 1e3, (quartiles[2] - quartiles[0]) * 1e3, stock / median, num_bytes))
    return rows


def print_table(arguments: argparse.Namespace, top_k: int, rows: list[Row]) -> None:
    """One table, and what share of the stock step is communication."""
    share = 1 - rows[1].milliseconds / rows[0].milliseconds
    print(f"\ntop-{top_k} of {arguments.experts}: communication is {share:.0%} of the stock step")
    print(f"{'variant':<26}{'ms/step':>9}{'± IQR':>8}{'speed-up':>10}{'kB sent':>9}")
    for row in rows:
        sent = "" if row.sent_bytes is None else f"{row.sent_bytes / 1e3:9.0f}"
        print(f"{row.variant:<26}{row.milliseconds:9.1f}{row.spread:8.1f}{row.speedup:10.2f}{sent}")


def be_a_rank(arguments: argparse.Namespace) -> None:
    """Measure; rank 0 reports."""
    import torch
    import torch.distributed as dist

    from megatron_on_cpu import prepare

    torch.set_num_threads(1)
    prepare()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(expert_model_parallel_size=dist.get_world_size())
    model_parallel_cuda_manual_seed(1)
    torch.manual_seed(dist.get_rank())
    tables = {top_k: measure(arguments, top_k) for top_k in arguments.top_k}
    if dist.get_rank() == 0:
        print(f"configuration: {vars(arguments)}; {len(os.sched_getaffinity(0))} cores, gloo, fp32")
        for top_k, rows in tables.items():
            print_table(arguments, top_k, rows)
        if arguments.json:
            settings = {key: str(value) for key, value in vars(arguments).items()}
            rows_of = {f"top-{top_k}": [asdict(row) for row in rows] for top_k, rows in tables.items()}
            arguments.json.write_text(json.dumps({"configuration": settings, "rows": rows_of}, indent=1))
        for top_k, rows in tables.items():
            suffix = "" if top_k == arguments.top_k[0] else f"_top{top_k}"
            speedups = {row.variant: row.speedup for row in rows}
            print(f"RESULT train_speedup_exact{suffix}={speedups[EXACT]:.3f}")
            print(f"RESULT train_speedup_8bit{suffix}={speedups[EIGHT_BIT]:.3f}")
    dist.destroy_process_group()


def main() -> None:
    """Launch the cluster, or be one of its ranks."""
    arguments = parse_arguments()
    if "RANK" in os.environ:
        be_a_rank(arguments)
        return
    from benchmarks.cluster import ClusterSpec, run_on_cluster

    spec = ClusterSpec.even(2, arguments.ranks_per_node, arguments.inter, arguments.intra)
    line = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:]]
    sys.exit(run_on_cluster(spec, line, 900, environment={"OMP_NUM_THREADS": "1"}, capture=False).returncode)


if __name__ == "__main__":
    main()
