"""Megatron core 0.19: checked with 0.19.0.

Scripts parse arguments themselves, with parse_and_validate_args(), and a model may come from a config's builder
instead of get_model().
"""

from __future__ import annotations

from megatron_patches.common import AGREEMENT, CHOICE, CONFIG, FLAGS, MODEL
from megatron_patches.model import activated
from megatron_patches.patching import Patch

BUILDER = Patch(
    "megatron.training.models.dist_utils", "unimodal_build_distributed_models",
    "switch the MoE layers of models from a config's builder over", activated,
)  # fmt: skip
PATCHES = (FLAGS, CHOICE, AGREEMENT, MODEL, BUILDER, CONFIG)
