"""An image as an NBD export: what :class:`byre.nbd.disk.Disk` asks for, out of an Image.

Owns what clients see of the image: its size as of the export's making, transmission flags, block sizes and metadata
contexts. Sockets are :mod:`byre.nbd.server`'s.
"""

from __future__ import annotations

import os
from time import perf_counter_ns
from typing import TYPE_CHECKING, Final

from ..errors import InvalidArgument, NotFound
from ..nbd import wire
from ..nbd.disk import IN_FILE, ZERO, Batch, DirectRange, Piece
from ..nbd.server_negotiation import ALLOCATION_DEPTH, BASE_ALLOCATION, DIRTY_BITMAP, Offer
from ..units import SECTOR
from . import contexts
from .contexts import dirty, zero_run
from .export import Export

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..bitmaps.bitmap import Bitmap
    from ..graph.node import Node
    from ..image import Image
    from .contexts import Context

__all__ = ["NbdExport"]

_PREFERRED: Final = 4096
_LONG: Final = 128 << 10
"""From here on looking for a short cut costs nothing that matters."""
_NOTHING: Final = (0, 0, 0, 0, 0)


class NbdExport(Export):
    """One export of an NBD server. Several clients and threads at once.

    :ivar connections: most clients at a time, 0 for any number
    """

    kind = "nbd"

    def __init__(
        self,
        image: Image,
        name: str = "",
        *,
        id: str = "",
        description: str = "",
        writable: bool = False,
        connections: int = 0,
        bitmaps: Sequence[str] = (),
        allocation_depth: bool = False,
    ) -> None:
        """
        :param bitmaps: names of dirty bitmaps to show as ``qemu:dirty-bitmap:NAME``
        :param allocation_depth: show ``qemu:allocation-depth``
        :raises InvalidArgument: a name or description longer than 4096 bytes
        :raises NotFound: no such bitmap
        :raises Busy: a bitmap is in use
        """
        super().__init__(image, id=id, writable=writable)
        for what, text in (("name", name), ("description", description)):
            if len(text.encode()) > wire.MAX_STRING:
                raise InvalidArgument(f"export {what} {text[:40]!r}... is longer than {wire.MAX_STRING} bytes")
        self.connections = connections
        # Any range is served; but what a disk that was only probed may become is judged by sectors.
        self._unit = SECTOR if getattr(image.node, "probed", False) else 1
        self._bitmaps: list[Bitmap] = []
        self._contexts: dict[str, Context] = {BASE_ALLOCATION: contexts.allocation}
        if allocation_depth:
            self._contexts[ALLOCATION_DEPTH] = contexts.allocation_depth
        try:
            for bitmap_name in bitmaps:
                self._show(bitmap_name)
        except BaseException:
            self.close()
            raise
        self._offer = self._make_offer(name, description)

    def _show(self, name: str) -> None:
        bitmap = _find_bitmap(self.image.node, name)
        if bitmap is None:
            raise NotFound(f"Bitmap '{name}' is not found")
        if not self.writable and not bitmap.read_only and bitmap.enabled and not self.image.node.read_only:
            raise InvalidArgument(f"Enabled bitmap '{name}' incompatible with readonly export")
        bitmap.check(read_only=True)
        bitmap.occupy()
        self._bitmaps.append(bitmap)
        self._contexts[DIRTY_BITMAP + name] = dirty(bitmap)

    def _make_offer(self, name: str, description: str) -> Offer:
        flags = wire.TRANSMISSION_HAS_FLAGS | wire.TRANSMISSION_FLUSH | wire.TRANSMISSION_FUA | wire.TRANSMISSION_CACHE
        if self.writable:
            flags |= wire.TRANSMISSION_TRIM | wire.TRANSMISSION_WRITE_ZEROES | wire.TRANSMISSION_FAST_ZERO
        else:
            flags |= wire.TRANSMISSION_READ_ONLY
        if self.connections != 1:
            # All clients reach the same node: what one was told is written, the others read, and a flush covers it.
            flags |= wire.TRANSMISSION_MULTI_CONN
        alignment = self.image.node.limits.request_alignment
        sizes = (self._unit, max(_PREFERRED, min(alignment, wire.MAX_PAYLOAD)), wire.MAX_PAYLOAD)
        return Offer(name, description, self.image.size, flags, sizes, tuple(self._contexts))

    @property
    def name(self) -> str:
        return self._offer.name

    @property
    def offer(self) -> Offer:
        return self._offer

    def close(self) -> None:
        bitmaps, self._bitmaps = self._bitmaps, []
        for bitmap in bitmaps:
            bitmap.vacate()

    # -- requests ---------------------------------------------------------------------------------

    def in_file(self) -> bool:
        node = self.image.begin_batch()
        try:
            # A format that says nothing of its first byte may do so of others, where nobody writes to it.
            return node.file_range(0, 1) is not None or (node.layered and node.read_only)
        finally:
            self.image.end_batch(*_NOTHING)

    def begin(self) -> Batch:
        image = self.image
        node = image.begin_batch()
        try:
            quick = self.writable and node.buffered and not image.writethrough
            return Batch(node.size, node.read_cached, node.write_from if quick else None)
        except BaseException:
            image.end_batch(*_NOTHING)
            raise

    def end(self, reads: int, bytes_read: int, writes: int, bytes_written: int, started: int) -> None:
        self.image.end_batch(reads, bytes_read, writes, bytes_written, started)

    def past_cache(self) -> bool:
        return not self.image.node.buffered

    def direct(self, offset: int, length: int) -> DirectRange | None:
        image = self.image
        started = perf_counter_ns()
        node = image.begin_batch()
        found = None
        try:
            found = node.direct_range(offset, length) if offset + length <= node.size else None
        finally:
            if found is None:
                image.end_batch(*_NOTHING)
        if found is None:
            return None
        fd, host, give_back = found

        def release(done: int) -> None:
            if give_back is not None:
                give_back()
            image.end_batch(1 if done > 0 else 0, max(done, 0), 0, 0, started)

        return DirectRange(fd, host, release)

    def read_into(self, offset: int, view: memoryview) -> None:
        if len(view) < _LONG or not self._read_cached(offset, view):
            self.image.read_into(offset, view)

    def _read_cached(self, offset: int, view: memoryview) -> bool:
        """Read a long piece that lies in memory, past the layers above the file."""
        started = perf_counter_ns()
        node = self.image.begin_batch()
        done = False
        try:
            done = node.read_cached(offset, view)
        finally:
            self.image.end_batch(int(done), len(view) if done else 0, 0, 0, started)
        return done

    def write(self, offset: int, view: memoryview, fua: bool) -> None:
        self.image.write(offset, view, fua=fua)

    def write_zeroes(self, offset: int, length: int, *, may_unmap: bool, fast: bool) -> None:
        unmap = may_unmap and bool(getattr(self.image.node, "pass_discard", True))
        self.image.write_zeroes(offset, length, unmap=unmap, fallback=not fast)

    def trim(self, offset: int, length: int) -> None:
        self.image.discard(offset, length)

    def flush(self) -> None:
        if not self.image.read_only:
            self.image.flush()

    def pieces(self, offset: int, length: int, *, in_file: bool, holes: bool) -> list[Piece]:
        found: list[Piece] = []
        copies: dict[int, int] = {}
        end = offset + length
        node = self.image.begin_batch()
        try:
            while offset < end:
                zero, step = zero_run(node, offset, end - offset) if holes else (False, end - offset)
                place = node.file_range(offset, step) if in_file and not zero else None
                if zero:
                    found.append(Piece(step, ZERO))
                elif place is None:
                    found.append(Piece(step))
                else:
                    if place[0] not in copies:
                        # The node's own may be closed when the graph changes, before all is sent.
                        copies[place[0]] = os.dup(place[0])
                    found.append(Piece(step, IN_FILE, copies[place[0]], place[1]))
                offset += step
        except BaseException:
            for fd in copies.values():
                os.close(fd)
            raise
        finally:
            self.image.end_batch(*_NOTHING)
        return found

    def status(self, context: str, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
        runs = self._contexts[context](self.image, offset, length, limit)
        return runs if self._unit == 1 else contexts.whole_blocks(runs, self._unit)


def _find_bitmap(node: Node | None, name: str) -> Bitmap | None:
    """The bitmap of that name in the topmost layer that has one."""
    from ..formats.abilities import HasBitmaps

    while node is not None:
        tracked = node.tracker.find(name) if node.tracker is not None else None
        if tracked is not None:
            return tracked
        if isinstance(node, HasBitmaps):
            try:
                return node.bitmap_store().find(name)
            except NotFound:
                pass
        below = node.children.get("backing") or (node.children.get("file") if node.kind == "filter" else None)
        node = below.node if below else None
    return None
