"""An open QED image: its map, the bit that says that it needs a check, resizing, another backing file."""

from __future__ import annotations

from ...errors import ImageError, InvalidArgument, NoSpace, NotSupported
from ...io import engine
from ...typing import TYPE_CHECKING
from ...units import SECTOR, align_up
from ..mapped import MappedNode
from ..opening import check_size, fit_flags, read_exactly, read_head
from ..space import Space
from ..twolevel import Shape, TwoLevelMap
from .layout import (
    BACKING_FILE,
    HEADER_SIZE,
    MAX_NAME,
    NEED_CHECK,
    NO_PROBE,
    ZERO_CLUSTER,
    Header,
    decode_header,
    encode_header,
)

if TYPE_CHECKING:
    from ...graph.node import Node
    from ...graph.opening import OpenFlags, OpenRequest
    from ...jobs.job import Control
    from ..abilities import CheckResult

__all__ = ["QedNode", "open_qed"]


def open_qed(request: OpenRequest) -> QedNode:
    """The node of an existing image; its backing file is attached by the opener.

    :raises ImageError: the header breaks the format
    """
    file = request.open_child("file")
    flags = fit_flags(request, file)
    try:
        header = decode_header(read_head(file, HEADER_SIZE))
        if header.l1_offset + header.table_bytes > file.size:
            raise ImageError(f"the L1 table ends at {header.l1_offset + header.table_bytes:#x}, past the end of the "
                             f"file ({file.size:#x})")  # fmt: skip
        check_size(request, header.size)
        name = b""
        if header.features & BACKING_FILE:
            name = bytes(read_exactly(file, header.backing_offset, header.backing_size, "name of the backing file"))
    except ImageError as error:
        error.where = error.where or file.filename
        raise
    node = QedNode(request, file, header, flags)
    node.backing_name = name.partition(b"\0")[0].decode("utf-8", "surrogateescape")
    node.backing_format = "raw" if header.features & NO_PROBE and node.backing_name else ""
    node.attach(request)
    if not flags.no_io:
        node.map.load()
        if header.features & NEED_CHECK and not (flags.read_only or flags.check):
            request.opener.graph.repairs += node.mend()
    return node


class QedNode(MappedNode):
    """An open image. Guarded by ``lock``: the map, ``header``."""

    driver = "qed"
    #: Of raw ones only that they are raw.
    records_backing_format = False
    map: TwoLevelMap

    def __init__(self, request: OpenRequest, file: Node, header: Header, flags: OpenFlags) -> None:
        super().__init__(request, file, flags)
        self.header = header
        self.cluster_size = self.zero_unit = header.cluster_size
        self._size = header.size
        shape = Shape(header.cluster_size, header.table_bytes, "little", header.cluster_size, zero=ZERO_CLUSTER)
        self.table_span = shape.span
        space = Space(header.header_size * header.cluster_size, header.cluster_size, file.size)
        self.map = TwoLevelMap(file, shape, header.l1_offset, header.table_bytes // 8, space, self.write_back,
                               self.report)  # fmt: skip

    @property
    def dirty(self) -> bool:  # type: ignore[override]
        return bool(self.header.features & NEED_CHECK)

    def write_header(self, header: Header) -> None:
        """All of it lies in one sector. Lock held; not flushed."""
        self.header = header
        self.file.write_from(0, memoryview(encode_header(header)))

    # -- the need-check bit -----------------------------------------------------------------------

    def start_writing(self) -> None:
        """Autoclear bits go, for nobody here keeps up what they promise; the image needs a check from now on."""
        header = self.header._replace(features=self.header.features | NEED_CHECK, autoclear_features=0)
        if header != self.header:
            self.write_header(header)
            self.file.flush()

    def settle(self) -> None:
        if self.header.features & NEED_CHECK:
            self.file.flush()
            self.write_header(self.header._replace(features=self.header.features & ~NEED_CHECK))
            self.file.flush()
        self._writing = False

    def _write_back(self) -> None:
        if not self.map.dirty and self._writing and not self.inflight.claim_count:
            self.settle()
        super()._write_back()

    def mend(self) -> tuple[str, ...]:
        """After a crash: entries that point nowhere are dropped, and the bit goes; what was done, as sentences."""
        from .check import check_qed

        result = check_qed(self, None, "all")
        if result.corruptions or result.check_errors:
            raise ImageError(f"the image was not closed, and cannot be mended: {'; '.join(result.messages[:3])}",
                             where=self.filename, hint="open it read-only")  # fmt: skip
        return result.messages

    def reopen_finish(self) -> None:
        if self.header.features & NEED_CHECK and not self.read_only:
            self.mend()

    # -- abilities --------------------------------------------------------------------------------

    def check(self, control: Control, fix: str = "") -> CheckResult:
        """Every entry points to a cluster of the file, no two to the same."""
        from .check import check_qed

        return check_qed(self, control, fix)

    def resize(self, size: int, *, preallocation: str = "off", exact: bool = True) -> None:
        """Grow.

        :raises NotSupported: to shrink, or with preallocation
        :raises InvalidArgument: larger than the tables can describe
        """
        self.check_writable("resize")
        if preallocation != "off":
            raise NotSupported(f"preallocation mode {preallocation!r} is not supported for QED", where=self.filename)
        before = self._size
        if size < before:
            raise NotSupported("QED images cannot shrink", where=self.filename)
        if size % SECTOR or size > self.header.most:
            raise InvalidArgument(f"the new size is {size}, allowed are multiples of 512 up to {self.header.most}",
                                  where=self.filename)  # fmt: skip
        with self.lock:
            self.check_failure()
            self.inflight.wait_all()
            self.before_change()
            # What lies behind the old end must be settled before the header names it; the engine clips at the size.
            self._size = size
        try:
            self._zero_new_space(before, size)
            engine.flush(self)
            with self.lock:
                self.check_failure()
                self.guarded(lambda: self.write_header(self.header._replace(size=size)))
                self.guarded(self.file.flush)
        except BaseException:
            with self.lock:
                if self.header.size == before:
                    self._size = before
            raise

    def _zero_new_space(self, before: int, size: int) -> None:
        """Neither what the last cluster holds behind the old end nor a longer backing file may show."""
        end = min(align_up(before, self.cluster_size), size)
        if end > before and not engine.reads_zero(self, before, end - before):
            engine.write_zeroes(self, before, end - before)
        if self.backing is not None:
            end_below = min(size, align_up(self.backing.node.size, self.cluster_size))
            if end < end_below:
                engine.write_zeroes(self, end, end_below - end)

    def check_backing(self, name: str, format: str) -> None:
        """:raises NoSpace: the name does not fit into the header"""
        length = len(name.encode("utf-8", "surrogateescape"))
        if length > min(MAX_NAME, self.header.header_size * self.cluster_size - HEADER_SIZE):
            raise NoSpace(f"the name of the backing file takes {length} bytes, which the header has no room for",
                          where=self.filename)  # fmt: skip
        if name and self.header.compatible_features:
            raise NotSupported(f"the image has unknown features ({self.header.compatible_features:#x}), so what its "
                               "header holds behind the fields is unknown", where=self.filename)  # fmt: skip

    def change_backing(self, name: str, format: str) -> None:
        """Record another backing file. A new name goes where no reader looks yet, if there is room; then the fields."""
        self.check_writable("change the backing file")
        self.check_backing(name, format)
        self.flush()
        with self.lock:
            self.check_failure()
            self.guarded(lambda: self._change_backing(name.encode("utf-8", "surrogateescape"), format))
        self.backing_name = name
        self.backing_format = format if format == "raw" else ""

    def _change_backing(self, name: bytes, format: str) -> None:
        header = self.header
        features = header.features & ~(BACKING_FILE | NO_PROBE)
        offset = 0
        if name:
            features |= BACKING_FILE | (NO_PROBE if format == "raw" else 0)
            offset = self._room_for(len(name))
            self.file.write_from(offset, memoryview(name))
            self.file.flush()
        self.write_header(header._replace(features=features, backing_offset=offset, backing_size=len(name)))
        self.file.flush()

    def _room_for(self, length: int) -> int:
        """Where a name can be written while the old one is still in force, if the header has room for both."""
        header = self.header
        if not header.features & BACKING_FILE or header.backing_offset - HEADER_SIZE >= length:
            return HEADER_SIZE
        behind = header.backing_offset + header.backing_size
        fits = behind + length <= header.header_size * header.cluster_size
        return behind if fits else HEADER_SIZE
