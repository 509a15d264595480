"""Quorum: several copies of one disk; what most of them say is what is read.

Driver ``quorum``: ``children.0``, ``children.1``, ... and ``vote-threshold``: how many must agree on a read, and for
how many a write or flush must succeed. ``read-pattern=fifo`` reads from the first child that can, without a vote;
``rewrite-corrupted`` writes the winner over those that disagree; ``blkverify`` (two children, both needed) names the
first byte that differs. Children come and go while the disk is in use: :func:`add_child`, :func:`remove_child`.

Whoever sets :attr:`QuorumNode.on_event` is told of failures: ``QUORUM_REPORT_BAD`` for each child that failed or was
outvoted, ``QUORUM_FAILURE`` when too few agree.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias, cast

from ..errors import Busy, ByreError, InvalidArgument, IOFailure, Mismatch, NotFound, ReadOnly
from ..graph.live import settled
from ..graph.node import PERM_READ, PERM_RESIZE, PERM_WRITE, PERM_WRITE_UNCHANGED, Limits, Node
from ..io.extent import DATA, FUA, MAY_UNMAP, ZERO, Extent
from ..options import Option, OptionSet
from ..units import SECTOR
from .base import RangeLock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ..graph.child import Child
    from ..graph.graph import Graph
    from ..graph.opening import OpenFlags, OpenRequest
    from ..image import Image
    from ..options import OptionValues

__all__ = ["QuorumNode", "Settings", "add_child", "remove_child"]

OPTIONS: Final = OptionSet(
    Option("vote-threshold", "int", "children that must agree"),
    Option("blkverify", "bool", "compare two children, and say where they differ", False),
    Option("rewrite-corrupted", "bool", "write what most children say to those that differ", False),
    Option("read-pattern", "enum", "quorum or fifo", "quorum", ("quorum", "fifo")),
)
CHILDREN: Final = ("children",)

_STEP: Final = 1 << 20
"""A vote is about at most this many bytes, of which each child is read into memory."""
_EVERYTHING: Final = (0, 1 << 65)
_NO_RANGE: Final = (1 << 64, 1 << 65)
"""For requests that concern no range but the list of children."""


class Settings(NamedTuple):
    """How children vote; see the module."""

    threshold: int
    blkverify: bool = False
    rewrite: bool = False
    fifo: bool = False

    def check(self, count: int) -> None:
        """:param count: of children
        :raises InvalidArgument: they cannot vote like this
        """
        if not 1 <= self.threshold <= count:
            raise InvalidArgument(f"vote-threshold is {self.threshold}: expected 1 to {count}, the number of children")
        if self.blkverify and (count != 2 or self.threshold != 2):
            raise InvalidArgument("blkverify=on needs exactly two children and a vote-threshold of 2")
        if self.blkverify and self.rewrite:
            raise InvalidArgument("rewrite-corrupted=on cannot be used with blkverify=on")


def open_node(request: OpenRequest) -> QuorumNode:
    specs = _child_list(request.children.get("children"))
    settings = _settings(request.options, len(specs))
    flags = request.flags._replace(detect_zeroes="off")
    if settings.rewrite and flags.read_only:
        raise InvalidArgument("rewrite-corrupted=on needs an image that is open for writing")
    node = QuorumNode(settings, name=request.name, read_only=flags.read_only)
    node.runtime = request.options
    request.opener.adopt(node)
    for index, spec in enumerate(specs):
        below = request.opener.open(spec, flags, protocol=request.protocol)
        request.opener.graph.attach(node, f"children.{index}", below, "data")
    node.members_changed()
    node.check_sizes()
    return node


def _settings(options: OptionValues, count: int) -> Settings:
    if "vote-threshold" not in options:
        raise InvalidArgument("driver 'quorum' needs 'vote-threshold'")
    fifo = options.word("read-pattern") == "fifo"
    settings = Settings(options.number("vote-threshold"), options.flag("blkverify") and not fifo,
                        options.flag("rewrite-corrupted") and not fifo, fifo)  # fmt: skip
    settings.check(count)
    return settings


def _child_list(given: object) -> list[object]:
    """The children as a list, from JSON or from dotted keys 0, 1, 2, ...

    :raises InvalidArgument: no list, or one with gaps
    """
    if isinstance(given, list):
        specs = list(given)
    elif isinstance(given, dict):
        if set(given) != {str(index) for index in range(len(given))}:
            raise InvalidArgument("children of a quorum are numbered children.0, children.1, ... without gaps")
        specs = [given[str(index)] for index in range(len(given))]
    else:
        specs = []
    if not specs:
        raise InvalidArgument("driver 'quorum' needs 'children', one or more")
    return specs


class _Ballot(NamedTuple):
    """What one child answered: its bytes, or its error."""

    child: Child
    data: bytearray | None
    error: ByreError | None


_Bad: TypeAlias = "dict[Child, ByreError | None]"
"""Children that failed, with their errors, or were outvoted."""


class _NoQuorum(Exception):
    """Too few children read something, or agree on it; ``errors`` are those of the ones that failed."""

    def __init__(self, errors: list[ByreError]) -> None:
        super().__init__()
        self.errors = errors


class QuorumNode(Node):
    """Reads by vote, writes to all.

    Overlapping requests take turns as far as one of them writes, so that all children see the same order; children are
    asked one after the other, in the thread of the request. Memory: 1 MiB per child and request.
    Guarded by ``_ranges`` (all of it to change): ``_members``.

    :ivar on_event: called with the name of the event and its data, in the thread of the request; must not raise
    """

    driver = "quorum"
    kind = "filter"

    def __init__(self, settings: Settings, *, name: str = "", read_only: bool = False) -> None:
        super().__init__(name=name, read_only=read_only)
        self.settings = settings
        self.runtime: OptionValues | None = None
        self.on_event: Callable[[str, dict[str, object]], None] | None = None
        self._members: tuple[Child, ...] = ()
        self._ranges = RangeLock()

    @property
    def members(self) -> tuple[Child, ...]:
        """The edges to the children, in order."""
        return self._members

    def members_changed(self) -> None:
        """The edges named ``children.N`` are the members from now on."""
        edges = [edge for name, edge in self.children.items() if name.startswith("children.")]
        self._members = tuple(sorted(edges, key=lambda edge: int(edge.name.partition(".")[2])))
        if self._members:
            limits = [edge.node.limits for edge in self._members]
            self.limits = Limits(*(max(column) for column in zip(*limits, strict=True)))._replace(
                max_transfer=min((one.max_transfer for one in limits if one.max_transfer), default=0))  # fmt: skip

    def child_moved(self, child: Child, before: Node) -> None:
        self.members_changed()

    # -- size -------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """The length that enough children agree on.

        :raises IOFailure: too few do
        """
        sizes = [edge.node.size for edge in self._members]
        first = sizes[0]
        if sizes.count(first) == len(sizes):
            return first
        winner = max(sizes, key=sizes.count)
        if sizes.count(winner) < self.settings.threshold:
            raise IOFailure(f"the children of quorum node {self.name!r} have different sizes: "
                            + ", ".join(map(str, sizes)), where=self.filename)  # fmt: skip
        return winner

    def check_sizes(self) -> None:
        """:raises IOFailure: not all children have the same length"""
        sizes = {edge.node.size for edge in self._members}
        if len(sizes) > 1:
            raise IOFailure(f"the children of quorum node {self.name!r} have different sizes: "
                            + ", ".join(map(str, sorted(sizes))), where=self.filename)  # fmt: skip

    def resize(self, size: int, *, preallocation: str = "off", exact: bool = True) -> None:
        self._all("write", _EVERYTHING, lambda node: node.resize(size, preallocation=preallocation, exact=exact))

    def refresh_size(self) -> None:
        for edge in self._members:
            edge.node.refresh_size()

    @property
    def has_zero_init(self) -> bool:
        return all(edge.node.has_zero_init for edge in self._members)

    def allocated_size(self) -> int:
        sizes = [edge.node.allocated_size() for edge in self._members]
        return -1 if min(sizes) < 0 else sum(sizes)

    # -- reading ----------------------------------------------------------------------------------

    def read_into(self, offset: int, buffer: memoryview) -> None:
        read = self._read_first if self.settings.fifo else self._read_vote
        bad: _Bad = {}
        try:
            for start in range(0, len(buffer), _STEP):
                view = buffer[start : start + _STEP]
                claim = self._ranges.enter(offset + start, offset + start + len(view), False)
                try:
                    read(offset + start, view, bad)
                finally:
                    self._ranges.leave(claim)
        except _NoQuorum as failure:
            self._report_bad("read", offset, len(buffer), bad)
            self._failed("read", offset, len(buffer), failure.errors)
        except Mismatch as difference:
            raise Mismatch(f"quorum: offset={offset} bytes={len(buffer)} {difference.message}",
                           where=self.filename) from None  # fmt: skip
        except ByreError:
            self._report_bad("read", offset, len(buffer), bad)
            raise
        self._report_bad("read", offset, len(buffer), bad)

    def _read_first(self, offset: int, view: memoryview, bad: _Bad) -> None:
        failed: list[ByreError] = []
        for edge in self._members:
            try:
                edge.node.read_into(offset, view)
                return
            except ByreError as error:
                failed.append(error)
                bad[edge] = error
        raise failed[-1]

    def _read_vote(self, offset: int, view: memoryview, bad: _Bad) -> None:
        ballots = [self._ask(edge, offset, len(view), bad) for edge in self._members]
        read = [ballot for ballot in ballots if ballot.data is not None]
        if len(read) < self.settings.threshold:
            raise _NoQuorum([ballot.error for ballot in ballots if ballot.error])
        versions = _versions(read)
        winner = max(versions, key=len)
        if self.settings.blkverify and len(versions) > 1:
            one, other = (cast("bytearray", ballot.data) for ballot in read[:2])
            at = next(index for index in range(len(one)) if one[index] != other[index])
            raise Mismatch(f"contents mismatch at offset {offset + at}")
        if len(winner) < self.settings.threshold:
            raise _NoQuorum([])
        good = cast("bytearray", winner[0].data)
        view[:] = good
        for ballot in (ballot for version in versions if version is not winner for ballot in version):
            bad.setdefault(ballot.child, None)
            if self.settings.rewrite:
                self._rewrite(ballot.child, offset, memoryview(good))

    @staticmethod
    def _ask(edge: Child, offset: int, length: int, bad: _Bad) -> _Ballot:
        data = bytearray(length)  # not a view: those are compared byte by byte
        try:
            edge.node.read_into(offset, memoryview(data))
        except ByreError as error:
            bad[edge] = error
            return _Ballot(edge, None, error)
        return _Ballot(edge, data, None)

    def _rewrite(self, edge: Child, offset: int, data: memoryview) -> None:
        """Mend a child that was outvoted. Readers of the range may do the same at once; writers wait."""
        inside = min(len(data), self.size - offset)
        try:
            if inside > 0:
                edge.node.write_from(offset, data[:inside])
        except ByreError:
            pass  # it is no worse than before, and the read has its bytes

    # -- changing ---------------------------------------------------------------------------------

    def write_from(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
        self._all("write", (offset, offset + len(buffer)), lambda node: node.write_from(offset, buffer, flags))

    def writev_from(self, offset: int, buffers: Sequence[memoryview], flags: int = 0) -> None:
        end = offset + sum(map(len, buffers))
        self._all("write", (offset, end), lambda node: node.writev_from(offset, buffers, flags))

    def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        # Without NO_FALLBACK: one child alone refusing would leave them different.
        kept = flags & (FUA | MAY_UNMAP)
        self._all("write", (offset, offset + length), lambda node: node.write_zeroes(offset, length, kept))

    def discard(self, offset: int, length: int) -> None:
        """Ignored: what a discarded range reads as may differ between children."""

    def flush(self) -> None:
        self._all("flush", _NO_RANGE, lambda node: node.flush())

    def _all(self, kind: str, span: tuple[int, int], action: Callable[[Node], None]) -> None:
        """Have every child do it; enough must succeed.

        :raises ByreError: what most of those that failed say
        """
        claim = self._ranges.enter(*span, kind != "flush")
        offset, length = (span[0], span[1] - span[0]) if span[1] < _NO_RANGE[0] else (0, 0)
        try:
            members = self._members
            bad: _Bad = {}
            for edge in members:
                try:
                    action(edge.node)
                except ByreError as error:
                    bad[edge] = error
        finally:
            self._ranges.leave(claim)
        failed = [error for error in bad.values() if error is not None]
        self._report_bad(kind, offset, length, bad)
        if len(members) - len(failed) < self.settings.threshold:
            if kind == "flush":
                raise _most_frequent(failed)
            self._failed(kind, offset, length, failed)

    # -- looking ----------------------------------------------------------------------------------

    def block_status(self, offset: int, length: int) -> Extent:
        """Zero where all children say so, else data; offsets in files mean nothing here."""
        from ..io.engine import reads_zero

        claim = self._ranges.enter(*_NO_RANGE, False)
        try:
            shortest, zero = length, True
            for edge in self._members:
                extent = edge.node.block_status(offset, length)
                shortest = min(shortest, extent.length)
                zero = zero and (extent.kind == ZERO or reads_zero(edge.node, offset, extent.length))
        finally:
            self._ranges.leave(claim)
        return Extent(offset, shortest, ZERO if zero else DATA)

    # -- events -----------------------------------------------------------------------------------

    def _failed(self, kind: str, offset: int, length: int, errors: list[ByreError]) -> None:
        """:raises ByreError: always"""
        first, count = _sectors(offset, length)
        self._event("QUORUM_FAILURE", {"reference": self.name, "sector-num": first, "sectors-count": count})
        if errors:
            raise _most_frequent(errors)
        raise IOFailure(f"cannot {kind} {length} bytes at {offset:#x}: fewer than {self.settings.threshold} of "
                        f"{len(self._members)} children agree", where=self.filename)  # fmt: skip

    def _report_bad(self, kind: str, offset: int, length: int, bad: _Bad) -> None:
        """Once per request and child."""
        first, count = _sectors(offset, length)
        for edge, error in bad.items():
            data: dict[str, object] = {"type": kind, "node-name": edge.node.name, "sector-num": first,
                                       "sectors-count": count}  # fmt: skip
            if error is not None:
                data["error"] = str(error)
            self._event("QUORUM_REPORT_BAD", data)

    def _event(self, name: str, data: dict[str, object]) -> None:
        if self.on_event is not None:
            self.on_event(name, data)

    # -- permissions, reopening -------------------------------------------------------------------

    def child_permissions(self, child: Child, used: int, shared: int) -> tuple[int, int]:
        if self.settings.rewrite and not self.read_only:
            used |= PERM_WRITE
        # Written by somebody else, the children would differ.
        return used, shared & PERM_READ | PERM_WRITE_UNCHANGED

    def reopen_prepare(self, flags: OpenFlags, options: OptionValues) -> object:
        if self.runtime is None and not options.given:  # made in Python, by settings
            return flags, None, self.settings
        return flags, options, _settings(options, len(self._members))

    def reopen_commit(self, token: object) -> None:
        flags, self.runtime, self.settings = cast("tuple[OpenFlags, OptionValues | None, Settings]", token)
        self.read_only = flags.read_only


def _versions(ballots: list[_Ballot]) -> list[list[_Ballot]]:
    """The ballots by what they say, in the order of the children."""
    versions: list[list[_Ballot]] = []
    for ballot in ballots:
        for version in versions:
            if version[0].data == ballot.data:
                version.append(ballot)
                break
        else:
            versions.append([ballot])
    return versions


def _most_frequent(errors: list[ByreError]) -> ByreError:
    """One of the errors with the number that most of them have, the first such."""
    numbers = [error.errno for error in errors]
    return max(errors, key=lambda error: numbers.count(error.errno))


def _sectors(offset: int, length: int) -> tuple[int, int]:
    """(first sector, number of sectors) of a range of bytes."""
    first = offset // SECTOR
    return first, -(-(offset + length) // SECTOR) - first


# -- children come and go ---------------------------------------------------------------------------


def add_child(graph: Graph, quorum: QuorumNode, node: Node | Image) -> Child:
    """``node``, whose content is the caller's concern, takes part from now on; requests are held back meanwhile.

    :param node: an Image stands for its node, and is a handle for reading from then on: the quorum writes
    :raises InvalidArgument: a quorum that compares two children, or a node of another length
    :raises ReadOnly: the quorum is open for writing, the node is not
    :raises Busy: permissions conflict
    """
    if quorum.settings.blkverify:
        raise InvalidArgument("cannot add a child to a quorum in blkverify mode", where=quorum.filename)
    with _held_back(graph, quorum, node) as (_, below):
        if below.size != quorum.size:
            raise InvalidArgument(f"node {below.name!r} has {below.size} bytes, the quorum {quorum.size}",
                                  where=quorum.filename)  # fmt: skip
        if below.read_only and not quorum.read_only:
            raise ReadOnly(f"node {below.name!r} is open read-only, but the quorum would write to it",
                           where=below.filename)  # fmt: skip
        last = max(int(edge.name.partition(".")[2]) for edge in quorum.members)
        with nullcontext() if node is below else _handed_over(graph, cast("Image", node)):
            child = graph.attach(quorum, f"children.{last + 1}", below, "data")
        quorum.members_changed()
        return child


@contextmanager
def _handed_over(graph: Graph, image: Image) -> Iterator[None]:
    """``image`` does not write any more, unless the body fails."""
    before, root = image.read_only, image._root
    used = root.used
    image.read_only = True
    graph.set_image_permissions(root, used & ~(PERM_WRITE | PERM_RESIZE), root.shared)
    try:
        yield
    except BaseException:
        image.read_only = before
        graph.set_image_permissions(root, used, root.shared)
        raise


def remove_child(graph: Graph, quorum: QuorumNode, name: str) -> None:
    """The child of this name (``children.1``) or node name takes no part any more; closed if nobody else uses it.

    :raises NotFound: there is none
    :raises Busy: fewer than the threshold would be left
    """
    with _held_back(graph, quorum):
        child = next((edge for edge in quorum.members if name in (edge.name, edge.node.name)), None)
        if child is None:
            raise NotFound(f"quorum node {quorum.name!r} has no child {name!r}")
        if len(quorum.members) <= quorum.settings.threshold:
            least = quorum.settings.threshold
            raise Busy(f"the number of children cannot be lower than the vote threshold {least}",
                       where=quorum.filename)  # fmt: skip
        graph.detach(child)
        quorum.members_changed()
    graph.release(child.node)


@contextmanager
def _held_back(graph: Graph, quorum: QuorumNode, *more: Node | Image) -> Iterator[list[Node]]:
    """No request is under way, neither through an Image nor from a node above; the graph lock is held."""
    with settled(graph, [quorum, *more]) as nodes:
        claim = quorum._ranges.enter(*_EVERYTHING, True)
        try:
            yield nodes
        finally:
            quorum._ranges.leave(claim)
