"""Crash replay: a log of writes and flushes, and the disks a power cut could have left behind.

Public API for tests of anything that promises to survive a crash: :class:`WriteLog` is filled by
``blklog`` nodes (``writelog.py``), :func:`crash_states` yields the states. The model of the disk: between
two completed flushes any subset of the writes may be durable, except that an earlier write never undoes
a later one; writes are torn at 512-byte sectors; zero writes and discards act as writes of zeroes or not
at all; a flush covers what completed before it was issued; FUA covers its own write.
"""

from __future__ import annotations

import random
import threading
from itertools import combinations
from typing import TYPE_CHECKING, Final, NamedTuple

from ..units import align_down, align_up

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

__all__ = ["CrashState", "LogEntry", "SparseDisk", "WriteLog", "crash_states"]

PAGE: Final = 4096
SECTOR: Final = 512
_ZERO_PAGE: Final = bytes(PAGE)
_MASK: Final = (1 << 64) - 1
ALL_SUBSETS_LIMIT: Final = 8
SEEDED_SUBSETS: Final = 32
TORN_LIMIT: Final = 16


class LogEntry(NamedTuple):
    """One request as the disk saw it. Times are ticks of the log's one clock; ``completed`` is -1 while it is in
    flight and for requests that failed (they may have happened or not).

    :ivar seq: number in the order of issue, over all disks of the log
    :ivar disk: which disk
    :ivar kind: "write", "zeroes", "discard", "flush", "resize" or "mark"
    :ivar length: bytes; for "resize" the new size is ``offset``
    :ivar data: what was written; for "mark" the test's own note
    """

    seq: int
    disk: str
    kind: str
    offset: int = 0
    length: int = 0
    data: object = b""
    fua: bool = False
    issued: int = 0
    completed: int = -1


class SparseDisk:
    """Bytes in 4 KiB pages, zero pages left out; cheap to copy, and it knows a hash of its content.

    :ivar size: bytes
    :ivar digest: 64-bit hash of size and content
    """

    __slots__ = ("_hash", "pages", "size")

    def __init__(self, size: int = 0, data: bytes | memoryview = b"") -> None:
        self.size = max(size, len(data))
        self.pages: dict[int, bytes] = {}
        self._hash = 0
        self._store(0, memoryview(data))

    def copy(self) -> SparseDisk:
        twin = SparseDisk()
        twin.size, twin.pages, twin._hash = self.size, dict(self.pages), self._hash
        return twin

    @property
    def digest(self) -> int:
        return hash((self.size, self._hash))

    def _set_page(self, index: int, page: bytes) -> None:
        before = self.pages.get(index)
        if before is not None:
            self._hash = (self._hash - hash((index, before))) & _MASK
        if page == _ZERO_PAGE:
            self.pages.pop(index, None)
        else:
            self.pages[index] = page
            self._hash = (self._hash + hash((index, page))) & _MASK

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write; the disk grows if ``data`` ends behind its end."""
        self._store(offset, memoryview(data))
        self.size = max(self.size, offset + len(data))

    def _store(self, offset: int, view: memoryview) -> None:
        at = 0
        while at < len(view):
            index, skip = divmod(offset + at, PAGE)
            step = min(PAGE - skip, len(view) - at)
            piece = view[at : at + step]
            if step == PAGE:
                page = bytes(piece)
            else:
                old = self.pages.get(index, _ZERO_PAGE)
                page = b"".join((old[:skip], piece, old[skip + step :]))
            self._set_page(index, page)
            at += step

    def zero(self, offset: int, length: int) -> None:
        """Zero a range; the disk grows if it ends behind its end."""
        end = offset + length
        first, last = -(-offset // PAGE), end // PAGE
        self.size = max(self.size, end)
        if first >= last:
            self._store(offset, memoryview(bytes(length)))
            return
        self._store(offset, memoryview(bytes(first * PAGE - offset)))
        self._store(last * PAGE, memoryview(bytes(end - last * PAGE)))
        for index in [index for index in self.pages if first <= index < last]:
            self._set_page(index, _ZERO_PAGE)

    def resize(self, size: int) -> None:
        if size < self.size:
            grown = self.size
            self.zero(size, grown - size)
        self.size = size

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset``; zeroes past the end."""
        first, skip = divmod(offset, PAGE)
        pages = [self.pages.get(i, _ZERO_PAGE) for i in range(first, -(-(offset + length) // PAGE))]
        return b"".join(pages)[skip : skip + length]

    def to_bytes(self) -> bytes:
        return self.read(0, self.size)


class WriteLog:
    """What happened to one or several disks, on one clock.

    Guarded by ``_lock``: the entries and the clock.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clock = 0
        self._entries: list[LogEntry] = []
        self.bases: dict[str, SparseDisk] = {}

    def add_disk(self, name: str, base: SparseDisk) -> None:
        """A disk that begins as ``base``."""
        with self._lock:
            self.bases[name] = base

    def issue(
        self, disk: str, kind: str, offset: int = 0, length: int = 0, data: object = b"", fua: bool = False
    ) -> int:
        """A request begins; give the result to :meth:`complete`."""
        with self._lock:
            self._clock += 1
            seq = len(self._entries)
            self._entries.append(LogEntry(seq, disk, kind, offset, length, data, fua, self._clock))
            return seq

    def complete(self, seq: int) -> None:
        """The request succeeded. A request that failed is never completed."""
        with self._lock:
            self._clock += 1
            self._entries[seq] = self._entries[seq]._replace(completed=self._clock)

    def mark(self, note: object) -> None:
        """A note of the test ("flush 3 was acknowledged"); states carry all notes made before the crash."""
        self.complete(self.issue("", "mark", data=note))

    @property
    def entries(self) -> tuple[LogEntry, ...]:
        with self._lock:
            return tuple(self._entries)

    @property
    def clock(self) -> int:
        with self._lock:
            return self._clock

    def __len__(self) -> int:
        return len(self.entries)

    def final(self, disk: str) -> SparseDisk:
        """The disk with everything applied in order of issue."""
        state = self.bases[disk].copy()
        for entry in self.entries:
            if entry.disk == disk:
                _apply(state, entry)
        return state


class CrashState(NamedTuple):
    """One state a crash could leave.

    :ivar time: the clock at the crash
    :ivar marks: notes made before
    :ivar disks: content by name; not to be changed
    :ivar story: what is missing or torn, for the report of a failure
    :ivar digest: hash over all disks
    """

    time: int
    marks: tuple[object, ...]
    disks: Mapping[str, SparseDisk]
    story: str
    digest: int


class _Choice(NamedTuple):
    """What of the pending entries happened: whole ones, and one of which only ``[start, end)`` reached the disk."""

    whole: frozenset[int]
    torn: int = -1
    start: int = 0
    end: int = 0


_CHANGES: Final = ("write", "zeroes", "discard", "resize")


def _apply(disk: SparseDisk, entry: LogEntry) -> None:
    if entry.kind == "write":
        disk.write(entry.offset, entry.data)  # type: ignore[arg-type]
    elif entry.kind == "zeroes":
        disk.zero(entry.offset, entry.length)
    elif entry.kind == "discard":
        length = min(entry.length, disk.size - entry.offset)
        if length > 0:
            disk.zero(entry.offset, length)
    elif entry.kind == "resize":
        disk.resize(entry.offset)


def crash_states(
    log: WriteLog, *, since: int = 0, seed: int = 0, seen: set[object] | None = None, ignore_discards: bool = True
) -> Iterator[CrashState]:
    """Every state worth looking at after a crash at each tick of the clock from ``since`` on.

    For each tick: all pending writes, none, each one missing, each one alone, all subsets if at most 8 are pending,
    else each pair and 32 subsets chosen by ``seed``; the last and the largest pending write torn at up to 16 sector
    boundaries from either side, with all others and with none. Also with durable discards not done at all
    (``ignore_discards``), because a disk may ignore them. A state that was yielded since the last mark is not repeated.

    :param seen: keys of states seen; hand the same set to several logs to skip what they share
    """
    seen = set() if seen is None else seen
    walk = _Walk(log)
    while walk.advance():
        if walk.time < since:
            continue
        yield from _states_at(walk, seed, seen, ignore_discards)


def _in_sectors(log: WriteLog) -> list[LogEntry]:
    """The entries with writes (and zero writes) that begin or end inside a sector widened to whole sectors.

    A disk takes whole sectors: what shares one with an earlier write carries that write's bytes along.
    """
    live = {name: disk.copy() for name, disk in log.bases.items()}
    entries: list[LogEntry] = []
    for entry in log.entries:
        if entry.kind in _CHANGES:
            disk = live[entry.disk]
            _apply(disk, entry)
            start = align_down(entry.offset, SECTOR)
            end = min(align_up(entry.offset + entry.length, SECTOR), disk.size)
            if entry.kind in ("write", "zeroes") and (start, end - start) != (entry.offset, entry.length):
                data = disk.read(start, end - start)
                entry = entry._replace(kind="write", offset=start, length=end - start, data=data)
        entries.append(entry)
    return entries


class _Walk:
    """Goes through the log tick by tick, keeping what is durable applied and what is pending apart."""

    def __init__(self, log: WriteLog) -> None:
        self.entries = _in_sectors(log)
        self.time = -1
        self.marks: tuple[object, ...] = ()
        self.base = {name: disk.copy() for name, disk in log.bases.items()}
        # What a disk that ignores discards holds; the same objects' content until the first durable discard.
        self.undiscarded = {name: disk.copy() for name, disk in log.bases.items()}
        self.discards_differ = False
        # Entries that are not folded into the base, in order; those durable already must be applied.
        self.open: list[LogEntry] = []
        self.durable: set[int] = set()
        self.tried: set[_Choice] = set()
        ticks: dict[int, list[tuple[str, LogEntry]]] = {0: []}
        for entry in self.entries:
            ticks.setdefault(entry.issued, []).append(("issued", entry))
            if entry.completed >= 0:
                ticks.setdefault(entry.completed, []).append(("completed", entry))
        self._ticks = sorted(ticks.items())
        self._at = 0
        self._completed: list[LogEntry] = []

    def advance(self) -> bool:
        """To the next tick; False at the end."""
        if self._at == len(self._ticks):
            return False
        self.time, events = self._ticks[self._at]
        self._at += 1
        for what, entry in events:
            if what == "issued":
                if entry.kind in _CHANGES:
                    self.open.append(entry)
            elif entry.kind == "mark":
                self.marks += (entry.data,)
                self.tried.clear()
            elif entry.kind == "flush":
                self._flushed(entry)
            else:
                self._completed.append(entry)
                if entry.fua:
                    self._harden([entry])
        return True

    def _flushed(self, flush: LogEntry) -> None:
        covered = [e for e in self._completed if e.disk == flush.disk and e.completed < flush.issued]
        self._completed = [e for e in self._completed if e not in covered]
        self._harden(covered)

    def _harden(self, covered: list[LogEntry]) -> None:
        self.durable.update(entry.seq for entry in covered)
        self.tried.clear()
        # Fold from the front: an entry behind a pending one of the same disk must stay behind it.
        blocked: set[str] = set()
        rest: list[LogEntry] = []
        for entry in self.open:
            if entry.seq in self.durable and entry.disk not in blocked:
                _apply(self.base[entry.disk], entry)
                if entry.kind == "discard":
                    self.discards_differ = True
                else:
                    _apply(self.undiscarded[entry.disk], entry)
            else:
                rest.append(entry)
                blocked.add(entry.disk)
        self.open = rest

    @property
    def pending(self) -> list[LogEntry]:
        return [entry for entry in self.open if entry.seq not in self.durable]


def _states_at(walk: _Walk, seed: int, seen: set[object], ignore_discards: bool) -> Iterator[CrashState]:
    pending = walk.pending
    for choice in _choices(pending, seed):
        if choice in walk.tried:
            continue
        walk.tried.add(choice)
        bases = [(walk.base, False)]
        if ignore_discards and walk.discards_differ and (not choice.whole or len(choice.whole) == len(pending)):
            bases.append((walk.undiscarded, True))
        for base, undiscarded in bases:
            disks = _build(base, walk, choice, undiscarded)
            digest = hash(tuple((name, disk.digest) for name, disk in disks.items()))
            key = (digest, walk.marks)
            if key in seen:
                continue
            seen.add(key)
            story = _tell(walk, pending, choice) + (", discards ignored" if undiscarded else "")
            yield CrashState(walk.time, walk.marks, disks, story, digest)


def _build(base: Mapping[str, SparseDisk], walk: _Walk, choice: _Choice, undiscarded: bool) -> dict[str, SparseDisk]:
    disks = dict(base)
    copied: set[str] = set()
    for entry in walk.open:
        whole = entry.seq in choice.whole or entry.seq in walk.durable
        if not whole and entry.seq != choice.torn:
            continue
        if undiscarded and entry.kind == "discard":
            continue
        if entry.disk not in copied:
            copied.add(entry.disk)
            disks[entry.disk] = disks[entry.disk].copy()
        if whole:
            _apply(disks[entry.disk], entry)
        else:
            part = memoryview(entry.data)[choice.start : choice.end]  # type: ignore[arg-type]
            disks[entry.disk].write(entry.offset + choice.start, part)
    if not copied:
        disks = {name: disk.copy() for name, disk in disks.items()}
    return disks


def _choices(pending: list[LogEntry], seed: int) -> Iterator[_Choice]:
    seqs = [entry.seq for entry in pending]
    every = frozenset(seqs)
    yield _Choice(every)
    yield _Choice(frozenset())
    for seq in seqs:
        yield _Choice(every - {seq})
        yield _Choice(frozenset((seq,)))
    if len(seqs) <= ALL_SUBSETS_LIMIT:
        for count in range(2, len(seqs) - 1):
            yield from (_Choice(frozenset(some)) for some in combinations(seqs, count))
    else:
        yield from (_Choice(frozenset(pair)) for pair in combinations(seqs, 2))
        chooser = random.Random(f"{seed} {seqs}")
        for _ in range(SEEDED_SUBSETS):
            yield _Choice(frozenset(seq for seq in seqs if chooser.random() < 0.5))
    yield from _torn(pending, every)


def _torn(pending: list[LogEntry], every: frozenset[int]) -> Iterator[_Choice]:
    writes = [entry for entry in pending if entry.kind == "write"]
    if not writes:
        return
    largest = max(writes, key=lambda entry: entry.length)
    for entry in {largest.seq: largest, writes[-1].seq: writes[-1]}.values():
        for cut in cut_points(entry.offset, entry.length):
            for start, end in ((0, cut), (cut, entry.length)):
                yield _Choice(every - {entry.seq}, entry.seq, start, end)
                yield _Choice(frozenset(), entry.seq, start, end)


def cut_points(offset: int, length: int) -> Iterable[int]:
    """Up to 16 positions inside a write at which the disk's sectors end, spread evenly."""
    cuts = range(SECTOR - offset % SECTOR, length, SECTOR)
    if len(cuts) <= TORN_LIMIT:
        return cuts
    return [cuts[index * (len(cuts) - 1) // (TORN_LIMIT - 1)] for index in range(TORN_LIMIT)]


def _tell(walk: _Walk, pending: list[LogEntry], choice: _Choice) -> str:
    def name(entry: LogEntry) -> str:
        return f"#{entry.seq} {entry.kind} {entry.disk}+{entry.offset:#x}/{entry.length}"

    missing = [name(e) for e in pending if e.seq not in choice.whole and e.seq != choice.torn]
    torn = [f"{name(e)} torn to [{choice.start}, {choice.end})" for e in pending if e.seq == choice.torn]
    lost = f"lost {', '.join(missing)}" if missing else "nothing lost"
    return "; ".join([f"crash at {walk.time}", f"{len(pending)} pending", lost, *torn])
