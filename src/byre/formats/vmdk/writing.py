"""The first and the last things that a session writes, and the order in between.

Before anything else: another content ID, and a mark in each extent whose tables are kept twice that it is in use
("uncleanShutdown"). At the end the mark goes. A disk that was not closed has the copies of its tables made equal again
before it is written; which copy readers use does not change. Everything here is called with the node's lock held.
"""

from __future__ import annotations

import os

from ...errors import NotSupported, ReadOnly
from ...typing import TYPE_CHECKING
from .allocation import Allocator
from .extents import SparseExtent

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .image import VmdkNode

__all__ = ["new_allocator", "record_parent", "settle", "start", "write_back"]


def start(node: VmdkNode) -> None:
    """Make ready for the first change since the disk was opened; durable on return.

    :raises NotSupported: the disk cannot be written
    """
    if node.refusal:
        raise NotSupported(node.refusal, where=node.filename)
    if node.read_only:
        raise ReadOnly("cannot write: the image is open read-only", where=node.filename)
    for index, extent in enumerate(node.extents_of_disk):
        if isinstance(extent, SparseExtent) and extent.writable:
            _start_extent(node, index, extent)
    _change_content_id(node)
    node.file.flush()
    for allocator in _allocators(node):
        allocator.file.flush()


def _start_extent(node: VmdkNode, index: int, extent: SparseExtent) -> None:
    header = node.headers[index]
    if extent.allocator is None:
        extent.allocator = new_allocator(node, index, extent)
        if header.unclean and header.redundant:
            from .check import equalize

            equalize(extent, extent.allocator)
    extent.allocator.mark_unclean(True)


def new_allocator(node: VmdkNode, index: int, extent: SparseExtent) -> Allocator:
    """For extent ``index``, with both copies of its tables at hand."""
    from .opening import check_distinct, load_redundant

    header = node.headers[index]
    load_redundant(extent, header)
    check_distinct(*extent.tables.copies)
    return Allocator(extent, header, node.inflight.when_clear, last=index == len(node.extents_of_disk) - 1)


def _change_content_id(node: VmdkNode) -> None:
    """As many digits as before, so that nothing else moves, and only the digits."""
    descriptor = node.descriptor
    if descriptor is None:
        return
    digits = descriptor.cid_digits
    cid = node.cid
    while cid in (node.cid, 0xFFFFFFFF, 0xFFFFFFFE):
        cid = int.from_bytes(os.urandom(4), "little") & ((1 << 4 * digits) - 1)
    text = f"{cid:0{digits}x}".encode()
    node.file.write_from(node.descriptor_at + descriptor.cid_at, memoryview(text))
    node.cid = cid


def record_parent(node: VmdkNode, cid: int) -> None:
    """The parent has another content ID; durable on return.

    :raises NotSupported: the descriptor has no room for it
    """
    descriptor = node.descriptor
    if descriptor is None:
        return
    text = f"{cid:0{descriptor.parent_cid_digits}x}".encode()
    if len(text) != descriptor.parent_cid_digits:
        raise NotSupported("the descriptor has no room for the content ID of the parent", where=node.filename)
    node.file.write_from(node.descriptor_at + descriptor.parent_cid_at, memoryview(text))
    node.file.flush()
    node.parent_cid = cid


def _allocators(node: VmdkNode) -> Iterator[Allocator]:
    for extent in node.extents_of_disk:
        if isinstance(extent, SparseExtent) and extent.allocator is not None:
            yield extent.allocator


def write_back(node: VmdkNode) -> None:
    """Grain tables behind the data they name; see :mod:`.allocation`."""
    for allocator in _allocators(node):
        allocator.write_back()


def settle(node: VmdkNode) -> None:
    """Everything is durable, then the marks go."""
    used = list(_allocators(node))
    for allocator in used:
        allocator.write_back()
    for allocator in used:
        allocator.file.flush()
        allocator.mark_unclean(False)
        allocator.file.flush()
