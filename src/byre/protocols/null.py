"""A disk that takes everything and holds nothing: for measuring what lies above it."""

from __future__ import annotations

from time import perf_counter_ns, sleep
from typing import TYPE_CHECKING, Final

from ..errors import InvalidArgument, ReadOnly
from ..graph.node import Node, Stats
from ..io.buffers import zero_fill
from ..io.extent import DATA, ZERO, Extent
from ..options import Option, OptionSet
from ..units import GIB

if TYPE_CHECKING:
    from ..graph.opening import OpenRequest

__all__ = ["OPTIONS", "NullNode", "open_node", "parse_filename"]

OPTIONS: Final = OptionSet(
    Option("filename", "str", "name to show in messages"),
    Option("size", "size", "size of the null block", GIB),
    Option("latency-ns", "int", "nanoseconds (approximated) to wait before completing request", 0),
    Option("read-zeroes", "bool", "return zeroes when read", False),
)


class NullNode(Node):
    """:param latency_ns: nanoseconds every request takes at least
    :param read_zeroes: reads give zeroes; otherwise they leave the buffer as it is
    """

    kind = "protocol"
    driver = "null-co"

    def __init__(
        self,
        size: int = GIB,
        *,
        latency_ns: int = 0,
        read_zeroes: bool = False,
        name: str = "",
        filename: str = "null-co://",
        read_only: bool = False,
    ) -> None:
        super().__init__(name=name, filename=filename, read_only=read_only)
        self._size = size
        self._latency = latency_ns / 1e9
        self._read_zeroes = read_zeroes

    @property
    def size(self) -> int:
        return self._size

    def allocated_size(self) -> int:
        return 0

    def _done(self, kind: int, length: int, started: int) -> None:
        if self._latency:
            sleep(self._latency)
        self.stats.done(kind, length, started)

    def _check_writable(self) -> None:
        if self.read_only:
            raise ReadOnly("the null device is open read-only", where=self.filename)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        started = perf_counter_ns()
        if self._read_zeroes:
            zero_fill(buffer)
        elif offset + len(buffer) > self._size:
            zero_fill(buffer[max(0, self._size - offset) :])
        self._done(Stats.READ, len(buffer), started)

    def write_from(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
        started = perf_counter_ns()
        self._check_writable()
        self._done(Stats.WRITE, len(buffer), started)
        self.stats.wrote(offset + len(buffer))

    def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        started = perf_counter_ns()
        self._check_writable()
        self._done(Stats.ZEROES, length, started)

    def discard(self, offset: int, length: int) -> None:
        started = perf_counter_ns()
        self._check_writable()
        self._done(Stats.DISCARD, length, started)

    def flush(self) -> None:
        self._done(Stats.FLUSH, 0, perf_counter_ns())

    def block_status(self, offset: int, length: int) -> Extent:
        if offset >= self._size:
            return Extent(offset, length, ZERO)
        kind = ZERO if self._read_zeroes else DATA
        return Extent(offset, min(length, self._size - offset), kind, offset)


def parse_filename(rest: str) -> dict[str, object]:
    """Options for ``null-co:`` followed by ``rest``, which must be ``//``.

    :raises InvalidArgument: it is something else
    """
    if rest != "//":
        raise InvalidArgument(f"expected 'null-co://' or 'null-aio://', found {rest!r} behind the colon",
                              hint="options such as size go beside the name")  # fmt: skip
    return {}


def open_node(request: OpenRequest) -> NullNode:
    options = request.options
    node = NullNode(options.number("size"), latency_ns=options.number("latency-ns"),
                    read_zeroes=options.flag("read-zeroes"), name=request.name,
                    filename=options.text("filename") or f"{request.row.name}://",
                    read_only=request.flags.read_only)  # fmt: skip
    node.driver = request.row.name
    return node
