"""An open Parallels image: its map, the field that says that it is in use, growing, checking."""

from __future__ import annotations

from ...errors import ImageError, InvalidArgument, NotSupported
from ...io.extent import UNALLOCATED
from ...typing import TYPE_CHECKING
from ...units import SECTOR, align_up
from ..flatmap import EntryCode, FlatMap
from ..mapped import MappedNode
from ..opening import check_size, fit_flags, read_head
from ..space import Space
from .layout import (
    BAT_OFFSET,
    CLOSED,
    HEADER_SIZE,
    IN_USE,
    MAX_SECTORS,
    Header,
    decode_header,
    encode_header,
    is_descriptor,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    from ...graph.node import Node
    from ...graph.opening import OpenFlags, OpenRequest
    from ...jobs.job import Control
    from ..abilities import CheckResult
    from .extension import StoredBitmaps

__all__ = ["ParallelsNode", "open_parallels"]


def open_parallels(request: OpenRequest) -> Node:
    """The node of an existing image, or of the bundle whose descriptor the file is.

    :raises ImageError: the header breaks the format
    """
    file = request.open_child("file")
    head = read_head(file, HEADER_SIZE)
    if is_descriptor(head):
        from .bundle import open_bundle

        return open_bundle(request, file)
    flags = fit_flags(request, file)
    try:
        header = decode_header(head)
        if header.bat_end > file.size:
            raise ImageError(f"the BAT ends at {header.bat_end:#x}, past the end of the file ({file.size:#x})")
        check_size(request, header.size)
    except ImageError as error:
        error.where = error.where or file.filename
        raise
    node = ParallelsNode(request, file, header, flags)
    node.attach(request)
    if not flags.no_io:
        node.load()
        if not (flags.read_only or flags.check) and node.needs_check():
            request.opener.graph.repairs += node.mend()
    return node


class ParallelsNode(MappedNode):
    """An open image. Guarded by ``lock``: the map, ``header``."""

    driver = "parallels"
    marks_every_write = True
    map: FlatMap

    def __init__(self, request: OpenRequest, file: Node, header: Header, flags: OpenFlags) -> None:
        super().__init__(request, file, flags)
        self.header = header
        self.cluster_size = self.zero_unit = header.cluster_size
        self._size = header.size
        self._bitmaps: StoredBitmaps | None = None
        start, self.data_offset_right = header.data_offset(file.size)
        self.map = FlatMap(
            file, BAT_OFFSET, header.entries, EntryCode(0, header.entry_unit, 0),
            Space(start, header.cluster_size, start), what="BAT entry", hole=UNALLOCATED, in_place_zero=False,
        )  # fmt: skip

    def load(self) -> None:
        """The BAT, and from it which clusters are free.

        :raises ImageError: it lies beyond the end of the file
        """
        self.map.load()
        start, unit = self.map.space.base, self.cluster_size
        highest, aligned = -1, True
        for _, hosts in self.map.windows():
            hosts = hosts[(hosts >= start) & (hosts < self.file.size)]
            if len(hosts):
                highest = max(highest, int(hosts.max()))
                aligned = aligned and not ((hosts - start) % unit).any()
        space = Space(start, unit, highest + unit if highest >= 0 else start)
        space.clean = max(space.clean, self.file.size)
        if not self.read_only and highest >= 0 and aligned:
            space.use_gaps(self._used_clusters(start))
        self.map.space = space

    def _used_clusters(self, start: int) -> Iterator[NDArray[np.int64]]:
        """Numbers of the clusters in use, counted from ``start``, ascending."""
        import numpy as np

        for _, hosts in self.map.windows(np.sort(np.frombuffer(self.map.entries, np.uint32))):
            hosts = hosts[(hosts >= start) & (hosts < self.file.size)]
            yield (hosts - start) // self.cluster_size

    # -- in use -----------------------------------------------------------------------------------

    def write_header(self, header: Header) -> None:
        """All of it lies in one sector. Lock held; not flushed."""
        self.header = header
        self.file.write_from(0, memoryview(encode_header(header)))

    def start_writing(self) -> None:
        """The image is in use; its format extension goes, for what it says will not be true any more."""
        if self.header.in_use != IN_USE or self.header.extension_sector:
            self.write_header(self.header._replace(in_use=IN_USE, extension_sector=0))
            self.file.flush()

    def settle(self) -> None:
        """The file ends where its last cluster does, and the header says that the image was closed."""
        if self.header.in_use != IN_USE:
            return
        if self.file.size > self.map.space.end:
            self.file.resize(self.map.space.end, exact=False)
        self.file.flush()
        self.write_header(self.header._replace(in_use=CLOSED))
        self.file.flush()
        self._writing = False

    def needs_check(self) -> bool:
        """Whether the image was not closed, or its entries make no sense."""
        from .check import finds_damage

        return self.header.in_use == IN_USE or not self.data_offset_right or finds_damage(self)

    def mend(self) -> tuple[str, ...]:
        """What ``check -r all`` does; what was done, as sentences.

        :raises ImageError: there is damage left
        """
        from .check import check_parallels

        result = check_parallels(self, "all")
        if result.corruptions or result.check_errors:
            raise ImageError(f"the image is damaged, and cannot be mended: {'; '.join(result.messages[:3])}",
                             where=self.filename, hint="open it read-only")  # fmt: skip
        return result.messages

    def reopen_finish(self) -> None:
        if not self.read_only and self.needs_check():
            self.mend()

    # -- abilities --------------------------------------------------------------------------------

    def bitmap_store(self) -> StoredBitmaps:
        """The dirty bitmaps of the format extension, while the image is read-only.

        :raises ImageError: it breaks the format
        """
        from .extension import StoredBitmaps

        with self.lock:
            if self._bitmaps is None:
                self._bitmaps = StoredBitmaps(self)
            return self._bitmaps

    def format_info(self) -> dict[str, object]:
        """The bitmaps of the format extension; empty if there is none."""
        if not self.header.extension_sector:
            return {}
        from .extension import read_extension

        return {"bitmaps": [{"flags": [], "name": stored.name, "granularity": stored.granularity}
                            for stored in read_extension(self)]}  # fmt: skip

    def check(self, control: Control, fix: str = "") -> CheckResult:
        """Entries lie within the file, no two alike; the file ends with the last cluster."""
        from .check import check_parallels

        return check_parallels(self, fix)

    def resize(self, size: int, *, preallocation: str = "off", exact: bool = True) -> None:
        """Grow, as far as there is room for a longer BAT before the data.

        :raises NotSupported: to shrink, or beyond that room
        """
        self.check_writable("resize")
        header = self.header
        if preallocation != "off":
            raise NotSupported(f"preallocation mode {preallocation!r} is not supported for Parallels images",
                               where=self.filename)  # fmt: skip
        if size < self._size:
            raise NotSupported("Parallels images cannot shrink", where=self.filename)
        if size % SECTOR or size > MAX_SECTORS * SECTOR:
            raise InvalidArgument(f"the new size is {size}: expected a multiple of {SECTOR}", where=self.filename)
        count = max(-(-size // self.cluster_size), header.entries)
        room = (self.map.space.base - BAT_OFFSET) // 4
        if count > room or header._replace(sectors=size // SECTOR).size != size:
            raise NotSupported(f"the BAT has room for {room} clusters, {room * self.cluster_size} bytes; {size} were "
                               "asked for", where=self.filename, hint="convert it to a new image")  # fmt: skip
        self.flush()
        with self.lock:
            self.check_failure()
            self.inflight.wait_all()
            self.before_change()
            self.guarded(lambda: self._grow(size, count))

    def _grow(self, size: int, count: int) -> None:
        """BAT | header."""
        self.map.zero_tail(self._size)
        self.map.extend([0] * (count - self.header.entries))
        sectors = size // SECTOR
        header = self.header._replace(sectors=sectors, entries=count, cylinders=sectors // 16 // 32 & 0xFFFFFFFF)
        if header.data_sector == 0:
            header = header._replace(data_sector=self.map.space.base // SECTOR)
        self.write_header(header)
        self.file.flush()
        self._size = align_up(size, SECTOR)
