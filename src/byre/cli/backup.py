"""``backup``: copy a disk, or what changed since the backup before, with the backup job."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ..errors import ByreError, InvalidArgument, NotSupported
from . import common
from .targets import ERROR_SWITCHES, TARGET_SWITCHES, Target, Watch, error_policies, print_options, record_backing

if TYPE_CHECKING:
    from ..image import Image
    from ..jobs.backup import BackupOptions

__all__ = ["HELP", "run"]

_TABLE: Final = (
    common.FORMAT._replace(help="format of the source; probed if it is not given"),
    *TARGET_SWITCHES,
    common.Switch("sync", "s", "sync", "MODE", "full (default), top, incremental or bitmap (below)"),
    common.Switch("bitmap", "", "bitmap", "NAME", "dirty bitmap of the source"),
    common.Switch("bitmap-mode", "", "bitmap-mode", "MODE", "when to clear it: on-success (default), never or always"),
    common.Switch("backing", "B", "backing", "FILENAME", "the backup before: the new target becomes its overlay"),
    common.Switch("backing-format", "F", "backing-format", "FMT", "format of the backup before"),
    common.Switch("compress", "c", "compress", "", "write compressed clusters"),
    common.Switch("workers", "m", "max-workers", "COUNT", "how many threads copy, 1 to 64"),
    common.Switch("chunk", "", "max-chunk", "SIZE", "copy at most so much at once (1M)"),
    *ERROR_SWITCHES,
)

HELP: Final = f"""\
usage: byre backup [OPTIONS] SOURCE TARGET
Copy SOURCE, or what changed in it, to TARGET.

{common.option_help(_TABLE)}
MODE of --sync: full copies the whole disk; top what its top layer holds, into an overlay of the same backing file;
incremental and bitmap what is dirty in the bitmap. A bitmap is cleared only when the backup is safe on the disk;
if it fails or is interrupted, the bitmap is as it was.
POLICY is report (fail), ignore (try again later), stop (pause, and try again after some seconds), enospc or auto
(stop when the disk is full, else fail).

Examples:
  byre bitmap --add disk.qcow2 weekly                    from now on changes are remembered
  byre backup -c disk.qcow2 full.qcow2 --bitmap weekly   everything, and changes are counted from here
  byre backup -s incremental --bitmap weekly -B full.qcow2 -F qcow2 disk.qcow2 monday.qcow2
  byre backup -s incremental --bitmap weekly -B monday.qcow2 -F qcow2 disk.qcow2 tuesday.qcow2"""


def run(arguments: list[str]) -> int:
    given = common.parse(_TABLE, arguments)
    options = common.create_options(given.all("options"))
    if options is None:
        print_options(given)
        return 0
    _check(given)
    watch = Watch(given)
    wanted, policies = _options(given), error_policies(given)
    with common.open_image(given.positional[0], given, format=given.last("format"),
                           read_only=wanted.bitmap_mode in ("", "never"), discard="unmap",
                           cache=given.last("source-cache", "writeback")) as source:  # fmt: skip
        if wanted.bitmap:
            _check_bitmap(source, wanted.bitmap)
        _settle_backing(given, source, options, wanted.sync)
        with Target(given, source, options) as target:
            _backup(source, target, wanted, policies, watch)
    return 0


def _check(given: common.Given) -> None:
    """:raises UsageError: options that exclude or need each other"""
    if len(given.positional) != 2:
        raise common.UsageError("expecting the names of a source and a target")
    for condition, message in (
        (given.has("options") and given.has("no-create"), "-o has no effect when skipping image creation"),
        (given.has("backing") and given.has("no-create"), "-B has no effect when skipping image creation"),
        (given.has("backing-format") and not given.has("backing"), "-F needs -B"),
        (given.has("bitmap-mode") and not given.has("bitmap"), "--bitmap-mode needs --bitmap"),
        (given.last("sync") == "none", "--sync none is for disks that are in use"),
        (given.last("sync") in ("incremental", "bitmap") and not given.has("bitmap"),
         f"--sync {given.last('sync')} needs --bitmap"),
    ):  # fmt: skip
        if condition:
            raise common.UsageError(message)


def _options(given: common.Given) -> BackupOptions:
    from ..jobs.backup import MOST_WORKERS, BackupOptions

    workers = given.last("workers", "0")
    if given.has("workers") and not (workers.isascii() and workers.isdigit() and 1 <= int(workers) <= MOST_WORKERS):
        raise InvalidArgument(f"invalid number of workers {workers!r}: allowed are 1 to {MOST_WORKERS}")
    return BackupOptions(
        sync=given.last("sync", "full"),
        bitmap=given.last("bitmap"),
        bitmap_mode=given.last("bitmap-mode", "on-success" if given.has("bitmap") else ""),
        compress=given.has("compress"),
        max_workers=int(workers),
        max_chunk=common.size_argument(given.last("chunk"), "chunk size") if given.has("chunk") else 0,
    ).checked()


def _check_bitmap(source: Image, name: str) -> None:
    """Refuse before a target is made."""
    from ..filters.copy_before_write import find_bitmap

    try:
        find_bitmap(source.node, name)
    except ByreError as error:
        error.where = error.where or source.filename
        raise


def _settle_backing(given: common.Given, source: Image, options: dict[str, str], sync: str) -> None:
    """Put -B and -F into the options; without them the target of ``top`` shares the backing file of the source."""
    if given.has("no-create"):
        return
    if given.has("backing"):
        options["backing_file"] = given.last("backing")
        if given.has("backing-format"):
            options["backing_fmt"] = given.last("backing-format")
        elif "backing_fmt" not in options:
            raise InvalidArgument("use of a backing file requires an explicit backing format", hint="use -F")
    elif sync == "top" and "backing_file" not in options:
        from ..graph import chain

        layers = chain.layers(source.node)
        if len(layers) > 1:
            record_backing(options, layers[1])


def _backup(source: Image, target: Image, options: BackupOptions, policies: tuple[str, str], watch: Watch) -> None:
    from ..formats.abilities import HasCompression
    from ..jobs.backup import BackupJob, backup_journal

    if options.compress and not isinstance(target.node, HasCompression):
        raise NotSupported("compression not supported for this file format", where=target.filename)
    path = common.journal_path(watch.given)
    journal = backup_journal(path, source, target, options, resume=watch.given.has("resume")) if path else None
    try:
        job = BackupJob(source, target, options, speed=watch.rate, on_source_error=policies[0],
                    on_target_error=policies[1], journal=journal)  # fmt: skip
        watch.run(job)
    finally:
        if journal is not None:
            journal.close()
