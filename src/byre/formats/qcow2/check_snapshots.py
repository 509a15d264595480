"""The snapshot table as a qcow2 check reads it: tolerant, because repairing begins with what opening refuses.

docs/interop/qcow2, section "Snapshots". Also makes the corrected table that a repair writes.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from ...errors import printable
from . import layout
from .check_fit import TableFits
from .directories import MAX_SNAPSHOT_EXTRA, MAX_SNAPSHOT_TABLE, MAX_SNAPSHOTS

if TYPE_CHECKING:
    from .check_findings import Findings
    from .check_fit import Fit
    from .check_reader import Subject

__all__ = ["SnapshotRow", "SnapshotTable"]

_FIXED: Final = struct.Struct(">QIHHIIQII")
_CHUNK: Final = 1 << 20


class SnapshotRow(NamedTuple):
    """Where an entry lies, and what the check needs of it."""

    position: int
    l1_offset: int
    l1_size: int
    id_size: int
    name_size: int
    extra_size: int


class SnapshotTable:
    """The entries of the snapshot table.

    :ivar size: bytes of the table
    :ivar count: entries the header should name; below ``header.nb_snapshots`` where some were given up
    :ivar unfit: entries that must be rewritten
    :ivar outside: the table reaches past the end of the file
    """

    def __init__(self, subject: Subject, findings: Findings, *, repair: bool, give_up: bool = False) -> None:
        """
        :param repair: leave out and cut what keeps the table from being read
        :param give_up: also leave out snapshots whose L1 tables cannot be read
        """
        self.subject = subject
        self.rows: list[SnapshotRow] = []
        self.size = 0
        self.unfit = 0
        self.outside = False
        self._chunk = memoryview(b"")
        self._chunk_at = 0
        self._read(findings, repair, give_up)

    @property
    def dropped(self) -> int:
        return self.subject.header.nb_snapshots - len(self.rows)

    def _read(self, findings: Findings, repair: bool, give_up: bool) -> None:
        header = self.subject.header
        count = header.nb_snapshots
        if count > MAX_SNAPSHOTS and repair:
            findings.say(f"Discarding {count - MAX_SNAPSHOTS} overhanging snapshots")
            count = MAX_SNAPSHOTS
        if count > MAX_SNAPSHOTS:
            findings.say(f"You can force-remove all {count - MAX_SNAPSHOTS} overhanging snapshots with check -r all")
            raise findings.abort("ERROR snapshot table too large")
        if count and (header.snapshots_offset % header.cluster_size or header.snapshots_offset >= 1 << 62):
            raise findings.abort("ERROR snapshot table offset invalid")
        written = 0
        position = header.snapshots_offset
        for index in range(count):
            row = self._row(position + -position % 8)
            kept = row.extra_size
            if row.extra_size > MAX_SNAPSHOT_EXTRA:
                kept = MAX_SNAPSHOT_EXTRA
                self._oversized(index, row, findings, repair)
            end = row.position + _FIXED.size + row.extra_size + row.id_size + row.name_size
            written += -written % 8 + _FIXED.size + kept + row.id_size + row.name_size
            if written > MAX_SNAPSHOT_TABLE or end - header.snapshots_offset >= 1 << 31:
                self._too_big(count - index, findings, repair)
                break
            self.rows.append(row)
            position = end
        self.size = position - header.snapshots_offset
        end = position if self.size else 0
        self.outside = end - self.subject.file_length >= header.cluster_size
        if give_up:
            # Nothing counts a table that is cut off: where it lies, its clusters would be leaks.
            self.unfit += self.outside
            self._leave_others(findings)
            self._give_up_lost(findings)
        findings.corruptions += self.dropped
        if header.version >= 3:
            self._find_incomplete(findings, repair)

    def _leave_others(self, findings: Findings) -> None:
        """Have a table that is so long that it reaches into other metadata written anew, elsewhere."""
        if not self.outside and self._overlong():
            self.unfit += 1
            findings.corrupt(f"Repairing snapshot table: its {self.size} bytes run into other metadata")

    def _overlong(self) -> bool:
        start = self.subject.header.snapshots_offset
        # The L1 tables may lie within what is wrong about the table: they are not looked at.
        return self.size > self.subject.cluster_size and TableFits(self.subject, []).collides(
            start + 1, start + self.size
        )

    def _oversized(self, index: int, row: SnapshotRow, findings: Findings, repair: bool) -> None:
        if not repair:
            raise findings.abort("ERROR failed to read the snapshot table: Too much extra metadata in snapshot table "
                                 f"entry {index}; you can force-remove it with check -r all")  # fmt: skip
        findings.corrupt(f"Discarding too much extra metadata in snapshot table entry {index} "
                         f"({row.extra_size} > {MAX_SNAPSHOT_EXTRA})")  # fmt: skip
        self.unfit += 1

    def _too_big(self, left: int, findings: Findings, repair: bool) -> None:
        if not repair:
            raise findings.abort("ERROR failed to read the snapshot table: Snapshot table is too big; you can "
                                 f"force-remove all {left} overhanging snapshots with check -r all")  # fmt: skip
        findings.say(f"Discarding {left} overhanging snapshots (snapshot table is too big)")

    def _find_incomplete(self, findings: Findings, repair: bool) -> None:
        for index, row in enumerate(self.rows):
            if row.extra_size < 16:
                self.unfit += 1
                findings.corrupt(f"{'Repairing' if repair else 'ERROR'} snapshot table entry {index} is incomplete")

    def _row(self, position: int) -> SnapshotRow:
        data = self._bytes(position, _FIXED.size)
        l1_offset, l1_size, id_size, name_size, _, _, _, _, extra_size = _FIXED.unpack(data)
        return SnapshotRow(position, l1_offset, l1_size, id_size, name_size, extra_size)

    def _bytes(self, position: int, length: int) -> memoryview:
        at = position - self._chunk_at
        if at < 0 or at + length > len(self._chunk):
            self._chunk = self.subject.read(position, max(length, _CHUNK)).data
            self._chunk_at, at = position, 0
        return self._chunk[at : at + length]

    def l1_problem(self, row: SnapshotRow) -> str:
        """What is wrong with the L1 table of a snapshot, "" if nothing that keeps it from being read."""
        aligned = row.l1_offset % self.subject.cluster_size == 0
        if aligned and row.l1_size * 8 <= layout.MAX_L1_SIZE:
            return ""
        shot = self._snapshot(row)
        what = f"ERROR snapshot {printable(shot.id)} ({printable(shot.name)}) "
        if not aligned:
            offset = f"{row.l1_offset:#x}"
            return f"{what}l1_offset={offset}: L1 table is not cluster aligned; snapshot table entry corrupted"
        return f"{what}l1_size={row.l1_size:#x}: L1 table is too large; snapshot table entry corrupted"

    def _give_up_lost(self, findings: Findings) -> None:
        """Leave out snapshots that nobody can read: their clusters are leaks, which repairing frees, and an entry that
        stays could not even be deleted.
        """
        if self.rows and not self.subject.header.snapshots_offset:
            findings.say(f"Discarding {len(self.rows)} snapshots: their table would be the header")
            self.rows = []
        fits = TableFits(self.subject, self.rows)
        kept = []
        for index, row in enumerate(self.rows):
            row = self._fitted(fits, index, row, findings)
            nowhere = row.l1_size and not 0 < row.l1_offset < self.subject.file.size
            wrong = self.l1_problem(row) or (nowhere and f"ERROR no L1 table can be at {row.l1_offset:#x}")
            if not any(row[1:]):
                wrong = "ERROR the entry is empty"
            if wrong:
                findings.say(wrong)
                findings.say(f"Discarding snapshot table entry {index}: the snapshot cannot be read")
            else:
                kept.append(row)
        self.rows = kept

    def _fitted(self, fits: TableFits, index: int, row: SnapshotRow, findings: Findings) -> SnapshotRow:
        """``row``, its L1 table cut to what the snapshot needs if it runs into something else."""
        fit = self._fit(fits, row)
        if not fit.overlong:
            return row
        findings.corrupt(f"Repairing snapshot table entry {index}: its L1 table of {row.l1_size} entries runs into "
                         f"other metadata, the snapshot needs {fit.needed}")  # fmt: skip
        self.unfit += 1
        return row._replace(l1_size=fit.needed)

    def _fit(self, fits: TableFits, row: SnapshotRow) -> Fit:
        head = self._bytes(row.position, _FIXED.size + 16)
        state_size, disk_size = int.from_bytes(head[32:36], "big"), self.subject.header.size
        if row.extra_size >= 8:
            state_size = int.from_bytes(head[40:48], "big")
        if row.extra_size >= 16:
            disk_size = int.from_bytes(head[48:56], "big")
        return fits.snapshot(row, disk_size, state_size)

    def misfit(self) -> bool:
        """Whether the table, or any L1 table it names, is cut off or too long: what is used is not certain then."""
        if self.outside or self._overlong():
            return True
        fits = TableFits(self.subject, self.rows)
        return any(fit.overlong or fit.lost for fit in (self._fit(fits, row) for row in self.rows))

    # -- the corrected table ----------------------------------------------------------------------

    def _snapshot(self, row: SnapshotRow) -> layout.Snapshot:
        kept = min(row.extra_size, MAX_SNAPSHOT_EXTRA)
        head = self._bytes(row.position, _FIXED.size + kept)
        fields = _FIXED.unpack_from(head)
        extra = bytes(head[_FIXED.size :])
        text = bytes(self._bytes(row.position + _FIXED.size + row.extra_size, row.id_size + row.name_size))
        identity = text[: row.id_size].decode("utf-8", "surrogateescape")
        name = text[row.id_size :].decode("utf-8", "surrogateescape")
        date_sec, date_nsec, clock, state_size = fields[4:8]
        return layout.Snapshot(
            row.l1_offset, row.l1_size, date_sec, date_nsec, clock, state_size, extra, identity, name
        )

    def corrected(self) -> bytes:
        """The table to write: extra data cut or completed, entries given up left out."""
        size = self.subject.header.size
        shots = []
        for row in self.rows:
            shot = self._snapshot(row)
            if len(shot.extra) < 16:
                shot = shot._replace(extra=layout.snapshot_extra(shot.vm_state_size, size))
            shots.append(shot)
        return layout.encode_snapshot_table(shots)
