"""A process that has imported DeepSpeed, of which rank processes are forked: importing takes longer than most tests."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_STARTER = "import sys; sys.path.insert(0, sys.argv[1]); from tests.harness.forks import main; main(int(sys.argv[2]))"
_POLL_SECONDS = 0.01
_ANSWER_SECONDS = 240


@dataclass(frozen=True)
class ForkRequest:
    """A new rank process; the descriptor of its pipe follows on the connection."""

    output: Path
    stacks: Path
    backend: str
    environment: Mapping[str, str]


def start_interpreter(
    code: str, descriptor: int, more: list[str], output: Path, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Python that runs `code`, whose arguments are this project's folder, the descriptor of its pipe, and `more`."""
    with output.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-c", code, str(_ROOT), str(descriptor), *more],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            pass_fds=[descriptor],
            start_new_session=True,
        )


class ForkServerError(RuntimeError):
    """The fork server ended, hangs, or was interrupted: another one has to be started."""


class ForkServer:
    """The process, as the test process sees it."""

    def __init__(self, output: Path, environment: Mapping[str, str]) -> None:
        self._output = output
        self._is_asked = False  # and has not answered
        self._connection, childs_end = Pipe()
        self._process = start_interpreter(_STARTER, childs_end.fileno(), [], output, environment)
        childs_end.close()

    @property
    def is_usable(self) -> bool:
        """Whether it runs, and no answer is left over of a question that was interrupted."""
        return not self._is_asked and self._process.poll() is None

    def fork(self, request: ForkRequest, descriptor: int) -> ForkedProcess:
        """A new process with `descriptor` as its end of a pipe; ForkServerError."""
        pid = self._ask(request, descriptor)
        assert pid is not None
        return ForkedProcess(self, pid)

    def exit_code(self, pid: int) -> int | None:
        """As Popen.returncode, once; None while the process runs. ForkServerError."""
        return self._ask(pid)

    def close(self) -> None:
        """End the process, and with it, a second later, those it forked."""
        self._connection.close()
        self._process.kill()
        self._process.wait()

    def _ask(self, question: ForkRequest | int, descriptor: int | None = None) -> int | None:
        if not self.is_usable:
            raise ForkServerError(self._trouble())
        self._is_asked = True
        try:
            self._connection.send(question)
            if descriptor is not None:
                send_handle(self._connection, descriptor, self._process.pid)
            if not self._connection.poll(_ANSWER_SECONDS):
                raise ForkServerError(f"no answer in {_ANSWER_SECONDS} s: {self._trouble()}")
            answer: int | None = self._connection.recv()
        except (EOFError, OSError) as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=5)  # its end of the connection closes before it has ended
            raise ForkServerError(self._trouble()) from error
        self._is_asked = False
        return answer

    def _trouble(self) -> str:
        code = self._process.poll()
        state = "was interrupted or hangs" if code is None else f"ended with exit code {code}"
        return f"the fork server of the rank processes {state}; it printed\n{self._output.read_text(errors='replace')}"


class ForkedProcess:
    """What RankProcess needs of a subprocess.Popen, for a child of the fork server."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self._server, self.pid = server, pid
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a signal's; None while the process runs."""
        if self._code is None:
            try:
                self._code = self._server.exit_code(self.pid)
            except ForkServerError:  # its processes end with it
                self._code = -signal.SIGKILL
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
    while True:
        try:
            question = connection.recv()
        except EOFError:
            return None
        if isinstance(question, int):
            pid, status = os.waitpid(question, os.WNOHANG)
            connection.send(os.waitstatus_to_exitcode(status) if pid else None)
            continue
        descriptor = recv_handle(connection)
        pid = os.fork()
        if pid == 0:
            connection.close()
            return partial(_be_a_rank, question, descriptor)
        os.close(descriptor)
        os.setpgid(pid, pid)  # before anybody can kill the group
        connection.send(pid)


def _be_a_rank(request: ForkRequest, descriptor: int) -> None:
    from tests.harness.worker import serve

    with request.output.open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.clear()
    os.environ.update(request.environment)
    serve(Connection(descriptor), str(request.stacks), request.backend)
