"""``rebase``: give an overlay another backing file, or none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ..catalog import driver
from ..errors import ByreError, InvalidArgument
from . import common
from .progress import Display, mode_for

if TYPE_CHECKING:
    from ..image import Image
    from ..jobs.rebase import NewBacking

__all__ = ["HELP", "run"]

_TABLE: Final = (
    common.FORMAT,
    common.Switch("backing-file", "b", "backing", "FILENAME", 'the new backing file; "" for none'),
    common.Switch("backing-format", "F", "backing-format", "FMT", "format of the new backing file"),
    common.Switch("unsafe", "u", "backing-unsafe", "", "change the name only: the new file holds what the old one did"),
    common.Switch("compress", "c", "compress", "", "write compressed clusters"),
    common.Switch("cache", "t", "cache", "CACHE", "cache mode of the image (writeback)"),
    common.SOURCE_CACHE._replace(help="cache mode of the new backing file (writeback)"),
    *common.JOURNAL,
    common.PROGRESS,
    common.Switch("progress-kind", "", "progress", "bar|text|json", "how to show the progress"),
    common.QUIET,
    common.FORCE_SHARE._replace(help="open the new backing file although another program writes it"),
    common.IMAGE_OPTS,
    common.OBJECT,
)

HELP: Final = f"""\
usage: byre rebase [OPTIONS] FILENAME
Give an image another backing file, or none. What would read differently is copied into the image first.

{common.option_help(_TABLE)}"""


def run(arguments: list[str]) -> int:
    given = common.parse(_TABLE, arguments)
    if len(given.positional) != 1:
        raise common.UsageError("expecting one image file name")
    from ..opening import cache_flags

    unsafe = given.has("unsafe")
    if not unsafe and not given.has("backing-file"):
        raise common.UsageError("must specify backing file (-b) or use unsafe mode (-u)")
    kind = given.last("progress-kind")
    if kind not in ("", "bar", "text", "json"):
        raise common.UsageError("--progress must be bar, text or json")
    mode = mode_for(given.has("progress"), kind, given.has("quiet"))
    cache, source_cache = given.last("cache", "writeback"), given.last("source-cache", "writeback")
    cache_flags(source_cache)
    if common.journal_path(given) and unsafe:
        raise common.UsageError("--journal is of no use with -u: nothing is copied")
    format = given.last("backing-format")
    if format:
        _check_format(format)
    with common.open_image(given.positional[0], given, format=given.last("format"), read_only=False, cache=cache,
                           force_share=False, backing=not unsafe, discard="ignore") as image:  # fmt: skip
        _rebase(image, given, source_cache, mode)
    return 0


def _check_format(name: str) -> None:
    """:raises InvalidArgument: no such format"""
    try:
        driver(name)
    except ByreError:
        raise InvalidArgument(f"invalid format name: '{name}'") from None


def _rebase(image: Image, given: common.Given, source_cache: str, mode: str) -> None:
    from ..jobs.rebase import NewBacking, RebaseJob, check_rebase, rebase_journal

    name = given.last("backing-file")
    backing = NewBacking(name, given.last("backing-format") if name else "")
    unsafe, compress = given.has("unsafe"), given.has("compress")
    check_rebase(image, backing, compress=compress)
    below = _open_below(image, backing, given, source_cache) if name and not unsafe else None
    path = common.journal_path(given)
    journal = None
    try:
        if path:
            journal = rebase_journal(path, image, below, resume=given.has("resume"))
        job = RebaseJob(image, backing, below, unsafe=unsafe, compress=compress, keep_data=common.as_peer(),
                        measure=mode != "none", journal=journal)  # fmt: skip
        with Display(job.control, "rebase", mode, least=2.0):
            job.execute()
    finally:
        if journal is not None:
            journal.close()
        if below is not None:
            below.close()


def _open_below(image: Image, backing: NewBacking, given: common.Given, cache: str) -> Image:
    """The new backing file: a layer of the chain if it is one, else opened as the user named it.

    :raises ByreError: it cannot be opened
    """
    from ..graph.layers import find_layer, same_file
    from ..graph.opening import has_protocol, resolve_backing
    from ..image import Image

    layer = find_layer(image.node, backing.name)
    if layer is not None and layer.driver == driver(backing.format).name:
        return Image(layer, image.graph, name="rebase")
    path = resolve_backing(image.filename, backing.name)
    if not has_protocol(path) and same_file(image.node, path):
        raise InvalidArgument("the new backing file is the image itself", where=backing.name)
    try:
        return common.open_image(path, given, format=backing.format,
                                 image_opts=False, cache=cache, graph=image.graph)  # fmt: skip
    except ByreError as error:
        error.message = f"could not open new backing file '{backing.name}': {error.message}"
        error.where = ""
        raise
