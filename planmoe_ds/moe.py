"""A drop-in MoE layer for people who write new models: DeepSpeed's signature, planmoe's dispatch."""

from __future__ import annotations

import torch
from deepspeed.moe.layer import MoE as DeepSpeedMoE

from planmoe_ds.errors import PlanMoEError
from planmoe_ds.integrations.deepspeed import PlanMoELayer


class MoE(DeepSpeedMoE):
    """deepspeed.moe.layer.MoE that goes through planmoe without a "planmoe" section in the config.

    Arguments and results are DeepSpeed's. `deepspeed.initialize` switches it on, with the config's "planmoe" section
    if there is one and as with `true` otherwise; so does `planmoe_ds.activate(model)` for models without an engine.
    """

    planmoe_drop_in = True

    def forward(
        self, hidden_states: torch.Tensor, used_token: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """hidden_states [..., H] -> (output [..., H], l_aux scalar, exp_counts [E])."""
        if not self.planmoe_drop_in:  # the config said "planmoe": false
            return super().forward(hidden_states, used_token)
        if not isinstance(self.deepspeed_moe, PlanMoELayer):
            raise PlanMoEError(
                "planmoe_ds.MoE was called before it was set up: pass the model to deepspeed.initialize first, or "
                "call planmoe_ds.activate(model) once the process groups exist"
            )
        return super().forward(hidden_states, used_token)
