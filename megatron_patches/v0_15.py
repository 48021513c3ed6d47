"""Megatron core 0.15: checked with 0.15.3. initialize_megatron() parses the arguments, get_model() builds models."""

from __future__ import annotations

from megatron_patches.common import AGREEMENT, CHOICE, CHOICE_BOUND, CONFIG, FLAGS, MODEL

PATCHES = (FLAGS, CHOICE, CHOICE_BOUND, AGREEMENT, MODEL, CONFIG)
