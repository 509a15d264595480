"""``open``, and opening what the program was started with: names, option strings, temporary overlays."""

from __future__ import annotations

import os

from ...errors import ByreError, InvalidArgument, from_oserror
from ...graph.opening import parse_filename
from ...opening import CACHE_MODES
from ...opening import open as open_target
from ...options import parse_keyval, unflatten
from ...typing import TYPE_CHECKING, Final, NamedTuple
from ..common import policy, warn_graph
from .getopt import UsageError, scan
from .shell import Command, Failed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...graph.graph import Graph
    from ...image import Image
    from ..common import Given
    from .shell import Shell

__all__ = ["COMMANDS", "Settings", "change", "open_image", "target_of"]

_DISCARD: Final = {"off": "ignore", "ignore": "ignore", "on": "unmap", "unmap": "unmap"}
_AIO: Final = ("threads", "native", "io_uring")


class Settings(NamedTuple):
    """How to open an image. The shell writes through unless told otherwise: what it reports as written is durable."""

    read_only: bool = False
    snapshot: bool = False
    cache: str = "writethrough"
    discard: str = "unmap"
    force_share: bool = False
    copy_on_read: bool = False


def change(settings: Settings, key: str, value: str) -> Settings:
    """``settings`` after one more option.

    :raises InvalidArgument: no such cache, discard or aio mode
    """
    if key == "read-only":
        return settings._replace(read_only=True)
    if key == "snapshot":
        return settings._replace(snapshot=True)
    if key == "force-share":
        return settings._replace(force_share=True)
    if key == "nocache":
        return settings._replace(cache="none")
    if key == "cache":
        if value not in CACHE_MODES:
            raise InvalidArgument(f"Invalid cache option: {value}")
        return settings._replace(cache=value)
    if key == "discard":
        if value not in _DISCARD:
            raise InvalidArgument(f"Invalid discard option: {value}")
        return settings._replace(discard=_DISCARD[value])
    if key == "aio" and value not in _AIO:
        raise InvalidArgument(f"Invalid aio option: {value}")
    if key == "copy-on-read":
        return settings._replace(copy_on_read=True)
    return settings


def target_of(name: str, options: dict[str, str]) -> str | dict[str, object]:
    """What to open: ``name`` ("" for none) with flat ``options``; those below ``file.`` add to what the name says."""
    nested = unflatten(options)
    if not name:
        return nested
    if not nested:
        return name
    if name.startswith("json:"):
        return _joined(unflatten(parse_filename(name)), nested)
    below = nested.get("file")
    if isinstance(below, dict):
        nested["file"] = {**parse_filename(name), **below}
    else:
        nested["filename"] = name
    return nested


def _joined(below: Mapping[str, object], above: Mapping[str, object]) -> dict[str, object]:
    """Options of a ``json:`` name and, before them, those given with it."""
    joined = dict(below)
    for name, value in above.items():
        old = joined.get(name)
        if isinstance(old, dict) and isinstance(value, dict):
            value = _joined(old, value)
        joined[name] = value
    return joined


def open_image(target: str | dict[str, object], format: str, settings: Settings, given: Given) -> Image:
    """:raises ByreError: as the drivers say"""
    from ...graph.graph import Graph

    if isinstance(target, dict) and settings.force_share and target.get("force-share", "on") != "on":
        raise InvalidArgument("-U conflicts with image options")
    graph = Graph()
    given.furnish(graph)
    if settings.snapshot:
        image = _open_overlay(target, format, settings, given, graph)
    else:
        image = open_target(target, format=format, read_only=settings.read_only, cache=settings.cache,
                            discard=settings.discard, force_share=settings.force_share,
                            copy_on_read=settings.copy_on_read, policy=policy(given),
                            graph=graph, secrets=given.secrets())  # fmt: skip
    warn_graph(graph)
    return image


def _open_overlay(
    target: str | dict[str, object], format: str, settings: Settings, given: Given, graph: Graph
) -> Image:
    """An overlay over the image; it has no name any more when this returns, so it is gone with the process."""
    import tempfile

    from ...graph.creating import create

    base = unflatten({"driver": format, "file": parse_filename(target)} if format else parse_filename(target)) \
        if isinstance(target, str) else dict(target)  # fmt: skip
    with open_target(dict(base), policy=policy(given), force_share=settings.force_share,
                     secrets=given.secrets()) as image:  # fmt: skip
        size = image.size
    folder = os.environ.get("TMPDIR") or "/var/tmp"
    try:
        handle, name = tempfile.mkstemp(prefix="byre-", suffix=".qcow2", dir=folder)
    except OSError as error:
        raise from_oserror(error, "cannot make a temporary file", folder) from None
    os.close(handle)
    try:
        create(name, "qcow2", size)
        overlay = {"driver": "qcow2", "file": {"driver": "file", "filename": name}, "backing": base}
        return open_target(overlay, read_only=settings.read_only, cache=settings.cache, discard=settings.discard,
                           copy_on_read=settings.copy_on_read, policy=policy(given), graph=graph,
                           secrets=given.secrets())  # fmt: skip
    finally:
        os.unlink(name)


_LETTERS: Final = {"s": "snapshot", "n": "nocache", "C": "copy-on-read", "r": "read-only", "k": "native-aio",
                   "i": "aio", "t": "cache", "d": "discard", "U": "force-share"}  # fmt: skip


def open_command(shell: Shell, arguments: list[str]) -> None:
    settings = Settings()
    options: dict[str, str] = {}
    image_opts = shell.given.has("image-opts")

    def seen(letter: str, text: str) -> None:
        nonlocal settings
        if letter != "o":
            settings = change(settings, _LETTERS[letter], text)
        elif image_opts:
            shell.say("--image-opts and 'open -o' are mutually exclusive\n")
            raise Failed
        else:
            options.update(parse_keyval(text))

    given = scan("open", arguments, "snCro:ki:t:d:U", seen=seen)
    if len(given.rest) > 1:
        raise UsageError
    name = given.rest[0] if given.rest else ""
    if image_opts and name:
        options.update(parse_keyval(name))
        name = ""
    open_into(shell, name, target_of(name, options), "", settings)


def open_into(shell: Shell, name: str, target: str | dict[str, object], format: str, settings: Settings) -> None:
    """Open ``target`` as the shell's image.

    :param name: for messages; "" if it has none
    :raises ByreError: it cannot be opened, or an image is open already
    """
    if shell.image is not None:
        raise InvalidArgument("file open already, try 'help close'")
    try:
        shell.image = open_image(target, format, settings, shell.given)
    except ByreError as error:
        device = f" device {name}" if name else ""
        raise type(error)(f"can't open{device}: {error}", errno=error.errno) from None


COMMANDS = (
    Command("open", open_command, "open an image", "[-rsCnkU] [-t cache] [-d discard] [-o options] [path]", 1, -1, "o",
            needs_image=False, help="""
 Example: 'open -n -o driver=raw /tmp/data' opens a raw image read-write, past the page cache.

 -r  read-only
 -s  with a temporary overlay that takes all changes
 -C  with copy-on-read
 -n  past the page cache, as '-t none'
 -U  although another program writes it
 -k  with kernel requests (accepted, has no effect)
 -i  with threads, native or io_uring requests (accepted, has no effect)
 -t  cache mode: none, directsync, writethrough, writeback or unsafe
 -d  discard mode: ignore or unmap
 -o  options of the driver: key=value,...

"""),
)  # fmt: skip
