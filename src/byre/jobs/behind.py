"""Write-behind: who writes much tells the system to begin early, so that the flush at the end has little left to do."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final, Protocol, runtime_checkable

from ..units import KIB, MIB

if TYPE_CHECKING:
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
    """The data files under ``node``, to which much is going to be written. Guarded by its own lock, a leaf."""

    def __init__(self, node: Node) -> None:
        self._files: list[_BulkFile] = []
        for child in getattr(node, "sources", ()):
            if isinstance(child.node, _BulkFile):
                child.node.bulk_size = _BULK
                self._files.append(child.node)
        self._lock = threading.Lock()
        self._held_back = 0

    def wrote(self, count: int) -> None:
        """``count`` more bytes were written."""
        with self._lock:
            self._held_back += count
            if self._held_back < _HELD_BACK:
                return
            self._held_back = 0
        for file in self._files:
            file.start_write_back()
