"""``mirror``: copy a disk to another with the mirror job, which notices what others write meanwhile.

On the command line nobody else writes, so the job ends as soon as both disks are the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ..errors import InvalidArgument
from . import common
from .targets import ERROR_SWITCHES, TARGET_SWITCHES, Target, Watch, error_policies, print_options, record_backing

if TYPE_CHECKING:
    from ..image import Image
    from ..jobs.mirror import MirrorOptions

__all__ = ["HELP", "run"]

_TABLE: Final = (
    common.FORMAT._replace(help="format of the source; probed if it is not given"),
    *TARGET_SWITCHES,
    common.Switch("sync", "s", "sync", "full|top|none", "copy the whole disk (default), its top layer, nothing"),
    common.Switch("granularity", "g", "granularity", "SIZE", "copy in units of this; a power of 2 from 512 to 64M"),
    common.Switch("buffer", "", "buf-size", "SIZE", "data in flight at most (16M)"),
    common.Switch("copy-mode", "", "copy-mode", "MODE", "background or write-blocking"),
    common.Switch("unmap", "", "unmap", "on|off", "whether zeroes may become holes (on)"),
    common.Switch("target-is-zero", "", "target-is-zero", "", "the existing target reads as zeroes"),
    *ERROR_SWITCHES,
)

HELP: Final = f"""\
usage: byre mirror [OPTIONS] SOURCE TARGET
Make TARGET the same as SOURCE. What is a hole in both stays one.

{common.option_help(_TABLE)}
With -s top a new target gets the backing file of the source, and only what the top layer holds is copied.
POLICY is report (fail), ignore (try again later), stop (pause, and try again after some seconds), enospc or auto
(stop when the disk is full, else fail).

Examples:
  byre mirror -p disk.qcow2 copy.qcow2                   a copy in the same format
  byre mirror -O raw -r 50M disk.qcow2 /dev/vg/lv -n     onto an existing device, 50 MiB per second
  byre mirror -s top --on-target-error enospc overlay.qcow2 elsewhere.qcow2"""


def run(arguments: list[str]) -> int:
    given = common.parse(_TABLE, arguments)
    options = common.create_options(given.all("options"))
    if options is None:
        print_options(given)
        return 0
    if len(given.positional) != 2:
        raise common.UsageError("expecting the names of a source and a target")
    if given.has("options") and given.has("no-create"):
        raise common.UsageError("-o has no effect when skipping image creation")
    if given.has("target-is-zero") and not given.has("no-create"):
        raise common.UsageError("--target-is-zero requires use of -n flag")
    watch = Watch(given)
    wanted, policies = _options(given), error_policies(given)
    with common.open_image(given.positional[0], given, format=given.last("format"),
                           cache=given.last("source-cache", "writeback")) as source:  # fmt: skip
        if wanted.sync != "full" and not given.has("no-create"):
            _over_backing(source, options)
        with Target(given, source, options) as target:
            _mirror(source, target, wanted, policies, watch)
    return 0


def _options(given: common.Given) -> MirrorOptions:
    from ..jobs.mirror import MirrorOptions

    unmap = given.last("unmap", "on")
    if unmap not in ("on", "off"):
        raise InvalidArgument(f"--unmap is {unmap!r}: expected on or off")
    options = MirrorOptions(
        sync=given.last("sync", "full"),
        copy_mode=given.last("copy-mode", "background"),
        granularity=common.size_argument(given.last("granularity"), "granularity") if given.has("granularity") else 0,
        buffer_size=common.size_argument(given.last("buffer"), "buffer size") if given.has("buffer") else 0,
        unmap=unmap == "on",
        target_is_zero=given.has("target-is-zero"),
    )
    options.check()
    return options


def _over_backing(source: Image, options: dict[str, str]) -> None:
    from ..graph import chain

    layers = chain.layers(source.node)
    if len(layers) > 1 and "backing_file" not in options:
        record_backing(options, layers[1])


def _mirror(source: Image, target: Image, options: MirrorOptions, policies: tuple[str, str], watch: Watch) -> None:
    from ..jobs.mirror import MirrorJob, mirror_journal

    path = common.journal_path(watch.given)
    journal = mirror_journal(path, source, target, options, resume=watch.given.has("resume")) if path else None
    try:
        job = MirrorJob(source, target, options, speed=watch.rate, on_source_error=policies[0],
                    on_target_error=policies[1], journal=journal)  # fmt: skip
        # A soft cancellation: the target is a copy, and nobody is led to it.
        watch.run(job, ready=job.cancel)
    finally:
        if journal is not None:
            journal.close()
