"""planmoe on one model: what a framework's integration returns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from planmoe_ds.auto_planner import Planner
from planmoe_ds.config import PlanMoEConfig
from planmoe_ds.execution import save_execution
from planmoe_ds.recorder import Recorder


@dataclass(frozen=True)
class Session:
    """`engine.planmoe` with DeepSpeed, what activate() returns with Megatron (`planmoe` on each model chunk)."""

    config: PlanMoEConfig
    num_layers: int
    recorder: Recorder
    planners: tuple[Planner, ...] = ()

    def save_trace(self, path: str | Path) -> None:
        """Write what ran on this rank since recorder.start_trace(), what was predicted, and the experts' loads.

        For `planmoe trace` and `planmoe simulate --trace`. OSError where the file cannot be written.
        """
        schedules = {index: planner.schedules() for index, planner in enumerate(self.planners)}
        loads = self.recorder.take_loads()
        save_execution(path, self.recorder.stop_trace(), schedules, loads)
