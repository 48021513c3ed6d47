"""A pytest plugin: Megatron-LM's own unit tests with planmoe on in every MoE layer, on CPU ranks where there is no GPU.

    cd Megatron-LM && PYTHONPATH=.:PLANMOE:PLANMOE/tests/megatron PLANMOE_SECTION='{"chunks": 2}' torchrun \
        --nproc_per_node 8 -m pytest -p unit_tests_plugin tests/unit_tests/transformer/moe/test_moe_layer.py

Without PLANMOE_SECTION: Megatron's own all-to-all. Found by its own name, since a checkout has a package `tests` too.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import sys
import types
from typing import Any

import torch
import torch.distributed as dist
from _pytest.assertion import rewrite
from run_megatron_lm import prepare_this_machine

ON_CPU = not torch.cuda.is_available()
prepare_this_machine()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.transformer.moe.moe_layer import MoELayer  # noqa: E402


def know_of_no_transformer_engine() -> None:
    """0.16 compares the version None where there is no Transformer Engine; the tests are to skip what needs it."""
    from megatron.core import utils

    if utils.get_te_version() is None:
        utils._te_version = utils.PkgVersion("0")


class OutputsOnTheCpu(ast.NodeTransformer):
    """A test that asserts `….device.type == 'cuda'` at its end gets what this plugin is about: the CPU."""

    def visit_Compare(self, node: ast.Compare) -> ast.Compare:
        """Replace the constant."""
        if ast.unparse(node.left).endswith(".device.type") and ast.unparse(node.comparators[0]) == "'cuda'":
            node.comparators = [ast.copy_location(ast.Constant("cpu"), node.comparators[0])]
        return node


def expect_outputs_on_the_cpu() -> None:
    """Where pytest rewrites the assertions of a test module anyway."""
    original = rewrite.rewrite_asserts

    @functools.wraps(original)
    def rewrite_asserts(module: ast.Module, *args: Any, **kwargs: Any) -> None:
        original(OutputsOnTheCpu().visit(module), *args, **kwargs)

    sys.dont_write_bytecode = True  # nor may another run find what was made of the module
    rewrite.rewrite_asserts = rewrite_asserts


def skip_downloads() -> None:
    """Megatron's conftest fetches test data that the MoE tests do not need."""
    module: Any = types.ModuleType("tests.test_utils.python_scripts.download_unit_tests_dataset")
    module.download_and_extract_asset = lambda *_, **__: True
    sys.modules[module.__name__] = module


def destroy_groups_with_the_model_parallel_state() -> None:
    """Each set of groups holds threads, which Megatron's teardown leaves running."""
    original = parallel_state.destroy_model_parallel

    @functools.wraps(original)
    def destroy() -> None:
        original()
        if dist.is_initialized():
            dist.barrier()
            for group in list(dist.distributed_c10d._world.pg_map):
                if group is not dist.group.WORLD:
                    dist.destroy_process_group(group)

    parallel_state.destroy_model_parallel = destroy


def switch_planmoe_on(section: dict[str, Any]) -> None:
    """Every layer goes through planmoe once built and on its device, also where a test leaves or names "allgather"."""
    from planmoe_ds.integrations.megatron import PlanMoELayer, activate

    original_init, original_apply = MoELayer.__init__, MoELayer._apply

    def activate_once(layer: Any) -> None:
        if layer.config.moe_token_dispatcher_type == "alltoall" and type(layer) is not PlanMoELayer:
            activate(layer, section)

    @functools.wraps(original_init)
    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        if config.moe_token_dispatcher_type == "allgather":  # the default, too
            config.moe_token_dispatcher_type = "alltoall"
        original_init(self, config, *args, **kwargs)
        if ON_CPU:
            activate_once(self)

    def apply(self: Any, *args: Any, **kwargs: Any) -> Any:  # cuda() is one
        original_apply(self, *args, **kwargs)
        if all(parameter.is_cuda for parameter in self.parameters()):
            activate_once(self)
        return self

    MoELayer.__init__, MoELayer._apply = init, apply


know_of_no_transformer_engine()
if ON_CPU:
    expect_outputs_on_the_cpu()
skip_downloads()
destroy_groups_with_the_model_parallel_state()
if "PLANMOE_SECTION" in os.environ:
    switch_planmoe_on(json.loads(os.environ["PLANMOE_SECTION"]))
