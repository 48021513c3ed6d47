"""Checks of the frameworks planmoe_ds serves and of the GPU stack below them."""

from __future__ import annotations

from planmoe_ds.doctor.finding import Finding
from planmoe_ds.doctor.machine import Distribution, Machine

_TESTED_DEEPSPEED = ("0.19.8",)
_TESTED_MEGATRON = {"0.15.3": (3, 10), "0.16.1": (3, 10), "0.17.1": (3, 12), "0.19.0": (3, 12)}
_CUDA_TORCH = "install a CUDA build of torch to train on GPUs"
_SOCKETS = ("NCCL_SOCKET_NTHREADS", "NCCL_NSOCKS_PERTHREAD")
_APEX_FOLDERS = ("amp", "multi_tensor_apply", "normalization", "optimizers", "transformer")


def nccl(machine: Machine) -> Finding:
    """NCCL as torch was built with it."""
    facts = machine.torch.facts
    if facts.get("nccl"):
        return Finding("NCCL", "ok", facts["nccl"])
    reason = "torch is not there" if not facts else "this torch was built without it"
    return Finding("NCCL", "missing", detail=reason, advice=_CUDA_TORCH)


def nccl_sockets(machine: Machine) -> Finding:
    """Over how many sockets NCCL talks to other machines: one thread with one of them does not fill a fast network."""
    name, environment = "NCCL's sockets", machine.environment
    if not machine.torch.facts.get("nccl"):
        return Finding(name, "info", detail="this torch has no NCCL")
    network, plugin = environment.get("NCCL_NET", ""), environment.get("NCCL_NET_PLUGIN", "")
    if network.lower() != "socket":
        if network or plugin.lower() not in ("", "none"):
            return Finding(name, "info", detail="NCCL_NET or NCCL_NET_PLUGIN chooses the network between machines")
        if machine.rdma and (environment.get("NCCL_IB_DISABLE") or "0") == "0":
            detail = f"not used while NCCL can use {', '.join(machine.rdma)}: NCCL_DEBUG=INFO says what it takes"
            return Finding(name, "info", detail=detail)
    settings = {variable: environment.get(variable) for variable in _SOCKETS}
    given = [f"{variable}={value}" for variable, value in settings.items() if value]
    if given:
        return Finding(name, "info", detail=", ".join(given))
    detail = "between machines TCP, one thread and one socket for each channel (more on AWS and Google Cloud)"
    advice = f"with several machines try {' and '.join(f'{variable}=2' for variable in _SOCKETS)} (or 4) on all of them"
    return Finding(name, "info", detail=detail, advice=advice)


def cuda_devices(machine: Machine) -> Finding:
    """The GPUs torch sees."""
    facts = machine.torch.facts
    devices = facts.get("devices", [])
    if devices:
        kinds = "; ".join(f"{devices.count(kind)} x {kind}" for kind in dict.fromkeys(devices))
        return Finding("CUDA devices", "ok", str(len(devices)), kinds)
    if facts.get("cuda") is None:
        detail = "this torch was built without CUDA; ranks run on the CPU over gloo"
        return Finding("CUDA devices", "missing", detail=detail, advice=_CUDA_TORCH)
    detail = facts["cuda_error"] or "torch sees none"
    advice = "check nvidia-smi, the driver's version and CUDA_VISIBLE_DEVICES"
    return Finding("CUDA devices", "missing", detail=detail, advice=advice)


def max_connections(machine: Machine) -> Finding:
    """CUDA_DEVICE_MAX_CONNECTIONS: where streams share one, kernels of one queue behind those of another."""
    name, value = "CUDA_DEVICE_MAX_CONNECTIONS", machine.environment.get("CUDA_DEVICE_MAX_CONNECTIONS")
    best = "set it to 32, so that all links and the computing have connections of their own"
    if value is None:
        return Finding(name, "info", detail="not set: the driver's default of 8, or of 2 under MPS", advice=best)
    if not value.isdigit() or not 1 <= int(value) <= 32:
        return Finding(name, "problem", value, "not a number from 1 to 32", "set it to 32")
    if value == "1":
        detail = "with 1, exchanges queue behind kernels: overlap of communication and compute is lost"
        advice = f"{best}; before Blackwell, Megatron's tensor or context parallelism asks for 1: keep it then"
        return Finding(name, "info", value, detail, advice)
    if int(value) < 8:
        return Finding(name, "info", value, "exchanges of different links may queue behind each other", best)
    return Finding(name, "info", value, "overlap works")


def deepspeed(machine: Machine) -> Finding:
    """DeepSpeed."""
    newest = _TESTED_DEEPSPEED[-1]
    probe = machine.deepspeed
    if not probe.is_installed:
        advice = f"pip install deepspeed=={newest} to train with DeepSpeed"
        return Finding("DeepSpeed", "missing", advice=advice)
    if probe.error:
        return Finding("DeepSpeed", "problem", detail=probe.error, advice=f"reinstall deepspeed=={newest}")
    version = probe.facts["version"]
    if version.split("+")[0] not in _TESTED_DEEPSPEED:
        detail = f"not tested with planmoe_ds; tested: {', '.join(_TESTED_DEEPSPEED)}"
        return Finding("DeepSpeed", "info", version, detail, f"if something fails, try deepspeed=={newest}")
    return Finding("DeepSpeed", "ok", version, "tested")


def megatron_core(machine: Machine) -> Finding:
    """The megatron.core package."""
    python = ".".join(str(part) for part in machine.python[:2])
    fitting = [version for version, oldest in _TESTED_MEGATRON.items() if machine.python[:2] >= oldest]
    tested = ", ".join(f"{version} (Python {oldest[0]}.{oldest[1]}+)" for version, oldest in _TESTED_MEGATRON.items())
    advice = "install Python 3.10 or newer to train with it"
    if fitting:
        advice = f"pip install megatron-core=={fitting[-1]}, the newest tested for Python {python}"
    probe = machine.megatron_core
    if not probe.is_installed:
        return Finding("megatron-core", "missing", detail=f"tested: {tested}", advice=advice)
    if probe.error:
        return Finding("megatron-core", "problem", detail=probe.error, advice=advice)
    version = probe.facts["version"]
    if version not in _TESTED_MEGATRON:
        return Finding("megatron-core", "info", version, f"not tested with planmoe_ds; tested: {tested}", advice)
    return Finding("megatron-core", "ok", version, "tested")


def megatron_lm(machine: Machine) -> Finding:
    """A Megatron-LM checkout: megatron.training and, beside it, pretrain_gpt.py."""
    name = "Megatron-LM"
    checkouts = [folder for folder in machine.packages.get("megatron", ()) if (folder / "training").is_dir()]
    if not checkouts:
        advice = "clone Megatron-LM and put it on PYTHONPATH to run pretrain_gpt.py; no wheel contains that script"
        return Finding(name, "missing", detail="megatron.training cannot be imported", advice=advice)
    place = checkouts[0].parent
    if (place / "pretrain_gpt.py").is_file():
        return Finding(name, "ok", detail=f"checkout in {place}")
    advice = "clone Megatron-LM and put it on PYTHONPATH to run pretrain_gpt.py"
    return Finding(name, "info", detail=f"megatron.training is in {place}, without pretrain_gpt.py", advice=advice)


def transformer_engine(machine: Machine) -> Finding:
    """Transformer Engine, for Megatron's fused layers."""
    name, probe = "Transformer Engine", machine.transformer_engine
    if not probe.is_installed:
        advice = (
            "without it Megatron needs --transformer-impl local; with GPUs: pip install transformer_engine[pytorch]"
        )
        return Finding(name, "missing", advice=advice)
    if probe.error:
        advice = "reinstall it for this torch: pip install --no-build-isolation transformer_engine[pytorch]"
        return Finding(name, "problem", detail=probe.error, advice=advice)
    known = machine.distributions.get("transformer_engine")
    return Finding(name, "ok", probe.facts["version"] if known is None else known.version)


def apex(machine: Machine) -> Finding:
    """NVIDIA's apex, told from the unrelated package of that name without running either."""
    name, distribution = "NVIDIA apex", machine.distributions.get("apex", Distribution("", ""))
    source = "build NVIDIA's from https://github.com/NVIDIA/apex (pip's package index does not have it)"
    if "apex" not in machine.packages:
        return Finding(name, "missing", detail="only some of Megatron's options need it", advice=source)
    if not any((folder / part).is_dir() for folder in machine.packages["apex"] for part in _APEX_FOLDERS):
        detail = "the installed 'apex' is another project"
        detail += f": {distribution.summary}" if distribution.summary else ""
        return Finding(name, "problem", distribution.version, detail, f"pip uninstall apex, then {source}")
    if "amp_C" not in machine.packages:
        detail = "without its compiled parts (amp_C)"
        return Finding(name, "info", distribution.version, detail, f"if an option needs them, {source}")
    return Finding(name, "ok", distribution.version)
