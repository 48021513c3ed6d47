"""What all supported versions have alike."""

from __future__ import annotations

from megatron_patches.flags import with_choice, with_flags
from megatron_patches.model import activated, agreed, translated
from megatron_patches.patching import Patch

FLAGS = Patch("megatron.training.arguments", "add_megatron_arguments", "add planmoe's flags", with_flags)
CHOICE = Patch("megatron.training.arguments", "parse_args", "check them before anything is set up", with_choice)
CHOICE_BOUND = Patch(
    "megatron.training.initialize", "parse_args", "check them where the name was bound before", with_choice
)
AGREEMENT = Patch("megatron.core.parallel_state", "initialize_model_parallel", "compare the ranks' arguments", agreed)
MODEL = Patch("megatron.training.training", "get_model", "switch the model's MoE layers over", activated)
CONFIG = Patch(
    "megatron.core.transformer.transformer_config", "TransformerConfig.__post_init__",
    "accept moe_token_dispatcher_type 'planmoe' in configs", translated,
)  # fmt: skip
