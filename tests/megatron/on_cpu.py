"""Importing this makes megatron.core usable on ranks without a GPU: they do so before they import megatron."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "gpt_moe"))

import torch

from megatron_on_cpu import prepare

if not torch.cuda.is_available():
    prepare()
