"""Opening an image as a user asks for it: a name or options, and words for the modes.

The nodes are made by :mod:`.graph.opening`; the handle over the top one is an :class:`.image.Image`.
"""

from __future__ import annotations

import os

from .errors import InvalidArgument
from .graph.graph import Graph
from .graph.opening import COMMON_OPTIONS, Opener, OpenFlags, Policy, has_protocol
from .image import Image
from .options import Option, convert
from .typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .crypto.secrets import SecretProvider

__all__ = ["CACHE_MODES", "cache_flags", "open"]

CACHE_MODES: Final = {
    # name: (direct, no_flush, writethrough)
    "none": (True, False, False),
    "off": (True, False, False),
    "directsync": (True, False, True),
    "writethrough": (False, False, True),
    "writeback": (False, False, False),
    "unsafe": (False, True, False),
}


def cache_flags(mode: str) -> tuple[bool, bool, bool]:
    """(direct, no_flush, writethrough) for a cache mode name.

    :raises InvalidArgument: an unknown mode
    """
    flags = CACHE_MODES.get(mode)
    if flags is None:
        raise InvalidArgument(f"unknown cache mode {mode!r}: expected one of {', '.join(CACHE_MODES)}")
    return flags


def open(
    target: str | os.PathLike[str] | Mapping[str, object],
    *,
    format: str = "",
    read_only: bool = True,
    cache: str = "writeback",
    discard: str = "unmap",
    detect_zeroes: str = "off",
    copy_on_read: bool = False,
    force_share: bool = False,
    backing: bool = True,
    no_io: bool = False,
    check: bool = False,
    exclusive: bool = False,
    resizable: bool = False,
    policy: Policy | None = None,
    graph: Graph | None = None,
    secrets: SecretProvider | None = None,
) -> Image:
    """Open an image and its backing chain.

    :param target: a path, ``driver:rest``, ``json:{...}``, or nested options as for ``--image-opts``, e.g.
        ``{"driver": "qcow2", "file": {"driver": "file", "filename": "a.qcow2"}}``
    :param format: the driver to use; "" probes (raw is the last resort)
    :param read_only: open for reading only; the default
    :param cache: none, directsync, writethrough, writeback or unsafe
    :param discard: "ignore" or "unmap"
    :param detect_zeroes: "off", "on" or "unmap": turn writes of zeroes into zero writes
    :param copy_on_read: keep what is read from backing files in the image; needs a writable one
    :param force_share: take no lock that keeps other programs out; read-only
    :param backing: open the backing chain as well
    :param no_io: metadata only: nothing the image names is opened
    :param check: opened to be checked: damage is no reason to refuse, and nothing is mended on the way
    :param exclusive: no other user of the same node or file may write meanwhile
    :param resizable: ask for the permission to resize now, not at the first resize
    :param policy: which files the image may name; the default allows plain files
    :param secrets: keys by the ids that options such as ``key-secret`` name: a mapping, or a function of the id
    :raises ByreError: as the drivers say; nothing stays open then
    """
    direct, no_flush, writethrough = cache_flags(cache)
    for name, word in (("discard", discard), ("detect-zeroes", detect_zeroes)):
        convert(COMMON_OPTIONS[name], word)
    if force_share and not read_only:
        raise InvalidArgument("force-share needs a read-only image")
    flags = OpenFlags(
        read_only=read_only,
        direct=direct,
        no_flush=no_flush,
        unmap=discard in ("unmap", "on"),
        detect_zeroes=detect_zeroes,
        force_share=force_share,
        no_backing=not backing,
        no_io=no_io,
        check=check,
    )
    graph = graph or Graph()
    opener = Opener(graph, policy or Policy(), secrets)
    if isinstance(target, os.PathLike):  # a path, whatever colons it holds
        target = os.path.join(os.curdir, target) if has_protocol(os.fspath(target)) else os.fspath(target)
    spec: object = target if isinstance(target, str) else dict(target)
    if isinstance(spec, dict):
        writeback = _pop_writeback(spec)
        writethrough = writethrough if writeback is None else not writeback
    node = opener.open_chain(spec, flags, driver_name=format)
    try:
        if copy_on_read:
            from .filters.copy_on_read import cover

            node = cover(graph, node)
        return Image(node, graph, read_only=read_only, writethrough=writethrough, exclusive=exclusive, no_io=no_io,
                     resizable=resizable)  # fmt: skip
    except BaseException:
        graph.release(node)
        raise


def _pop_writeback(spec: dict[str, object]) -> bool | None:
    """``cache.writeback`` belongs to the handle, not to a node."""
    value = spec.pop("cache.writeback", None)
    cache = spec.get("cache")
    if value is None and isinstance(cache, dict):
        spec["cache"] = cache = dict(cache)
        value = cache.pop("writeback", None)
    return None if value is None else bool(convert(Option("cache.writeback", "bool", ""), value))
