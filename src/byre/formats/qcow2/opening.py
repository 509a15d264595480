"""Opening a qcow2 image: header, extensions, data file, tables; and what ``info`` says about it."""

from __future__ import annotations

import os

from ...errors import Corrupt, ImageError, InvalidArgument, NotSupported, printable
from ...graph.opening import has_protocol, resolve_backing
from ...typing import TYPE_CHECKING, Final
from . import layout
from .image import Qcow2Node

if TYPE_CHECKING:
    from ...graph.node import Node
    from ...graph.opening import OpenRequest

__all__ = ["describe", "open_qcow2", "read_header", "read_snapshots", "reread"]

_FIRST_READ: Final = 4096


def open_qcow2(request: OpenRequest) -> Qcow2Node:
    """The node for an image; its backing file is attached by the opener.

    :raises ImageError: header or extensions break the format
    :raises NotSupported: unknown incompatible features, named
    """
    file = request.open_child("file")
    where = file.filename
    header, extensions, backing_name = read_header(file, where, repair=request.flags.check)
    flags = request.flags
    if file.read_only and not flags.read_only:
        flags = flags._replace(read_only=True)
    check_usable(header, flags.read_only or flags.check, where)
    if request.options.given:
        from .runtime import check_options

        check_options(request.options, header, where)
    if request.opener.policy.max_size and header.size > request.opener.policy.max_size:
        raise ImageError(f"the virtual size is {header.size}, allowed are {request.opener.policy.max_size} bytes "
                         "for an untrusted image", where=where, hint="raise --max-size")  # fmt: skip
    node = Qcow2Node(file, header, extensions, backing_name, request.options, flags, name=request.name)
    recorded = layout.find_extension(extensions, layout.EXTENSION_BACKING_FORMAT)
    node.backing_format = recorded.decode("utf-8", "replace") if recorded else ""
    request.opener.adopt(node)  # so that a failure from here on leaves no edge behind
    graph = request.opener.graph
    main = graph.attach(node, "file", file, "metadata" if header.has_data_file else "data")
    node.sources = (main,)
    encryption = header.crypt_method or request.options.text("encrypt.format")
    if encryption:
        from .encryption import unlock

        unlock(request, node)
    if header.has_data_file:
        _attach_data_file(request, node)
    elif request.has_child("data-file"):
        raise InvalidArgument("a data file is given, but the image has none", where=where)
    if not flags.no_io:
        node.load_tables()
        if header.incompatible_features & layout.INCOMPATIBLE_DIRTY and not (flags.read_only or flags.check):
            from .check import repair_dirty

            graph.repairs += repair_dirty(node)
        if node.has_bitmaps() and not (node.read_only or flags.check):
            # A directory that makes no sense is refused before anything is written.
            count, most = len(node.bitmap_store().entries()), request.opener.policy.max_bitmaps
            if most and count > most:
                raise ImageError(
                    f"the image has {count} bitmaps, allowed are {most} for an untrusted image", where=where
                )
    return node


def read_header(
    file: Node, where: str, *, repair: bool = False
) -> tuple[layout.Header, tuple[layout.Extension, ...], str]:
    """(header, extensions, backing name) of the image in ``file``, within the limits of the layout.

    :param repair: accept what ``check -r`` can mend
    :raises ImageError: it breaks the format
    """
    try:
        data = bytearray(min(_FIRST_READ, max(file.size, 1)))
        file.read_into(0, memoryview(data))
        while True:
            try:
                header = layout.decode_header(data, repair=repair)
                extensions = layout.decode_extensions(data, header)
                names = layout.find_extension(extensions, layout.EXTENSION_FEATURE_NAMES)
                layout.check_features(header, layout.decode_feature_names(names) if names else ())
                return header, extensions, layout.decode_backing_name(data, header)
            except layout.Truncated as short:
                # What a short file lacks reads as zeroes; nothing here reaches past the first 2 MiB cluster.
                if short.needed <= len(data) or short.needed > 1 << layout.MAX_CLUSTER_BITS:
                    raise
                data = bytearray(max(short.needed, min(2 * len(data), 1 << layout.MAX_CLUSTER_BITS)))
                file.read_into(0, memoryview(data))
    except (ImageError, NotSupported) as error:
        error.where = error.where or where
        raise


def check_usable(header: layout.Header, read_only: bool, where: str) -> None:
    """:raises Corrupt: the image is marked corrupt and is to be written"""
    if header.incompatible_features & layout.INCOMPATIBLE_CORRUPT and not read_only:
        raise Corrupt("the image is marked corrupt; it cannot be opened for writing", where=where,
                      hint='run "byre check -r all"')  # fmt: skip


def _attach_data_file(request: OpenRequest, node: Qcow2Node) -> None:
    """The external data file: named by the user, or by the image and then let through the gate."""
    recorded = layout.find_extension(node.extensions, layout.EXTENSION_DATA_FILE)
    opener = request.opener
    flags = node.open_flags.for_file()
    if request.has_child("data-file"):
        data = request.open_child("data-file", flags=flags)
    elif node.open_flags.no_io:
        return
    elif not recorded:
        raise ImageError("the image has an external data file but does not name it", where=node.filename,
                         hint="give it with data-file.filename=...")  # fmt: skip
    else:
        name = recorded.decode("utf-8", "surrogateescape")
        path = resolve_backing(node.filename, name)
        opener.policy.check(name, None if has_protocol(name) else path, "data file", node.filename)
        data = opener.open({"driver": "file", "filename": path}, flags, protocol=True, implicit=True)
    child = opener.graph.attach(node, "data-file", data, "data")
    node.sources = (child,)


def reread(node: Qcow2Node) -> None:
    """Header and tables as they are in the file now; lock held."""
    node.header, node.extensions, node.backing_name = read_header(
        node.file, node.filename, repair=node.open_flags.check
    )
    node._size = node.header.disk_size
    node._snapshots = None
    node.load_tables()


def read_snapshots(node: Qcow2Node) -> tuple[layout.Snapshot, ...]:
    """The snapshot table's entries.

    :raises ImageError: an entry is outside its limits
    """
    header = node.header
    if not header.nb_snapshots:
        return ()
    length = header.nb_snapshots * 40
    while True:
        data = bytearray(length)
        node.file.read_into(header.snapshots_offset, memoryview(data))
        try:
            return layout.decode_snapshot_table(data, header.nb_snapshots, header.cluster_bits)
        except layout.Truncated as short:
            length = max(short.needed, min(2 * length, 64 << 20))
        except ImageError as error:
            error.where = error.where or node.filename
            raise


def read_bitmaps(node: Qcow2Node) -> tuple[layout.BitmapEntry, ...]:
    """The bitmap directory's entries, if the autoclear bit says that they are valid."""
    header = node.header
    data = layout.find_extension(node.extensions, layout.EXTENSION_BITMAPS)
    if data is None or not header.autoclear_features & layout.AUTOCLEAR_BITMAPS:
        return ()
    record = layout.decode_bitmaps_extension(data, header.cluster_bits)
    directory = bytearray(record.directory_size)
    node.file.read_into(record.directory_offset, memoryview(directory))
    return layout.decode_bitmap_directory(directory, record.nb_bitmaps, header.cluster_bits)


def describe(node: Qcow2Node) -> dict[str, object]:
    """``format-specific`` of ``info --output json``, in the peer's order."""
    header = node.header
    result: dict[str, object] = {"compat": "0.10" if header.version == 2 else "1.1"}
    result["compression-type"] = node.compression_name
    if header.version == 2:
        result["refcount-bits"] = 16
        return _with_encryption(result, node)
    result["lazy-refcounts"] = header.lazy_refcounts
    bitmaps = [
        {
            "flags": [name for bit, name in ((1, "in-use"), (2, "auto")) if entry.flags & bit],
            "name": printable(entry.name),
            "granularity": 1 << entry.granularity_bits,
        }
        for entry in read_bitmaps(node)
    ]
    if bitmaps:
        result["bitmaps"] = bitmaps
    result["refcount-bits"] = 1 << header.refcount_order
    _with_encryption(result, node)
    data_file = layout.find_extension(node.extensions, layout.EXTENSION_DATA_FILE)
    if header.has_data_file:
        if data_file:
            result["data-file"] = os.fsdecode(data_file)
        result["data-file-raw"] = header.raw_data_file
    result["corrupt"] = bool(header.incompatible_features & layout.INCOMPATIBLE_CORRUPT)
    result["extended-l2"] = header.extended_l2
    return result


def _with_encryption(result: dict[str, object], node: Qcow2Node) -> dict[str, object]:
    if node.encrypted:
        from .encryption import describe as describe_encryption

        result["encrypt"] = describe_encryption(node)
    return result
