"""qcow2's run-time options: which values go together, what they change, and what becomes of older ones when an image
is reopened.

What ``overlap-check`` looks for is in :mod:`.overlap`, lazy reference counts are in :mod:`.writeback`. With
``l2-cache-entry-size`` below the cluster size, tables that are only read are cached in parts of that size; a table that
changes is held as a whole.
"""

from __future__ import annotations

from ...errors import ByreError, InvalidArgument, NotSupported
from ...typing import TYPE_CHECKING, Final
from .lookup import PART_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...options import OptionValues
    from .image import Qcow2Node
    from .layout import Header

__all__ = ["check_options", "join_options", "tune"]

_SMALLEST_ENTRY: Final = 512
_DEFAULT_L2_CACHE: Final = 32 << 20
_MOST_ENTRIES: Final = (1 << 31) - 1

_REFCOUNT_CACHE: Final = 8 << 20
_LEAST_TABLES: Final = 4
_CLEAN_INTERVAL: Final = 600
_LONGEST_INTERVAL: Final = (1 << 32) - 1

_TOTAL: Final = "cache-size"
_PARTS: Final = ("l2-cache-size", "refcount-cache-size")
_TEMPLATE_NAMES: Final = ("overlap-check", "overlap-check.template")


def check_options(options: OptionValues, header: Header, where: str) -> None:
    """:raises ByreError: values that exclude each other, or that an image with this header cannot have"""
    try:
        _check_options(options, header)
    except ByreError as error:
        error.where = error.where or where
        raise


def _check_options(options: OptionValues, header: Header) -> None:
    _check_caches(options, header)
    interval = options.optional_number("cache-clean-interval")
    if interval is not None and not 0 <= interval <= _LONGEST_INTERVAL:
        raise InvalidArgument(f"option 'cache-clean-interval' is {interval}: must be 0 to {_LONGEST_INTERVAL} seconds")
    short, long = (options.text(name) for name in _TEMPLATE_NAMES)
    if short and long and short != long:
        raise InvalidArgument(f"options 'overlap-check' ({short}) and 'overlap-check.template' ({long}) contradict")
    if header.version < 3:
        for name in ("lazy-refcounts", "discard-no-unref"):
            if options.flag(name):
                raise NotSupported(f"option {name!r} needs an image of version 3 (compat=1.1)")


def _check_caches(options: OptionValues, header: Header) -> None:
    total = options.optional_number(_TOTAL)
    l2, refcount = (options.optional_number(name) for name in _PARTS)
    if total is not None:
        if l2 is not None and refcount is not None:
            raise InvalidArgument(f"options {_TOTAL!r}, {_PARTS[0]!r} and {_PARTS[1]!r} cannot all be given")
        for name, part in zip(_PARTS, (l2, refcount), strict=True):
            if part is not None and part > total:
                raise InvalidArgument(f"option {name!r} is {part}: more than {_TOTAL!r}, which is {total}")
        if l2 is None:
            l2 = total - (refcount or 0)
        elif refcount is None:
            refcount = total - l2
    # A cache larger than all tables together is as large as those.
    whole = _whole(header)
    l2 = min(_DEFAULT_L2_CACHE if l2 is None else l2, whole)
    entry = _entry_size(options, header, l2)
    if not _SMALLEST_ENTRY <= entry <= header.cluster_size or entry & (entry - 1):
        raise InvalidArgument(f"option 'l2-cache-entry-size' is {entry}: must be a power of two from {_SMALLEST_ENTRY} "
                              f"to the cluster size, which is {header.cluster_size}")  # fmt: skip
    for name, size, unit in zip(_PARTS, (l2, refcount or 0), (entry, header.cluster_size), strict=True):
        if size // unit > _MOST_ENTRIES:
            raise InvalidArgument(f"option {name!r} is {size}: that is over {_MOST_ENTRIES} tables of {unit} bytes")


def _entry_size(options: OptionValues, header: Header, l2: int) -> int:
    """Bytes of what the L2 cache of ``l2`` bytes is made of: whole tables where it holds all there are."""
    given = options.optional_number("l2-cache-entry-size")
    if given is not None:
        return given
    return header.cluster_size if l2 >= _whole(header) else min(header.cluster_size, PART_BYTES)


def tune(node: Qcow2Node) -> None:
    """Let the options take effect, those given and the defaults; lock held.

    Options that give nobody a say: the L2 cache has at most 32 MiB and the cache of refcount blocks 8 MiB, where a
    given size may be anything from a few tables on.
    """
    options, header = node.runtime, node.header
    l2, counts = _cache_sizes(options, header)
    interval = options.optional_number("cache-clean-interval")
    part = _entry_size(options, header, l2)
    if part < header.cluster_size or node.mapping.l2.part_length:
        node.mapping.l2.use_parts(part)
    for cache, size in ((node.mapping.l2, l2), (node.refcounts.blocks if node.refcounts else None, counts)):
        if cache is not None:
            cache.capacity = max(size >> header.cluster_bits, _LEAST_TABLES)
            cache.clean_interval = _CLEAN_INTERVAL if interval is None else interval
    if node.read_only:
        return
    lazy = options.flag("lazy-refcounts") if "lazy-refcounts" in options else header.lazy_refcounts
    node.lazy_refcounts = node.mapping.count_tables = lazy and header.version >= 3
    node.mapping.keep_discarded = options.flag("discard-no-unref")
    if node.refcounts is not None:
        from .overlap import Guard, chosen_classes

        node.guard = guard = Guard(node, chosen_classes(options))
        node.mapping.use_guard(guard)
        node.refcounts.use_guard(guard)


def _cache_sizes(options: OptionValues, header: Header) -> tuple[int, int]:
    """(L2 tables, refcount blocks) in bytes."""
    total = options.optional_number(_TOTAL)
    l2, counts = (options.optional_number(name) for name in _PARTS)
    if total is not None:
        if l2 is not None:
            counts = total - l2
        elif counts is not None:
            l2 = total - counts
        else:
            # As much as makes sense for L2 tables; the rest, but a little at least, for counts.
            least = min(total, _LEAST_TABLES << header.cluster_bits)
            l2 = max(min(total - least, _whole(header)), 0)
            counts = total - l2
    return _DEFAULT_L2_CACHE if l2 is None else l2, _REFCOUNT_CACHE if counts is None else counts


def _whole(header: Header) -> int:
    """Bytes of L2 entries for the whole disk."""
    return -(-header.size // header.cluster_size) * (16 if header.extended_l2 else 8)


def join_options(before: Mapping[str, object], given: Mapping[str, object]) -> dict[str, object]:
    """The options of a reopened image: ``given`` on top of those it had.

    A new overlap template replaces all that was said about overlap checks; a new total cache size replaces those of
    the parts, and a new size of a part the total.
    """
    kept = dict(before)
    if any(name in given for name in _TEMPLATE_NAMES):
        kept = {name: value for name, value in kept.items() if not name.startswith("overlap-check")}
    dropped: tuple[str, ...]
    if _TOTAL in given:
        dropped = _PARTS
    else:
        dropped = (_TOTAL,) if any(name in given for name in _PARTS) else ()
    return {name: value for name, value in kept.items() if name not in dropped} | dict(given)
