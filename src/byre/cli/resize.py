"""``resize``: change the virtual size of an image."""

from __future__ import annotations

import sys
from typing import Final

from ..errors import InvalidArgument
from . import common

__all__ = ["HELP", "run"]

_TABLE: Final = (
    common.FORMAT,
    common.IMAGE_OPTS,
    common.OBJECT,
    common.Switch("preallocation", "", "preallocation", "MODE", "off, metadata, falloc or full, for the new space"),
    common.Switch("shrink", "", "shrink", "", "allow the image to become smaller; what is cut off is lost"),
    common.QUIET,
)

HELP: Final = f"""\
usage: byre resize [OPTIONS] FILENAME [+|-]SIZE
Change the virtual size of an image, to SIZE or by SIZE.

{common.option_help(_TABLE)}"""

_MODES: Final = ("off", "metadata", "falloc", "full")


def run(arguments: list[str]) -> int:
    # The size may begin with a minus sign, so it is taken away before options are looked for.
    if arguments[-1:] in (["-h"], ["--help"]):
        raise common.HelpRequested
    if len(arguments) < 2:
        raise common.UsageError("expecting image file name and size")
    given = common.parse(_TABLE, arguments[:-1])
    if len(given.positional) != 1:
        raise common.UsageError("expecting image file name and size")
    preallocation = given.last("preallocation", "off")
    if preallocation not in _MODES:
        raise InvalidArgument(f"invalid preallocation mode {preallocation!r}: expected one of {', '.join(_MODES)}")
    sign, amount = _size(arguments[-1])
    name = given.positional[0]
    with common.open_image(name, given, format=given.last("format"), read_only=False, resizable=True) as image:
        size = image.size + sign * amount if sign else amount
        if not 0 < size <= common.MAX_SIZE:
            raise InvalidArgument(f"the new size would be {size} bytes; it must be between 1 and {common.MAX_SIZE}",
                                  where=name)  # fmt: skip
        if size <= image.size and preallocation != "off":
            raise InvalidArgument("preallocation is for growing an image only", where=name)
        if size < image.size and not given.has("shrink"):
            common.report(f"{name}: use the --shrink option to make the image smaller")
            common.warn("shrinking an image deletes everything beyond its new end; make sure that nothing there is "
                        "needed")  # fmt: skip
            return 1
        image.resize(size, preallocation=preallocation, shrink=given.has("shrink"))
    if not given.has("quiet"):
        sys.stdout.write("Image resized.\n")
    return 0


def _size(text: str) -> tuple[int, int]:
    """(sign or 0, bytes) for ``[+|-]SIZE``."""
    sign = {"+": 1, "-": -1}.get(text[:1], 0)
    number = text[1:] if sign else text
    if number[:1] in ("+", "-"):
        raise InvalidArgument(f"invalid size {text!r}")
    return sign, common.size_argument(number, "size")
