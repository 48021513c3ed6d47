"""planmoe_ds: one engine for the all-to-all of Mixture-of-Experts layers, under DeepSpeed and Megatron.

Importing this package makes `deepspeed.initialize` understand a "planmoe" section in its config; without one, or with
`"planmoe": false`, DeepSpeed is untouched.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from planmoe_ds.errors import PlanMoEConfigError, PlanMoEError, PlanMoEMismatchError
from planmoe_ds.hook import when_imported
from planmoe_ds.integrations.deepspeed_hook import install

if TYPE_CHECKING:
    from planmoe_ds.config import PlanMoEConfig
    from planmoe_ds.integrations.deepspeed import activate
    from planmoe_ds.moe import MoE
    from planmoe_ds.plugins import (
        AbstractComm,
        AbstractCompressor,
        AbstractScheduler,
        register_comm,
        register_compressor,
        register_scheduler,
    )

__version__ = "0.1.0"
__all__ = [
    "AbstractComm",
    "AbstractCompressor",
    "AbstractScheduler",
    "MoE",
    "PlanMoEConfig",
    "PlanMoEConfigError",
    "PlanMoEError",
    "PlanMoEMismatchError",
    "activate",
    "register_comm",
    "register_compressor",
    "register_scheduler",
]

_LAZY = {  # need the compiled backend or DeepSpeed
    "AbstractComm": "planmoe_ds.plugins",
    "AbstractCompressor": "planmoe_ds.plugins",
    "AbstractScheduler": "planmoe_ds.plugins",
    "MoE": "planmoe_ds.moe",
    "PlanMoEConfig": "planmoe_ds.config",
    "activate": "planmoe_ds.integrations.deepspeed",
    "register_comm": "planmoe_ds.plugins",
    "register_compressor": "planmoe_ds.plugins",
    "register_scheduler": "planmoe_ds.plugins",
}


def __getattr__(name: str) -> Any:
    """Import what `name` needs when it is first used."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'planmoe_ds' has no attribute '{name}'")


when_imported("deepspeed.runtime.engine", install)
