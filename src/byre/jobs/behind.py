"""Write-behind: who writes much tells the system to begin early, so that the flush at the end has little left to do."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final, Protocol, runtime_checkable

from ..graph import chain
from ..io.workers import spawn
from ..units import KIB, MIB

if TYPE_CHECKING:
    from types import TracebackType

    from ..graph.node import Node

__all__ = ["WriteBehind"]

_BULK: Final = 256 * KIB
_HELD_BACK: Final = 32 * MIB
"""So much is written before the system is told to begin with it."""


@runtime_checkable
class _BulkFile(Protocol):
    """What ``protocols/file.py`` does for those who write much in order.

    :ivar bulk_size: writes of at least so many bytes have their space allocated first
    """

    bulk_size: int

    def start_write_back(self) -> None: ...


class WriteBehind:
    """The data files under ``node`` while much is written to them: a context manager around that, which may be
    entered again.

    The system is told on a thread of its own, for it may take its time, and writers shall not wait for that.
    Guarded by its own lock, a leaf: all but ``_files``.

    :param early: whether the system is to begin early at all. Not with the file of a disk in use: what its users
        write would wait for what is on its way to the disk
    """

    def __init__(self, node: Node, *, early: bool = True) -> None:
        sources = getattr(chain.skip_filters(node), "sources", ())
        self._files = [child.node for child in sources if isinstance(child.node, _BulkFile)]
        self._early = early
        self._changed = threading.Condition()
        self._before: list[int] = []
        self._held_back = 0
        self._inside = False
        self._thread: threading.Thread | None = None

    def __enter__(self) -> WriteBehind:
        with self._changed:
            self._before = [file.bulk_size for file in self._files]
            self._held_back = 0
            self._inside = True
        for file in self._files:
            file.bulk_size = min(_BULK, file.bulk_size)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        with self._changed:
            self._inside = False
            self._changed.notify_all()
            thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        for file, before in zip(self._files, self._before, strict=True):
            file.bulk_size = before

    def wrote(self, count: int) -> None:
        """``count`` more bytes were written."""
        if not self._early or not self._files:
            return
        with self._changed:
            self._held_back += count
            if self._held_back < _HELD_BACK or not self._inside:
                return
            if self._thread is None:
                self._thread = spawn(self._work, "write-behind")
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                while self._inside and self._held_back < _HELD_BACK:
                    self._changed.wait()
                if not self._inside:
                    return
                self._held_back = 0
            for file in self._files:
                file.start_write_back()
