"""``stream``: an image takes in what lies in its backing files, and then does without them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

from ..errors import NotFound
from . import common
from .targets import Watch

if TYPE_CHECKING:
    from ..graph.node import Node
    from ..image import Image

__all__ = ["HELP", "run"]

_TABLE: Final = (
    common.FORMAT,
    common.Switch("base", "b", "base", "FILENAME", "the layer that stays the backing file; none if not given"),
    common.Switch("bottom", "", "bottom", "FILENAME", "instead of -b: the last layer that is taken in"),
    common.Switch("layer", "l", "layer", "FILENAME", "take in what lies below this layer, not below the image"),
    common.Switch("backing-file", "", "backing-file", "NAME", "how the image is to name its backing file"),
    common.Switch("rate", "r", "rate-limit", "RATE", "bytes per second"),
    common.Switch("on-error", "", "on-error", "POLICY", "what to do about errors (below)"),
    common.Switch("cache", "t", "cache", "CACHE", "cache mode (writeback)"),
    *common.JOURNAL,
    common.PROGRESS,
    common.Switch("progress-kind", "", "progress", "bar|text|json", "how to show the progress"),
    common.QUIET,
    common.IMAGE_OPTS,
    common.OBJECT,
)

HELP: Final = f"""\
usage: byre stream [OPTIONS] FILENAME
Copy what an image shows of its backing files into it, and make it stand on the base, or alone.

{common.option_help(_TABLE)}
POLICY is report (fail), ignore (go on, and fail in the end), stop (pause, and try again after some seconds), enospc or
auto (stop when the disk is full, else fail).

Examples:
  byre stream -p disk.qcow2                              no backing file any more
  byre stream -b base.qcow2 -r 50M disk.qcow2            on base.qcow2, without the layers between
  byre stream -l middle.qcow2 disk.qcow2                 a layer further down takes in what lies below it"""


def run(arguments: list[str]) -> int:
    given = common.parse(_TABLE, arguments)
    if len(given.positional) != 1:
        raise common.UsageError("expecting one image file name")
    if given.has("base") and given.has("bottom"):
        raise common.UsageError("-b and --bottom exclude each other")
    from ..jobs.errors_policy import check_policy

    watch = Watch(given)
    policy = check_policy(given.last("on-error", "report"))
    # A layer further down is opened for writing by the job, and the image itself is not written to then.
    with common.open_image(given.positional[0], given, format=given.last("format"), read_only=given.has("layer"),
                           cache=given.last("cache", "writeback"), force_share=False) as image:  # fmt: skip
        _stream(image, given, policy, watch)
    if not given.has("quiet") and given.last("progress-kind") != "json":
        sys.stdout.write("Image streamed.\n")
    return 0


def _stream(image: Image, given: common.Given, policy: str, watch: Watch) -> None:
    from ..jobs.stream import StreamJob, stream_journal

    node = _layer(image, given, "layer") or image.node
    base, bottom = _layer(image, given, "base"), _layer(image, given, "bottom")
    name = given.last("backing-file") if given.has("backing-file") else None
    path = common.journal_path(given)
    journal = stream_journal(path, node, base or bottom, resume=given.has("resume")) if path else None
    try:
        watch.run(StreamJob(image.graph, node, base, bottom=bottom, backing_file=name, on_error=policy,
                            speed=watch.rate, journal=journal))  # fmt: skip
    finally:
        if journal is not None:
            journal.close()


def _layer(image: Image, given: common.Given, key: str) -> Node | None:
    """The layer that the option ``key`` names.

    :raises NotFound: the chain has none
    """
    if not given.has(key):
        return None
    from ..graph.layers import find_layer

    wanted = given.last(key)
    found = find_layer(image.node, wanted)
    if found is None:
        raise NotFound(f"did not find '{wanted}' in the backing chain", where=given.positional[0])
    return found
