"""qcow2 reference counts: which host clusters are in use, and the allocator over them.

Owns the refcount table and its blocks ("Host cluster management" in the specification). An increase is
written before the table that relies on it; a decrease is applied only after the table that let go is on
disk, so a cluster is never reused while an old mapping could still come back.
"""

from __future__ import annotations

from array import array

from ...errors import Corrupt, NoSpace
from ...io.tables import PAGE, Table, TableCache, decode_words, encode_words, page_runs
from ...typing import TYPE_CHECKING, Final
from .entries import REFCOUNT_OFFSET_MASK, REFCOUNT_RESERVED, get_refcount, set_refcount
from .layout import MAX_REFCOUNT_TABLE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ...graph.node import Node
    from .overlap import Guard

__all__ = ["Refcounts"]

_CACHE_BYTES: Final = 8 << 20
_MAX_HOST: Final = 1 << 56
_ALIKE: Final = 8
"""From this many counts on, it pays to see whether they are all alike."""


def _zero_field_table(order: int) -> bytes:
    """For sub-byte counts: 1 for each byte value that holds a zero entry."""
    width = 1 << order
    mask = (1 << width) - 1
    return bytes(any(value >> shift & mask == 0 for shift in range(0, 8, width)) for value in range(256))


def _no_report(_name: str) -> None:
    pass


def _no_failure(_error: BaseException) -> None:
    pass


class Refcounts:
    """Guarded by the node's lock.

    :param metadata_at: called with (first cluster, count); names the metadata that lies there, "" for none
    :param publish_table: called with (offset, clusters) to point the header at a new refcount table, durably
    :ivar freed: clusters whose last reference was dropped and written; the caller may punch holes there
    """

    def __init__(
        self,
        file: Node,
        cluster_bits: int,
        order: int,
        table_offset: int,
        table_clusters: int,
        relieve: Callable[[], None],
        publish_table: Callable[[int, int], None],
        metadata_at: Callable[[int, int], str],
        where: str,
    ) -> None:
        self.file = file
        self.where = where
        self.cluster_bits = cluster_bits
        self.cluster_size = 1 << cluster_bits
        self.order = order
        self.maximum = (1 << (1 << order)) - 1
        self.block_bits = cluster_bits + 3 - order
        self.block_entries = 1 << self.block_bits
        self.table_offset = table_offset
        self.table_clusters = table_clusters
        self._report = file.debug_event if file.takes_events else _no_report
        data = bytearray(table_clusters << cluster_bits)
        self._report("reftable_load")
        file.read_into(table_offset, memoryview(data))
        self.table = decode_words(data)
        self._table_dirty: set[int] = set()
        self.blocks = TableCache(file, self.cluster_size, _CACHE_BYTES >> cluster_bits, False, relieve)
        self.blocks.report = file.debug_event if file.takes_events else None
        self.blocks.load_event, self.blocks.update_event = "refblock_load", "refblock_update_part"
        self._publish_table = publish_table
        #: Told that moving the table failed half way: nothing may be written any more.
        self.on_failure: Callable[[BaseException], None] = _no_failure
        self._metadata_at = metadata_at
        self._guard: Guard | None = None
        self._hint = 0
        self.allocated = False  # any cluster, since the image was opened
        self._packed_at = 0  # host offset behind the last compressed cluster, 0 for none
        #: First cluster that never held anything: beyond it the file reads as zeroes.
        self.virgin = -(-file.size >> cluster_bits) if file.has_zero_init else 1 << 62
        #: (first cluster, count, why) whose references were dropped; to be lowered once the tables are on disk.
        self.ready: list[tuple[int, int, str]] = []
        self._zero_fields = _zero_field_table(order) if order < 3 else b""

    def use_guard(self, guard: Guard) -> None:
        """Ask ``guard`` before anything is written."""
        self._guard = guard
        self.blocks.vet = guard.check_block

    # -- one count --------------------------------------------------------------------------------

    def get(self, cluster: int) -> int:
        """The count of host cluster ``cluster``; 0 beyond the table."""
        block = self._block(cluster >> self.block_bits)
        if block is None or block.data is None:
            return 0
        return get_refcount(block.data, cluster & (self.block_entries - 1), self.order)

    def _block(self, index: int) -> Table | None:
        """The refcount block ``index``, ``None`` if there is none.

        :raises Corrupt: its table entry is unaligned or reserved bits are set
        """
        if index >= len(self.table):
            return None
        entry = self.table[index]
        if not entry:
            return None
        host = entry & REFCOUNT_OFFSET_MASK
        if entry & REFCOUNT_RESERVED or host & (self.cluster_size - 1) or host >= _MAX_HOST:
            raise Corrupt(f"refcount table entry {index} is {entry:#x}, which is not a cluster offset",
                          where=self.where, hint='run "byre check -r all"')  # fmt: skip
        return self.blocks.get(host)

    def _change(self, first: int, count: int, delta: int) -> None:
        """Add ``delta`` to the counts of ``count`` clusters; their blocks must exist.

        :raises Corrupt: a count would become negative
        """
        order = self.order
        while count:
            block = self._block(first >> self.block_bits)
            low = first & (self.block_entries - 1)
            step = min(count, self.block_entries - low)
            if block is None or block.data is None:
                raise Corrupt(f"host cluster {first} has no refcount block", where=self.where,
                              hint='run "byre check -r all"')  # fmt: skip
            data = block.data
            if step < _ALIKE or not self._change_alike(data, low, step, delta):
                for index in range(low, low + step):
                    value = get_refcount(data, index, order) + delta
                    if value < 0:
                        raise Corrupt(f"the refcount of host cluster {first + index - low} would become negative",
                                      where=self.where, hint='run "byre check -r all"')  # fmt: skip
                    set_refcount(data, index, order, value)
            bits = 1 << order
            self.blocks.mark(block, low * bits >> 3, ((low + step) * bits - 1) >> 3)
            first += step
            count -= step

    def _change_alike(self, data: bytearray, low: int, count: int, delta: int) -> bool:
        """:meth:`_change` of counts that are all 0 before, or all 0 behind; False if they are not."""
        if self.order < 3:
            return False
        width = 1 << self.order - 3
        one, zero = (1).to_bytes(width, "big") * count, bytes(width * count)
        before, behind = (zero, one) if delta == 1 else (one, zero)
        start, end = low * width, (low + count) * width
        if data[start:end] != before:
            return False
        data[start:end] = behind
        return True

    def forget_packing(self) -> None:
        """Compressed clusters written from now on share no host cluster with those that are there."""
        self._packed_at = 0

    def freed_below(self, cluster: int) -> None:
        """Clusters from ``cluster`` on were freed by other means than :meth:`lower`: look there again."""
        self._hint = min(self._hint, cluster)

    # -- allocation -------------------------------------------------------------------------------

    def allocate(self, count: int, what: str = "") -> int:
        """``count`` contiguous clusters, counted once; their host offset.

        :param what: what they are for
        :raises NoSpace: the format cannot address more
        """
        self._report("cluster_alloc")
        self.allocated = True
        first = self._find_unused(count, what)
        while not self._ensure_blocks(first, count):
            first = self._find_unused(count, what)
        self._change(first, count, 1)
        if count == 1 or first == self._hint:
            self._hint = first + count
        self.virgin = max(self.virgin, first + count) if self.virgin < 1 << 62 else self.virgin
        return first << self.cluster_bits

    def allocate_zeroed(self, count: int) -> tuple[int, bool]:
        """:meth:`allocate`, and whether the clusters are known to read as zeroes."""
        virgin = self.virgin
        host = self.allocate(count)
        return host, host >> self.cluster_bits >= virgin

    def release(self, host: int, count: int) -> None:
        """Take back at once what was allocated but never linked."""
        first = host >> self.cluster_bits
        self._change(first, count, -1)
        self._hint = min(self._hint, first)

    def _find_unused(self, count: int, what: str) -> int:
        """Free clusters that no structure the node knows lies in, whatever the counts say.

        :raises Corrupt: the counts call metadata free
        """
        first = self._find(self._hint, count)
        structure = self._metadata_at(first, count)
        if structure:
            raise Corrupt(f"Preventing invalid allocation of {what} at offset 0" if what and not first else
                          f"Preventing invalid write on metadata (overlaps with {structure})", where=self.where,
                          hint=f'the refcounts call host cluster {first} free; run "byre check -r all"')  # fmt: skip
        return first

    def _find(self, start: int, count: int) -> int:
        """The first cluster at or after ``start`` where ``count`` consecutive ones are free."""
        position = start
        while True:
            position = self._next_zero(position)
            run = self._zero_run(position, count)
            if run >= count:
                break
            position += run
        if (position + count) << self.cluster_bits > _MAX_HOST:
            raise NoSpace("the image cannot grow: host offsets of the format end at 2^56", where=self.where)
        return position

    def _next_zero(self, position: int) -> int:
        """The first cluster at or after ``position`` with count 0."""
        while True:
            block = self._block(position >> self.block_bits)
            if block is None or block.data is None:
                return position
            found = self._zero_in_block(block.data, position & (self.block_entries - 1))
            base = position >> self.block_bits << self.block_bits
            if found < self.block_entries:
                return base + found
            position = base + self.block_entries

    def _zero_in_block(self, data: bytearray, low: int) -> int:
        order = self.order
        if order < 3:
            per_byte = 8 >> order
            while low & (per_byte - 1):
                if get_refcount(data, low, order) == 0:
                    return low
                low += 1
            at = data.translate(self._zero_fields).find(1, low // per_byte)
            if at < 0:
                return self.block_entries
            low = at * per_byte
            while get_refcount(data, low, order):
                low += 1
            return low
        width = 1 << (order - 3)
        at = low * width
        while True:
            at = data.find(bytes(width), at)
            if at < 0:
                return self.block_entries
            if at % width == 0:
                return at // width
            at += 1 if width == 2 else width - at % width

    def _zero_run(self, position: int, limit: int) -> int:
        """How many clusters from ``position`` have count 0, at most ``limit``."""
        done = 0
        while done < limit:
            at = position + done
            block = self._block(at >> self.block_bits)
            low = at & (self.block_entries - 1)
            step = min(limit - done, self.block_entries - low)
            if block is not None and block.data is not None:
                free = self._zeroes_in_block(block.data, low, step)
                if free < step:
                    return done + free
            done += step
        return done

    def _zeroes_in_block(self, data: bytearray, low: int, limit: int) -> int:
        order = self.order
        if order >= 3:
            width = 1 << (order - 3)
            part = data[low * width : (low + limit) * width]
            return (len(part) - len(part.lstrip(b"\0"))) // width
        for index in range(low, low + limit):
            if get_refcount(data, index, order):
                return index - low
        return limit

    # -- new blocks and a bigger table ------------------------------------------------------------

    def _ensure_blocks(self, first: int, count: int) -> bool:
        """Make the blocks that count these clusters; False if that took space, so that they must be sought again."""
        last = (first + count - 1) >> self.block_bits
        if last >= len(self.table):
            self._grow_table(last)
            return False
        missing = [index for index in range(first >> self.block_bits, last + 1) if not self.table[index]]
        if missing:
            self._new_blocks(missing, first)
        return not missing

    def _new_blocks(self, indexes: list[int], cluster: int) -> None:
        """Put these refcount blocks side by side at the free clusters from ``cluster``.

        Together, because a block at the start of each range it counts would leave no room for a run longer than
        that range. Their own clusters are counted before the table names them.
        """
        # A full disk fails the request that needs them, then, and not the blocks when they are written back.
        self.file.write_from(cluster << self.cluster_bits, memoryview(bytes(len(indexes) << self.cluster_bits)))
        made: dict[int, Table] = {}
        for number, index in enumerate(indexes):
            self._report("refblock_alloc")
            made[index] = self.blocks.create((cluster + number) << self.cluster_bits)
        for own in range(cluster, cluster + len(indexes)):
            home = own >> self.block_bits
            block = made[home] if home in made else self._block(home)
            assert block is not None
            assert block.data is not None
            low = own & (self.block_entries - 1)
            set_refcount(block.data, low, self.order, 1)
            self.blocks.mark(block, low << self.order >> 3, low << self.order >> 3)
        for index, block in made.items():
            self.set_entry(index, block.host)
        if self.virgin < 1 << 62:
            self.virgin = max(self.virgin, cluster + len(indexes))

    def set_entry(self, index: int, host: int) -> None:
        """Let the table name another block, or none (0); what that needs before it reaches the disk is the caller's."""
        self.table[index] = host
        if self._guard is not None and host:
            self._guard.block_made(host)
        self._table_dirty.add(index * 8 // PAGE)

    def _grow_table(self, index: int) -> None:
        """Move to a table that covers block ``index``: written, then published, then the old one is let go.

        The new table and the blocks that count it lie behind everything the old table covered.
        """
        self._report("reftable_grow")
        per_cluster = self.cluster_size // 8
        start = max(len(self.table) << self.block_bits, -(-self.file.size >> self.cluster_bits))
        first_block = start >> self.block_bits
        start = max(start, first_block << self.block_bits)
        new_clusters = block_count = 0
        while True:
            last = (start + new_clusters + block_count) >> self.block_bits
            blocks = last - first_block + 1
            wanted = max(last, index, first_block + block_count) + 1
            clusters = -(-(wanted + wanted // 2) // per_cluster)
            if clusters <= new_clusters and blocks <= block_count:
                break
            new_clusters, block_count = max(clusters, new_clusters), max(blocks, block_count)
        if new_clusters << self.cluster_bits > MAX_REFCOUNT_TABLE_SIZE:
            raise NoSpace("the image cannot grow: its refcount table would exceed 8 MiB", where=self.where,
                          hint="use larger clusters")  # fmt: skip
        old_offset, old_clusters = self.table_offset, self.table_clusters
        try:
            self.write_back()
            grown = self.table[:]
            grown.frombytes(bytes((new_clusters << self.cluster_bits) - len(grown) * 8))
            self._place_table(grown, start, block_count, new_clusters, first_block)
        except BaseException as error:
            self.on_failure(error)
            raise
        self.release(old_offset, old_clusters)

    def _place_table(self, grown: array[int], start: int, block_count: int, clusters: int, first_block: int) -> None:
        """Write ``block_count`` blocks from cluster ``start`` and the table behind them, then switch over."""
        for number in range(block_count):
            grown[first_block + number] = (start + number) << self.cluster_bits
        offset = (start + block_count) << self.cluster_bits
        self.table, before = grown, self.table
        try:
            for number in range(block_count):
                self.blocks.create((start + number) << self.cluster_bits)
            self._change(start, block_count + clusters, 1)
            self._report("refblock_alloc_write_blocks")
            self.blocks.write_dirty()
            self._report("refblock_alloc_write_table")
            self.file.write_from(offset, memoryview(encode_words(grown)))
            self.file.flush()
            self._report("refblock_alloc_switch_table")
            self._publish_table(offset, clusters)
        except BaseException:
            self.table = before
            raise
        self.table_offset, self.table_clusters = offset, clusters
        self._table_dirty.clear()
        if self.virgin < 1 << 62:
            self.virgin = max(self.virgin, start + block_count + clusters)

    # -- compressed clusters ----------------------------------------------------------------------

    def allocate_packed(self, lengths: list[int]) -> list[int]:
        """Host offsets for compressed clusters, one behind the other; each counts once in every cluster it touches."""
        return [self._pack(length) for length in lengths]

    def _pack(self, length: int) -> int:
        self._report("cluster_alloc_bytes")
        self.allocated = True
        size, bits = self.cluster_size, self.cluster_bits
        at = self._packed_at
        free = -at % size if at else 0
        if free and self.get(at >> bits) >= self.maximum:
            free = 0
        if free >= length:
            self._change(at >> bits, 1, 1)
            self._packed_at = at + length
            return at
        need = -(-(length - free) // size)
        host = self.allocate(need)
        if free and host == at + free:
            self._change(at >> bits, 1, 1)
            start = at
        else:
            start = host
        self._packed_at = start + length
        return start

    def touched(self, host: int, length: int) -> tuple[int, int]:
        """(first cluster, count) that ``length`` bytes at ``host`` touch."""
        first = host >> self.cluster_bits
        return first, ((host + length - 1) >> self.cluster_bits) - first + 1

    def release_packed(self, host: int, length: int) -> None:
        """Take back at once a compressed cluster that was never linked."""
        first, count = self.touched(host, length)
        self._change(first, count, -1)
        self._hint = min(self._hint, first)
        self._packed_at = 0

    # -- letting go -------------------------------------------------------------------------------

    def lower(self, runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Lower the counts of (first cluster, count) runs whose mappings are gone from the disk.

        :returns: the runs, as (host offset, length), that nothing refers to any more
        """
        freed: list[tuple[int, int]] = []
        for first, count in runs:
            self._report("cluster_free")
            self._change(first, count, -1)
            for cluster, free in self._free_runs(first, count):
                structure = self._metadata_at(cluster, free)
                if structure:
                    raise Corrupt(f"Preventing invalid freeing of metadata (overlaps with {structure})",
                                  where=self.where,
                                  hint=f'host cluster {cluster} is let go; run "byre check -r all"')  # fmt: skip
                host, length = cluster << self.cluster_bits, free << self.cluster_bits
                if host < self._packed_at <= host + length:
                    self._packed_at = 0
                if freed and freed[-1][0] + freed[-1][1] == host:
                    freed[-1] = (freed[-1][0], freed[-1][1] + length)
                else:
                    freed.append((host, length))
                self._hint = min(self._hint, cluster)
        return freed

    def _free_runs(self, first: int, count: int) -> Iterator[tuple[int, int]]:
        """(first, count) of the runs among these clusters whose count is 0."""
        end = first + count
        while first < end:
            free = self._zero_run(first, end - first)
            if free:
                yield first, free
            first += free or 1

    # -- writing back -----------------------------------------------------------------------------

    @property
    def dirty(self) -> bool:
        return bool(self.blocks.dirty or self._table_dirty)

    def write_back(self) -> bool:
        """Blocks, then, behind a flush, the table entries that name new ones; whether anything was written."""
        if self._table_dirty:
            self._report("refblock_alloc_write")
        wrote = bool(self.blocks.write_dirty())
        if self._table_dirty:
            self._report("refblock_alloc_hookup")
            if wrote:
                self.file.flush()
            if self._guard is not None:
                self._guard.check_table(self.table_offset, self.table_clusters << self.cluster_bits, "refcount-table")
            for start, end in page_runs(self._table_dirty, len(self.table) * 8):
                self.file.write_from(
                    self.table_offset + start, memoryview(encode_words(self.table[start // 8 : end // 8]))
                )
            self._table_dirty.clear()
            wrote = True
        return wrote
