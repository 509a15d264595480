"""What ``serve`` offers: the image with its overlay, snapshot or offset, as an export."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING

from ..errors import ByreError, InvalidArgument, from_oserror, printable
from ..exports.nbd import NbdExport
from ..graph.graph import Graph
from ..image import Image
from ..opening import open as open_target
from . import common

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["open_export"]


@contextlib.contextmanager
def open_export(given: common.Given, connections: int) -> Iterator[NbdExport]:
    """The export that the options describe; image and overlay are closed at the end.

    :param connections: most clients at a time, 0 for any number
    """
    image = _open(given)
    try:
        export = NbdExport(
            image,
            given.last("export-name"),
            description=given.last("description"),
            writable=not image.read_only,
            connections=connections,
            bitmaps=given.all("bitmap"),
            allocation_depth=given.has("allocation-depth"),
        )
        try:
            yield export
        finally:
            export.close()
    finally:
        image.close()


def _open(given: common.Given) -> Image:
    name = given.positional[0]
    read_only = given.has("read-only") or given.has("load-snapshot")
    graph = Graph()
    overlay = given.has("snapshot") and not read_only
    try:
        image = common.open_image(
            name, given, format=given.last("format"), read_only=read_only or overlay, cache=_cache(given),
            discard=given.last("discard", "ignore"), detect_zeroes=given.last("detect-zeroes", "off"), graph=graph,
        )  # fmt: skip
    except ByreError as error:
        if common.as_peer():
            error.message, error.where = f"Failed to blk_new_open '{name}': {error}", ""
            error.hint = ""
        raise
    _warn_of_guess(image)
    try:
        if given.has("load-snapshot"):
            from .snapshot import load_snapshot

            load_snapshot(image, given.last("load-snapshot"))
        if overlay:
            image = _overlay(given, image, graph)
        if given.last("offset", "0") != "0":
            image = _shifted(given, image, graph)
        return image
    except BaseException:
        image.close()
        raise


def _warn_of_guess(image: Image) -> None:
    """A client may write to a disk whose format nobody said: not everything, and somebody should know why."""
    if image.read_only or not getattr(image.node, "probed", False):
        return
    name = printable(image.filename)
    if common.as_peer():
        sys.stderr.write(
            f"WARNING: Image format was not specified for '{name}' and probing guessed raw.\n"
            "         Automatically detecting the format is dangerous for raw images, write operations on block 0 will "
            "be restricted.\n"
            "         Specify the 'raw' format explicitly to remove the restrictions.\n"
        )
    else:
        common.warn(f"{name}: probed as raw: writes that would make it look like another format are refused; "
                    "say -f raw to allow them")  # fmt: skip


def _cache(given: common.Given) -> str:
    return "none" if given.has("nocache") else given.last("cache", "writeback")


def _overlay(given: common.Given, below: Image, graph: Graph) -> Image:
    """A temporary overlay that takes the writes. Its file has no name any more when this returns."""
    import tempfile

    from ..graph.creating import create

    try:
        fd, path = tempfile.mkstemp(prefix="byre-overlay-", suffix=".qcow2")
    except OSError as error:
        raise from_oserror(error, "cannot make a temporary overlay", tempfile.gettempdir()) from None
    os.close(fd)
    try:
        create(path, "qcow2", below.size)
        top = open_target(
            {"driver": "qcow2", "file": {"driver": "file", "filename": path}, "backing": below.node.name},
            read_only=False, graph=graph, cache="unsafe", discard=given.last("discard", "ignore"),
            detect_zeroes=given.last("detect-zeroes", "off"),
        )  # fmt: skip
    finally:
        os.unlink(path)
    below.close()
    return top


def _shifted(given: common.Given, below: Image, graph: Graph) -> Image:
    """The part of ``below`` from the offset on."""
    offset = int(given.last("offset"), 16 if given.last("offset").lower().startswith("0x") else 10)
    if offset > below.size:
        raise InvalidArgument(f"offset {offset} lies behind the end of the image ({below.size} bytes)",
                              where=below.filename)  # fmt: skip
    top = open_target(
        {"driver": "raw", "offset": offset, "file": below.node.name}, read_only=below.read_only, graph=graph,
        cache=_cache(given), discard=given.last("discard", "ignore"),
        detect_zeroes=given.last("detect-zeroes", "off"),
    )  # fmt: skip
    below.close()
    return top
