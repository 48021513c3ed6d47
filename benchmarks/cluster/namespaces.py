"""Linux namespaces held open by file descriptors: they vanish when the process that made them ends, however it ends."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

_CLONE_NEWUTS = 0x04000000
_CLONE_NEWNET = 0x40000000
_KINDS = {"net": _CLONE_NEWNET, "uts": _CLONE_NEWUTS}
_SECONDS_PER_COMMAND = 20


class SetupError(RuntimeError):
    """This machine refused something the emulated cluster needs; the message says what and why."""


def command(*words: str | int) -> None:
    """Run a system command in the namespaces of the moment; SetupError with its complaint when it fails."""
    line = [str(word) for word in words]
    try:
        done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=_SECONDS_PER_COMMAND)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SetupError(f"`{' '.join(line)}`: {error}") from error
    if done.returncode != 0:
        raise SetupError(f"`{' '.join(line)}`: {done.stderr.strip() or f'exit code {done.returncode}'}")


class Namespace:
    """A network of its own with a host name of its own; for single-threaded processes with CAP_SYS_ADMIN."""

    def __init__(self) -> None:
        """The one this process is in."""
        self._files = {kind: os.open(f"/proc/self/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC) for kind in _KINDS}

    @classmethod
    def create(cls, hostname: str) -> Namespace:
        """A fresh one, with nothing but a loopback device that is down."""
        with cls().entered():  # and back
            _call("unshare", _CLONE_NEWNET | _CLONE_NEWUTS)
            socket.sethostname(hostname)
            return cls()

    @property
    def path(self) -> str:
        """The network namespace as a path that `ip link … netns` takes; valid in this process's children too."""
        return f"/proc/{os.getpid()}/fd/{self._files['net']}"

    def enter(self) -> None:
        """Move this process into the namespace, for good."""
        for kind, file in self._files.items():
            _call("setns", file, _KINDS[kind])

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Be inside for a while; processes started meanwhile stay inside."""
        outside = Namespace()
        self.enter()
        try:
            yield
        finally:
            outside.enter()
            outside.close()

    def close(self) -> None:
        """Let go of the namespace; the kernel drops it after the last process inside."""
        for file in self._files.values():
            os.close(file)
        self._files = {}


def _call(function: str, *arguments: int) -> None:
    """One call into the C library (os.unshare and os.setns are younger than Python 3.10)."""
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, function)(*arguments) != 0:
        raise SetupError(f"{function}: {os.strerror(ctypes.get_errno())}")
