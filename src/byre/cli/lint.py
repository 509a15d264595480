"""``lint``: would a place take this image, and if not, why."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

from ..profiles import PROFILES, lint, profile
from . import common

if TYPE_CHECKING:
    from ..profiles import Finding, Profile

__all__ = ["HELP", "run"]

_TABLE: Final = (
    common.Switch("for", "", "for", "NAME", "the place: " + ", ".join(row.name for row in PROFILES)),
    common.FORMAT,
    common.Switch("output", "", "output", "human|json", "how to print what was found"),
    common.IMAGE_OPTS,
    common.OBJECT,
    common.FORCE_SHARE,
)

HELP: Final = f"""\
usage: byre lint --for NAME [OPTIONS] FILENAME
Say whether a place would take the image, and if not, why and what to do. Only metadata is read; 'byre check' looks
deeper. 'byre convert --for NAME' makes an image that passes. For gcp, FILENAME may be the archive (.tar.gz).

{common.option_help(_TABLE)}
Exit code 0: it would be taken, 1: it would be refused, or could not be opened."""


def run(arguments: list[str]) -> int:
    given = common.parse(_TABLE, arguments)
    if not given.has("for"):
        raise common.UsageError("must specify the place (--for)")
    place = profile(given.last("for"))
    output = given.last("output", "human")
    if output not in ("human", "json"):
        raise common.UsageError(f"--output must be used with human or json as argument, not {output!r}")
    if len(given.positional) != 1:
        raise common.UsageError("expecting one image file name")
    name = given.positional[0]
    if place.name == "gcp" and name.endswith(".tar.gz"):
        from .delivery import lint_archive

        findings = lint_archive(name, place)
    else:
        with common.open_image(name, given, format=given.last("format"), backing=False, no_io=True) as image:
            findings = lint(image, place)
    accepted = not any(finding.refused for finding in findings)
    if output == "json":
        _print_json(name, place, findings, accepted)
    else:
        _print_text(name, place, findings, accepted)
    return 0 if accepted else 1


def _print_text(name: str, place: Profile, findings: list[Finding], accepted: bool) -> None:
    from ..errors import printable

    for finding in findings:
        hint = f" ({finding.fix})" if finding.fix else ""
        sys.stdout.write(f"{'refused' if finding.refused else 'note'}: {printable(finding.message)}{hint}\n")
    sys.stdout.write(f"{printable(name)}: {place.title} {'takes' if accepted else 'refuses'} this image\n")


def _print_json(name: str, place: Profile, findings: list[Finding], accepted: bool) -> None:
    import json

    rows = [
        {"severity": "refused" if finding.refused else "note", "message": finding.message, "fix": finding.fix}
        for finding in findings
    ]
    sys.stdout.write(
        json.dumps({"filename": name, "for": place.name, "accepted": accepted, "findings": rows}, indent=4)
    )
    sys.stdout.write("\n")
