"""Megatron-LM main of August 2026 (it calls itself 0.20): names checked by reading, not run. As in 0.19."""

from megatron_patches.v0_19 import PATCHES as PATCHES
