"""Process-wide state that one call on a rank must not leave behind for the next one."""

from __future__ import annotations

import copy
import gc
import importlib
import os
import random
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch

SEED = 1234

# DeepSpeed modules whose variables `deepspeed.initialize`, a training step or a checkpointed forward assign.
_DEEPSPEED_MODULES = (
    "deepspeed",
    "deepspeed.comm.comm",
    "deepspeed.comm.torch",
    "deepspeed.moe.sharded_moe",
    "deepspeed.runtime.activation_checkpointing.checkpointing",
    "deepspeed.runtime.sequence_parallel.parallel_state_sp",
    "deepspeed.runtime.zero.utils",
    "deepspeed.utils.groups",
)
_RESTORED_TYPES = (type(None), bool, int, float, str, dict, list, set)
Snapshot = dict[str, dict[str, Any]]


def preload_deepspeed() -> None:
    """Import DeepSpeed, and what the first reset imports, so that no call has to."""
    for name in _DEEPSPEED_MODULES:
        importlib.import_module(name)
    reset_torch()
    freeze_modules()


_num_frozen = 0


def freeze_modules() -> None:
    """Between calls: what new modules hold stays, so that collecting garbage need not look through it every time."""
    global _num_frozen  # noqa: PLW0603
    if len(sys.modules) != _num_frozen:
        _num_frozen = len(sys.modules)
        gc.collect()
        gc.freeze()


def skip_deepspeed_compilation() -> None:
    """Keep DeepSpeed, if it is loaded, from compiling its shared-memory all-reduce, which training never calls.

    That takes half a minute or more, and a rank killed in the middle leaves a lock that stops every later one.
    """
    if "deepspeed.ops" in sys.modules:
        sys.modules["deepspeed.ops"].__compatible_ops__["deepspeed_shm_comm"] = False


def snapshot_deepspeed() -> Snapshot:
    """Copy the plain module variables of the DeepSpeed modules loaded in this process."""
    loaded = {name: sys.modules[name] for name in _DEEPSPEED_MODULES if name in sys.modules}
    return {name: _plain_variables(module) for name, module in loaded.items()}


def restore_deepspeed(snapshot: Snapshot) -> None:
    """Give every variable in the snapshot its value back; containers stay the same objects."""
    for module_name, variables in snapshot.items():
        module = vars(sys.modules[module_name])
        for name, value in variables.items():
            current = module[name]
            if isinstance(value, (dict, set)) and type(current) is type(value):
                current.clear()
                current.update(value)
            elif isinstance(value, list) and isinstance(current, list):
                current[:] = value
            else:
                module[name] = value


def destroy_models() -> None:
    """End DeepSpeed's engines and what Megatron keeps: they hold process groups.

    A gloo group has three threads or more, each of which looks for work 100 times a second.
    """
    for engine in _instances("deepspeed.runtime.engine", "DeepSpeedEngine"):
        engine.destroy()  # its gradient hooks keep it alive
    for wrapper in _instances("megatron.core.distributed.distributed_data_parallel", "DistributedDataParallel"):
        wrapper.grad_accs.clear()  # and these
    for dispatcher in _instances("megatron.core.transformer.moe.token_dispatcher", "MoETokenDispatcher"):
        dispatcher.probs = None  # with the graph of the last step
    rotary = sys.modules.get("megatron.core.models.common.embeddings.rotary_pos_embedding")
    if rotary is not None and hasattr(rotary.RotaryEmbedding.forward, "cache_clear"):
        rotary.RotaryEmbedding.forward.cache_clear()
    parallel_state = sys.modules.get("megatron.core.parallel_state")
    if parallel_state is not None:
        parallel_state.destroy_model_parallel()


def _instances(module: str, kind: str) -> list[Any]:
    """Objects of a class and those derived from it, none where its module is not loaded."""
    if module not in sys.modules:
        return []
    class_ = getattr(sys.modules[module], kind)
    return [item for item in gc.get_objects() if issubclass(type(item), class_)]


def _plain_variables(module: ModuleType) -> dict[str, Any]:
    return {
        name: copy.copy(value)
        for name, value in vars(module).items()
        if type(value) in _RESTORED_TYPES and not name.startswith("__")
    }


def restore_environment(environment: Mapping[str, str]) -> None:
    """Make the process environment equal to the given one."""
    for name in set(os.environ) - set(environment):
        del os.environ[name]
    os.environ.update(environment)


def reset_torch() -> None:
    """Set torch's process-wide switches and every random generator to what a test may rely on."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.use_deterministic_algorithms(mode=False)
    torch.set_grad_enabled(True)
    torch.manual_seed(SEED)
    random.seed(SEED)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(SEED)
