"""Servers in the background: a process that outlives the command, its id in a file, and an undisturbed end."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING

from ..errors import Busy, from_oserror, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["PidFile", "in_background", "no_interrupts"]


def in_background(serve: Callable[[Callable[[], None]], int], *, keep_stderr: bool) -> int:
    """Run ``serve`` in a process of its own; the exit code of the command that started it.

    The command ends when ``serve`` calls what it is given, with 0, or when it fails before. What it said on stderr
    until then is passed on. Nothing may have started threads before.

    :param keep_stderr: the server goes on writing to the terminal
    """
    said_read, said_write = os.pipe2(os.O_CLOEXEC)
    ready_read, ready_write = os.pipe2(os.O_CLOEXEC)
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        os.close(said_write)
        os.close(ready_write)
        return _relay(said_read, ready_read, child)
    os.close(said_read)
    os.close(ready_read)
    os.setsid()
    stderr = os.dup(2)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1):
        os.dup2(null, fd)
    os.dup2(said_write, 2)
    os.close(said_write)

    def ready() -> None:
        os.write(ready_write, b"1")
        os.close(ready_write)
        os.dup2(stderr if keep_stderr else null, 2)
        os.close(stderr)
        os.close(null)

    return serve(ready)


def _relay(said: int, ready: int, child: int) -> int:
    """Pass on what the server says until clients can connect, or it is gone."""
    try:
        while data := os.read(said, 4096):
            os.write(2, data)
        if os.read(ready, 1):
            return 0
    finally:
        os.close(said)
        os.close(ready)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) or 1


class PidFile:
    """This process's id in a file, from entry to exit; nothing without a path.

    :param keep: leave the file behind, as the peer does: scripts remove it themselves, right after the signal
    :raises Busy: another process that runs has its id there
    """

    def __init__(self, path: str, *, keep: bool = False) -> None:
        self._path = path
        self._keep = keep
        self._fd = -1

    def __enter__(self) -> None:
        if not self._path:
            return
        import fcntl

        try:
            fd = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise from_oserror(error, "cannot create PID file", printable(self._path)) from None
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(fd, 0)
            os.write(fd, f"{os.getpid()}\n".encode())
        except BlockingIOError:
            os.close(fd)
            raise Busy("cannot create PID file: cannot lock it, another server runs", where=self._path) from None
        except OSError as error:
            os.close(fd)
            raise from_oserror(error, "cannot write PID file", printable(self._path)) from None
        self._fd = fd

    def __exit__(self, *_error: object) -> None:
        if self._fd >= 0:
            if not self._keep:
                with contextlib.suppress(OSError):
                    os.unlink(self._path)
            os.close(self._fd)


@contextlib.contextmanager
def no_interrupts() -> Iterator[None]:
    """Signals that would end the process are ignored: it is ending, and must come to write everything back."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals do not come here
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
