"""Runs a program on an emulated cluster, as root or, where the kernel lets them, as any user."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cluster.spec import SKIP, TIMED_OUT, ClusterSpec

_ROOT = Path(__file__).resolve().parents[2]
_TOOLS = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "setpriv": "util-linux", "mount": "mount"}
# The first process in them dies with the one that started it, and takes all others with it.
_NAMESPACES = ("--net", "--uts", "--mount", "--mount-proc", "--pid", "--fork", "--kill-child")
_USER_NAMESPACE = ("--user", "--map-root-user")
_TRIAL_SECONDS = 20


@dataclass(frozen=True)
class ClusterRun:
    """How a program ended: the first failing rank's exit code (124: out of time, 77: skipped) and what was printed.

    `stdout` is rank 0's; `stderr` is every rank's and the emulator's own. Both are empty when they were not captured.
    """

    returncode: int
    stdout: str = ""
    stderr: str = ""

    @property
    def skip_reason(self) -> str | None:
        """Why this machine cannot emulate a cluster, or None when it did."""
        if self.returncode != SKIP or "SKIP: " not in self.stderr:
            return None
        return self.stderr.split("SKIP: ", 1)[1].strip()


def run_on_cluster(
    spec: ClusterSpec,
    argv: Sequence[str],
    timeout: float,
    *,
    environment: Mapping[str, str] | None = None,
    capture: bool = True,
) -> ClusterRun:
    """Run `argv` once per rank for at most `timeout` seconds; every process and namespace is gone on return.

    `environment` is added to every rank's. Ranks find torchrun's variables, GLOO_SOCKET_IFNAME, an empty cache folder.
    """
    prefix, reason = _find_prefix()
    if reason is not None:
        text = f"SKIP: this machine cannot emulate a cluster: {reason}\n"
        if not capture:
            sys.stderr.write(text)
        return ClusterRun(SKIP, stderr=text)
    line = [*prefix, sys.executable, "-m", "benchmarks.cluster.supervisor", spec.to_json(), *argv]
    try:
        # What planmoe's probe keeps of links is true of these links alone.
        with tempfile.TemporaryDirectory() as folder:
            variables = {**os.environ, "XDG_CACHE_HOME": folder, **(environment or {})}
            variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), variables.get("PYTHONPATH")]))
            done = subprocess.run(line, env=variables, timeout=timeout, check=False, text=True, capture_output=capture)
    except subprocess.TimeoutExpired as error:
        note = f"cluster: {' '.join(argv)} took longer than {timeout:g} s and was ended\n"
        if not capture:
            sys.stderr.write(note)
        return ClusterRun(TIMED_OUT, _text(error.stdout), _text(error.stderr) + note)
    return ClusterRun(done.returncode, done.stdout or "", done.stderr or "")


def _text(output: str | bytes | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def _find_prefix() -> tuple[list[str], str | None]:
    """The words before a program that runs it in fresh namespaces, or why none work here."""
    missing = {tool: package for tool, package in _TOOLS.items() if shutil.which(tool) is None}
    if missing:
        packages = " ".join(sorted(set(missing.values())))
        return [], f"{', '.join(missing)} not found; as root: apt-get install -y {packages}"
    reasons = []
    for who, extra in (("root", ()), ("an unprivileged user", _USER_NAMESPACE)):
        if who == "root" and os.geteuid() != 0:
            reasons.append("this is not root")
            continue
        prefix = ["setpriv", "--pdeathsig", "KILL", "unshare", *extra, *_NAMESPACES]
        complaint = _try([*prefix, "true"])
        if complaint is None:
            return prefix, None
        reasons.append(f"as {who}: {complaint}")
    return [], f"{'; '.join(reasons)}. It needs root with CAP_SYS_ADMIN and CAP_NET_ADMIN, or user namespaces"


def _try(line: Sequence[str]) -> str | None:
    """None when the command works, else its complaint."""
    try:
        done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=_TRIAL_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None if done.returncode == 0 else done.stderr.strip() or f"exit code {done.returncode}"
