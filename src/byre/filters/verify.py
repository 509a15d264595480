"""Verification: a filter that sends every request to two images and compares what they read.

Driver ``blkverify`` (``blkverify:RAW:IMAGE``): ``raw`` is the reference, ``test`` the image under suspicion.
A contradiction is an error that names the offset. Discards are not passed on: what they leave behind is
not defined, so the two could differ without either being wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ..errors import ByreError, InvalidArgument, Mismatch
from ..options import Option, OptionSet
from .base import FilterNode, RangeLock, open_filtered

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..graph.node import Node
    from ..graph.opening import OpenRequest

__all__ = ["VerifyNode"]

OPTIONS: Final = OptionSet(
    Option("x-raw", "str", "reference image, if no child 'raw' is given"),
    Option("x-image", "str", "image to test, if no child 'test' is given"),
    Option("filename", "str", "image to test, if no child 'test' is given"),
)
CHILDREN: Final = ("raw", "test")
CHILD_NAMES: Final = ("x-raw", "x-image", "filename")
CHILD_OPTIONS: Final = {"file": "test"}


def parse_filename(rest: str) -> dict[str, object]:
    """Options for ``RAW:IMAGE``."""
    raw, colon, image = rest.partition(":")
    if not colon or not raw or not image:
        raise InvalidArgument(f"expected blkverify:RAW:IMAGE, found 'blkverify:{rest}'")
    return {"x-raw": raw, "x-image": image}


def plain_name(node: VerifyNode) -> str | None:
    """``blkverify:RAW:IMAGE``."""
    from ..graph.naming import plain_name

    raw, test = plain_name(node.raw), plain_name(node.below)
    return None if raw is None or test is None else f"blkverify:{raw}:{test}"


def open_node(request: OpenRequest) -> VerifyNode:
    options = request.options
    raw = request.children.get("raw") or options.text("x-raw")
    test = request.children.get("test") or options.text("x-image") or options.text("filename")
    if not raw or not test:
        raise InvalidArgument("driver 'blkverify' needs the children 'raw' and 'test'")
    flags = request.flags.for_file()
    node = VerifyNode(name=request.name, read_only=request.flags.read_only)
    # The reference is taken as it is; the tested image is probed unless its options name a driver.
    open_filtered(request, node, "raw", request.opener.open(raw, flags, protocol=True))
    open_filtered(request, node, "file", request.opener.open(test, flags))
    return node


class VerifyNode(FilterNode):
    """Mirrors requests to ``raw`` and ``file`` (the tested image) and compares reads.

    Overlapping reads and writes take turns, so that both children see them in the same order.
    """

    driver = "blkverify"

    def __init__(self, *, name: str = "", read_only: bool = False) -> None:
        super().__init__(name=name, read_only=read_only)
        self._ranges = RangeLock()

    @property
    def raw(self) -> Node:
        return self.children["raw"].node

    def read_into(self, offset: int, buffer: memoryview) -> None:
        reference = memoryview(bytearray(len(buffer)))
        claim = self._ranges.enter(offset, offset + len(buffer), False)
        try:
            self._both(
                "read",
                offset,
                len(buffer),
                lambda: self.raw.read_into(offset, reference),
                lambda: self.below.read_into(offset, buffer),
            )
        finally:
            self._ranges.leave(claim)
        if reference != buffer:
            at = offset + first_difference(reference, buffer)
            raise self._contradiction("read", offset, len(buffer), f"contents mismatch at offset {at}")

    def readv_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        for buffer in buffers:
            self.read_into(offset, buffer)
            offset += len(buffer)

    def write_from(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
        self._change("write", offset, len(buffer), lambda node: node.write_from(offset, buffer, flags))

    def writev_from(self, offset: int, buffers: Sequence[memoryview], flags: int = 0) -> None:
        length = sum(map(len, buffers))
        self._change("write", offset, length, lambda node: node.writev_from(offset, buffers, flags))

    def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        # Without NO_FALLBACK: one child alone refusing would leave the two different.
        from ..io.extent import FUA, MAY_UNMAP

        self._change("write", offset, length, lambda n: n.write_zeroes(offset, length, flags & (FUA | MAY_UNMAP)))

    def discard(self, offset: int, length: int) -> None:
        pass

    def flush(self) -> None:
        self._both("flush", 0, 0, self.raw.flush, self.below.flush)

    def resize(self, size: int, *, preallocation: str = "off", exact: bool = True) -> None:
        self._both(
            "resize",
            size,
            0,
            lambda: self.raw.resize(size, exact=exact),
            lambda: self.below.resize(size, preallocation=preallocation, exact=exact),
        )

    @property
    def has_zero_init(self) -> bool:
        return self.raw.has_zero_init and self.below.has_zero_init

    def _change(self, verb: str, offset: int, length: int, action: Callable[[Node], None]) -> None:
        claim = self._ranges.enter(offset, offset + length, True)
        try:
            self._both(verb, offset, length, lambda: action(self.raw), lambda: action(self.below))
        finally:
            self._ranges.leave(claim)

    def _both(
        self, verb: str, offset: int, length: int, reference: Callable[[], None], tested: Callable[[], None]
    ) -> None:
        """Do both; they must succeed together, or fail together with the same error number."""
        ours, theirs = _outcome(tested), _outcome(reference)
        numbers = [error.errno if error else 0 for error in (ours, theirs)]
        if numbers[0] != numbers[1]:
            text = f"return value mismatch {-numbers[0]} != {-numbers[1]} ({ours or theirs})"
            raise self._contradiction(verb, offset, length, text)
        if ours:
            raise ours

    def _contradiction(self, verb: str, offset: int, length: int, text: str) -> Mismatch:
        return Mismatch(f"blkverify: {verb} offset={offset} bytes={length} {text}", where=self.filename)


def _outcome(action: Callable[[], None]) -> ByreError | None:
    try:
        action()
    except ByreError as error:
        return error
    return None


def first_difference(one: memoryview, other: memoryview) -> int:
    """The first index at which two buffers of the same length differ; their length if they do not."""
    low, high = 0, len(one)
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] != other[low:middle]:
            high = middle
        else:
            low = middle
    return low if low < len(one) and one[low] != other[low] else len(one)
