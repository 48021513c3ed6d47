"""planmoe_ds: one engine for the all-to-all of Mixture-of-Experts layers, under DeepSpeed and Megatron.

Importing this package makes `deepspeed.initialize` understand a "planmoe" section in its config; without one, or with
`"planmoe": false`, DeepSpeed is untouched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from planmoe_ds.config import PlanMoEConfig
from planmoe_ds.errors import PlanMoEConfigError, PlanMoEError, PlanMoEMismatchError
from planmoe_ds.hook import when_imported

if TYPE_CHECKING:
    from types import ModuleType

    from planmoe_ds.integrations.deepspeed import activate
    from planmoe_ds.moe import MoE

__version__ = "0.1.0"
__all__ = ["MoE", "PlanMoEConfig", "PlanMoEConfigError", "PlanMoEError", "PlanMoEMismatchError", "activate"]


def _patch_engine(engine_module: ModuleType) -> None:
    from planmoe_ds.integrations.deepspeed import install

    install(engine_module)


def __getattr__(name: str) -> Any:
    """Names that need DeepSpeed, imported when first used."""
    if name == "MoE":
        from planmoe_ds.moe import MoE

        return MoE
    if name == "activate":
        from planmoe_ds.integrations.deepspeed import activate

        return activate
    raise AttributeError(f"module 'planmoe_ds' has no attribute '{name}'")


when_imported("deepspeed.runtime.engine", _patch_engine)
