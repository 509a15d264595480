"""From one version of the format to another (amend ``compat``).

Up: entries of the snapshot table get the fields that version 3 wants, then the header changes. Down: what version 2
cannot say must go: zero clusters become data that is zero, or, where no backing file is below, nothing at all. Clusters
that snapshots share are never written to: the active layer gets new ones by the way every write takes, and tables that
only snapshots have are pointed to new clusters. Dirty bitmaps, which version 2 has not, go with the change of the
header and their space behind it. The header comes last, so whatever interrupts this leaves a good version 3 image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from ...errors import Corrupt, NotSupported
from ...io import engine
from ...io.tables import decode_words, encode_words
from . import header_update, layout, vmstate
from .bitmaps import store_of
from .creation import NEW_HEADER_LENGTH, SMALL_CLUSTER
from .entries import COMPRESSED, OFFSET_MASK, ZERO
from .exclusive import exclusive
from .snapshot_refs import References, read_l1

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from ...jobs.job import Control
    from .image import Qcow2Node

__all__ = ["check_downgrade", "check_snapshots", "downgrade", "downgrade_steps", "upgrade"]

_STEP: Final = 1 << 20
_ZEROES: Final = bytes(_STEP)
_KEPT_FEATURES: Final = layout.INCOMPATIBLE_DIRTY | layout.INCOMPATIBLE_COMPRESSION


# -- up -------------------------------------------------------------------------------------------


def upgrade(node: Qcow2Node) -> None:
    """Make it a version 3 image."""
    if any(len(shot.extra) < 16 for shot in node.snapshots):
        from .snapshots import rewrite_table

        rewrite_table(node)
    fields: dict[str, object] = {
        "version": 3,
        "header_length": NEW_HEADER_LENGTH,
        "extra": bytes(NEW_HEADER_LENGTH - layout.V3_LENGTH - 1),
    }
    extensions = node.extensions
    names = layout.find_extension(extensions, layout.EXTENSION_FEATURE_NAMES)
    if names is None and node.cluster_size > SMALL_CLUSTER:
        extensions = (*extensions, layout.Extension(layout.EXTENSION_FEATURE_NAMES, layout.encode_feature_names()))
    with node.lock:
        node._before_change()
        header_update.update(node, fields, extensions)
        node.mapping.version = 3
        node._guarded(node.tune)


# -- may it go down -------------------------------------------------------------------------------


def check_downgrade(node: Qcow2Node, refcount_bits: int) -> None:
    """Whether version 2 can hold the image at all.

    :param refcount_bits: the width it will have
    :raises NotSupported: it cannot; nothing has changed
    """
    header, reason, hint = node.header, "", "convert the image with -o compat=0.10"
    if refcount_bits != 16:
        reason, hint = "compat=0.10 needs refcount_bits=16", "amend both at once: compat=0.10,refcount_bits=16"
    elif header.has_data_file:
        reason = "an image with a data file cannot have compat=0.10"
    elif header.extended_l2:
        reason = "an image with extended L2 entries cannot have compat=0.10"
    elif header.incompatible_features & ~_KEPT_FEATURES:
        reason = (
            f"incompatible features {header.incompatible_features & ~_KEPT_FEATURES:#x} keep the image at compat=1.1"
        )
    elif header.compression_type != layout.COMPRESSION_ZLIB and _has_compressed(node):
        reason = f"an image with clusters compressed with {node.compression_name} cannot have compat=0.10"
    if reason:
        raise NotSupported(reason, where=node.filename, hint=hint)
    if _has_bitmaps(node):
        node.bitmap_store().check_forgettable()


def _has_bitmaps(node: Qcow2Node) -> bool:
    return node.has_bitmaps() or node._bitmaps is not None


def check_snapshots(node: Qcow2Node, size: int) -> None:
    """Whether version 2 can hold the snapshots of a disk of ``size`` bytes.

    :raises NotSupported: one has a size that programs for version 2 do not look at
    """
    for shot in node.snapshots:
        if shot.vm_state_size >> 32 or shot.disk_size not in (None, size):
            raise NotSupported(f"snapshot {shot.id!r} differs from the disk in size, or has too much machine state, "
                               "for compat=0.10", where=node.filename, hint="delete the snapshot")  # fmt: skip


def _has_compressed(node: Qcow2Node) -> bool:
    with exclusive(node):
        for l1 in (np.frombuffer(node.mapping.l1, np.uint64).copy(), *_inactive_l1s(node)):
            for batch in References(node, l1, "an L1 table").batches():
                if (batch.words & np.uint64(COMPRESSED)).any():
                    return True
    return False


def _inactive_l1s(node: Qcow2Node) -> Iterator[NDArray[np.uint64]]:
    for shot in node.snapshots:
        yield read_l1(node, shot.l1_table_offset, shot.l1_size)


# -- down -----------------------------------------------------------------------------------------


def downgrade_steps(node: Qcow2Node) -> int:
    """What :func:`downgrade` will advance a job by: one for each L1 entry there is."""
    return len(node.mapping.l1) + sum(shot.l1_size for shot in node.snapshots)


def downgrade(node: Qcow2Node, control: Control) -> None:
    """Make it a version 2 image, without the dirty bitmaps it has.

    :raises NotSupported: as :func:`check_downgrade` and :func:`check_snapshots`
    :raises Busy: a job works with a bitmap
    """
    check_downgrade(node, 1 << node.header.refcount_order)
    check_snapshots(node, node.header.size)
    backed = bool(node.backing_name)
    detect_zeroes, node.detect_zeroes = node.detect_zeroes, "off"
    try:
        for index in range(len(node.mapping.l1)):
            _expand_active(node, index, backed)
            control.advance(1)
    finally:
        node.detect_zeroes = detect_zeroes
    if node.snapshots:
        _expand_inactive(node, backed, control)
    gone = (layout.EXTENSION_FEATURE_NAMES, layout.EXTENSION_BITMAPS)
    with node.lock:
        bitmaps = store_of(node) if _has_bitmaps(node) else None
        freed = [] if bitmaps is None else bitmaps.runs()
        header_update.update(
            node,
            {
                "version": 2,
                "header_length": layout.V2_LENGTH,
                "incompatible_features": 0,
                "compatible_features": 0,
                "autoclear_features": 0,
                "compression_type": layout.COMPRESSION_ZLIB,
                "extra": b"",
            },
            tuple(extension for extension in node.extensions if extension.type not in gone),
        )
        node.mapping.version = 2
        node._compress = node._decompress = None
        if bitmaps is not None:
            bitmaps.forget(freed)
        node._guarded(node.tune)


def _expand_active(node: Qcow2Node, index: int, backed: bool) -> None:
    """The zero clusters of an L2 table of the active layer, as any other request would write to them."""
    mapping, bits = node.mapping, node.header.cluster_bits
    with node.lock:
        node.check_failure()
        if index << mapping.span_bits >= vmstate.area(node):
            # What lies behind the disk is nobody's: machine state is kept in snapshots.
            node._guarded(lambda: vmstate.drop(node))
            return
        host = mapping.l2_host(index)
        if not host:
            return
        words = mapping.l2.get(host).words
        assert words is not None
        runs = _zero_runs(np.frombuffer(words, np.uint64))
    for first, count in runs:
        start = (index << mapping.span_bits) + (first << bits)
        end = start + (count << bits)
        if backed:
            for offset in range(start, end, _STEP):
                engine.write(node, offset, memoryview(_ZEROES)[: min(_STEP, end - offset)])
            continue
        with node.lock:
            node.check_failure()
            node.inflight.wait_clear(start, end)
            while start < end:
                start += node.unallocate(start, end - start)


def _zero_runs(words: NDArray[np.uint64]) -> list[tuple[int, int]]:
    """(index, count) of the runs of zero clusters."""
    zero = (words & np.uint64(ZERO | COMPRESSED)) == np.uint64(ZERO)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], zero, [False])).astype(np.int8)))
    return [(int(start), int(end - start)) for start, end in edges.reshape(-1, 2)]


def _expand_inactive(node: Qcow2Node, backed: bool, control: Control) -> None:
    """The zero clusters of all L2 tables that snapshots have; a table once, however many have it."""
    with exclusive(node):
        tables: dict[int, int] = {}
        for l1 in _inactive_l1s(node):
            found = References(node, l1, "a snapshot")
            for host, times in zip(found.hosts.tolist(), found.times.tolist(), strict=True):
                tables[host] = tables.get(host, 0) + times
        done: set[int] = set()
        for l1 in _inactive_l1s(node):
            for index, entry in enumerate(l1.tolist()):
                host = entry & OFFSET_MASK
                if host and host not in done:
                    done.add(host)
                    node._guarded(_Expansion(node, index, host, tables[host], backed).run)
                control.advance(1)


class _Expansion:
    """The zero clusters of one L2 table that ``times`` snapshots have, and the active layer has not."""

    def __init__(self, node: Qcow2Node, index: int, host: int, times: int, backed: bool) -> None:
        assert node.refcounts is not None
        self.node = node
        self.refcounts = node.refcounts
        self.index = index
        self.host = host
        self.times = times
        self.backed = backed

    def run(self) -> None:
        """New clusters and their counts | the table | the counts of what it pointed to."""
        node, bits = self.node, self.node.header.cluster_bits
        data = bytearray(node.cluster_size)
        node.file.read_into(self.host, memoryview(data))
        words = decode_words(data)
        runs = _zero_runs(np.frombuffer(words, np.uint64))
        if not runs:
            return
        gone: list[tuple[int, int]] = []
        for first, count in runs:
            for at in range(first, first + count):
                if words[at] & OFFSET_MASK & (node.cluster_size - 1):
                    raise Corrupt(f"L2 entry {words[at]:#018x} does not point to a cluster", where=node.filename,
                                  hint='run "byre check"')  # fmt: skip
                if words[at] & OFFSET_MASK:
                    gone += [((words[at] & OFFSET_MASK) >> bits, 1)] * self.times
                words[at] = self._zero_cluster(at) if self.backed else 0
        self.refcounts.write_back()
        node.file.flush()
        if node.guard is not None:
            node.guard.check(self.host >> bits, 1, "an inactive L2 table", "inactive-l2")
        node.file.write_from(self.host, memoryview(encode_words(words)))
        node.file.flush()
        for start, length in self.refcounts.lower(gone):
            if node._punches("other"):
                node.file.discard(start, length)
        self.refcounts.write_back()

    def _zero_cluster(self, at: int) -> int:
        """The host offset of a new cluster of zeroes with a reference for each snapshot."""
        node, bits = self.node, self.node.header.cluster_bits
        host = self.refcounts.allocate(1)
        if self.times > 1:
            self.refcounts._change(host >> bits, 1, self.times - 1)
        content = bytearray(node.cluster_size)
        if node.cipher is not None:
            guest = (self.index << node.mapping.span_bits) + (at << bits)
            node.cipher.encrypt(host if node.cipher.by_host else guest, content)
        node.file.write_from(host, memoryview(content))
        return host
