"""A report on the environment: what planmoe_ds finds, what is missing or wrong, and what to do about it.

Nothing here imports torch, a framework or the compiled backend into this process; see `machine.py`.
"""

from __future__ import annotations

from collections.abc import Callable

from planmoe_ds.doctor import build_checks, framework_checks
from planmoe_ds.doctor.finding import Finding
from planmoe_ds.doctor.machine import Machine, look
from planmoe_ds.doctor.report import as_json, is_usable, print_table

__all__ = ["CHECKS", "Finding", "as_json", "collect", "is_usable", "print_table"]

CHECKS: tuple[Callable[[Machine], Finding], ...] = (
    build_checks.python,
    build_checks.torch,
    build_checks.extension,
    build_checks.extension_torch,
    framework_checks.nccl,
    framework_checks.nccl_sockets,
    framework_checks.cuda_devices,
    framework_checks.max_connections,
    framework_checks.deepspeed,
    framework_checks.megatron_core,
    framework_checks.megatron_lm,
    framework_checks.transformer_engine,
    framework_checks.apex,
    build_checks.compiler,
    build_checks.nvcc,
    build_checks.pybind11,
    build_checks.mpirun,
    build_checks.zfp,
)


def collect() -> list[Finding]:
    """Look at this machine and run every check; a check that fails itself becomes a problem, not an exception."""
    machine = look()
    return [_run(check, machine) for check in CHECKS]


def _run(check: Callable[[Machine], Finding], machine: Machine) -> Finding:
    try:
        return check(machine)
    except Exception as error:  # noqa: BLE001 - one odd package must not hide the rest of the report
        detail = f"the check failed: {type(error).__name__}: {error}"
        return Finding(check.__name__, "problem", detail=detail, advice="please report this as a planmoe_ds bug")
