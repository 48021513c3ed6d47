"""Megatron-LM main of August 2026 (it calls itself 0.20), checked with that of the 22nd. As in 0.19."""

from megatron_patches.v0_19 import PATCHES as PATCHES
