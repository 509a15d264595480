"""``commit``: write what an overlay holds into its backing file, and empty it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

from ..errors import InvalidArgument, NotFound
from . import common
from .progress import Display, mode_for

if TYPE_CHECKING:
    from ..graph.node import Node
    from ..image import Image

__all__ = ["HELP", "run"]

_TABLE: Final = (
    common.FORMAT,
    common.Switch("base", "b", "base", "FILENAME", "down to this backing file; the image keeps what it holds (-d)"),
    common.Switch("drop", "d", "drop", "", "do not empty the image"),
    common.Switch("rate", "r", "rate-limit", "RATE", "bytes per second"),
    common.Switch("cache", "t", "cache", "CACHE", "cache mode (writeback)"),
    *common.JOURNAL,
    common.PROGRESS,
    common.Switch("progress-kind", "", "progress", "bar|text|json", "how to show the progress"),
    common.QUIET,
    common.IMAGE_OPTS,
    common.OBJECT,
)

HELP: Final = f"""\
usage: byre commit [OPTIONS] FILENAME
Write what an image holds into its backing file, which grows if it is shorter.

{common.option_help(_TABLE)}
After a crash or an interruption, the same command with --resume goes on where --journal says it was."""


def run(arguments: list[str]) -> int:
    given = common.parse(_TABLE, arguments)
    if len(given.positional) != 1:
        raise common.UsageError("expecting one image file name")
    kind = given.last("progress-kind")
    if kind not in ("", "bar", "text", "json"):
        raise common.UsageError("--progress must be bar, text or json")
    mode = mode_for(given.has("progress"), kind, given.has("quiet"))
    rate = common.size_argument(given.last("rate"), "rate limit") if given.has("rate") else 0
    cache = given.last("cache", "writeback")
    name = given.positional[0]
    with common.open_image(name, given, format=given.last("format"), read_only=False, cache=cache) as image:
        _commit(image, name, given, rate, mode)
    if not given.has("quiet"):
        sys.stdout.write("Image committed.\n")
    return 0


def _commit(image: Image, name: str, given: common.Given, rate: int, mode: str) -> None:
    from ..jobs.commit import CommitJob, commit_journal

    empty = not (given.has("drop") or given.has("base"))
    base = _base(image, name, given)
    path = common.journal_path(given)
    journal = commit_journal(path, image, base, resume=given.has("resume")) if path else None
    try:
        job = CommitJob(image, base, empty=empty, speed=rate, measure=mode != "none", journal=journal)
        with Display(job.control, "commit", mode):
            job.execute()
    finally:
        if journal is not None:
            journal.close()


def _base(image: Image, name: str, given: common.Given) -> Node:
    """:raises NotFound: the chain has no such file
    :raises InvalidArgument: there is no chain
    """
    from ..graph import chain
    from ..graph.layers import find_layer

    layers = chain.layers(image.node)
    if not given.has("base"):
        if len(layers) < 2:
            raise InvalidArgument("the image does not have a backing file", where=name)
        return layers[1]
    wanted = given.last("base")
    found = find_layer(image.node, wanted)
    if found is None:
        raise NotFound(f"did not find '{wanted}' in the backing chain", where=name)
    return found
