"""The methods by which a qcow2 node has dirty bitmaps; see :mod:`.bitmaps`.

Apart from them because most images have none, and then that module is not loaded.
"""

from __future__ import annotations

from ...typing import TYPE_CHECKING, cast
from . import layout

if TYPE_CHECKING:
    from .bitmaps import StoredBitmaps
    from .image import Qcow2Node

__all__ = ["WithBitmaps"]


def _node(ability: WithBitmaps) -> Qcow2Node:
    return cast("Qcow2Node", ability)


class WithBitmaps:
    """See :class:`byre.formats.abilities.HasBitmaps`."""

    _bitmaps: StoredBitmaps | None = None

    def bitmap_store(self) -> StoredBitmaps:
        """The image's bitmaps.

        :raises ImageError: the directory breaks the format
        """
        from .bitmaps import store_of

        node = _node(self)
        with node.lock:
            return store_of(node)

    def has_bitmaps(self) -> bool:
        """Whether the image has persistent bitmaps on disk, as far as the header says; lock held."""
        node = _node(self)
        return bool(
            node.header.autoclear_features & layout.AUTOCLEAR_BITMAPS
            and layout.find_extension(node.extensions, layout.EXTENSION_BITMAPS)
        )

    def begin_bitmaps(self) -> int:
        """The guest is about to write; the autoclear bits that may stay set. Lock held."""
        if self._bitmaps is None and not self.has_bitmaps():
            return 0
        from .bitmaps import store_of

        store_of(_node(self)).begin_writing()
        return layout.AUTOCLEAR_BITMAPS if self.has_bitmaps() else 0

    def store_bitmaps(self) -> None:
        """Bitmaps that changed are stored, and no longer in use on disk. Lock held."""
        if self._bitmaps is not None:
            self._bitmaps.store()

    def resize_bitmaps(self, size: int, *, prepare: bool = False) -> None:
        """The disk has another size; no lock held.

        :param prepare: it will have
        :raises ByreError: (``prepare``) a bitmap forbids it; nothing has changed
        """
        node = _node(self)
        if prepare:
            if self._bitmaps is not None or self.has_bitmaps():
                self.bitmap_store().prepare_resize(size)
        elif node.tracker is not None:
            node.tracker.resize(size)
