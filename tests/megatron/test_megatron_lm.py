"""Megatron-LM's own pretrain_gpt.py on CPU ranks: MEGATRON_LM names a checkout; skipped without."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = os.environ.get("MEGATRON_LM", "")
ROOT = Path(__file__).resolve().parents[2]
ALLTOALL = ["--moe-token-dispatcher-type", "alltoall"]
PLANMOE = ["--moe-token-dispatcher", "planmoe", "--planmoe-exactness", "exact", "--planmoe-chunks", "1"]
ARGUMENTS = """
    --num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --seq-length 32 --disable-bias-linear
    --max-position-embeddings 32 --position-embedding-type rope --attention-dropout 0 --hidden-dropout 0
    --num-experts 8 --moe-router-topk 2 --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01
    --expert-model-parallel-size 2 --micro-batch-size 2 --global-batch-size 8 --train-iters 4
    --lr 1e-2 --min-lr 1e-2 --lr-decay-style constant --tokenizer-type NullTokenizer --vocab-size 127 --mock-data
    --split 99,1,0 --num-workers 0 --eval-iters 0 --eval-interval 1000 --log-interval 1
    --no-create-attention-mask-in-dataloader
    --distributed-backend gloo --transformer-impl local --use-cpu-initialization --no-gradient-accumulation-fusion
    --no-persist-layer-norm --no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-dropout-fusion --no-rope-fusion
"""

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not CHECKOUT, reason="MEGATRON_LM names no checkout of Megatron-LM"),
]


def losses(*arguments: str) -> list[str]:
    """Language-model loss of every step of a run on two ranks."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    script = [str(ROOT / "tests" / "megatron" / "run_megatron_lm.py"), "pretrain_gpt.py"]
    paths = [CHECKOUT, str(ROOT), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, *launch, *script, *ARGUMENTS.split(), *arguments],
        cwd=CHECKOUT, capture_output=True, text=True, timeout=100,
        env={**os.environ, "PYTHONPATH": ":".join(paths), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return re.findall(r"lm loss: (\S+)", done.stdout)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("writer", "reader"), [(PLANMOE, ALLTOALL), (ALLTOALL, PLANMOE)], ids=["planmoe", "alltoall"])
def test_checkpoint_goes_on_with_the_other(tmp_path: Path, writer: list[str], reader: list[str]) -> None:
    """As with the one that wrote it: Megatron itself resumes such a run with other losses than undisturbed."""
    losses(*writer, "--save", str(tmp_path), "--save-interval", "2", "--exit-interval", "2")
    load = ["--load", str(tmp_path), "--use-checkpoint-args"]
    expected, resumed = losses(*writer, *load), losses(*reader, *load)
    assert len(expected) == 2
    assert resumed == expected
