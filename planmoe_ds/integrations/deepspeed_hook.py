"""What is patched in DeepSpeed: DeepSpeedEngine._configure_distributed_model, wrapped once.

Engines with planmoe on have their save_checkpoint and load_checkpoint wrapped, too: see deepspeed_checkpoints.py.

Light on purpose: it is imported with planmoe_ds, before anybody has asked for planmoe.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any


def install(engine_module: ModuleType) -> None:
    """Wrap the method of deepspeed.runtime.engine's DeepSpeedEngine; calling it again changes nothing.

    Raises ImportError naming the missing attribute when this DeepSpeed has no such method.
    """
    engine_class = engine_module.DeepSpeedEngine
    original = getattr(engine_class, "_configure_distributed_model", None)
    if original is None:
        raise ImportError(
            "deepspeed.runtime.engine.DeepSpeedEngine has no _configure_distributed_model: planmoe_ds is tested with "
            "deepspeed 0.19.8"
        )
    if hasattr(original, "planmoe_wraps"):
        return

    @functools.wraps(original)
    def configure_distributed_model(engine: Any, model: Any) -> None:
        from planmoe_ds.integrations.deepspeed import agree, configure

        config = agree(engine, model)
        original(engine, model)
        session = configure(engine, config)
        if session is not None:
            engine.planmoe = session

    configure_distributed_model.planmoe_wraps = original  # type: ignore[attr-defined]
    engine_class._configure_distributed_model = configure_distributed_model
