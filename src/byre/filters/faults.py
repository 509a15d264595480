"""Fault injection: a filter that fails, delays, splits and aligns the requests of the node above it.

Driver ``blkdebug``, with the options and file names of its peer (``blkdebug:CONFIG:IMAGE``): rules that
events activate (``rules.py``), breakpoints that hold a request back until it is resumed, and limits that
a real device might have. For tests, :meth:`FaultNode.fail` fails the n-th request of a kind.
Formats report what they are about to do with ``debug_event`` on their file child.
"""

from __future__ import annotations

import errno as _errno
import os
import sys
import threading
from typing import TYPE_CHECKING, Final, NamedTuple

from ..errors import InvalidArgument, IOFailure, NoSpace, NotFound, NotSupported
from ..graph.node import Limits
from ..io.extent import NO_FALLBACK
from ..options import Option
from ..units import align_down, align_up
from .base import FilterNode, RangeLock, open_filtered
from .rules import FaultOptions, RuleEngine, check_event, rules_of, size_option

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ..graph.child import Child
    from ..graph.node import Node
    from ..graph.opening import OpenRequest
    from ..io.extent import Extent
    from ..io.extentmap import ExtentMap

__all__ = ["FaultNode"]

OPTIONS: Final = FaultOptions(
    Option("config", "str", "file with fault rules"),
    Option("filename", "str", "image, if no child is given"),
    Option("x-image", "str", "image, if no child is given"),
    Option("align", "size", "alignment requests must have, bytes", 0),
    Option("max-transfer", "size", "longest read or write, bytes", 0),
    Option("opt-write-zero", "size", "alignment zero writes must have, bytes", 0),
    Option("max-write-zero", "size", "longest zero write, bytes", 0),
    Option("opt-discard", "size", "preferred alignment of discards, bytes", 0),
    Option("max-discard", "size", "longest discard, bytes", 0),
)
CHANGES: Final = frozenset(("write", "write-zeroes", "discard", "resize"))
CHILDREN: Final = ("image", "file")
CHILD_NAMES: Final = ("x-image", "filename")
CHILD_OPTIONS: Final = {"file": "image"}

_ZEROES = bytes(1 << 16)


def parse_filename(rest: str) -> dict[str, object]:
    """Options for ``CONFIG:IMAGE``; the configuration may be empty."""
    config, colon, image = rest.partition(":")
    if not colon:
        raise InvalidArgument(f"expected blkdebug:CONFIG:IMAGE, found 'blkdebug:{rest}'")
    return {"x-image": image, **({"config": config} if config else {})}


def plain_name(node: FilterNode) -> str | None:
    """``blkdebug:CONFIG:IMAGE``, unless there are rules in the options."""
    from ..graph.naming import own_options, plain_name

    own, below = own_options(node, sys.modules[__name__]), plain_name(node.below)
    return None if below is None or set(own) - {"config"} else f"blkdebug:{own.get('config', '')}:{below}"


def open_node(request: OpenRequest) -> FaultNode:
    options = request.options
    name = next((key for key in CHILDREN if request.has_child(key)), "")
    named = options.text("x-image") or options.text("filename")
    spec = request.children[name] if name else named
    if named and isinstance(spec, dict):
        # A file name, and options for the image it names.
        spec = {"filename": named, **spec}
    if not spec:
        raise InvalidArgument("driver 'blkdebug' needs a child 'image'")
    rules = rules_of(options)
    below = request.opener.open(spec, request.flags.for_file(), protocol=True)
    node = FaultNode(RuleEngine(rules), name=request.name, read_only=request.flags.read_only)
    for key, field in (("take-child-perms", "extra_used"), ("unshare-child-perms", "unshared")):
        setattr(node, field, options.given.get(key, 0))
    open_filtered(request, node, "file", below)
    align = options.number("align")
    if align & (align - 1) or align >= 1 << 31:
        raise InvalidArgument(f"option 'align' is {align}: expected a power of two below 2 GiB")
    unit = max(align, below.limits.request_alignment)
    zero_unit = size_option(options, "opt-write-zero", unit)
    discard_unit = size_option(options, "opt-discard", unit)
    node.set_device(
        Device(
            align or 1,
            size_option(options, "max-transfer", unit),
            zero_unit or 1,
            size_option(options, "max-write-zero", max(zero_unit, unit)),
            discard_unit or 1,
            size_option(options, "max-discard", max(discard_unit, unit)),
        )
    )
    node.debug_event("none")
    return node


class Device(NamedTuple):
    """Limits of the device that is played, bytes; alignments are 1 and maxima 0 where there is none."""

    align: int = 1
    max_transfer: int = 0
    zero_align: int = 1
    max_zero: int = 0
    discard_align: int = 1
    max_discard: int = 0


class _Planned:
    """A failure asked for by :meth:`FaultNode.fail`."""

    def __init__(self, kind: str, nth: int, errno: int, sticky: bool, effect: str) -> None:
        self.kind = kind
        self.left = nth
        self.errno = errno
        self.sticky = sticky
        self.effect = effect


class FaultNode(FilterNode):
    """Fails and delays requests on their way to ``file``.

    Guarded by ``_lock``: the rule engine, breakpoints, suspended requests, planned failures, ``calls``.

    :ivar calls: requests seen so far by kind ("read", "write", "write-zeroes", "discard", "flush",
        "block-status", "resize")
    :ivar on_suspend: called with the tag when a breakpoint holds a request
    :ivar on_resume: called with the tag when it is let go
    """

    driver = "blkdebug"
    takes_events = True
    KINDS: Final = ("read", "write", "write-zeroes", "discard", "flush", "block-status", "resize")

    def __init__(self, engine: RuleEngine | None = None, *, name: str = "", read_only: bool = False) -> None:
        super().__init__(name=name, read_only=read_only)
        self._lock = threading.Lock()
        self._resumed = threading.Condition(self._lock)
        self._engine = engine or RuleEngine(())
        self._breakpoints: list[tuple[str, str]] = []
        self._suspended: list[list[str]] = []
        self._planned: list[_Planned] = []
        self._device = Device()
        self._plain = True
        self._unflushed = False
        self._ranges = RangeLock()
        self.calls = dict.fromkeys(self.KINDS, 0)
        self.extra_used = 0
        self.unshared = 0
        self.on_suspend: Callable[[str], None] | None = None
        self.on_resume: Callable[[str], None] | None = None

    def set_device(self, device: Device) -> None:
        """Play a device with these limits; before the first request."""
        below = self.below.limits
        self._device = device
        self._plain = device == Device()
        self.limits = Limits(
            max(below.request_alignment, device.align),
            device.max_transfer or below.max_transfer,
            max(below.discard_alignment, device.discard_align),
            max(below.zero_alignment, device.zero_align),
            below.memory_alignment,
        )

    # -- events and breakpoints -------------------------------------------------------------------

    def debug_event(self, name: str) -> None:
        """``name`` happens now: activates rules, changes the state, and waits here while a breakpoint holds it."""
        with self._lock:
            self._engine.happened(name)
            tags = [tag for event, tag in self._breakpoints if event == name]
            if not tags:
                return
            self._breakpoints = [entry for entry in self._breakpoints if entry[0] != name]
            held = [[tag] for tag in tags]  # lists: each suspension has its own identity
            self._suspended += held
            self._resumed.notify_all()
        for tag in tags:
            if self.on_suspend:
                self.on_suspend(tag)
        with self._lock:
            while any(entry is mine for entry in self._suspended for mine in held):
                self._resumed.wait()

    def set_breakpoint(self, event: str, tag: str) -> None:
        """The next request that reaches ``event`` waits there, under the name ``tag``.

        :raises InvalidArgument: no such event
        """
        check_event(event)
        with self._lock:
            self._breakpoints.append((event, tag))

    def resume(self, tag: str) -> None:
        """Let one request go that waits under ``tag``.

        :raises NotFound: none does
        """
        if not self._release(tag, every=False):
            raise NotFound(f"no request is suspended under the tag {tag!r}", where=self.filename)

    def remove_breakpoint(self, tag: str) -> None:
        """Forget the breakpoints called ``tag`` and let all requests go that wait there.

        :raises NotFound: there is neither
        """
        with self._lock:
            before = len(self._breakpoints)
            self._breakpoints = [entry for entry in self._breakpoints if entry[1] != tag]
            found = len(self._breakpoints) != before
        if not self._release(tag, every=True) and not found:
            raise NotFound(f"there is no breakpoint with the tag {tag!r}", where=self.filename)

    def _release(self, tag: str, every: bool) -> int:
        with self._lock:
            gone = [entry for entry in self._suspended if entry[0] == tag]
            # The latest comes first, as with the peer.
            gone = gone if every else gone[-1:]
            self._suspended = [entry for entry in self._suspended if not any(entry is one for one in gone)]
        for _ in gone:
            if self.on_resume:
                self.on_resume(tag)
        with self._lock:
            self._resumed.notify_all()
        return len(gone)

    def is_suspended(self, tag: str) -> bool:
        """Whether a request waits under ``tag``."""
        with self._lock:
            return any(entry[0] == tag for entry in self._suspended)

    def wait_suspended(self, tag: str, timeout: float | None = None) -> bool:
        """Wait until a request is held under ``tag``; False if ``timeout`` seconds passed before."""
        with self._lock:
            return self._resumed.wait_for(lambda: any(entry[0] == tag for entry in self._suspended), timeout)

    # -- failures ---------------------------------------------------------------------------------

    def fail(
        self, kind: str = "any", nth: int = 1, errno: int = _errno.EIO, *, sticky: bool = False, effect: str = "none"
    ) -> None:
        """Fail the ``nth`` request from now of ``kind`` (one of ``KINDS``, "change" for all that change
        something, or "any").

        :param sticky: and every later one of the kind
        :param effect: what a failed request does to the child before it fails: "none", "half" (the first half of
            a write, in sectors) or "full"
        """
        if kind not in (*self.KINDS, "any", "change") or nth < 1 or effect not in ("none", "half", "full"):
            raise InvalidArgument(f"cannot plan a failure of kind {kind!r}, request {nth}, effect {effect!r}")
        with self._lock:
            self._planned.append(_Planned(kind, nth, errno, sticky, effect))

    def heal(self) -> None:
        """Forget all planned failures."""
        with self._lock:
            self._planned.clear()

    @property
    def pending_failures(self) -> int:
        """Planned failures that have not happened yet (a sticky one that has happened does not count)."""
        with self._lock:
            return sum(plan.left > 0 for plan in self._planned)

    def _judge(self, kind: str, offset: int, length: int) -> tuple[int, str]:
        """(error number or 0, effect) for the next request to the child."""
        with self._lock:
            self.calls[kind] += 1
            # As with the peer, rules do not see a flush that no request since the last one gives a reason for.
            idle = kind == "flush" and not self._unflushed
            self._unflushed = kind in CHANGES or (self._unflushed and kind != "flush")
            number = 0 if idle else self._engine.error_for(kind, offset, length)
            if number:
                return number, "none"
            verdict = (0, "none")
            for plan in list(self._planned):
                if plan.kind not in (kind, "any") and (plan.kind != "change" or kind in ("read", "block-status")):
                    continue
                plan.left -= 1
                if plan.left <= 0:
                    verdict = plan.errno, plan.effect
                    if not plan.sticky:
                        self._planned.remove(plan)
            return verdict

    def _error(self, number: int, kind: str, offset: int, length: int) -> IOFailure:
        what = {"flush": "cannot flush", "resize": f"cannot resize to {length} bytes"}.get(
            kind, f"cannot {kind} {length} bytes at {offset:#x}"
        )
        error = NoSpace if number == _errno.ENOSPC else IOFailure
        return error(f"{what}: {os.strerror(number)} (injected)", where=self.filename, errno=number)

    def _apply(self, kind: str, offset: int, length: int, action: Callable[[], None]) -> None:
        """``action`` is one request to the child; fail it if it is its turn."""
        number, effect = self._judge(kind, offset, length)
        if not number:
            action()
            return
        if effect == "full":
            action()
        raise self._error(number, kind, offset, length)

    # -- reads ------------------------------------------------------------------------------------

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if self._plain:
            self._apply("read", offset, len(buffer), lambda: self.below.read_into(offset, buffer))
            return
        align = self._device.align
        start, end = align_down(offset, align), align_up(offset + len(buffer), align)
        whole = buffer
        if (start, end) != (offset, offset + len(buffer)):
            whole = memoryview(bytearray(end - start))
        for at, part in _pieces(start, whole, self._device.max_transfer):
            self._apply("read", at, len(part), lambda at=at, part=part: self.below.read_into(at, part))  # type: ignore[misc]
        if whole is not buffer:
            buffer[:] = whole[offset - start : offset - start + len(buffer)]

    def readv_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        length = sum(map(len, buffers))
        if self._plain:
            self._apply("read", offset, length, lambda: self.below.readv_into(offset, buffers))
            return
        data = memoryview(bytearray(length))
        self.read_into(offset, data)
        at = 0
        for buffer in buffers:
            buffer[:] = data[at : at + len(buffer)]
            at += len(buffer)

    # -- writes -----------------------------------------------------------------------------------

    def write_from(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
        if self._plain:
            self.debug_event("pwritev")
            self._write(offset, buffer, flags)
            self.debug_event("pwritev_done")
            return
        align = self._device.align
        start, end = align_down(offset, align), align_up(offset + len(buffer), align)
        padded = (start, end) != (offset, offset + len(buffer))
        claim = self._ranges.enter(start, end, padded)
        try:
            if padded:
                start, buffer = self._pad(offset, buffer)
            self.debug_event("pwritev")
            for at, part in _pieces(start, buffer, self._device.max_transfer):
                self._write(at, part, flags)
            self.debug_event("pwritev_done")
        finally:
            self._ranges.leave(claim)

    def writev_from(self, offset: int, buffers: Sequence[memoryview], flags: int = 0) -> None:
        if not self._plain or self._planned:
            self.write_from(offset, memoryview(b"".join(buffers)), flags)
            return
        self.debug_event("pwritev")
        length = sum(map(len, buffers))
        self._apply("write", offset, length, lambda: self.below.writev_from(offset, buffers, flags))
        self.debug_event("pwritev_done")

    def _write(self, offset: int, buffer: memoryview, flags: int) -> None:
        number, effect = self._judge("write", offset, len(buffer))
        if number and effect != "none":
            half = align_up(len(buffer) // 2, 512)
            self.below.write_from(offset, buffer if effect == "full" else buffer[:half])
        if number:
            raise self._error(number, "write", offset, len(buffer))
        self.below.write_from(offset, buffer, flags)

    def _pad(self, offset: int, buffer: memoryview) -> tuple[int, memoryview]:
        """(aligned start, ``buffer`` with what is around it up to the alignment, read from the child).

        The file does not grow beyond what was asked for: the last block ends with it.
        """
        align = self._device.align
        end = offset + len(buffer)
        start = align_down(offset, align)
        stop = min(align_up(end, align), max(end, self.size))
        data = memoryview(bytearray(stop - start))
        tail = align_down(end, align) if end % align else end
        head, trailing = offset > start, end < stop
        if head and trailing and tail == start:
            self._fill(("head", "tail"), start, data)
        else:
            if head:
                self._fill(("head",), start, data[:align])
            if trailing:
                self._fill(("tail",), tail, data[tail - start :])
        data[offset - start : end - start] = buffer
        return start, data

    def _fill(self, which: tuple[str, ...], offset: int, block: memoryview) -> None:
        """Read what surrounds a request that covers ``block`` only in part."""
        for end in which:
            self.debug_event(f"pwritev_rmw_{end}")
        self._apply("read", offset, len(block), lambda: self.below.read_into(offset, block))
        for end in which:
            self.debug_event(f"pwritev_rmw_after_{end}")

    def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        self.debug_event("pwritev_zero")
        unit = max(self._device.align, self._device.zero_align)
        start, end = align_up(offset, unit), align_down(offset + length, unit)
        if start >= end:
            start = end = offset
        if (start, end) != (offset, offset + length) and flags & NO_FALLBACK:
            raise NotSupported(f"zeroing is possible in units of {unit} bytes only", where=self.filename)
        self._write_zero_bytes(offset, start - offset, flags)
        claim = self._ranges.enter(start, end, False)
        try:
            for at, size in _steps(start, end, self._device.max_zero):
                self._apply("write-zeroes", at, size,
                            lambda at=at, size=size: self.below.write_zeroes(at, size, flags))  # type: ignore[misc]  # fmt: skip
        finally:
            self._ranges.leave(claim)
        self._write_zero_bytes(end, offset + length - end, flags)

    def _write_zero_bytes(self, offset: int, length: int, flags: int) -> None:
        for at, size in _steps(offset, offset + length, len(_ZEROES)):
            self.write_from(at, memoryview(_ZEROES)[:size], flags)

    # -- the rest ---------------------------------------------------------------------------------

    def discard(self, offset: int, length: int) -> None:
        device = self._device
        start, end = align_up(offset, device.align), align_down(offset + length, device.align)
        if start >= end:
            return
        # Ends that the device would rather not be asked about go as requests of their own.
        first = min(align_up(start, device.discard_align), end)
        last = max(align_down(end, device.discard_align), first)
        for low, high in ((start, first), (first, last), (last, end)):
            for at, size in _steps(low, high, device.max_discard):
                self._apply("discard", at, size, lambda at=at, size=size: self.below.discard(at, size))  # type: ignore[misc]

    def flush(self) -> None:
        try:
            self._apply("flush", 0, 0, self.below.flush)
        except BaseException:
            with self._lock:
                self._unflushed = True
            raise

    def block_status(self, offset: int, length: int) -> Extent:
        self._apply("block-status", offset, length, _nothing)
        return self.below.block_status(offset, length)

    def extents(self, offset: int, length: int) -> ExtentMap:
        self._apply("block-status", offset, length, _nothing)
        return self.below.extents(offset, length)

    def populate(self, offset: int, length: int, *, base: Node | None = None, everything: bool = False) -> int:
        self.debug_event("cor_write")
        number, _ = self._judge("write", offset, length)
        if number:
            raise self._error(number, "write", offset, length)
        return self.below.populate(offset, length, base=base, everything=everything)

    def resize(self, size: int, *, preallocation: str = "off", exact: bool = True) -> None:
        self._apply("resize", 0, size, lambda: self.below.resize(size, preallocation=preallocation, exact=exact))

    def child_permissions(self, child: Child, used: int, shared: int) -> tuple[int, int]:
        return used | self.extra_used, shared & ~self.unshared

    def close(self) -> None:
        with self._lock:
            self._breakpoints.clear()
            self._suspended.clear()
            self._resumed.notify_all()
        super().close()


def _nothing() -> None:
    pass


def _steps(start: int, end: int, most: int) -> Iterator[tuple[int, int]]:
    """``(offset, length)`` of consecutive steps of at most ``most`` bytes (0: one step)."""
    while start < end:
        size = min(end - start, most or end - start)
        yield start, size
        start += size


def _pieces(offset: int, buffer: memoryview, most: int) -> Iterator[tuple[int, memoryview]]:
    """``buffer`` in pieces of at most ``most`` bytes, each with its offset."""
    end = offset + len(buffer)
    for at, size in _steps(offset, end, most):
        yield at, buffer[at - offset : at - offset + size]
