"""``bitmap``: add, remove, clear, enable, disable and merge the persistent bitmaps of an image.

Several actions may be given; they are carried out in their order, and those before one that fails are kept.
"""

from __future__ import annotations

from ..errors import ByreError, NotFound, NotSupported
from ..typing import TYPE_CHECKING, Final
from . import common

if TYPE_CHECKING:
    from ..formats.abilities import BitmapStore
    from ..image import Image

__all__ = ["HELP", "run"]

_ACTIONS: Final = ("add", "remove", "clear", "enable", "disable", "merge")

_TABLE: Final = (
    common.Switch("add", "", "add", "", "make the bitmap, all clean and enabled"),
    common.Switch("remove", "", "remove", "", "remove it"),
    common.Switch("clear", "", "clear", "", "nothing is dirty any more"),
    common.Switch("enable", "", "enable", "", "writes are recorded from now on"),
    common.Switch("disable", "", "disable", "", "they are not recorded any more"),
    common.Switch("merge", "", "merge", "SOURCE", "what is dirty in bitmap SOURCE becomes dirty as well"),
    common.Switch("granularity", "g", "granularity", "SIZE", "with --add: bytes for each bit; a power of 2"),
    common.Switch("source-file", "b", "source-file", "FILE", "with --merge: the image that SOURCE is in"),
    common.Switch("source-format", "F", "source-format", "FMT", "format of that image; probed if it is not given"),
    common.FORMAT,
    common.IMAGE_OPTS,
    common.OBJECT,
)

HELP: Final = f"""\
usage: byre bitmap ACTION... [OPTIONS] FILENAME BITMAP
Change a persistent bitmap of an image; 'byre info' lists those there are. Actions are carried out in their order.

{common.option_help(_TABLE)}"""


def run(arguments: list[str]) -> int:
    given = common.parse(_TABLE, arguments)
    actions = [(key, value) for key, value in given.ordered if key in _ACTIONS]
    granularity = 0
    if given.has("granularity"):
        granularity = common.size_argument(given.last("granularity"), "granularity")
    _check_usage(given, granularity)
    name, bitmap = given.positional
    source: Image | None = None
    image = common.open_image(name, given, format=given.last("format"), read_only=False, backing=False)
    try:
        try:
            if given.has("source-file"):
                source = common.open_image(given.last("source-file"), given, format=given.last("source-format"),
                                           image_opts=False, backing=False)  # fmt: skip
            return _carry_out(image, source or image, actions, bitmap, granularity)
        finally:
            if source is not None:
                source.close()
    except ByreError as error:
        # Closing may fail as well, and stores what was done before.
        common.report(error)
        return 1
    finally:
        image.close()


def _check_usage(given: common.Given, granularity: int) -> None:
    """:raises UsageError: options that exclude or need each other"""
    for condition, message in (
        (
            not any(given.has(action) for action in _ACTIONS),
            "need at least one of --add, --remove, --clear, --enable, --disable, or --merge",
        ),
        (granularity and not given.has("add"), "granularity only supported with --add"),
        (given.has("source-format") and not given.has("source-file"), "-F only supported with -b"),
        (given.has("source-file") and not given.has("merge"), "merge bitmap source file only supported with --merge"),
        (len(given.positional) != 2, "expecting filename and bitmap name"),
    ):
        if condition:
            raise common.UsageError(message)


def _carry_out(image: Image, source: Image, actions: list[tuple[str, str]], name: str, granularity: int) -> int:
    for action, value in actions:
        try:
            _act(image, source, action, value, name, granularity)
        except ByreError as error:
            error.message = f"Operation {action} on bitmap {name} failed: {error.message}"
            error.where = ""
            raise
    return 0


def _act(image: Image, source: Image, action: str, value: str, name: str, granularity: int) -> None:
    if action == "add":
        store = _store(image)
        if store is None:
            raise NotSupported(f"Can't store persistent bitmaps to {image.filename}: its format has none")
        store.add(name, granularity)
        return
    store = _store(image)
    if store is None:
        raise NotFound(f"Dirty bitmap '{name}' not found")
    if action == "remove":
        store.remove(name)
        return
    bitmap = store.find(name)
    if action == "merge":
        other = _store(source)
        if other is None:
            raise NotFound(f"Dirty bitmap '{value}' not found")
        bitmap.merge(other.find(value))
        return
    bitmap.check()
    if action == "clear":
        bitmap.clear_all()
    elif action == "enable":
        bitmap.enable()
    else:
        bitmap.disable()


def _store(image: Image) -> BitmapStore | None:
    from ..formats.abilities import HasBitmaps

    node = image.node
    return node.bitmap_store() if isinstance(node, HasBitmaps) else None
