"""A process that has imported DeepSpeed, of which rank processes are forked: importing takes longer than most tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_STARTER = "import sys; sys.path.insert(0, sys.argv[1]); from tests.harness.forks import main; main(int(sys.argv[2]))"
_POLL_SECONDS = 0.01


@dataclass(frozen=True)
class ForkRequest:
    """A new rank process; the descriptor of its pipe follows on the connection."""

    output: Path
    stacks: Path
    backend: str
    environment: Mapping[str, str]


class ForkServer:
    """The process, as the test process sees it; started when it is first needed."""

    def __init__(self, output: Path, environment: Mapping[str, str]) -> None:
        self._connection, childs_end = Pipe()
        with output.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _STARTER, str(_ROOT), str(childs_end.fileno())],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                pass_fds=[childs_end.fileno()],
                start_new_session=True,
            )
        childs_end.close()

    def fork(self, request: ForkRequest, descriptor: int) -> ForkedProcess:
        """A new process with `descriptor` as its end of a pipe."""
        self._connection.send(request)
        send_handle(self._connection, descriptor, self._process.pid)
        return ForkedProcess(self, self._connection.recv())

    def exit_code(self, pid: int) -> int | None:
        """As Popen.returncode; None while the process runs."""
        self._connection.send(pid)
        code: int | None = self._connection.recv()
        return code

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.kill()
        self._process.wait()


class ForkedProcess:
    """What RankProcess needs of a subprocess.Popen, for a child of the fork server."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self._server, self.pid = server, pid
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a signal's; None while the process runs."""
        if self._code is None:
            self._code = self._server.exit_code(self.pid)
        return self._code

    def wait(self, timeout: float = 60.0) -> int:
        """Raises subprocess.TimeoutExpired."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"rank process {self.pid}", timeout)
            time.sleep(_POLL_SECONDS)
        return code

    def send_signal(self, number: int) -> None:
        """Unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


# ---- in the fork server ----


def main(descriptor: int) -> None:
    """Fork as asked until the test process closes the pipe; in a child: be a rank process."""
    from tests.harness import state

    state.preload_deepspeed()
    child = _serve(Connection(descriptor))
    if child is not None:
        child()


def _serve(connection: Connection) -> Callable[[], None] | None:
    """What a forked child has to do; None in the server itself, once the test process is gone."""
    codes: dict[int, int] = {}
    while True:
        try:
            message = connection.recv()
        except EOFError:
            return None
        if isinstance(message, int):
            if message not in codes:
                pid, status = os.waitpid(message, os.WNOHANG)
                if pid:
                    codes[message] = os.waitstatus_to_exitcode(status)
            connection.send(codes.get(message))
            continue
        descriptor = recv_handle(connection)
        pid = os.fork()
        if pid == 0:
            connection.close()
            return lambda: _be_a_rank(message, descriptor)
        os.close(descriptor)
        connection.send(pid)


def _be_a_rank(request: ForkRequest, descriptor: int) -> None:
    from tests.harness.worker import serve

    os.setsid()
    with request.output.open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.clear()
    os.environ.update(request.environment)
    signal.set_wakeup_fd(-1)
    serve(Connection(descriptor), str(request.stacks), request.backend)
