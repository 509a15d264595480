"""nbd: a disk that a server on the network, or another process, holds.

Turns requests of the graph into requests of the protocol: cut to what the server takes at once, aligned to its
minimum block size, several on their way for one that is large. How they travel is :mod:`byre.nbd.session`'s.
"""

from __future__ import annotations

from time import perf_counter_ns
from typing import TYPE_CHECKING, Final, cast

from ..errors import ByreError, ImageError, InvalidArgument, NotFound, NotSupported, ReadOnly
from ..graph.node import Limits, Node, Stats
from ..io.buffers import zero_fill, zero_view
from ..io.extent import DATA, FUA, MAY_UNMAP, NO_FALLBACK, NOT_COUNTED, WRITTEN_ZERO, ZERO, Extent
from ..nbd import uri, wire
from ..nbd.client_negotiation import BASE_ALLOCATION
from ..nbd.request import Request
from ..nbd.session import Client
from ..units import MIB, SECTOR, align_down, align_up
from .nbd_options import OPTIONS, parse_name, settings_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from ..graph.opening import OpenFlags, OpenRequest
    from ..io.align import AlignedAccess
    from ..io.extentmap import ExtentMap
    from ..options import OptionValues

__all__ = ["OPTIONS", "NbdNode", "open_node", "parse_name"]

READ_PIECE: Final = 1 * MIB
"""Longer reads go as several requests of this size, so that the server reads on while bytes travel."""
_ZERO_STEP: Final = 1 * MIB

_SIZE_LIMIT: Final = (1 << 63) - SECTOR
_ROW_LIMIT: Final = 1 << 20
"""Rows of one extent map; what a server cuts into more pieces than this is reported as data."""
_STATUS_STEP: Final = 1 << 30
"""Bytes asked about at once without extended headers."""


class NbdNode(Node):
    """An export of an NBD server. Guarded by: nothing of its own; the client and the aligner have their locks.

    :ivar client: speaks to the server
    :ivar runtime: the options it was opened with
    """

    kind = "protocol"
    driver = "nbd"
    remote = True

    def __init__(self, client: Client, flags: OpenFlags, runtime: OptionValues, *, name: str = "",
                 filename: str = "") -> None:  # fmt: skip
        super().__init__(name=name, filename=filename, read_only=flags.read_only)
        info = client.info
        self.client = client
        self.open_flags = flags
        self.runtime = runtime
        self._size = info.size
        self._flags = info.flags
        self._fua = wire.CMD_FLAG_FUA if info.flags & wire.TRANSMISSION_FUA else 0
        self._context_name = runtime.text("x-dirty-bitmap") or BASE_ALLOCATION
        self._context = info.context(self._context_name)
        unit = info.minimum or (1 if info.size % SECTOR or self._context is not None else SECTOR)
        most = min(info.maximum or wire.MAX_PAYLOAD, wire.MAX_PAYLOAD)
        self._unit = unit
        self._read_piece = max(align_down(min(most, READ_PIECE), unit), unit)
        self._write_piece = max(align_down(most, unit), unit)
        # The compact header has 32 bits for a length; a server with extended ones takes any.
        self._most_zeroes = 1 << 40 if info.extended else self._write_piece
        self._most_discard = 1 << 40 if info.extended else align_down((1 << 31) - 1, unit)
        self._most_status = 1 << 40 if info.extended else align_down(_STATUS_STEP, unit)
        self.limits = Limits(request_alignment=unit, max_transfer=align_down(most, unit))
        self._aligned = self._aligner(unit) if unit > 1 else None

    def _aligner(self, unit: int) -> AlignedAccess:
        from ..io.align import AlignedAccess

        return AlignedAccess(unit, 1, self._read, self._write, end=lambda: self._size)

    # -- size -------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        return self._size

    def allocated_size(self) -> int:
        return -1

    def resize(self, size: int, *, preallocation: str = "off", exact: bool = True) -> None:
        """Only answers whether it fits: a client cannot change an export's size.

        :param exact: with False it need only be large enough
        """
        if size == self._size or (size < self._size and not exact):
            return
        if exact:
            raise NotSupported("Cannot resize NBD nodes", where=self.filename)
        raise InvalidArgument("Cannot grow NBD nodes", where=self.filename)

    # -- reading and writing ----------------------------------------------------------------------

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """:raises IOFailure: the server reports an error, or the connection broke"""
        started = perf_counter_ns()
        length = len(buffer)
        inside = self._size - offset
        if length > inside:
            zero_fill(buffer[max(inside, 0) :])
            buffer = buffer[: max(inside, 0)]
        try:
            if self._aligned is None:
                self._read(offset, buffer)
            else:
                self._aligned.read_into(offset, buffer)
        except ByreError:
            self.stats.failed(Stats.READ)
            raise
        self.stats.done(Stats.READ, length, started)

    def _read(self, offset: int, buffer: memoryview) -> None:
        length = len(buffer)
        if length > self._read_piece:
            self.client.run(self._reads(offset, buffer))
        elif length:
            self.client.run_one(Request(wire.CMD_READ, offset, length, buffer=buffer))

    def _reads(self, offset: int, buffer: memoryview) -> Iterator[Request]:
        for start in range(0, len(buffer), self._read_piece):
            part = buffer[start : start + self._read_piece]
            yield Request(wire.CMD_READ, offset + start, len(part), buffer=part)

    def write_from(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
        self.writev_from(offset, (buffer,), flags)

    def writev_from(self, offset: int, buffers: Sequence[memoryview], flags: int = 0) -> None:
        """:raises IOFailure: the server reports an error, or the connection broke"""
        started = perf_counter_ns()
        length = sum(map(len, buffers))
        self._check_write(offset, length)
        try:
            if self._aligned is not None:
                self._aligned.writev_from(offset, buffers)
                if flags & FUA:
                    self._flush()
            else:
                self._write(offset, buffers, flags)
        except ByreError:
            self.stats.failed(Stats.WRITE)
            raise
        self.stats.done(Stats.WRITE, length, started)
        self.stats.wrote(offset + length)

    def _check_write(self, offset: int, length: int) -> None:
        if self.read_only:
            raise ReadOnly("the export is open read-only", where=self.filename)
        if offset + length > self._size and length:
            raise InvalidArgument(f"cannot write {length} bytes at {offset:#x}: the export ends at {self._size:#x}",
                                  where=self.filename)  # fmt: skip

    def _write(self, offset: int, buffers: Sequence[memoryview], flags: int = 0) -> None:
        length = sum(map(len, buffers))
        command_flags = self._fua if flags & FUA else 0
        if length > self._write_piece:
            self.client.run(self._writes(offset, buffers, command_flags))
        elif length:
            request = Request(wire.CMD_WRITE, offset, length, command_flags, payload=buffers)
            self.client.run_one(request)
        if flags & FUA and not self._fua:
            self._flush()

    def _writes(self, offset: int, buffers: Iterable[memoryview], flags: int) -> Iterator[Request]:
        """Requests of one piece each, whatever buffers they come from."""
        held: list[memoryview] = []
        size = 0
        for buffer in buffers:
            while buffer:
                part = buffer[: self._write_piece - size]
                buffer = buffer[len(part) :]
                held.append(part)
                size += len(part)
                if size == self._write_piece:
                    yield Request(wire.CMD_WRITE, offset, size, flags, payload=held)
                    offset += size
                    held, size = [], 0
        if size:
            yield Request(wire.CMD_WRITE, offset, size, flags, payload=held)

    def flush(self) -> None:
        """Whatever the cache mode is: it says what this side may leave out, not the server.

        One connection's flush covers what was acknowledged on any: that is what allows several.
        """
        started = perf_counter_ns()
        self._flush()
        self.stats.done(Stats.FLUSH, 0, started)

    def _flush(self) -> None:
        if self._flags & wire.TRANSMISSION_FLUSH and not self.read_only:
            self.client.run_one(Request(wire.CMD_FLUSH, 0, 0))

    # -- zeroes and discards ----------------------------------------------------------------------

    def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        """:raises NotSupported: with ``NO_FALLBACK``, where the server cannot zero faster than by writing"""
        started = perf_counter_ns()
        self._check_write(offset, length)
        start, end = align_up(offset, self._unit), align_down(offset + length, self._unit)
        able = self._flags & wire.TRANSMISSION_WRITE_ZEROES and start < end
        if flags & NO_FALLBACK and length:
            whole = able and end - start == length
            if not whole or not self._flags & wire.TRANSMISSION_FAST_ZERO:
                raise NotSupported("the server has no fast zeroes for this range", where=self.filename)
        if not able:
            start = end = offset + length
        self._fill_zeroes(offset, start - offset, flags)
        if start < end:
            self.client.run(self._zeroes(start, end, flags))
        self._fill_zeroes(end, offset + length - end, flags)
        if flags & FUA and not self._fua:
            self._flush()
        self.stats.done(Stats.ZEROES, length, started)
        self.stats.wrote(offset + length)

    def _zeroes(self, start: int, end: int, flags: int) -> Iterator[Request]:
        command_flags = self._fua if flags & FUA else 0
        command_flags |= 0 if flags & MAY_UNMAP else wire.CMD_FLAG_NO_HOLE
        command_flags |= wire.CMD_FLAG_FAST_ZERO if flags & NO_FALLBACK else 0
        for at in range(start, end, self._most_zeroes):
            yield Request(wire.CMD_WRITE_ZEROES, at, min(self._most_zeroes, end - at), command_flags)

    def _fill_zeroes(self, offset: int, length: int, flags: int) -> None:
        for at in range(offset, offset + length, _ZERO_STEP):
            part = (zero_view(min(_ZERO_STEP, offset + length - at)),)
            if self._aligned is not None:
                self._aligned.writev_from(at, part)
                if flags & FUA and self._fua:
                    self._flush()
            else:
                self._write(at, part, flags)

    def discard(self, offset: int, length: int) -> None:
        """Whole blocks, where the server can and ``discard=unmap`` was asked for; else nothing happens."""
        if not self.open_flags.unmap or not self._flags & wire.TRANSMISSION_TRIM:
            return
        self._check_write(offset, 0)
        started = perf_counter_ns()
        start = align_up(offset, self._unit)
        end = align_down(min(offset + length, self._size), self._unit)
        step = self._most_discard
        self.client.run(Request(wire.CMD_TRIM, at, min(step, end - at)) for at in range(start, end, step))
        self.stats.done(Stats.DISCARD, length, started)

    # -- what is where ----------------------------------------------------------------------------

    def block_status(self, offset: int, length: int) -> Extent:
        """DATA or ZERO as the server says (host = offset); data where it says nothing; ZERO past the end (no host).

        What is a hole without reading as zeroes, or dirty in an exposed bitmap, is DATA with source NOT_COUNTED; zeroes
        that are no hole have source WRITTEN_ZERO.
        """
        if offset >= self._size:
            return Extent(offset, length, ZERO)
        length = min(length, self._size - offset)
        if self._context is None:
            return Extent(offset, length, DATA, offset)
        start = align_down(offset, self._unit)
        asked = min(align_up(offset + length, self._unit) - start, self._most_status)
        payload = self._ask_status(start, asked, wire.CMD_FLAG_REQ_ONE)
        half = 8 if self.client.info.extended else 4
        size = int.from_bytes(payload[:half], "big")
        if size % self._unit and size < asked:
            # An extent ends where a block does; from a server that has it otherwise, it is data.
            return Extent(offset, min(align_up(start + size, self._unit) - offset, length), DATA, offset)
        kind, source = self._meaning(int.from_bytes(payload[half : 2 * half], "big"))
        return Extent(offset, min(start + size - offset, length), kind, offset, source)

    def extents(self, offset: int, length: int) -> ExtentMap:
        """All of a range in few requests; past a million pieces the rest is called data."""
        import numpy as np

        from ..io.extentmap import ExtentMap

        if self._context is None or offset >= self._size:
            return super().extents(offset, length)
        end = min(offset + length, self._size)
        at = align_down(offset, self._unit)
        stop = align_up(end, self._unit)
        lengths: list[NDArray[np.int64]] = []
        flags: list[NDArray[np.int64]] = []
        first, rows = at, 0
        while at < stop and rows < _ROW_LIMIT:
            found, states = self._statuses(at, min(stop - at, self._most_status, self._size - at))
            lengths.append(found)
            flags.append(states)
            at += int(found.sum())
            rows += len(found)
        if at < stop:
            lengths.append(np.array([stop - at], np.int64))
            flags.append(np.zeros(1, np.int64))
        columns = self._as_map(first, np.concatenate(lengths), np.concatenate(flags)).clip(offset, end - offset)
        if end < offset + length:
            columns = ExtentMap.concatenate((columns, ExtentMap.single(end, offset + length - end, ZERO)))
        return columns.coalesced()

    def _ask_status(self, offset: int, length: int, flags: int) -> bytearray:
        """(length, flags) pairs of 64 or 32 bits; none is empty.

        :raises ByreError: the server reports an error
        """
        assert self._context is not None
        length = min(length, self._size - offset)
        request = Request(wire.CMD_BLOCK_STATUS, offset, length, flags, contexts=(self._context,))
        self.client.run_one(request)
        assert request.status is not None
        return request.status[self._context]

    def _statuses(self, offset: int, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(lengths, flags) of extents from ``offset``, cut at ``length``."""
        import numpy as np

        code = ">u8" if self.client.info.extended else ">u4"
        pairs = np.frombuffer(self._ask_status(offset, length, 0), code).reshape(-1, 2)
        # An extent may reach beyond what was asked for, and in one step: nothing behind it counts.
        sizes = np.minimum(pairs[:, 0], length).astype(np.int64)
        ends = np.cumsum(sizes)
        used = int(np.searchsorted(ends, length, "left")) + 1
        sizes, states = sizes[:used], pairs[:used, 1].astype(np.int64)
        if ends[min(used, len(ends)) - 1] > length:
            sizes[-1] -= ends[used - 1] - length
        return self._whole_blocks(sizes, states, length) if self._unit > 1 else (sizes, states)

    def _whole_blocks(
        self, sizes: NDArray[np.int64], states: NDArray[np.int64], length: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Extents end where blocks do, or the export; from where a server has it otherwise on, all is data."""
        import numpy as np

        ends = np.cumsum(sizes)
        odd = (ends % self._unit != 0) & (ends != length)
        if not odd.any():
            return sizes, states
        first = int(odd.argmax())
        before = int(ends[first - 1]) if first else 0
        rest = min(align_up(int(ends[-1]), self._unit), length) - before
        return np.append(sizes[:first], rest), np.append(states[:first], 0)

    def _meaning(self, flags: int) -> tuple[int, int]:
        """(kind, source) for status flags; those of other contexts are shown as if they were the allocation's."""
        zero, hole = flags & wire.STATE_ZERO, flags & wire.STATE_HOLE
        if self._context_name == BASE_ALLOCATION and zero:
            return ZERO, 0 if hole else WRITTEN_ZERO
        return DATA, NOT_COUNTED if hole else WRITTEN_ZERO if zero else 0

    def _as_map(self, first: int, lengths: NDArray[np.int64], flags: NDArray[np.int64]) -> ExtentMap:
        import numpy as np

        from ..io.extentmap import ExtentMap

        meanings = np.array([self._meaning(value) for value in range(4)])
        offsets = first + np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths)[:-1]))
        chosen = meanings[flags & 3]
        return ExtentMap(offsets, lengths, chosen[:, 0].astype(np.uint8), offsets.copy(), chosen[:, 1].astype(np.int16))

    # -- life -------------------------------------------------------------------------------------

    def reopen_prepare(self, flags: OpenFlags, options: OptionValues) -> object:
        """:raises ByreError: the server offers the export read-only, or what was fixed at opening is to change"""
        changed = [name for name in options.given if options.given[name] != self.runtime.given.get(name)]
        if changed:
            raise InvalidArgument(f"cannot change the option {changed[0]!r} of an open export", where=self.filename)
        if not flags.read_only and self._flags & wire.TRANSMISSION_READ_ONLY:
            raise ReadOnly("the server offers the export read-only", where=self.filename)
        return flags

    def reopen_commit(self, token: object) -> None:
        super().reopen_commit(token)
        self.open_flags = cast("OpenFlags", token)

    def close(self) -> None:
        if not self.closed:
            super().close()
        self.client.close()


# -- opening --------------------------------------------------------------------------------------


def open_node(request: OpenRequest) -> NbdNode:
    bitmap = request.options.text("x-dirty-bitmap") or ""
    settings = settings_of(request, bitmap or BASE_ALLOCATION)
    flags = request.flags
    client = Client(settings)
    try:
        if bitmap and client.info.context(bitmap) is None:
            raise NotFound(f"the server has no metadata context {bitmap!r} (x-dirty-bitmap)", where=client.where)
        if client.info.flags & wire.TRANSMISSION_READ_ONLY and not flags.read_only:
            if not flags.auto_read_only:
                raise ReadOnly("the server offers the export read-only", where=client.where)
            flags = flags._replace(read_only=True)
        named = "export" in request.options
        shown = uri.show(settings.address, settings.wishes.export, named=named, tls=settings.security is not None)
        if client.info.size > _SIZE_LIMIT:
            raise ImageError(f"the export has {client.info.size} bytes, possible are {_SIZE_LIMIT}", where=client.where)
        name = shown or f"nbd:{settings.address}"
        return NbdNode(client, flags, request.options, name=request.name, filename=name)
    except BaseException:
        client.close()
        raise
