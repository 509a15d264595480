"""Persistent dirty bitmaps of a qcow2 image while it is open (docs/interop/qcow2, "Bitmaps").

On disk a bitmap is marked "in use" before the first write or change that it would have to follow, and stored again
when the image is closed: a crash makes it inconsistent, never wrongly clean. One found "in use" at opening can only be
removed. Nothing is loaded before it is needed, and an image opened for reading is not changed. The structures on disk
are in :mod:`.bitmap_store`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ...bitmaps.bitmap import Bitmap, check_granularity
from ...bitmaps.tracking import Tracker
from ...errors import AlreadyExists, ByreError, ImageError, InvalidArgument, NotFound, NotSupported, ReadOnly
from . import bitmap_store as disk
from . import layout
from .directories import MAX_BITMAP_BYTES, MAX_BITMAP_DIRECTORY, MAX_BITMAP_NAME, MAX_BITMAPS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .image import Qcow2Node
    from .layout import BitmapEntry

__all__ = ["StoredBitmaps", "store_of"]

LOADED_LIMIT: Final = 1 << 30
"""Bytes of memory that the bits of all bitmaps of an image may take together to be loaded."""
_LEAST_DEFAULT: Final = 4096
_MOST_DEFAULT: Final = 65536


class _Row:
    """A persistent bitmap.

    :ivar entry: what the directory on disk says; ``None`` while it is not there yet
    :ivar bitmap: ``None`` until it is needed
    """

    __slots__ = ("bitmap", "entry")

    def __init__(self, entry: BitmapEntry | None, bitmap: Bitmap | None = None) -> None:
        self.entry = entry
        self.bitmap = bitmap

    @property
    def name(self) -> str:
        if self.bitmap is not None:
            return self.bitmap.name
        assert self.entry is not None
        return self.entry.name

    @property
    def unsynced(self) -> bool:
        """What is in memory must be stored."""
        if self.bitmap is None or self.bitmap.inconsistent:
            return False
        return self.entry is None or self.entry.in_use


def store_of(node: Qcow2Node) -> StoredBitmaps:
    """The node's bitmaps, its directory read on first use; lock held.

    :raises ImageError: the directory breaks the format
    """
    if node._bitmaps is None:
        from .opening import read_bitmaps

        try:
            entries = read_bitmaps(node)
        except ImageError as error:
            error.where = error.where or node.filename
            raise
        node._bitmaps = StoredBitmaps(node, entries)
    return node._bitmaps


class StoredBitmaps:
    """The bitmaps of an open image, in the directory's order. Guarded by the node's lock."""

    def __init__(self, node: Qcow2Node, entries: Sequence[BitmapEntry]) -> None:
        self.node = node
        self._rows = [_Row(entry) for entry in entries]
        self._loaded = 0

    # -- looking ----------------------------------------------------------------------------------

    @property
    def can_persist(self) -> bool:
        """Whether the image can keep bitmaps: version 2 cannot."""
        return self.node.header.version >= 3

    def entries(self) -> list[tuple[str, int, bool]]:
        """(name, granularity, in use on disk without being loaded) of each persistent bitmap; nothing is loaded."""
        with self.node.lock:
            found = []
            for row in self._rows:
                if row.bitmap is not None:
                    found.append((row.name, row.bitmap.granularity, row.bitmap.inconsistent))
                else:
                    assert row.entry is not None
                    found.append((row.name, 1 << row.entry.granularity_bits, row.entry.in_use))
            return found

    def all(self) -> tuple[Bitmap, ...]:
        """All bitmaps, loaded; the persistent ones first.

        :raises IOFailure: one cannot be read
        """
        with self.node.lock:
            stored = tuple(self._load(row) for row in self._rows)
            tracker = self.node.tracker
            others = () if tracker is None else tuple(each for each in tracker.bitmaps if not each.persistent)
            return stored + others

    def find(self, name: str) -> Bitmap:
        """:raises NotFound: there is none of that name"""
        with self.node.lock:
            row = next((row for row in self._rows if row.name == name), None)
            if row is not None:
                return self._load(row)
            found = self.node.tracker.find(name) if self.node.tracker is not None and name else None
            if found is None:
                raise NotFound(f"Dirty bitmap '{name}' not found")
            return found

    def _load(self, row: _Row) -> Bitmap:
        """The row's bitmap; one whose bits make no sense is inconsistent."""
        if row.bitmap is not None:
            return row.bitmap
        entry, node = row.entry, self.node
        assert entry is not None
        bitmap = Bitmap(node.size, 1 << entry.granularity_bits, entry.name, persistent=True, enabled=entry.auto)
        bitmap.inconsistent = entry.in_use or bool(entry.extra and not entry.flags & layout.BITMAP_EXTRA_COMPATIBLE)
        bitmap.read_only = node.read_only
        if not bitmap.inconsistent:
            try:
                self._loaded += disk.load_bits(node, entry, bitmap, LOADED_LIMIT - self._loaded)
            except ImageError:
                bitmap.clear_all()
                bitmap.inconsistent = True
        bitmap.modified = False
        row.bitmap = bitmap
        if not bitmap.inconsistent:
            bitmap.unsync = self._unsync
            self._tracker().add(bitmap)
        return bitmap

    def _tracker(self) -> Tracker:
        if self.node.tracker is None:
            self.node.tracker = Tracker()
        return self.node.tracker

    # -- adding and removing ----------------------------------------------------------------------

    @property
    def default_granularity(self) -> int:
        """The cluster size, within 4 KiB and 64 KiB."""
        return min(max(self.node.cluster_size, _LEAST_DEFAULT), _MOST_DEFAULT)

    def add(self, name: str, granularity: int = 0, *, persistent: bool = True, enabled: bool = True) -> Bitmap:
        """A new bitmap, all clean. A persistent one is stored when the image is closed.

        :param granularity: bytes; 0 for the default
        :raises AlreadyExists: there is one of that name
        :raises NotSupported: the image cannot keep it
        """
        granularity = granularity or self.default_granularity
        node = self.node
        with node.lock:
            node.check_failure()
            if persistent and not name:
                raise InvalidArgument("Bitmap name cannot be empty")
            check_granularity(granularity)
            if name and self._exists(name):
                raise AlreadyExists(f"Bitmap already exists: {name}")
            if persistent:
                self._check_room(name, granularity)
            bitmap = Bitmap(node.size, granularity, name, persistent=persistent, enabled=enabled)
            self._tracker().add(bitmap)
            if persistent:
                bitmap.modified = True
                self._rows.append(_Row(None, bitmap))
            return bitmap

    def _exists(self, name: str) -> bool:
        tracker = self.node.tracker
        return any(row.name == name for row in self._rows) or (tracker is not None and tracker.find(name) is not None)

    def _check_room(self, name: str, granularity: int) -> None:
        node = self.node
        reason = ""
        if node.read_only:
            raise ReadOnly("cannot add a bitmap: the image is open read-only", where=node.filename)
        if not self.can_persist:
            reason = "Cannot store dirty bitmaps in qcow2 v2 files"
        elif not node.size:
            reason = "the disk is empty"
        elif -(-node.size // (granularity * 8)) > MAX_BITMAP_BYTES:
            reason = "Too much space will be occupied by the bitmap. Use larger granularity"
        elif len(name.encode("utf-8", "surrogateescape")) > MAX_BITMAP_NAME:
            reason = f"Name length exceeds maximum ({MAX_BITMAP_NAME} characters)"
        elif not disk.has_room(node):
            reason = "the header has no room for bitmaps"
        elif len(self._rows) >= MAX_BITMAPS:
            reason = "Maximum number of persistent bitmaps is already reached"
        else:
            named = layout.BitmapEntry(0, 0, 0, 1, 0, b"", name)
            kept = [row.entry or named._replace(name=row.name) for row in self._rows]
            if len(layout.encode_bitmap_directory([*kept, named])) > MAX_BITMAP_DIRECTORY:
                reason = "Not enough space in the bitmap directory"
        if reason:
            raise NotSupported(f"Can't make bitmap '{name}' persistent in '{node.filename}': {reason}")

    def remove(self, name: str) -> None:
        """Forget a bitmap, in memory and, durably, on disk.

        :raises NotFound: there is none of that name
        :raises Busy: a job works with it
        """
        bitmap = self.find(name)
        bitmap.check(inconsistent=True)
        node = self.node
        with node.lock:
            node.check_failure()
            row = next((row for row in self._rows if row.bitmap is bitmap), None)
            if row is not None:
                if node.read_only:
                    raise ReadOnly("cannot remove a bitmap: the image is open read-only", where=node.filename)
                if row.entry is not None:
                    self._remove_stored(row)
                self._rows.remove(row)
            bitmap.unsync = None
            if node.tracker is not None:
                node.tracker.remove(bitmap)

    def _remove_stored(self, row: _Row) -> None:
        assert row.entry is not None
        entry = row.entry
        kept = [other.entry for other in self._rows if other is not row and other.entry is not None]
        freed = disk.release_entry(self.node, entry)
        self._replace(kept, disk.Batch(self.node), freed)

    def _replace(self, entries: Sequence[BitmapEntry], batch: disk.Batch, freed: list[tuple[int, int]]) -> None:
        """A new directory in place of the old one, and what it let go of."""
        node = self.node
        disk.set_autoclear(node, node.header.autoclear_features & layout.AUTOCLEAR_KNOWN)
        try:
            freed = freed + disk.replace_directory(node, entries, batch)
        except BaseException:
            if node.failure is None:
                batch.give_back()
            raise
        self._let_go(freed)

    def _let_go(self, runs: list[tuple[int, int]]) -> None:
        """Nothing on disk refers to these runs of clusters any more."""
        node = self.node
        assert node.refcounts is not None
        node.refcounts.ready += [(first, count, "other") for first, count in runs]

        def lower() -> None:
            node.write_back()
            node.file.flush()

        node._guarded(lower)

    # -- all of them go ---------------------------------------------------------------------------

    def check_forgettable(self) -> None:
        """:raises Busy: a job works with a persistent bitmap"""
        with self.node.lock:
            for row in self._rows:
                if row.bitmap is not None:
                    row.bitmap.check(read_only=True, inconsistent=True)

    def runs(self) -> list[tuple[int, int]]:
        """Runs of clusters that persistent bitmaps and their directory take on disk. Lock held."""
        node, record = self.node, disk.directory_of(self.node)
        runs = [run for row in self._rows if row.entry is not None for run in disk.release_entry(node, row.entry)]
        if record is not None:
            length = -(-record.directory_size // node.cluster_size)
            runs.append((record.directory_offset >> node.header.cluster_bits, length))
        return runs

    def forget(self, runs: list[tuple[int, int]]) -> None:
        """The header names no bitmaps any more: those in memory go too, and the space they took. Lock held.

        :param runs: of clusters, as :meth:`runs` had them
        """
        tracker = self.node.tracker
        for row in self._rows:
            if row.bitmap is not None:
                row.bitmap.unsync = None
                if tracker is not None and not row.bitmap.inconsistent:
                    tracker.remove(row.bitmap)
        self._rows.clear()
        self._let_go(runs)

    # -- in use -----------------------------------------------------------------------------------

    def begin_writing(self) -> None:
        """The guest is about to write: bitmaps that follow it are loaded and, on disk, in use. Lock held."""
        rows = [row for row in self._rows if self._follows(row)]
        for row in rows:
            try:
                self._load(row)
            except ByreError:
                self._give_up(row)
        self._mark_in_use(rows)

    def _follows(self, row: _Row) -> bool:
        """Whether its copy on disk would have to contain the writes to come."""
        if row.entry is None or row.entry.in_use:
            return False
        return row.entry.auto or (row.bitmap is not None and row.bitmap.enabled)

    def _give_up(self, row: _Row) -> None:
        """It cannot be read now: it will not be right any more."""
        assert row.entry is not None
        row.bitmap = Bitmap(self.node.size, 1 << row.entry.granularity_bits, row.name, persistent=True)
        row.bitmap.inconsistent = True

    def _mark_in_use(self, rows: list[_Row]) -> None:
        """Set the flag of these bitmaps on disk; durable on return."""
        changed = [row for row in rows if row.entry is not None and not row.entry.in_use]
        if not changed:
            return
        for row in changed:
            assert row.entry is not None
            row.entry = row.entry._replace(flags=row.entry.flags | layout.BITMAP_IN_USE)
        disk.update_directory(self.node, [row.entry for row in self._rows if row.entry is not None])
        for row in changed:
            if row.bitmap is not None:
                row.bitmap.unsync = None

    def _unsync(self, bitmap: Bitmap) -> None:
        """A bitmap is about to change."""
        node = self.node
        with node.lock:
            node.check_failure()
            if node.read_only:
                raise ReadOnly(f"bitmap {bitmap.name!r} is readonly and cannot be modified", where=node.filename)
            rows = [row for row in self._rows if row.bitmap is bitmap]
            node._guarded(lambda: self._mark_in_use(rows))

    def prepare_resize(self, size: int) -> None:
        """The disk's size is about to change: all bitmaps are loaded and in use, for their tables will not fit.

        :raises ByreError: one is inconsistent or would be too long, or a job works with it; nothing has changed
        """
        for bitmap in self.all():
            bitmap.check()
            if bitmap.persistent and -(-size // (bitmap.granularity * 8)) > MAX_BITMAP_BYTES:
                raise NotSupported(f"bitmap {bitmap.name!r} would be too large for a disk of {size} bytes",
                                   where=self.node.filename)  # fmt: skip
        with self.node.lock:
            self.node._guarded(lambda: self._mark_in_use(self._rows))

    # -- storing ----------------------------------------------------------------------------------

    def store(self) -> None:
        """Store what is in memory; on disk, nothing that is consistent is in use afterwards. Lock held.

        :raises NoSpace: there is no room; the bitmaps on disk stay in use, which makes them inconsistent
        """
        rows = [row for row in self._rows if row.unsynced]
        if not rows:
            return
        node = self.node
        node._writing = False
        batch = disk.Batch(node)
        before = {row: row.entry for row in rows}
        freed: list[tuple[int, int]] = []
        try:
            after = {row: self._placed(row, batch, freed) for row in rows}
        except BaseException:
            if node.failure is None:
                batch.give_back()
            raise
        entries = [after.get(row, row.entry) for row in self._rows]
        final = [entry for entry in entries if entry is not None]
        if all(entry is not None and entry.table_size == after[row].table_size for row, entry in before.items()):
            self._update(final, after, batch)
            self._let_go(freed)
        else:
            self._replace(final, batch, freed)
        for row in rows:
            self._stored(row, after[row])

    def _placed(self, row: _Row, batch: disk.Batch, freed: list[tuple[int, int]]) -> BitmapEntry:
        """The directory entry of a bitmap that is on disk again, with everything it refers to."""
        bitmap, entry = row.bitmap, row.entry
        assert bitmap is not None
        if bitmap.frozen:
            bitmap.reclaim()
        flags = layout.BITMAP_AUTO if bitmap.enabled else 0
        bits = bitmap.granularity.bit_length() - 1
        if entry is None:
            offset, length = batch.place_bitmap(bitmap)
            return layout.BitmapEntry(offset, length, flags, 1, bits, b"", bitmap.name)
        flags |= entry.flags & layout.BITMAP_EXTRA_COMPATIBLE
        if bitmap.modified:
            freed += disk.release_entry(self.node, entry)
            offset, length = batch.place_bitmap(bitmap)
            entry = entry._replace(table_offset=offset, table_size=length)
        return entry._replace(flags=flags)

    def _update(self, final: list[BitmapEntry], after: dict[_Row, BitmapEntry], batch: disk.Batch) -> None:
        """The directory stays where it is: new tables are named while "in use" is still set, then it is taken off."""
        node = self.node
        try:
            batch.settle()
        except BaseException:
            if node.failure is None:
                batch.give_back()
            raise
        named = {entry.name for entry in after.values()}

        def write() -> None:
            if batch.runs:
                disk.update_directory(node, [
                    entry._replace(flags=entry.flags | layout.BITMAP_IN_USE) if entry.name in named else entry
                    for entry in final
                ])  # fmt: skip
            disk.update_directory(node, final)

        node._guarded(write)

    def _stored(self, row: _Row, entry: BitmapEntry) -> None:
        row.entry = entry
        assert row.bitmap is not None
        row.bitmap.modified = False
        row.bitmap.unsync = self._unsync

    def set_read_only(self, read_only: bool) -> None:
        """The node was reopened. Lock held."""
        for row in self._rows:
            if row.bitmap is not None:
                row.bitmap.read_only = read_only
