"""VpcNode: a VHD image as a node. Opening is in :mod:`.opening`, resizing in :mod:`.resizing`."""

from __future__ import annotations

from ...errors import NotSupported, ReadOnly
from ...typing import TYPE_CHECKING
from ...units import SECTOR
from ..stored import StoredFormat
from . import layout
from .mapping import DynamicMapping, FixedMapping

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...graph.node import Node
    from ...graph.opening import OpenFlags
    from ...io.extent import Extent
    from ...io.extentmap import ExtentMap
    from ...jobs.job import Control
    from ...options import OptionValues
    from ..abilities import CheckResult
    from ..base import Placement

__all__ = ["VpcNode"]


class VpcNode(StoredFormat):
    """An open VHD image. Guarded by ``lock``: mapping, footer, header, size.

    :ivar footer: as it is in the file, at its end; for other than fixed disks also at its beginning
    :ivar header: ``None`` for a fixed disk
    :ivar shown_cluster_size: what ``info`` says; 0 for a fixed disk
    """

    driver = "vpc"

    def __init__(self, file: Node, footer: layout.Footer, header: layout.DynamicHeader | None,
                 mapping: FixedMapping | DynamicMapping, options: OptionValues, flags: OpenFlags, *,
                 name: str = "") -> None:  # fmt: skip
        super().__init__(file, options, flags, name=name)
        self.footer = footer
        self.header = header
        self.mapping = mapping
        self.shown_cluster_size = header.block_size if header is not None else 0
        self.cluster_size = header.block_size if header is not None else SECTOR
        self.zero_unit = SECTOR
        self._size = mapping.size

    def holders(self) -> tuple[object, ...]:
        return (self.mapping,)

    @property
    def is_differencing(self) -> bool:
        return self.footer.disk_type == layout.DIFFERENCING

    @property
    def has_zero_init(self) -> bool:
        return self.header is not None or self.file.has_zero_init

    # -- the format contract ----------------------------------------------------------------------

    def lookup(self, offset: int, length: int) -> list[Extent]:
        return self.mapping.lookup(offset, length)

    def lookup_all(self, offset: int, length: int) -> ExtentMap:
        return self.mapping.lookup_all(offset, length)

    def in_place(self, offset: int, length: int) -> int:
        return self.mapping.in_place(offset, length) if self.report is None else -1

    def reserve(self, offset: int, length: int) -> list[Placement]:
        return self.mapping.reserve(offset, length)

    def publish(self, placements: Sequence[Placement]) -> None:
        self.mapping.publish(placements)

    def cancel(self, placements: Sequence[Placement]) -> None:
        self.mapping.cancel(placements)

    def unmap(self, offset: int, length: int, kind: int, keep: bool) -> int:
        return self.mapping.unmap(offset, length, kind, keep)

    def write_back(self) -> None:
        """Blocks, bitmaps, footer | block table; given up blocks may be used again behind another flush."""
        mapping = self.mapping
        if isinstance(mapping, FixedMapping):
            return
        if mapping.end_moved:
            self.file.write_from(mapping.end, memoryview(layout.encode_footer(self.footer)))
            mapping.end_moved = False
        if mapping.dirty:
            self.file.flush()
            mapping.write_table()
        if mapping.released:
            self.file.flush()
            self._reclaim(mapping)

    def _reclaim(self, mapping: DynamicMapping) -> None:
        """The table on disk does not name these blocks any more: free space once no request uses it."""
        released, mapping.released = mapping.released, []
        length, punch = mapping.bitmap_size + mapping.block_size, self.pass_discard

        def give_back() -> None:
            for host in released:
                if punch:
                    self.file.discard(host, length)
            mapping.free += released

        self.inflight.when_clear(give_back)

    # -- abilities --------------------------------------------------------------------------------

    def resize(self, size: int, *, preallocation: str = "off", exact: bool = True) -> None:
        if self.read_only:
            raise ReadOnly("cannot resize: the image is open read-only", where=self.filename)
        from .resizing import resize

        resize(self, size, preallocation)

    def check(self, control: Control, fix: str = "") -> CheckResult:
        from .check import check_image

        return check_image(self, control, fix)

    def has_holes(self) -> bool:
        return True  # blocks are large, and a fixed disk is one

    def format_info(self) -> dict[str, object]:
        from .opening import describe

        return describe(self)

    def chain_opened(self) -> None:
        if self.backing is not None:
            from .opening import check_parent

            check_parent(self, self.backing.node)

    # -- reopening --------------------------------------------------------------------------------

    def reopen_prepare(self, flags: OpenFlags, options: OptionValues) -> object:
        if not flags.read_only:
            check_writable(self.footer, self.filename)
        with self.lock:
            if not self.read_only and self.failure is None:
                self.guarded(self.write_back)
        return flags, options


def check_writable(footer: layout.Footer, where: str) -> None:
    """:raises NotSupported: a differencing disk"""
    if footer.disk_type == layout.DIFFERENCING:
        raise NotSupported("differencing disks can only be read", where=where, hint="open it read-only")
