"""Megatron core 0.16: checked with 0.16.1. The same places as in 0.15."""

from megatron_patches.v0_15 import PATCHES as PATCHES
