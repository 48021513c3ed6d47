"""DeepSpeed: `"planmoe"` in the config makes every deepspeed.moe.layer.MoE go through planmoe.

deepspeed_hook.py calls configure() once DeepSpeed has made its expert-parallel groups and before it builds the
optimizer. The class of every MOELayer instance then becomes PlanMoELayer, a subclass that overrides forward, and that
of its router PlanMoEGate. Names of parameters, tags, checkpoints, isinstance checks and what the router decides stay as
they were.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.sharded_moe import MOELayer
from deepspeed.utils import groups
from deepspeed.utils.bwc import (
    bwc_tensor_model_parallel_group,
    bwc_tensor_model_parallel_world_size,
)
from torch import nn

from planmoe_ds import __version__
from planmoe_ds.agreement import check_agreement
from planmoe_ds.auto_planner import ChoiceLog
from planmoe_ds.compression import AUTO
from planmoe_ds.config import Exactness, PlanMoEConfig, find_section, parse_config
from planmoe_ds.equal_experts import share_storage
from planmoe_ds.errors import PlanMoEConfigError
from planmoe_ds.experts import LocalExperts
from planmoe_ds.integrations.activation import LayerFacts, device_of, make_engine_layers, report_failure, settings_of
from planmoe_ds.integrations.deepspeed_checkpoints import watch_checkpoints
from planmoe_ds.integrations.deepspeed_gate import choose_gates
from planmoe_ds.layer import ExpertParallelLayer, combine
from planmoe_ds.plan import Routes
from planmoe_ds.session import Session
from planmoe_ds.stock_trial import StockTrial
from planmoe_ds.tensor_parallel import TensorParallelSplit, gather_rows, own_rows

SECTION = "planmoe"
SHARED_SETTINGS = (  # of DeepSpeed's own: ranks that disagree on them hang without a word
    "gradient_accumulation_steps",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "zero_optimization.stage",
    "bf16.enabled",
    "fp16.enabled",
)
MAX_PADDING = 2.0  # capacity factor up to which stock's dispatch is tried


class PlanMoELayer(MOELayer):  # type: ignore[misc]
    """A MOELayer whose tokens travel through planmoe; instances are made by activate()."""

    planmoe: ExpertParallelLayer
    tensor_parallel: TensorParallelSplit | None
    stock_trial: StockTrial | None

    @torch.compiler.disable
    def forward(self, hidden_states: torch.Tensor, used_token: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states [..., H] and the used-token mask or None -> output [..., H]; sets l_aux and exp_counts."""
        if self.stock_trial is None:
            return self._forward(hidden_states, used_token)
        stock = super().forward
        return self.stock_trial.run(
            hidden_states, lambda hidden: self._forward(hidden, used_token), lambda hidden: stock(hidden, used_token)
        )

    def _forward(self, hidden_states: torch.Tensor, used_token: torch.Tensor | None) -> torch.Tensor:
        if self.wall_clock_breakdown:
            self.timers("moe").start()
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        routes = self._route(tokens, used_token)
        experts = LocalExperts(self.experts.deepspeed_experts, self.experts)
        split = self.tensor_parallel
        if split is None:
            output = self.planmoe.forward(tokens, routes, experts)
        else:
            split.check_alike(routes)
            orders = split.orders(routes)
            own = own_rows(tokens, orders, routes, split)
            rows = self.planmoe.route_outputs(own.rows, own.routes, experts)
            output = combine(gather_rows(rows, orders, split), split.row_of_route(orders), routes.weight_KT)
        self._count_stock_bytes(tokens, routes)
        if self.wall_clock_breakdown:
            self.timers("moe").stop()
            self.time_moe = self.timers("moe").elapsed(reset=False)
        return output.reshape(hidden_states.shape)

    def _route(self, tokens: torch.Tensor, used_token: torch.Tensor | None) -> Routes:
        decision = self.gate(tokens, used_token, True, False)
        self.l_aux, capacity, num_experts, expert, slot, weight, self.exp_counts = decision
        return Routes(expert, slot, weight, num_experts, int(capacity))

    def _count_stock_bytes(self, tokens: torch.Tensor, routes: Routes) -> None:
        """Two padded all-to-alls forward, and two backward if there is one."""
        passes = 4 if torch.is_grad_enabled() else 2
        parts = 1 if self.tensor_parallel is None else self.tensor_parallel.group.size
        assert routes.capacity is not None
        rows = routes.capacity // parts * routes.num_experts
        padded = rows * tokens.shape[1] * tokens.element_size()
        self.planmoe.recorder.add_stock_bytes(passes * padded * (self.ep_size - 1) // self.ep_size)


def activate(model: nn.Module, section: object = True, device: torch.device | None = None) -> Session | None:
    """Send every deepspeed.moe.layer.MoE of `model` through planmoe; every rank must call this at the same time.

    Only for models used without `deepspeed.initialize`, which does this itself. Process groups must exist
    (set_deepspeed_parallelism was called on each MoE). section: what a DeepSpeed config's "planmoe" may hold.
    Returns None when the section says off. Raises PlanMoEConfigError.
    """
    if not dist.is_initialized():
        raise PlanMoEConfigError(
            "planmoe_ds.activate needs process groups: first call deepspeed.init_distributed(), and "
            "set_deepspeed_parallelism() of every MoE layer"
        )
    config = parse_config(section)
    layers = _moe_layers(model)
    check_agreement(_settings(config, {}, model))
    return _activate_layers(layers, config, device or device_of([model])) if config.enabled else None


def agree(engine: Any, model: nn.Module) -> PlanMoEConfig:
    """Read the engine's config and compare it with every other rank's, before DeepSpeed's first collective.

    Every rank calls this at the same time.
    """
    drop_ins: list[Any] = [module for module in model.modules() if hasattr(module, "planmoe_drop_in")]
    param_dict = engine._config._param_dict
    try:
        section = find_section(param_dict, SECTION)
        config = parse_config(True if section is None and drop_ins else section)
    except PlanMoEConfigError as error:
        report_failure(str(error))
        raise
    check_agreement(_settings(config, param_dict, model))
    for module in drop_ins:
        module.planmoe_drop_in = config.enabled
    return config


def configure(engine: Any, config: PlanMoEConfig) -> Session | None:
    """Switch the engine's model over, if the config says so; every rank calls this at the same time."""
    if not config.enabled:
        return None
    layers = _moe_layers(engine.module)
    in_buckets = engine.zero_optimization_stage() > 0
    session = _activate_layers(layers, config, torch.device(engine.device), in_buckets=in_buckets)

    def check() -> None:
        for layer in layers[:1]:  # all have one device and one watchdog
            layer.planmoe.group.check()

    watch_checkpoints(engine, [layer.ep_size for layer in layers], check)
    return session


def _moe_layers(model: nn.Module) -> list[MOELayer]:
    return [module for module in model.modules() if isinstance(module, MOELayer)]


def _settings(config: PlanMoEConfig, param_dict: Mapping[str, Any], model: nn.Module) -> dict[str, str]:
    """What every rank must have in common, by the name a user knows it by."""
    settings = settings_of(config)
    if not config.enabled:
        return settings
    settings["planmoe's version"] = __version__
    for path in SHARED_SETTINGS:
        value: Any = param_dict
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        settings[path] = str(value)
    layers = _moe_layers(model)
    where = f" of pipeline stage {model.stage_id}" if hasattr(model, "stage_id") else ""  # stages may differ
    settings[f"the model{where}"] = f"{len(layers)} MoE layers"
    for number, layer in enumerate(layers):
        gate = layer.gate
        settings[f"MoE layer {number}{where}"] = (
            f"{layer.ep_size * layer.num_local_experts} experts, expert-parallel size {layer.ep_size}, hidden size "
            f"{gate.wg.weight.shape[1]}, top-{gate.k}, drop_tokens {gate.drop_tokens}, capacity factor "
            f"{gate.capacity_factor} (evaluation {gate.eval_capacity_factor}, at least {gate.min_capacity})"
        )
    return settings


def _expert_ranks(layer: MOELayer) -> list[int]:
    if layer.ep_group is None:
        raise PlanMoEConfigError(
            "a MoE layer has no expert-parallel group yet: call set_deepspeed_parallelism() on every MoE, or let "
            "deepspeed.initialize do it"
        )
    return list(dist.get_process_group_ranks(layer.ep_group))


def _activate_layers(
    layers: list[MOELayer], config: PlanMoEConfig, device: torch.device, *, in_buckets: bool = False
) -> Session:
    """in_buckets: gradients are reduced in the order in which they come (ZeRO), between expert-parallel groups, too.

    Stock's come in another order than planmoe's: groups that chose differently would add up different parameters.
    """
    tensor_parallel_size, more_groups = bwc_tensor_model_parallel_world_size(groups.mpu), {}
    if tensor_parallel_size > 1:
        more_groups = {"tensor parallel": dist.get_process_group_ranks(bwc_tensor_model_parallel_group(groups.mpu))}
    if device.type == "cuda":
        for layer in layers:  # the optimizer, which keeps views, is not built yet
            share_storage(list(layer.experts.deepspeed_experts))
    choose_gates([layer.gate for layer in layers], device, exact=config.resolved_exactness is Exactness.EXACT)
    # tensor-parallel ranks hold the same tokens; an expert that is split between them needs every token on all of them
    divides_tokens = tensor_parallel_size > 1 and not _splits_experts()
    if _splits_experts():
        config = _same_in_all_groups(config)
    speaks = dist.get_rank() == 0
    made = make_engine_layers(
        [_facts(layer) for layer in layers], config, device, speaks=speaks, more_groups=more_groups
    )
    trial_log = ChoiceLog(speaks)
    for index, (layer, engine_layer) in enumerate(zip(layers, made.layers, strict=True)):
        layer.__class__ = PlanMoELayer
        layer.planmoe = engine_layer
        layer.tensor_parallel = TensorParallelSplit(made.groups["tensor parallel"], index) if divides_tokens else None
        layer.stock_trial = None
        decides_alone = in_buckets and groups._get_expert_data_parallel_world_size(layer.ep_group_name) > 1
        if config.chooses_everything and tensor_parallel_size == 1 and _stock_is_bounded(layer) and not decides_alone:
            trial_log.num_waiting += 1
            report = partial(trial_log.report, index)
            layer.stock_trial = StockTrial(
                engine_layer.group, engine_layer.planner, report, partial(getattr, engine_layer, "has_been_uneven")
            )
    if speaks:
        print(_announcement(layers, made.description), file=sys.stderr, flush=True)
    return made.session()


def _splits_experts() -> bool:
    return bool(groups._get_expert_model_parallel_world_size() > 1)


def _same_in_all_groups(config: PlanMoEConfig) -> PlanMoEConfig:
    """The config without what follows one expert-parallel group's times.

    An expert that is split between tensor-parallel ranks reduces over them once per chunk, and they are in different
    groups: with other chunks, or another order, these would wait for each other for ever, or mix their rows.
    """
    chosen: dict[str, object] = {"chunks": 1} if config.chunks == AUTO else {}
    chosen |= {"scheduler": "pipelined"} if config.scheduler == AUTO else {}
    return config.model_copy(update={**chosen, "deterministic": True})


def _stock_is_bounded(layer: MOELayer) -> bool:
    """Whether stock's buffers, an equal part for every expert, stay near the size of what is routed.

    Without dropping they grow with the busiest expert's rows: what fits during a trial may not fit later.
    """
    factor = max(layer.gate.capacity_factor, layer.gate.eval_capacity_factor)
    return bool(layer.gate.drop_tokens) and factor <= MAX_PADDING


def _facts(layer: MOELayer) -> LayerFacts:
    return LayerFacts(
        group=layer.ep_group_name,
        ranks=_expert_ranks(layer),
        hidden_size=layer.gate.wg.weight.shape[1],
        dtype=next((one.dtype for one in layer.experts.parameters()), torch.get_default_dtype()),
        top_k=layer.gate.k,
        num_experts=layer.ep_size * layer.num_local_experts,
    )


def _announcement(layers: list[MOELayer], description: str) -> str:
    if not layers:
        return "planmoe: on, but the model has no deepspeed.moe.layer.MoE: nothing to do"
    sizes = ", ".join(map(str, sorted({layer.ep_size for layer in layers})))
    return f"planmoe: active on {len(layers)} MoE layers: {description}, expert-parallel size {sizes}"
