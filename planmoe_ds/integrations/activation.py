"""What the integrations of all frameworks do alike: compare settings, then make the engine's layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from planmoe_ds.agreement import ENABLED, FAILED, check_agreement
from planmoe_ds.auto_planner import ChoiceLog
from planmoe_ds.backend import build_info
from planmoe_ds.choose import LayerTraffic
from planmoe_ds.choose_codecs import resolve_compression
from planmoe_ds.codecs import make_codecs
from planmoe_ds.compression import AUTO
from planmoe_ds.config import PlanMoEConfig
from planmoe_ds.connect import connect, connect_hosts
from planmoe_ds.group import ExpertGroup
from planmoe_ds.guard import QualityGuard
from planmoe_ds.layer import ExpertParallelLayer
from planmoe_ds.recorder import Recorder
from planmoe_ds.session import Session

NOMINAL_TOKENS = 4096  # tokens per rank and layer call that all-to-alls are compared for


@dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """A MoE layer as far as it is known before the first batch; see LayerTraffic and ExpertParallelLayer.

    group: a name of its expert-parallel group; ranks: the group's global ranks; dtype: of the experts.
    """

    group: str
    ranks: list[int]
    hidden_size: int
    dtype: torch.dtype
    top_k: int
    num_experts: int
    place_of_source: tuple[int, ...] | None = None

    def traffic(self) -> LayerTraffic:
        """What it sends."""
        return LayerTraffic(
            tokens_per_rank=NOMINAL_TOKENS,
            row_bytes=self.hidden_size * self.dtype.itemsize,
            top_k=self.top_k,
            num_experts=self.num_experts,
        )


@dataclass(frozen=True)
class EngineLayers:
    """The engine's layers in the order of the model's, their groups by name, and how it all is set up in words."""

    config: PlanMoEConfig
    layers: list[ExpertParallelLayer]
    groups: dict[str, ExpertGroup]
    recorder: Recorder
    description: str

    def session(self) -> Session:
        """What the user gets."""
        planners = tuple(layer.planner for layer in self.layers)
        return Session(self.config, len(self.layers), self.recorder, planners)


def settings_of(config: PlanMoEConfig) -> dict[str, str]:
    """What every rank must have in common of planmoe's config, by the name a user knows it by."""
    settings = {f"planmoe.{key}": str(value) for key, value in config.model_dump(mode="json").items()}
    return {ENABLED: str(config.enabled), **(settings if config.enabled else {})}


def report_failure(reason: str) -> None:
    """Let the other ranks know before this one raises; the caller's error is the better one."""
    try:
        check_agreement({FAILED: reason})
    except RuntimeError:
        return


def device_of(modules: Iterable[nn.Module]) -> torch.device:
    """Where the modules are: on an accelerator as soon as one parameter is, as Megatron's routers start on the CPU."""
    devices = [parameter.device for module in modules for parameter in module.parameters()]
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


def make_engine_layers(
    facts: Sequence[LayerFacts],
    config: PlanMoEConfig,
    device: torch.device,
    *,
    speaks: bool,
    more_groups: Mapping[str, list[int]] | None = None,
) -> EngineLayers:
    """Every rank of the world calls this at the same time, also one without MoE layers.

    speaks: this rank tells what layers choose later; more_groups: global ranks by name that are connected as well.
    """
    by_size = sorted(facts, key=lambda layer: layer.num_experts)
    traffic = {layer.group: layer.traffic() for layer in by_size}  # of the layer with most experts
    my_groups = {layer.group: layer.ranks for layer in facts} | dict(more_groups or {})
    groups = connect(my_groups, config, device, traffic)
    hidden, dtype = (facts[0].hidden_size, facts[0].dtype) if facts else (1, torch.float32)
    compression = resolve_compression(config, groups, traffic, (hidden, dtype, device))
    connect_hosts([groups[name] for name, choice in compression.items() if choice.compression.may_refuse()], config)
    recorder, log = Recorder(device), ChoiceLog(speaks)
    layers = []
    for index, layer in enumerate(facts):
        chosen = compression[layer.group].compression
        guard = None if config.guard is None else QualityGuard(config.guard, chosen, index, recorder)
        layers.append(
            ExpertParallelLayer(
                index=index,
                config=config.model_copy(update={"compression": chosen}),
                group=groups[layer.group],
                codecs=make_codecs(chosen),
                recorder=recorder,
                guard=guard,
                log=log,
                place_of_source=layer.place_of_source,
            )
        )
    choices = [groups[layer.group].choice for layer in facts]
    comm = " and ".join(sorted({choice.name if config.comm != AUTO else choice.reason for choice in choices}))
    codecs = " and ".join(sorted({compression[layer.group].reason for layer in facts}))
    description = (
        f"all-to-all {comm}, {config.describe_schedule()}, {config.resolved_exactness.value}, compression ({codecs})"
    )
    if device.type == "cuda" and build_info()["cuda"] == "off":
        description += ", SLOW: planmoe_ds._C was built without CUDA kernels (see planmoe doctor)"
    return EngineLayers(config, layers, groups, recorder, description)
