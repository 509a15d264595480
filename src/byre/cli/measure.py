"""``measure``: how large the file of a new image has to be, empty or with what another image holds."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final, NamedTuple

from ..catalog import driver
from ..errors import NotSupported
from ..options import OptionSet, OptionValues
from ..units import SECTOR, align_up
from . import common
from .create import declared_options, split_options
from .output import print_json

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    from ..image import Image

__all__ = ["HELP", "run"]

_TABLE: Final = (
    common.FORMAT,
    common.Switch("target-format", "O", "", "FMT", "format of the new image; raw if it is not given"),
    common.Switch("options", "o", "", "KEY=VALUE,...", "options of the new image"),
    common.Switch("size", "", "size", "SIZE", "measure an empty image of this size"),
    common.Switch("snapshot", "l", "", "SNAPSHOT", "measure an internal snapshot"),
    common.IMAGE_OPTS,
    common.OBJECT,
    common.OUTPUT,
    common.FORCE_SHARE,
)

HELP: Final = f"""\
usage: byre measure [OPTIONS] --size SIZE
       byre measure [OPTIONS] FILENAME
Say how large the file of a new image has to be.

{common.option_help(_TABLE)}"""


class _Sizes(NamedTuple):
    """Bytes.

    :ivar bitmaps: ``None`` where the source or the new image has no bitmaps
    """

    required: int
    fully_allocated: int
    bitmaps: int | None = None


def run(arguments: list[str]) -> int:
    given = common.parse(_TABLE, arguments)
    as_json = common.output_format(given) == "json"
    size = common.size_argument(given.last("size"), "image size") if given.has("size") else None
    if given.has("snapshot"):
        from .snapshot import check_snapshot

        check_snapshot(given.last("snapshot"))
    _check_usage(given)
    target = given.last("target-format", "raw")
    declared = declared_options(target)
    options = common.create_options(given.all("options"))
    if options is None:
        common.print_create_options(target, declared, complete=bool(given.positional))
        return 0
    if size is not None:
        options["size"] = str(size)
    values = _values(target, declared, options)
    if given.positional:
        with common.open_image(given.positional[0], given, format=given.last("format")) as image:
            if given.has("snapshot"):
                from .snapshot import load_snapshot

                load_snapshot(image, given.last("snapshot"))
            sizes = _measure(target, values, image)
    else:
        sizes = _measure(target, values, None)
    _print(sizes, as_json)
    return 0


def _check_usage(given: common.Given) -> None:
    """:raises UsageError: neither or both of a size and a file name"""
    if len(given.positional) > 1:
        raise common.UsageError("at most one file name is allowed")
    if not given.positional:
        if given.has("image-opts") or given.has("format") or given.has("snapshot"):
            raise common.UsageError("--image-opts, -f and -l need a file name")
        if not given.has("size"):
            raise common.UsageError("either --size or a file name must be given")
    elif given.has("size"):
        raise common.UsageError("--size cannot be used together with a file name")


def _values(target: str, declared: OptionSet, options: dict[str, str]) -> OptionValues:
    accepted, refusal = split_options(declared, options)
    if refusal is not None:
        raise refusal
    return declared.parse(accepted, what=f"format {target!r}")


def _measure(target: str, values: OptionValues, source: Image | None) -> _Sizes:
    """
    :param source: what the new image would hold; ``None`` for an empty one
    :raises NotSupported: the format cannot be measured
    """
    size = values.optional_number("size") or 0 if source is None else source.size
    if target == "raw":
        size = align_up(size, SECTOR)
        return _Sizes(size, size)
    module = driver(target).load()
    if not hasattr(module, "measure"):
        raise NotSupported(f"images of format {target!r} cannot be measured")
    data = 0
    values.given["size"] = size
    if source is None:
        values.given.pop("backing_file", None)
    elif "backing_file" not in values and (unit := _unit(module, target, values)):
        from ..formats.qcow2.measurement import touched_bytes

        data = touched_bytes(_data_spans(source), unit)
    required, full = module.measure(values, size, data)
    bitmaps = None
    if source is not None and target == "qcow2" and values.text("compat") not in ("0.10", "v2"):
        bitmaps = _bitmap_bytes(source, values.number("cluster_size"))
    return _Sizes(required, full, bitmaps)


def _unit(module: ModuleType, target: str, values: OptionValues) -> int:
    """In which pieces the new image holds data, bytes; 0 where that makes no difference."""
    if hasattr(module, "measure_unit"):
        return int(module.measure_unit(values))
    return values.number("cluster_size") if "cluster_size" in declared_options(target) else 0


def _data_spans(source: Image) -> Iterator[tuple[int, int]]:
    """(offset, length) of what the source holds and a copy has to write."""
    import numpy as np

    from ..graph import chain
    from ..io.extent import COMPRESSED, DATA

    for offset, length in chain.windows(0, source.size, chain.window_size(source.node)):
        found = source.extents(offset, length)
        rows = found.take((found.kind == DATA) | (found.kind == COMPRESSED))
        if not len(rows):
            continue
        # Where in the file they lie does not matter here: neighbours are one.
        begins = np.append(True, rows.offset[1:] != rows.offset[:-1] + rows.length[:-1])
        starts = rows.offset[begins]
        stops = (rows.offset + rows.length)[np.append(begins[1:], True)]
        yield from zip(starts.tolist(), (stops - starts).tolist(), strict=True)


def _bitmap_bytes(source: Image, cluster_size: int) -> int | None:
    """What copies of the source's bitmaps would take; ``None`` where it cannot have any (specification, "Bitmaps").

    Each is counted as if all its clusters were there; inconsistent ones as well, as the peer does.
    """
    from ..formats.abilities import HasBitmaps

    store = source.node.bitmap_store() if isinstance(source.node, HasBitmaps) else None
    if store is None or not store.can_persist:
        return None
    total = directory = 0
    for name, granularity, _ in store.entries():
        bits = -(-source.size // granularity)
        clusters = -(-bits // (8 * cluster_size))
        total += clusters * cluster_size + align_up(clusters * 8, cluster_size)
        directory += align_up(24 + len(name.encode("utf-8", "surrogateescape")), 8)
    return total + align_up(directory, cluster_size)


def _print(sizes: _Sizes, as_json: bool) -> None:
    if as_json:
        counts = {"required": sizes.required, "fully-allocated": sizes.fully_allocated}
        print_json(counts if sizes.bitmaps is None else {"bitmaps": sizes.bitmaps, **counts})
        return
    sys.stdout.write(f"required size: {sizes.required}\nfully allocated size: {sizes.fully_allocated}\n")
    if sizes.bitmaps is not None:
        sys.stdout.write(f"bitmaps size: {sizes.bitmaps}\n")
