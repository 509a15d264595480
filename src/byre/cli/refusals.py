"""Words about the program itself: help, version, and verbs that are not here yet."""

from __future__ import annotations

from .. import __version__
from ..errors import NotSupported
from ..typing import Final

__all__ = ["general_help", "refuse", "supported_formats", "version"]

_PEER_RELEASE: Final = "10.0.0"
"""The release whose options and output this program has."""

_MISSING: Final = {
    "daemon": "the storage daemon",
    "qemu-storage-daemon": "the storage daemon",
}

_VERBS: Final = """\
  amend [--object DEF] [--image-opts] [-p] [-q] [-f FMT] [-t CACHE] [--force] -o OPTIONS FILENAME
  bench [-c COUNT] [-d DEPTH] [-f FMT] [--flush-interval=N] [-i AIO] [-n] [--no-drain] [-o OFFSET] [--pattern=PATTERN] \
[-q] [-s BUFFER_SIZE] [-S STEP_SIZE] [-t CACHE] [-w] [-U] FILENAME
  bitmap (--merge SOURCE | --add | --remove | --clear | --enable | --disable)... [-b SOURCE_FILE [-F SOURCE_FMT]] \
[-g GRANULARITY] [--object DEF] [--image-opts | -f FMT] FILENAME BITMAP
  check [--object DEF] [--image-opts] [-q] [-f FMT] [--output=human|json] [-r leaks|all] [-T SRC_CACHE] [-U] FILENAME
  commit [--object DEF] [--image-opts] [-q] [-f FMT] [-t CACHE] [-b BASE] [-d] [-r RATE_LIMIT] [-p] FILENAME
  compare [--object DEF] [--image-opts] [-f FMT] [-F FMT] [-T SRC_CACHE] [-p] [-q] [-s] [-U] FILENAME1 FILENAME2
  convert [--object DEF] [--image-opts] [--target-image-opts] [--target-is-zero] [-U] [-C] [-c] [-p] [-q] [-n] \
[-f FMT] [-t CACHE] [-T SRC_CACHE] [-O FMT] [-B BACKING_FILE [-F BACKING_FMT]] [-o OPTIONS] [-S SPARSE_SIZE] \
[-r RATE_LIMIT] [-l SNAPSHOT_PARAM] [-m COUNT] [-W] [--salvage] [--for NAME] \
[--bitmaps [--skip-broken-bitmaps]] FILENAME... OUTPUT_FILENAME
  create [--object DEF] [-q] [-f FMT] [-b BACKING_FILE [-F BACKING_FMT]] [-u] [-o OPTIONS] FILENAME [SIZE]
  dd [--image-opts] [-U] [-f FMT] [-O FMT] [bs=SIZE] [count=BLOCKS] [skip=BLOCKS] if=INPUT of=OUTPUT
  info [--object DEF] [--image-opts] [-f FMT] [--output=human|json] [--backing-chain] [-U] FILENAME
  map [--object DEF] [--image-opts] [-f FMT] [--start-offset=OFFSET] [--max-length=LENGTH] [--output=human|json] [-U] \
FILENAME
  measure [--output=human|json] [-O FMT] [-o OPTIONS] [--size SIZE | [--object DEF] [--image-opts] [-f FMT] \
[-l SNAPSHOT_PARAM] FILENAME]
  rebase [--object DEF] [--image-opts] [-U] [-q] [-f FMT] [-t CACHE] [-T SRC_CACHE] [-p] [-u] [-c] -b BACKING_FILE \
[-F BACKING_FMT] FILENAME
  resize [--object DEF] [--image-opts] [-f FMT] [--preallocation=MODE] [-q] [--shrink] FILENAME [+|-]SIZE
  snapshot [--object DEF] [--image-opts] [-f FMT] [-q] [-U] [-l | -a SNAPSHOT | -c SNAPSHOT | -d SNAPSHOT] FILENAME
"""

_OWN_VERBS: Final = """\
  amend [--object DEF] [--image-opts] [-p] [-q] [-f FMT] [-t CACHE] [--force] -o OPTIONS FILENAME
  backup [-s MODE] [--bitmap NAME [--bitmap-mode MODE]] [-B BACKUP_BEFORE -F FMT] [-c] [-f FMT] [-O FMT] [-o OPTIONS] \
[-n] [-r RATE] [--on-error POLICY] [-p] [-q] SOURCE TARGET
  formats [--json | --markdown]      the formats and protocols there are
  io ...                             requests by hand, as qemu-io
  lint --for NAME [--output=human|json] FILENAME      would that place take the image
  links DIR                          make qemu-img, qemu-io, ... in DIR that start byre
  mirror [-s MODE] [-g GRANULARITY] [-f FMT] [-O FMT] [-o OPTIONS] [-n] [-r RATE] [--on-error POLICY] [-p] [-q] SOURCE \
TARGET
  serve [OPTIONS] FILENAME           offer an image as a network block device, as qemu-nbd
"""

_LATER: Final = "Not yet: daemon"


def version(prog: str) -> str:
    """What ``--version`` prints."""
    if prog == "byre":
        return f"byre {__version__}\n"
    word = "" if prog == "qemu-nbd" else "version "  # as the peers have it
    return f"{prog} {word}{_PEER_RELEASE} (byre {__version__})\n"


def supported_formats() -> str:
    """The line ``Supported formats: ...``, which scripts look for."""
    from ..catalog import CATALOG

    return "Supported formats: " + " ".join(sorted(row.name for row in CATALOG))


def general_help(prog: str) -> str:
    """What ``--help`` before a verb prints."""
    own = f"{_OWN_VERBS}\n{_LATER}\n" if prog == "byre" else ""
    return (
        f"{version(prog)}"
        f"usage: {prog} [-h | --help] [-V | --version] [-T | --trace PATTERN] COMMAND [OPTIONS]\n"
        "Create, look into, convert and check disk images.\n\n"
        f"Commands ('{prog} COMMAND --help' says more):\n{_VERBS}{own}\n"
        "SIZE is in bytes, or with a suffix k, M, G, T, P or E (powers of 1024). FMT is probed where it is not given.\n"
        "CACHE is none, directsync, writeback, writethrough or unsafe. OPTIONS is key=value,...; "
        "'-o help' lists them.\n\n"
        f"{supported_formats()}\n"
    )


def refuse(name: str, arguments: list[str]) -> int:
    """Say that ``name`` (a verb, or a program) is not here yet.

    :raises NotSupported: always, except for ``--version`` and ``--help`` of a program
    """
    import sys

    if name.startswith("qemu-") and arguments[:1] in (["--version"], ["-V"]):
        sys.stdout.write(version(name))
        return 0
    text = f"{name} is not part of byre {__version__} yet ({_MISSING[name]})"
    if arguments[:1] in (["--help"], ["-h"]):
        sys.stdout.write(f"{version(name) if name.startswith('qemu-') else ''}{text}\n")
        return 0
    raise NotSupported(text)
