"""Importing this before megatron makes it usable on ranks without a GPU, or without Transformer Engine."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "gpt_moe"))

import torch

from megatron_on_cpu import prepare
from megatron_without_engine import do_without_transformer_engine

if not torch.cuda.is_available():
    prepare()
else:
    do_without_transformer_engine()
