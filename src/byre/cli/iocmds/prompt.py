"""Where lines come from when none were given: a terminal with editing, or whatever standard input is."""

from __future__ import annotations

import os
import select
import sys

from ...typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from .shell import Shell

__all__ = ["PROMPT", "Lines"]

PROMPT: Final = "qemu-io> "
"""The same under every name, for scripts take it out of the output."""

_TICK: Final = 0.02


class Lines:
    """Lines from standard input, each asked for with a prompt.

    :param shell: its requests are reported while it waits for a line
    """

    def __init__(self, shell: Shell) -> None:
        self._shell = shell
        self._buffer = b""
        self._ended = sys.stdin is None  # closed: number 0 may be the image by now
        self._edit: Callable[[str], str] | None = None
        if sys.stdin is not None and sys.stdin.isatty():
            self._edit = self._editor()

    def _editor(self) -> Callable[[str], str]:
        """``input`` with history and completion of command names, where there is a line editor."""
        try:
            import readline
        except ImportError:
            return input
        names = [command.name for command in self._shell.commands]

        def complete(text: str, state: int) -> str | None:
            found = [name for name in names if name.startswith(text)]
            return found[state] if state < len(found) else None

        readline.set_completer(complete)
        readline.set_completer_delims(" ")
        readline.parse_and_bind("tab: complete")
        readline.set_auto_history(True)
        return input

    def next(self) -> str | None:
        """The next line, without its end; ``None`` at the end of input."""
        if self._edit is not None and not self._shell.requests.running:
            self._shell.requests.reap()
            sys.stdout.flush()
            try:
                return self._edit(PROMPT)
            except EOFError:
                self._shell.say("\n")
                return None
        self._shell.say(PROMPT)
        sys.stdout.flush()
        self._shell.requests.reap()
        line = self._read()
        if line is None and self._edit is not None:
            self._shell.say("\n")
        return line

    def _read(self) -> str | None:
        while b"\n" not in self._buffer and not self._ended:
            self._wait_readable()
            data = os.read(0, 65536)
            self._ended = not data
            self._buffer += data
        line, end, self._buffer = self._buffer.partition(b"\n")
        if not line and not end:
            return None
        return os.fsdecode(line)

    def _wait_readable(self) -> None:
        """Wait for input; what requests have to say meanwhile is said at once."""
        requests = self._shell.requests
        while requests.running:
            if select.select([0], [], [], _TICK)[0]:
                return
            requests.settle()
            requests.reap()
            sys.stdout.flush()
