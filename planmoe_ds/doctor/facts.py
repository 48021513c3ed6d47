"""Run as a script in a child process: imports one thing and prints what it found, as JSON after a mark.

A broken package can print, warn, exit or crash while it is imported; here that harms nobody.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import json
import sys
from typing import Any

MARK = "planmoe-doctor-facts:"


def torch_facts() -> dict[str, Any]:
    """Version, build, NCCL and CUDA devices of torch."""
    import torch

    facts: dict[str, Any] = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "path": torch.__file__,
        "nccl": "",
        "devices": [],
        "cuda_error": "",
    }
    if torch.version.cuda is None:
        return facts
    if torch.distributed.is_nccl_available():
        facts["nccl"] = ".".join(str(part) for part in torch.cuda.nccl.version())
    try:
        torch.cuda.init()
    except Exception as error:  # noqa: BLE001 - whatever stops CUDA is what we are here to report
        facts["cuda_error"] = str(error).splitlines()[0]
        return facts
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    facts["devices"] = [
        f"{device.name}, {device.total_memory / 2**30:.0f} GiB, sm_{device.major}{device.minor}"
        for device in properties
    ]
    return facts


def extension_facts(path: str) -> dict[str, Any]:
    """How the compiled backend in the file `path` was built, and what it holds."""
    importlib.import_module("torch")  # the extension needs torch's libraries in the process
    loader = importlib.machinery.ExtensionFileLoader("planmoe_ds._C", path)
    specification = importlib.util.spec_from_loader(loader.name, loader)
    if specification is None:
        raise ImportError(f"'{path}' is not an extension module")
    module = importlib.util.module_from_spec(specification)
    loader.exec_module(module)
    return {"build": module.build_info(), "compressors": module.compressor_names(), "comms": module.comm_names()}


def module_facts(name: str) -> dict[str, Any]:
    """Version and place of any module."""
    module = importlib.import_module(name)
    return {"version": str(getattr(module, "__version__", "")), "path": str(getattr(module, "__file__", ""))}


def main(kind: str, argument: str) -> None:
    """Print the facts of the kind asked for."""
    if kind == "torch":
        facts = torch_facts()
    elif kind == "extension":
        facts = extension_facts(argument)
    else:
        facts = module_facts(argument)
    sys.stdout.write(f"\n{MARK}{json.dumps(facts)}\n")


if __name__ == "__main__":
    sys.path.pop(0)  # this script's folder
    main(*sys.argv[1:])
