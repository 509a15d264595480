"""Breakpoints: ``break``, ``remove_break``, ``resume``, ``wait_break``, by a fault driver below the image."""

from __future__ import annotations

import os
import threading

from ...errors import ByreError, NotSupported
from ...typing import TYPE_CHECKING, Protocol, cast
from .shell import Command, Failed

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...graph.node import Node
    from .shell import Shell

__all__ = ["COMMANDS", "Breakpoints"]


class Breakable(Protocol):
    """A node that can hold requests; ``on_suspend`` is called by the thread that is held."""

    on_suspend: Callable[[str], None] | None
    on_resume: Callable[[str], None] | None

    def set_breakpoint(self, event: str, tag: str) -> None: ...
    def remove_breakpoint(self, tag: str) -> None: ...
    def resume(self, tag: str) -> None: ...


class Breakpoints:
    """Breakpoints set by the shell, by tag, and the requests held there.

    Guarded by ``_lock``: ``_held``, ``_news``. Everything else belongs to the shell's thread.

    :param say: told when a request is held and when it goes on, by the shell's thread
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._lock = threading.Lock()
        self._held: list[str] = []
        self._news: list[str] = []
        self._set: dict[str, Breakable] = {}

    def __bool__(self) -> bool:
        """Whether a request may be held from now on."""
        return bool(self._set)

    def add(self, node: Node, event: str, tag: str) -> None:
        """:raises ByreError: no such event, or no fault driver there"""
        target = find(node)
        target.on_suspend, target.on_resume = self._suspended, self._resumed
        target.set_breakpoint(event, tag)
        self._set[tag] = target

    def remove(self, node: Node, tag: str) -> None:
        """Requests held there go on.

        :raises ByreError: no such breakpoint
        """
        (self._set.get(tag) or find(node)).remove_breakpoint(tag)
        self.tell()

    def resume(self, node: Node, tag: str) -> None:
        """:raises ByreError: no request is held there"""
        (self._set.get(tag) or find(node)).resume(tag)
        self.tell()

    def _suspended(self, tag: str) -> None:
        with self._lock:
            self._held.append(tag)
            self._news.append(f"blkdebug: Suspended request '{tag}'\n")

    def _resumed(self, tag: str) -> None:
        with self._lock:
            if tag in self._held:
                self._held.remove(tag)
            self._news.append(f"blkdebug: Resuming request '{tag}'\n")

    def tell(self) -> None:
        """Say what happened since the last time."""
        with self._lock:
            news, self._news = self._news, []
        for line in news:
            self._say(line)

    def is_held(self, tag: str) -> bool:
        """Whether a request stands at this breakpoint now."""
        self.tell()
        with self._lock:
            return tag in self._held

    def watch(self) -> bool:
        """Whether a request stands at any breakpoint now."""
        self.tell()
        with self._lock:
            return bool(self._held)

    def clear(self) -> None:
        """Take all breakpoints away; the requests held there go on."""
        for tag, target in self._set.items():
            try:
                target.remove_breakpoint(tag)
            except ByreError:
                pass  # met and resumed already
        self._set.clear()
        self.tell()


def find(node: Node) -> Breakable:
    """The top-most node at or below ``node`` that can hold requests.

    :raises NotSupported: there is none
    """
    here: Node | None = node
    while here is not None:
        if hasattr(here, "set_breakpoint"):
            return cast("Breakable", here)
        edge = here.children.get("file")
        here = edge.node if edge else None
    raise NotSupported("no fault driver (blkdebug) below the image", where=node.filename)


def _refuse(shell: Shell, text: str, error: ByreError) -> Failed:
    shell.say(f"{text}: {os.strerror(error.errno)}\n")
    return Failed()


def set_break(shell: Shell, arguments: list[str]) -> None:
    try:
        shell.breakpoints.add(shell.opened.node, *arguments)
    except ByreError as error:
        raise _refuse(shell, "Could not set breakpoint", error) from None


def remove_break(shell: Shell, arguments: list[str]) -> None:
    tag = arguments[0]
    try:
        shell.breakpoints.remove(shell.opened.node, tag)
    except ByreError as error:
        raise _refuse(shell, f"Could not remove breakpoint {tag}", error) from None
    shell.requests.settle()


def resume(shell: Shell, arguments: list[str]) -> None:
    try:
        shell.breakpoints.resume(shell.opened.node, arguments[0])
    except ByreError as error:
        raise _refuse(shell, "Could not resume request", error) from None
    shell.requests.settle()


def wait_break(shell: Shell, arguments: list[str]) -> None:
    tag = arguments[0]
    held = shell.requests.until(lambda: shell.breakpoints.is_held(tag))
    shell.requests.reap()
    if not held:
        raise NotSupported(f"no request is left that could reach breakpoint {tag!r}")


COMMANDS = (
    Command("break", set_break, "hold the next request that meets EVENT, under the name TAG", "event tag", 2, 2),
    Command("remove_break", remove_break, "take a breakpoint away; requests held there go on", "tag", 1, 1),
    Command("resume", resume, "let the request held at a breakpoint go on", "tag", 1, 1),
    Command("wait_break", wait_break, "wait until a request is held at a breakpoint", "tag", 1, 1),
)
