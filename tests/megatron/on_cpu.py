"""Importing this makes megatron.core usable on CPU ranks: only rank processes do, before they import megatron."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "gpt_moe"))

from megatron_on_cpu import prepare

prepare()
