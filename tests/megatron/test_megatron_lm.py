"""Megatron-LM's own pretrain_gpt.py: MEGATRON_LM names a checkout; skipped without."""

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
ALONE = ["--moe-token-dispatcher", "planmoe"]  # the adviser chooses
TWO_CHUNKS = ["--moe-token-dispatcher", "planmoe", "--planmoe-chunks", "2", "--planmoe-comm", "dedup"]
ARGUMENTS = """
    --num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --seq-length 32 --disable-bias-linear
    --max-position-embeddings 32 --position-embedding-type rope --attention-dropout 0 --hidden-dropout 0
    --num-experts 8 --moe-router-topk 2 --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01
    --micro-batch-size 2 --global-batch-size 8
    --lr 1e-2 --min-lr 1e-2 --lr-decay-style constant --tokenizer-type NullTokenizer --vocab-size 8191 --mock-data
    --split 99,1,0 --num-workers 0 --eval-iters 0 --eval-interval 1000 --log-interval 1
    --no-create-attention-mask-in-dataloader --transformer-impl local --no-gradient-accumulation-fusion
    --no-persist-layer-norm --no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-dropout-fusion --no-rope-fusion
"""
ON_CPU = ["--distributed-backend", "gloo", "--use-cpu-initialization", "--train-iters", "4"]
ON_GPUS = ["--bf16", "--train-iters", "20"]

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not CHECKOUT, reason="MEGATRON_LM names no checkout of Megatron-LM"),
]


def losses(ranks: int, *arguments: str, on_gpus: bool = False) -> list[float]:
    """Language-model loss of every step of a run with all ranks expert-parallel."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", str(port)]
    script = [str(ROOT / "tests" / "megatron" / "run_megatron_lm.py"), "pretrain_gpt.py"]
    sizes = [*ARGUMENTS.split(), "--expert-model-parallel-size", str(ranks), *(ON_GPUS if on_gpus else ON_CPU)]
    paths = [CHECKOUT, str(ROOT), os.environ.get("PYTHONPATH", "")]
    hidden = {} if on_gpus else {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *launch, *script, *sizes, *arguments],
        cwd=CHECKOUT, capture_output=True, text=True, timeout=100,
        env={**os.environ, **hidden, "PYTHONPATH": ":".join(paths), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [float(loss) for loss in re.findall(r"lm loss: (\S+)", done.stdout)]


@pytest.mark.timeout(400)
def test_same_losses() -> None:
    stock = losses(2, *ALLTOALL)
    assert len(stock) == 4
    assert losses(2, *PLANMOE) == stock
    for arguments in (TWO_CHUNKS, ALONE):
        assert losses(2, *arguments) == pytest.approx(stock, rel=1e-5)


@pytest.mark.gpu
@pytest.mark.timeout(400)
def test_same_losses_on_gpus() -> None:
    """Four ranks, which share cards where there are fewer."""
    stock = losses(4, *ALLTOALL, on_gpus=True)
    assert len(stock) == 20
    for settings in (PLANMOE, TWO_CHUNKS):
        assert losses(4, *settings, on_gpus=True) == pytest.approx(stock, rel=2e-2)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("writer", "reader"), [(PLANMOE, ALLTOALL), (ALLTOALL, PLANMOE)], ids=["planmoe", "alltoall"])
def test_checkpoint_goes_on_with_the_other(tmp_path: Path, writer: list[str], reader: list[str]) -> None:
    """As with the one that wrote it: Megatron itself resumes such a run with other losses than undisturbed."""
    losses(2, *writer, "--save", str(tmp_path), "--save-interval", "2", "--exit-interval", "2")
    load = ["--load", str(tmp_path), "--use-checkpoint-args"]
    expected, resumed = losses(2, *writer, *load), losses(2, *reader, *load)
    assert len(expected) == 2
    assert resumed == expected
