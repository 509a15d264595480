"""Other flags and run-time options for an open qcow2 image: what is refused, and what is written before they change."""

from __future__ import annotations

from ...errors import ReadOnly
from ...typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...graph.opening import OpenFlags
    from ...options import OptionValues
    from .image import Qcow2Node

__all__ = ["commit", "prepare"]


def prepare(node: Qcow2Node, flags: OpenFlags, options: OptionValues) -> None:
    """Refuse what cannot be, and write back what is due before ``flags`` and ``options`` are taken over.

    :raises ReadOnly: it is to be writable, and a snapshot is loaded
    :raises ByreError: options or features that do not allow it, or a failed write
    """
    if node.loaded_snapshot is not None and not flags.read_only:
        raise ReadOnly(f"snapshot {node.loaded_snapshot!r} is loaded, which cannot be written", where=node.filename)
    if node.read_only and not flags.read_only:
        from .opening import check_usable

        check_usable(node.header, False, node.filename)
    if options.given:
        from .runtime import check_options

        check_options(options, node.header, node.filename)
    with node.lock:
        if not node.read_only:
            node._guarded(node.settle)
        if flags.read_only and not node.read_only:
            node.store_bitmaps()
            node._guarded(node.settle)


def commit(node: Qcow2Node, flags: OpenFlags, options: OptionValues) -> None:
    """Take over what :func:`prepare` looked at."""
    with node.lock:
        was_read_only = node.read_only
        node.open_flags, node.runtime = flags, options
        node.read_only = flags.read_only
        node.detect_zeroes = flags.detect_zeroes
        node.pass_discard = flags.unmap
        node._writing = False
        if node._bitmaps is not None:
            node._bitmaps.set_read_only(node.read_only)
        if was_read_only and not node.read_only:
            node.load_refcounts()
        else:
            node.tune()
