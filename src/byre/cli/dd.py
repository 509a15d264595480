"""``dd``: copy a range of an image, in the words of dd(1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from ..errors import ByreError
from ..units import SECTOR, align_up
from . import common
from .create import declared_options

if TYPE_CHECKING:
    from ..image import Image

__all__ = ["HELP", "run"]

_TABLE: Final = (
    common.FORMAT._replace(help="format of the input; probed if it is not given"),
    common.Switch("output-format", "O", "", "FMT", "format of the output; raw if it is not given"),
    common.IMAGE_OPTS._replace(help="the input name is key=value,..."),
    common.OBJECT,
    common.FORCE_SHARE,
)

HELP: Final = f"""\
usage: byre dd [OPTIONS] [bs=SIZE] [count=BLOCKS] [skip=BLOCKS] if=INPUT of=OUTPUT
Copy BLOCKS blocks of SIZE bytes (512), or all, of an image, after skipping some.

{common.option_help(_TABLE)}"""

_MAX_BLOCK: Final = (1 << 31) - 1


class _Operands(NamedTuple):
    """bs, count (-1: all) and skip as numbers; if and of as given."""

    block: int
    blocks: int
    skip: int
    source: str
    target: str


def run(arguments: list[str]) -> int:
    given = common.parse(_TABLE, arguments)
    operands = _operands(given.positional)
    format = given.last("output-format", "raw")
    declared_options(format)
    with common.open_image(operands.source, given, format=given.last("format")) as source:
        total = align_up(source.size, SECTOR)
        start = operands.skip * operands.block
        if start > total:
            common.report(f"{operands.source}: cannot skip to specified offset")
            start = total
        # Blocks are counted behind what was skipped.
        length = total - start
        if operands.blocks >= 0:
            length = min(length, operands.blocks * operands.block)
        from ..jobs.convert import check_not_source

        check_not_source([source], operands.target)
        _copy(source, start, length, operands.target, format, given)
    return 0


def _operands(words: list[str]) -> _Operands:
    """:raises UsageError: not dd's"""
    values: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in ("bs", "count", "skip", "if", "of"):
            raise common.UsageError(f"unrecognized operand {word}")
        values[key] = value
    if "if" not in values or "of" not in values:
        raise common.UsageError("must specify both input and output files")
    return _Operands(
        common.size_argument(values.get("bs", "512"), "bs", least=1, most=_MAX_BLOCK),
        common.size_argument(values["count"], "count") if "count" in values else -1,
        common.size_argument(values.get("skip", "0"), "skip"),
        values["if"],
        values["of"],
    )


def _copy(source: Image, start: int, length: int, target: str, format: str, given: common.Given) -> None:
    """Make ``target`` and fill it; everything is written, zeroes too."""
    from ..graph.creating import create
    from ..jobs.blockcopy import COPY, BlockCopy, CopySettings, Segment, SourceDisk
    from ..jobs.convert import MadeFiles
    from ..jobs.job import Control
    from .progress import Display

    made = MadeFiles(target, {})
    try:
        create(target, format, align_up(length, SECTOR))
        made.begun = True
        with common.open_image(target, given, format=format, image_opts=False, read_only=False,
                               force_share=False) as image:  # fmt: skip
            control = Control(length)
            copy = BlockCopy(SourceDisk([source], skip=start, size=length), image, CopySettings(sparse=0))
            with Display(control, "dd", "none"):
                copy.run([Segment(0, length, COPY)] if length else [], control)
    except BaseException as error:
        if isinstance(error, ByreError):
            error.where = error.where or target
        left = made.remove(error)
        if left:
            common.warn(left)
        raise
