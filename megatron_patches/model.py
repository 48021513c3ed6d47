"""The model: ranks agree before Megatron makes its groups, and planmoe takes over once the model is built."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from megatron_patches.flags import DISPATCHER, shared_settings
from planmoe_ds.agreement import ENABLED, check_agreement


def agreed(initialize_model_parallel: Callable[..., Any]) -> Callable[..., Any]:
    """Compare the ranks' arguments first: groups made of different ones would hang."""

    def initialize(*args: Any, **kwargs: Any) -> Any:
        arguments = _arguments()
        if arguments is not None and dist.is_initialized():
            section = getattr(arguments, "planmoe", None)
            settings = {ENABLED: str(section is not None)}
            if section is not None:
                settings |= {f"planmoe.{key}": str(section[key]) for key in (section if section is not True else ())}
                settings |= shared_settings(arguments)
            check_agreement(settings)
        return initialize_model_parallel(*args, **kwargs)

    return initialize


def activated(build_models: Callable[..., Any]) -> Callable[..., Any]:
    """Switch the chunks of this stage over once they are built, before the optimizer and any checkpoint."""
    active: list[bool] = []  # then a dense model beside, as for upcycling, is left alone

    def build(*args: Any, **kwargs: Any) -> Any:
        models = build_models(*args, **kwargs)
        section = getattr(_arguments(), "planmoe", None)
        if section is not None and (_arguments().num_experts is not None or not active):
            from planmoe_ds.integrations.megatron import activate

            active.append(activate(models, section) is not None)
        return models

    return build


def translated(post_init: Callable[..., Any]) -> Callable[..., Any]:
    """A TransformerConfig that says planmoe is checked as one that says alltoall: its checks know that name."""

    def check(config: Any) -> None:
        if getattr(config, DISPATCHER) == "planmoe":
            setattr(config, DISPATCHER, "alltoall")
            arguments = _arguments()
            if arguments is None:
                what = "stays 'alltoall' until planmoe_ds.integrations.megatron.activate(model) is called"
                warnings.warn(f"{DISPATCHER} = 'planmoe' {what}", stacklevel=3)
            elif getattr(arguments, "planmoe", None) is None:
                arguments.planmoe = True
        post_init(config)

    return check


def _arguments() -> Any:
    """Megatron's global arguments, None where nobody has parsed any."""
    return getattr(sys.modules.get("megatron.training.global_vars"), "_GLOBAL_ARGS", None)
