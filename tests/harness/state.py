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
    """Import DeepSpeed, so that no call has to."""
    for name in _DEEPSPEED_MODULES:
        importlib.import_module(name)
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


def destroy_engines() -> None:
    """End every DeepSpeed engine: its gradient hooks keep it, and with it the gloo threads of its groups, alive."""
    module = sys.modules.get("deepspeed.runtime.engine")
    if module is not None:
        for engine in [item for item in gc.get_objects() if issubclass(type(item), module.DeepSpeedEngine)]:
            engine.destroy()


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
    torch.set_default_device("cpu")
    torch.use_deterministic_algorithms(mode=False)
    torch.set_grad_enabled(True)
    torch.manual_seed(SEED)
    random.seed(SEED)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(SEED)
