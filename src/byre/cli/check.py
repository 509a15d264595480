"""``check``: are the metadata of an image consistent, and with ``-r``: mend them.

Without ``-r`` the image is opened read-only and not one byte of it changes. Exit codes: 0 consistent (now),
1 the check could not be completed, 2 corrupt, 3 leaks only, 63 the format has no checks.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

from ..errors import printable
from . import common
from .output import ordered, print_json

if TYPE_CHECKING:
    from ..formats.abilities import Checkable, CheckResult

__all__ = ["HELP", "run"]

_TABLE: Final = (
    common.FORMAT,
    common.IMAGE_OPTS,
    common.OBJECT,
    common.OUTPUT,
    common.Switch("repair", "r", "repair", "leaks|all", "mend leaked clusters, or everything"),
    common.SOURCE_CACHE,
    common.FORCE_SHARE,
    common.QUIET,
    common.PROGRESS,
)

HELP: Final = f"""\
usage: byre check [OPTIONS] FILENAME
Check the metadata of an image. Exit code: 0 consistent, 1 not completed, 2 corrupt, 3 leaks, 63 no checks.

{common.option_help(_TABLE)}"""

EXIT_CORRUPT: Final = 2
EXIT_LEAKS: Final = 3
EXIT_UNSUPPORTED: Final = 63

_KEYS: Final = (
    "image-end-offset",
    "compressed-clusters",
    "total-clusters",
    "corruptions",
    "corruptions-fixed",
    "check-errors",
    "leaks",
    "leaks-fixed",
    "allocated-clusters",
    "filename",
    "format",
    "fragmented-clusters",
)


def run(arguments: list[str]) -> int:
    from ..formats.abilities import Checkable

    given = common.parse(_TABLE, arguments)
    fix = given.last("repair")
    if given.has("repair") and fix not in ("leaks", "all"):
        raise common.UsageError(f"unknown value for -r (expecting 'leaks' or 'all'): {fix}")
    if len(given.positional) != 1:
        raise common.UsageError("expecting one image file name")
    as_json = common.output_format(given) == "json"
    name = given.positional[0]
    with common.open_image(
        name,
        given,
        format=given.last("format"),
        read_only=not fix,
        cache=given.last("source-cache", "writeback"),
        backing=False,
        check=True,
    ) as image:
        node = image.node
        if not isinstance(node, Checkable):
            common.report("This image format does not support checks")  # scripts look for these very words
            return EXIT_UNSUPPORTED
        result = _check(node, fix, quiet=as_json or given.has("quiet"), progress=given.has("progress"))
        if not given.has("quiet"):
            if as_json:
                _print_json(result, name, image.format)
            else:
                _print_human(result)
    if result.check_errors:
        common.report(f"{name}: the check could not be completed")
        return 1
    if result.corruptions:
        return EXIT_CORRUPT
    return EXIT_LEAKS if result.leaks else 0


def _check(node: Checkable, fix: str, *, quiet: bool, progress: bool) -> CheckResult:
    """Check, mend if asked, and if that changed something check again; the counts of what was mended are kept."""
    result = _pass(node, fix, quiet=quiet, progress=progress)
    if not result.corruptions_fixed and not result.leaks_fixed:
        return result
    if not quiet:
        sys.stdout.write(
            "The following inconsistencies were found and repaired:\n\n"
            f"    {result.leaks_fixed} leaked clusters\n"
            f"    {result.corruptions_fixed} corruptions\n\n"
            "Double checking the fixed image now...\n"
        )
    again = _pass(node, "", quiet=quiet, progress=progress)
    return again._replace(leaks_fixed=result.leaks_fixed, corruptions_fixed=result.corruptions_fixed)


def _pass(node: Checkable, fix: str, *, quiet: bool, progress: bool) -> CheckResult:
    from ..jobs.job import Control
    from .progress import Display, mode_for

    control = Control(measure=progress)
    with Display(control, "check", mode_for(progress, "", quiet)):
        result = node.check(control, fix)
    for message in result.messages:
        sys.stderr.write(f"{printable(message)}\n".replace("\\nUse ", "\nUse "))  # one of them has two lines
    return result


def _print_json(result: CheckResult, name: str, format_name: str) -> None:
    counts: dict[str, object] = {
        key.replace("_", "-"): value or None for key, value in result._asdict().items() if key != "messages"
    }
    print_json(ordered({**counts, "check-errors": result.check_errors, "filename": name, "format": format_name}, _KEYS))


def _print_human(result: CheckResult) -> None:
    lines: list[str] = []
    if not (result.corruptions or result.leaks or result.check_errors):
        lines.append("No errors were found on the image.")
    if result.corruptions:
        lines += ["", f"{result.corruptions} errors were found on the image.",
                  "Data may be corrupted, or further writes to the image may corrupt it."]  # fmt: skip
    if result.leaks:
        lines += ["", f"{result.leaks} leaked clusters were found on the image.",
                  "This means waste of disk space, but no harm to data."]  # fmt: skip
    if result.check_errors:
        lines += ["", f"{result.check_errors} internal errors have occurred during the check."]
    if result.total_clusters and result.allocated_clusters:
        allocated = result.allocated_clusters
        lines.append(
            f"{allocated}/{result.total_clusters} = {allocated * 100 / result.total_clusters:.2f}% allocated, "
            f"{result.fragmented_clusters * 100 / allocated:.2f}% fragmented, "
            f"{result.compressed_clusters * 100 / allocated:.2f}% compressed clusters"
        )
    if result.image_end_offset:
        lines.append(f"Image end offset: {result.image_end_offset}")
    sys.stdout.write("\n".join(lines) + "\n")
