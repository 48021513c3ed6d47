"""One rank process as the test process sees it: a pipe, an output file and a file for its Python stacks."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from multiprocessing import Pipe
from pathlib import Path

from tests.harness.forks import ForkedProcess, ForkRequest, ForkServer, start_interpreter

_STARTER = (
    "import sys; sys.path.insert(0, sys.argv[1]); from tests.harness.worker import main; "
    "main(int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5] == 'preload')"
)
_STACK_SECONDS = 3.0
PARENT_WATCH = "_exit_with_parent"  # the worker's own thread, of no interest in a stack report
_OUTPUT_BYTES = 6000

# What a launcher around the tests may have set; inside a rank these come from the pool alone.
_LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
    "GROUP_RANK",
    "CROSS_RANK",
    "CROSS_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "DEEPSPEED_TIMEOUT",
)
_DEFAULT_VARIABLES = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
_CPU_VARIABLES = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}


class RankProcess:
    """A started worker; `kill` ends it together with everything it started."""

    def __init__(
        self, folder: Path, backend: str, environment: Mapping[str, str], preload: bool, source: ForkServer | None
    ) -> None:
        folder.mkdir()
        self._output = folder / "output.txt"
        self._stacks = folder / "stacks.txt"
        self._call_start = 0
        self.connection, childs_end = Pipe()
        environment = start_environment(backend, environment)
        self._process: subprocess.Popen[bytes] | ForkedProcess
        if source is not None:
            self._output.touch()
            request = ForkRequest(self._output, self._stacks, backend, environment)
            self._process = source.fork(request, childs_end.fileno())
        else:
            arguments = [str(self._stacks), backend, "preload" if preload else "bare"]
            self._process = start_interpreter(_STARTER, childs_end.fileno(), arguments, self._output, environment)
        childs_end.close()

    @property
    def is_alive(self) -> bool:
        """Whether the process is running."""
        return self._process.poll() is None

    def mark_call(self) -> None:
        """Remember that output from here on belongs to a new call."""
        self._call_start = self._output.stat().st_size

    def output(self) -> str:
        """What the process printed since `mark_call`, at most its last 6000 bytes."""
        with self._output.open("rb") as file:
            file.seek(max(self._call_start, self._output.stat().st_size - _OUTPUT_BYTES))
            return file.read().decode(errors="replace")

    def stacks(self) -> str:
        """Ask the process where each of its Python threads is; empty when it does not answer in 3 seconds."""
        self._stacks.touch()
        before = self._stacks.stat().st_size
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGUSR1)
        deadline, size = time.monotonic() + _STACK_SECONDS, before
        while time.monotonic() < deadline:
            time.sleep(0.1)
            previous, size = size, self._stacks.stat().st_size
            if size > before and size == previous:
                break
        threads = self._stacks.read_bytes()[before:].decode(errors="replace").split("\n\n")
        return "\n\n".join(thread for thread in threads if PARENT_WATCH not in thread)

    def exit_reason(self) -> str:
        """Wait for the process to end and say how it ended."""
        code = self._process.wait(timeout=30)
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def kill(self) -> None:
        """End the process, its children and the pipe."""
        if self.is_alive:  # otherwise its number may belong to someone else by now
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self.connection.close()


def start_environment(backend: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that a rank process starts with."""
    inherited = {name: value for name, value in os.environ.items() if name not in _LAUNCHER_VARIABLES}
    if backend == "gloo":
        inherited.update(_CPU_VARIABLES)
    return {**inherited, **_DEFAULT_VARIABLES, **environment}
