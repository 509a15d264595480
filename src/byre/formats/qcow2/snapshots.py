"""Internal snapshots of qcow2: take, apply, delete, and look into one without applying it.

docs/interop/qcow2, section "Snapshots". The order of what is written is RELIABILITY 2.3's: a crash leaves the snapshot
table and the active layer as they were, or as they become; version 3 has its dirty bit set meanwhile, so that counts
and COPIED flags are put right when the image is opened again. What an L1 table refers to is in :mod:`.snapshot_refs`,
the area for the state of a machine in :mod:`.vmstate`.
"""

from __future__ import annotations

import errno
import re
import struct
import time
from array import array
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import numpy as np

from ...errors import Busy, ByreError, Corrupt, ImageError, InvalidArgument, NotFound, NotSupported, ReadOnly
from ...io.tables import PAGE
from . import layout, vmstate
from .directories import MAX_SNAPSHOT_TABLE
from .entries import COPIED
from .opening import read_bitmaps
from .refcounts_bulk import RefcountOverflow
from .snapshot_refs import References, read_l1, with_flags

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from .image import Qcow2Node
    from .layout import Snapshot

__all__ = ["MAX_NAME", "apply", "create", "delete", "find", "load", "rewrite_table"]

MAX_NAME: Final = 255
"""Bytes of a name; other programs cut longer ones and then do not find the snapshot again."""
_PLAIN = np.uint64(~COPIED & (1 << 64) - 1)


# -- finding --------------------------------------------------------------------------------------


def find(snapshots: Sequence[Snapshot], name: str, *, name_first: bool = False) -> int:
    """The index of the first snapshot whose id, else whose name is ``name`` (``name_first``: the other way round).

    :raises NotFound: there is none
    """
    ids, names = [shot.id for shot in snapshots], [shot.name for shot in snapshots]
    for values in (names, ids) if name_first else (ids, names):
        if name in values:
            return values.index(name)
    raise NotFound(f"there is no snapshot {name!r}")


def find_exactly(snapshots: Sequence[Snapshot], id: str | None, name: str | None) -> int:
    """The index of the first snapshot with this id and this name, where given.

    :raises NotFound: there is none
    """
    for index, shot in enumerate(snapshots):
        if (id is None or shot.id == id) and (name is None or shot.name == name):
            return index
    asked = " and ".join(f"{what} {value!r}" for what, value in (("id", id), ("name", name)) if value is not None)
    raise NotFound(f"there is no snapshot with {asked}")


def _new_id(snapshots: Sequence[Snapshot]) -> str:
    """One more than the largest number an id begins with."""
    used = {int(found[0]) for shot in snapshots if (found := re.match(r"\s*\+?\d+", shot.id, re.ASCII))}
    number = max(used, default=0) + 1
    if number >> 64:
        number = next(number for number in range(1, len(used) + 2) if number not in used)
    return str(number)


# -- the frame of an operation --------------------------------------------------------------------


class _Operation:
    """A change of the snapshot table or the active layer, while nothing else happens in the node.

    Guarded by the node's lock, which is held from beginning to end.
    """

    def __init__(self, node: Qcow2Node) -> None:
        assert node.refcounts is not None
        self.node = node
        self.file = node.file
        self.refcounts = node.refcounts
        self.snapshots = node.snapshots
        #: (host offset, clusters) of what was allocated and is not linked yet
        self.allocated: list[tuple[int, int]] = []

    # -- new structures, before anything is changed -----------------------------------------------

    def clusters(self, length: int) -> int:
        return -(-length >> self.node.header.cluster_bits)

    def place(self, data: bytes) -> int:
        """Write ``data`` to clusters of its own; their host offset, 0 for no data."""
        if not data:
            return 0
        count = self.clusters(len(data))
        host = self.refcounts.allocate(count)
        self.allocated.append((host, count))
        self.file.write_from(host, memoryview(data.ljust(count << self.node.header.cluster_bits, b"\0")))
        return host

    def place_table(self, snapshots: Sequence[Snapshot]) -> int:
        return self.place(_encoded(self._completed(snapshots)))

    def _completed(self, snapshots: Sequence[Snapshot]) -> list[Snapshot]:
        """All entries with the fields version 3 asks for; what is there already stays to the byte."""
        return [shot if len(shot.extra) >= 24 else self._complete(shot) for shot in snapshots]

    def _complete(self, shot: Snapshot) -> Snapshot:
        size = self.node.header.size if shot.disk_size is None else shot.disk_size
        full = layout.snapshot_extra(shot.vm_state_size, size)
        return shot._replace(extra=shot.extra[:16].ljust(16, b"\0") + full[16:] if len(shot.extra) >= 16 else full)

    def give_back(self) -> None:
        """What was allocated and is not linked."""
        while self.allocated:
            self.refcounts.release(*self.allocated.pop())

    # -- the change -------------------------------------------------------------------------------

    def run(self, change: Callable[[], None]) -> None:
        """Carry out ``change`` with the dirty bit set (version 3); a failure takes the node out of service.

        :raises RefcountOverflow: the references are too many after all; nothing has changed
        """
        overflow: list[RefcountOverflow] = []

        def guarded() -> None:
            was_dirty = self.node.dirty
            self._start(dirty=not was_dirty)
            try:
                change()
            except RefcountOverflow as error:
                overflow.append(error)
                self.give_back()
            self.node.settle()
            self.file.flush()
            if not was_dirty:
                self._set_features(self.node.header.incompatible_features & ~layout.INCOMPATIBLE_DIRTY)

        self.node._guarded(guarded)
        if overflow:
            raise overflow[0]

    def _start(self, *, dirty: bool) -> None:
        """Unknown autoclear bits go and the dirty bit is set, before anything else changes."""
        header = self.node.header
        if header.version >= 3:
            kept = header.autoclear_features & layout.AUTOCLEAR_KNOWN
            if kept != header.autoclear_features:
                self.node.header = header._replace(autoclear_features=kept)
                self.file.write_from(88, memoryview(kept.to_bytes(8, "big")))
        if dirty:
            self._set_features(header.incompatible_features | layout.INCOMPATIBLE_DIRTY)

    def _set_features(self, incompatible: int) -> None:
        """Header bytes 72 to 79, durable (version 3)."""
        header = self.node.header
        if header.version < 3:
            return
        self.node.header = header._replace(incompatible_features=incompatible)
        self.file.write_from(72, memoryview(incompatible.to_bytes(8, "big")))
        self.file.flush()

    def settle_counts(self) -> None:
        """Counts as they are now, and new structures, are durable."""
        self.refcounts.write_back()
        self.file.flush()

    def switch_table(self, snapshots: Sequence[Snapshot], offset: int) -> None:
        """Header bytes 60 to 71 name the new snapshot table; then the old one is let go."""
        node, header = self.node, self.node.header
        count = len(snapshots)
        self.file.write_from(60, memoryview(struct.pack(">IQ", count, offset)))
        self.file.flush()
        old_size = len(_encoded(self.snapshots))
        node.header = header._replace(nb_snapshots=count, snapshots_offset=offset)
        node._snapshots = tuple(self._completed(snapshots))
        self.allocated.clear()
        self.free(header.snapshots_offset, old_size)

    def free(self, host: int, length: int) -> None:
        """A table nothing on disk refers to any more."""
        if length and host:
            freed = self.refcounts.lower([(host >> self.node.header.cluster_bits, self.clusters(length))])
            if self.punches:
                for start, size in freed:
                    self.file.discard(start, size)

    @property
    def punches(self) -> bool:
        return self.node._punches("snapshot")

    # -- the active L1 table ----------------------------------------------------------------------

    def active_l1(self) -> NDArray[np.uint64]:
        """A copy of it."""
        return np.frombuffer(self.node.mapping.l1, np.uint64).copy()

    def flag_active_l1(self, single: NDArray[np.bool_]) -> None:
        """Set its COPIED flags as ``single`` says."""
        mapping = self.node.mapping
        old = self.active_l1()
        new = np.where(old == 0, old, with_flags(old, single))
        changed = np.flatnonzero(new != old)
        if len(changed):
            mapping.l1 = array("Q", new.tobytes())
            mapping._l1_dirty.update(np.unique(changed * 8 // PAGE).tolist())
            mapping.write_l1()


def _encoded(snapshots: Sequence[Snapshot]) -> bytes:
    data = layout.encode_snapshot_table(snapshots)
    if len(data) > MAX_SNAPSHOT_TABLE:
        raise InvalidArgument(f"the snapshot table would have {len(data)} bytes, allowed are {MAX_SNAPSHOT_TABLE}",
                              errno=errno.EFBIG)  # fmt: skip
    return data


@contextmanager
def _operation(node: Qcow2Node) -> Iterator[_Operation]:
    """The node to oneself, everything in it on disk, no table cached.

    :raises ReadOnly: the node is open read-only
    :raises NotSupported: guest data lies in an external data file
    """
    if node.read_only:
        raise ReadOnly("cannot change snapshots: the image is open read-only", where=node.filename)
    if node.header.has_data_file:
        raise NotSupported("an image with an external data file cannot have snapshots", where=node.filename)
    with node.lock:
        node.check_failure()
        claim = node.inflight.wait_idle()
        operation: _Operation | None = None
        try:
            node.check_failure()
            node._guarded(node.settle)
            node._guarded(node.file.flush)
            node.mapping.l2.drop_all()
            operation = _Operation(node)
            yield operation
        except ByreError as error:
            error.where = error.where or node.filename
            raise
        finally:
            if operation is not None and node.failure is None:
                operation.give_back()
                operation.refcounts.forget_packing()
            node.mapping.l2.drop_all()
            node.inflight.release(claim)


# -- create ---------------------------------------------------------------------------------------


def create(
    node: Qcow2Node,
    name: str,
    *,
    vm_state_size: int = 0,
    vm_clock_nsec: int = 0,
    icount: int | None = None,
    date: float | None = None,
) -> Snapshot:
    """Keep the disk as it is now as a snapshot; what ``snapshots`` then ends with.

    :param vm_state_size: bytes of machine state in the area behind the disk, which move to the snapshot
    :param icount: instruction count of record and replay
    :param date: seconds since 1970; now if not given
    :raises InvalidArgument: a name too long, too many snapshots (EFBIG), or counts too narrow; nothing has changed
    """
    if len(name.encode("utf-8", "surrogateescape")) > MAX_NAME:
        raise InvalidArgument(f"the name of a snapshot may have {MAX_NAME} bytes", where=node.filename)
    nanoseconds = time.time_ns() if date is None else int(date * 1_000_000_000)
    with _operation(node) as operation:
        snapshots, header = operation.snapshots, node.header
        if len(snapshots) >= layout.MAX_SNAPSHOTS:
            raise InvalidArgument(f"the image has {len(snapshots)} snapshots, which is the most", errno=errno.EFBIG)
        l1 = operation.active_l1()
        active = References(node, l1, "the active layer")
        active.check()
        shot = layout.Snapshot(
            operation.place((l1 & _PLAIN).astype(">u8").tobytes()),
            header.l1_size,
            nanoseconds // 1_000_000_000 & 0xFFFF_FFFF,
            # Other programs take the time in microseconds.
            nanoseconds % 1_000_000_000 // 1000 * 1000,
            vm_clock_nsec,
            vm_state_size if not vm_state_size >> 32 else 0,
            layout.snapshot_extra(vm_state_size, header.size, icount),
            _new_id(snapshots),
            name,
        )
        longer = (*snapshots, shot)
        offset = operation.place_table(longer)

        def change() -> None:
            active.raise_counts()
            operation.settle_counts()
            active.clear_flags()
            operation.flag_active_l1(np.zeros(len(l1), bool))
            node.file.flush()
            operation.switch_table(longer, offset)
            if vm_state_size:
                vmstate.drop(node)

        operation.run(change)
        return shot


# -- apply ----------------------------------------------------------------------------------------


def apply(node: Qcow2Node, name: str) -> None:
    """The disk becomes what it was when the snapshot was taken, in content and size; the snapshot stays.

    :param name: an id or a name
    :raises NotFound: there is no such snapshot
    :raises Busy: the image has persistent dirty bitmaps, which could not follow
    """
    with _operation(node) as operation:
        if read_bitmaps(node) or (node.tracker is not None and node.tracker.bitmaps):
            raise Busy("a snapshot cannot be applied to an image with dirty bitmaps", where=node.filename,
                       hint="remove the bitmaps")  # fmt: skip
        shot = operation.snapshots[find(operation.snapshots, name)]
        size, l1 = _snapshot_l1(node, shot)
        wanted = References(node, l1, f"snapshot {shot.id}")
        wanted.check()
        active = References(node, operation.active_l1(), "the active layer")
        active.check(down=True)
        node._before_change()
        offset = operation.place((l1 & _PLAIN).astype(">u8").tobytes())

        def change() -> None:
            wanted.raise_counts()
            operation.settle_counts()
            wanted.clear_flags()
            node.file.flush()
            old = _switch_l1(node, size, l1 & _PLAIN, offset)
            operation.allocated.clear()
            active.lower_counts(punch=operation.punches)
            operation.free(old.l1_table_offset, old.l1_size * 8)

        operation.run(change)


def _snapshot_l1(node: Qcow2Node, shot: Snapshot) -> tuple[int, NDArray[np.uint64]]:
    """(virtual size, L1 table) of a snapshot, the table as long as the size needs.

    :raises ImageError: the entry contradicts itself
    """
    header = node.header
    size = header.size if shot.disk_size is None else shot.disk_size
    needed = layout.l1_entries_needed(size, header.cluster_bits, extended_l2=header.extended_l2)
    if size > layout.MAX_VIRTUAL_SIZE or size % 512 or needed * 8 > layout.MAX_L1_SIZE:
        raise ImageError(f"snapshot {shot.id!r} has a disk size of {size} bytes, which no image can have",
                         where=node.filename, errno=errno.EFBIG)  # fmt: skip
    if shot.l1_size and not shot.l1_table_offset:
        raise Corrupt(f"snapshot {shot.id!r} has no L1 table", where=node.filename, hint='run "byre check -r all"')
    l1 = np.zeros(max(needed, shot.l1_size), np.uint64)
    l1[: shot.l1_size] = read_l1(node, shot.l1_table_offset, shot.l1_size)
    return size, l1


def _switch_l1(node: Qcow2Node, size: int, l1: NDArray[np.uint64], offset: int) -> layout.Header:
    """Size and L1 table in one sector: header bytes 24 to 47; the header as it was."""
    old, mapping = node.header, node.mapping
    fields = struct.pack(">QIIQ", size, old.crypt_method, len(l1), offset)
    node.file.write_from(24, memoryview(fields))
    node.file.flush()
    node.header = old._replace(size=size, l1_size=len(l1), l1_table_offset=offset)
    node._size = size
    mapping.l1, mapping.l1_offset = array("Q", l1.tobytes()), offset
    return old


# -- delete ---------------------------------------------------------------------------------------


def delete(node: Qcow2Node, name: str) -> Snapshot:
    """Remove a snapshot and what only it refers to; the removed entry.

    :param name: a name, or an id
    :raises NotFound: there is no such snapshot
    """
    with _operation(node) as operation:
        index = find(operation.snapshots, name, name_first=True)
        shot = operation.snapshots[index]
        rest = operation.snapshots[:index] + operation.snapshots[index + 1 :]
        gone = References(node, read_l1(node, shot.l1_table_offset, shot.l1_size), f"snapshot {shot.id}")
        gone.check(down=True)
        offset = operation.place_table(rest)

        def change() -> None:
            operation.settle_counts()
            operation.switch_table(rest, offset)
            gone.lower_counts(punch=operation.punches)
            operation.free(shot.l1_table_offset, shot.l1_size * 8)
            operation.settle_counts()
            l1 = operation.active_l1()
            active = References(node, l1, "the active layer")
            active.correct_flags()
            operation.flag_active_l1(active.single_tables(l1))

        operation.run(change)
        return shot


# -- the table as version 3 wants it --------------------------------------------------------------


def rewrite_table(node: Qcow2Node) -> None:
    """Write the snapshot table anew, with the fields that version 3 asks for in every entry."""
    with _operation(node) as operation:
        offset = operation.place_table(operation.snapshots)

        def change() -> None:
            operation.settle_counts()
            operation.switch_table(operation.snapshots, offset)

        operation.run(change)


# -- load -----------------------------------------------------------------------------------------


def load(node: Qcow2Node, index: int) -> Snapshot:
    """From now on the read-only node shows the disk of snapshot number ``index``, in its own size.

    :raises InvalidArgument: the node can be written
    """
    from .mapping import Mapping

    if not node.read_only:
        raise InvalidArgument("a snapshot can be looked into only in an image opened read-only", where=node.filename)
    if node.header.has_data_file:
        raise NotSupported("an image with an external data file cannot have snapshots", where=node.filename)
    with node.lock:
        claim = node.inflight.wait_idle()
        try:
            shot = node.snapshots[index]
            size, l1 = _snapshot_l1(node, shot)
            node.mapping = Mapping(node.file, node.header, array("Q", l1.tobytes()), node.filename, node._relieve,
                                   node._free)  # fmt: skip
            node._size = size
            node.loaded_snapshot = shot.id
            return shot
        finally:
            node.inflight.release(claim)
