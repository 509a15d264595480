"""``compare``: do two images hold the same bytes? Exit code 0 yes, 1 no, above that an error."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

from ..errors import ByreError, InvalidArgument
from . import common
from .progress import Display, mode_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..image import Image
    from ..jobs.compare import Result

__all__ = ["HELP", "run"]

_TABLE: Final = (
    common.FORMAT._replace(help="format of the first image; probed if it is not given"),
    common.Switch("second-format", "F", "", "FMT", "format of the second image; probed if it is not given"),
    common.Switch("strict", "s", "strict", "", "sizes and what is allocated must agree as well"),
    common.SOURCE_CACHE._replace(help="cache mode of both"),
    common.PROGRESS,
    common.Switch("progress-kind", "", "progress", "bar|text|json", "how to show the progress"),
    common.QUIET,
    common.IMAGE_OPTS,
    common.OBJECT,
    common.FORCE_SHARE,
)

HELP: Final = f"""\
usage: byre compare [OPTIONS] FILENAME1 FILENAME2
Compare the content of two images. Exit code: 0 identical, 1 different, 2 cannot open, 3 cannot tell what is
allocated, 4 cannot read.

{common.option_help(_TABLE)}"""

DIFFERENT: Final = 1
CANNOT_OPEN: Final = 2
CANNOT_TELL: Final = 3
CANNOT_READ: Final = 4


def run(arguments: list[str]) -> int:
    given = common.parse(_TABLE, arguments)
    if len(given.positional) != 2:
        raise common.UsageError("expecting two image file names")
    kind = given.last("progress-kind")
    if kind not in ("", "bar", "text", "json"):
        raise common.UsageError("--progress must be bar, text or json")
    mode = mode_for(given.has("progress"), kind, given.has("quiet"))
    images: list[Image] = []
    try:
        try:
            for name, format in zip(given.positional, (given.last("format"), given.last("second-format")), strict=True):
                images.append(_open(name, format, given))
        except ByreError as error:
            common.report(error)
            return CANNOT_OPEN
        return _compare(images, given, mode)
    finally:
        for image in reversed(images):
            image.close()


def _open(name: str, format: str, given: common.Given) -> Image:
    from ..opening import CACHE_MODES

    cache = given.last("source-cache", "writeback")
    if cache not in CACHE_MODES:
        raise InvalidArgument(f"invalid source cache option {cache!r}: expected one of {', '.join(CACHE_MODES)}")
    return common.open_image(name, given, format=format, cache=cache)


def _compare(images: list[Image], given: common.Given, mode: str) -> int:
    from ..jobs.compare import CompareJob, StatusError

    quiet = given.has("quiet")

    def say(line: str) -> None:
        if not quiet:
            sys.stdout.write(line + "\n")

    job = CompareJob(images[0], images[1], strict=given.has("strict"), measure=mode != "none",
                     on_size=lambda: say("Warning: Image size mismatch!"))  # fmt: skip
    try:
        with Display(job.control, "compare", mode, least=2.0, closing=False):
            job.execute()
    except StatusError as error:
        common.report(error)
        return CANNOT_TELL
    except ByreError as error:
        common.report(error)
        return CANNOT_READ
    return _answer(job.result, say)


def _answer(result: Result, say: Callable[[str], None]) -> int:
    if result.equal:
        say("Images are identical.")
        return 0
    if result.by_status:
        say(f"Strict mode: Offset {result.offset} block status mismatch!")
    elif result.offset < 0:
        say("Strict mode: Image size mismatch!")
    else:
        say(f"Content mismatch at offset {result.offset}!")
    return DIFFERENT
