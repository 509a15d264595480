"""``amend``: change options of an existing image."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

from ..catalog import driver
from ..errors import InvalidArgument, NotSupported
from . import common
from .progress import Display, mode_for

if TYPE_CHECKING:
    from ..image import Image
    from ..jobs.amend import AmendJob
    from ..options import OptionSet

__all__ = ["HELP", "run"]

_TABLE: Final = (
    common.Switch("options", "o", "", "OPTIONS", "what to change, key=value,...; 'help' lists them"),
    common.FORMAT,
    common.Switch("cache", "t", "cache", "CACHE", "cache mode (writeback)"),
    common.Switch("force", "", "force", "", "allow what may make data unreadable for ever"),
    common.PROGRESS,
    common.Switch("progress-kind", "", "progress", "bar|text|json", "how to show the progress"),
    common.QUIET,
    common.IMAGE_OPTS,
    common.OBJECT,
)

HELP: Final = f"""\
usage: byre amend -o OPTIONS [OPTIONS] FILENAME
Change options of an image. What cannot be done is refused before anything changes; when interrupted, the image is
intact.

{common.option_help(_TABLE)}"""


def run(arguments: list[str]) -> int:
    given = common.parse(_TABLE, arguments)
    if not given.has("options"):
        raise common.UsageError("must specify options (-o)")
    kind = given.last("progress-kind")
    if kind not in ("", "bar", "text", "json"):
        raise common.UsageError("--progress must be bar, text or json")
    mode = mode_for(given.has("progress"), kind, given.has("quiet"))
    wanted = common.create_options(given.all("options"))
    if wanted is None and given.has("format"):
        return _print_options(given.last("format"))
    if len(given.positional) != 1:
        raise common.UsageError("expecting one image file name")
    name = given.positional[0]
    cache = given.last("cache", "writeback")
    with common.open_image(name, given, format=given.last("format"), read_only=False, cache=cache,
                           resizable="size" in (wanted or {})) as image:  # fmt: skip
        if wanted is None:
            return _print_options(image.format)
        return _amend(image, wanted, given, mode)


def _declared(format: str) -> OptionSet:
    """:raises NotSupported: nothing of the format can be changed"""
    declared: OptionSet | None = getattr(driver(format).load(), "AMEND_OPTIONS", None)
    if declared is None:
        raise NotSupported(f"Format driver '{format}' does not support option amendment")
    return declared


def _print_options(format: str) -> int:
    lines = [f"Amend options for '{format}':"]
    lines += [common.option_line(option) for option in sorted(_declared(format).options, key=lambda each: each.name)]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _amend(image: Image, wanted: dict[str, str], given: common.Given, mode: str) -> int:
    from ..jobs.amend import AmendJob

    declared = _declared(image.format)
    unknown = [name for name in wanted if name not in declared]
    if unknown:
        common.report(InvalidArgument(f"Invalid parameter '{unknown[0]}'"))
        if unknown[0] in driver(image.format).load().CREATE_OPTIONS:
            sys.stderr.write("This option is only supported for image creation\n")
        return 1
    options = declared.parse(dict(wanted), what=f"format {image.format!r}")
    job = AmendJob(image, options, force=given.has("force"), secrets=given.secrets(), measure=mode != "none")
    try:
        if mode == "text":
            _execute_with_text(job)
        else:
            with Display(job.control, "amend", mode):
                job.execute()
        common.warn_graph(image.graph)
    except InvalidArgument as error:
        if not (common.as_peer() and "rebase" in error.hint):
            raise
        error.hint = ""
        common.report(error)
        sys.stderr.write(f"You can use '{common.PROGRAM.get()} rebase' instead.\n")  # scripts look for these words
        return 1
    return 0


def _execute_with_text(job: AmendJob) -> None:
    """Percents as the peer prints them: step by step, not from time to time."""
    control = job.control
    shown = -100.0

    def tell(percent: float, *, always: bool = False) -> None:
        nonlocal shown
        if always or percent - shown >= 1:
            shown = percent
            sys.stdout.write(f"    ({percent:3.2f}/100%)\r")
            sys.stdout.flush()

    control.on_advance = lambda: tell(100.0 * min(control.done, control.total) / max(control.total, 1))
    tell(0.0)
    try:
        with Display(control, "amend", "none"):
            job.execute()
        tell(100.0, always=True)
    finally:
        sys.stdout.write("\n")
