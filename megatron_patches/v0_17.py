"""Megatron core 0.17: names checked by reading 0.17.1, not run. The same places as in 0.16."""

from __future__ import annotations

from megatron_patches.common import AGREEMENT, CHOICE, CHOICE_BOUND, CONFIG, FLAGS, MODEL

PATCHES = (FLAGS, CHOICE, CHOICE_BOUND, AGREEMENT, MODEL, CONFIG)
