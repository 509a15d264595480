"""The io shell: its commands, the image they work on, and what happens to a line that was typed."""

from __future__ import annotations

import os
import sys
from time import perf_counter

from ...errors import ByreError, Corrupt, IOFailure, Mismatch, ReadOnly
from ...typing import TYPE_CHECKING, NamedTuple
from ..common import as_peer, report
from .getopt import UsageError
from .requests import Requests
from .text import Refused

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...image import Image
    from ..common import Given
    from .breakpoints import Breakpoints

__all__ = ["Command", "Failed", "Shell"]


class Failed(Exception):
    """A command failed and has said so."""


class Command(NamedTuple):
    """One command.

    :ivar run: takes the shell and the arguments; raises ``Failed``, ``Refused``, ``UsageError`` or a ByreError
    :ivar most: most arguments; -1 for any number
    :ivar args: what they are, for the usage line; ``None`` if there are none
    :ivar needs_image: refused while no image is open
    :ivar writes: refused on a read-only image
    :ivar help: printed by ``help NAME`` after the usage line
    """

    name: str
    run: Callable[[Shell, list[str]], None]
    summary: str
    args: str | None = None
    least: int = 0
    most: int = 0
    alias: str = ""
    needs_image: bool = True
    writes: bool = False
    help: str = ""

    def usage(self, name: str = "") -> str:
        args = "" if self.args is None else f"{self.args} "
        return f"{name or self.name} {args}-- {self.summary}\n"


class Shell:
    """State of one io shell.

    :ivar given: the options of the program, which ``open`` shares
    :ivar image: the open image
    :ivar requests: what runs beside the shell
    :ivar breakpoints: those that were set on the open image
    :ivar misalign: buffers lie 16 bytes off a page
    :ivar finished: ``quit`` was given
    """

    def __init__(self, given: Given, commands: tuple[Command, ...], *, misalign: bool = False) -> None:
        from .breakpoints import Breakpoints

        self.given = given
        self.commands = tuple(sorted(commands, key=lambda command: command.name))
        self.image: Image | None = None
        self.misalign = misalign
        self.finished = False
        self._told = False  # that the image went out of service
        self.breakpoints: Breakpoints = Breakpoints(self.say)
        self.requests = Requests(self.breakpoints.watch)

    # -- lines ------------------------------------------------------------------------------------

    def execute(self, line: str) -> bool:
        """Run one line; whether it succeeded. Errors are printed here."""
        words = [word for word in line.split(" ") if word]
        if not words:
            return True
        command = self.find(words[0])
        if command is None:
            self.complain(f'command "{words[0]}" not found')
            return False
        try:
            self._run(command, words[0], words[1:])
            return True
        except Failed:
            pass
        except UsageError:
            self.say(command.usage())
        except Refused as error:
            self.say(f"{error}\n")
        except ByreError as error:
            report(error)
        return False

    def _run(self, command: Command, name: str, arguments: list[str]) -> None:
        if command.needs_image and self.image is None:
            self.complain("no file open, try 'help open'")
            raise Failed
        if len(arguments) < command.least or 0 <= command.most < len(arguments):
            self._count_complaint(command, name, len(arguments))
            raise Failed
        if command.writes and self.image is not None and self.image.read_only:
            raise ReadOnly("Block node is read-only")
        command.run(self, arguments)

    def _count_complaint(self, command: Command, name: str, count: int) -> None:
        if command.most < 0:
            expected = f"at least {command.least}"
        elif command.least == command.most:
            expected = f"{command.least}"
        else:
            expected = f"between {command.least} and {command.most}"
        self.complain(f"bad argument count {count} to {name}, expected {expected} arguments")

    def find(self, name: str) -> Command | None:
        for command in self.commands:
            if name == command.name or (command.alias and name == command.alias):
                return command
        return None

    # -- the image --------------------------------------------------------------------------------

    @property
    def opened(self) -> Image:
        """The open image; commands that need one are not run without."""
        assert self.image is not None
        return self.image

    def perform(self, action: Callable[[], None]) -> float:
        """Run ``action`` and wait for it; the seconds it took. Requests that ended meanwhile are reported.

        :raises Busy: it is held at a breakpoint, or waits for a request that is
        """
        if self.breakpoints:  # only then can it be held, and must not take the shell with it
            request = self.requests.start(action, lambda _request: None)
            try:
                self.requests.wait(request)
            finally:
                self.requests.reap()
            if request.error is not None:
                raise request.error
            return request.seconds
        started = perf_counter()
        try:
            action()
        finally:
            seconds = perf_counter() - started
            self.requests.reap()
        return seconds

    def close(self) -> None:
        """Let held requests go, wait for all, and close the image.

        :raises ByreError: the last write-back failed; the image is closed all the same
        """
        self.breakpoints.clear()
        self.requests.drain()
        image, self.image = self.image, None
        if image is None:
            return
        try:
            image.close()
        except IOFailure:
            if not self._told:  # an image out of service cannot be written back, which is no news then
                raise

    # -- words ------------------------------------------------------------------------------------

    @staticmethod
    def say(text: str) -> None:
        sys.stdout.write(text)

    @staticmethod
    def complain(text: str) -> None:
        """One line on standard error, without the program's name."""
        from ...errors import printable

        sys.stderr.write(f"{printable(text)}\n")
        sys.stderr.flush()

    def failed(self, verb: str, error: BaseException) -> None:
        """Say that a request failed; under byre's own name also why.

        :raises BaseException: ``error`` itself, if it is none of byre's
        """
        if not isinstance(error, ByreError):
            raise error
        node = self.image.node if self.image is not None else None
        if node is not None and isinstance(error, Corrupt) and getattr(node, "failure", None) is error:
            self.complain(f"{node.driver}: Marking image as corrupt: {error.message}; "
                          "further corruption events will be suppressed")  # fmt: skip
            self._told = True
        if isinstance(error, Mismatch) and as_peer():
            self.complain(error.message)
            return
        self.say(f"{verb} failed: {os.strerror(error.errno)}\n")
        self.explain(error)

    @staticmethod
    def explain(error: ByreError) -> None:
        """The whole reason, on standard error; scripts that expect the peer's words are spared it."""
        if not as_peer():
            report(error)
