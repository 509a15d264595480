"""``byre io``: read and write an image by hand, with the arguments, commands and output of ``qemu-io``.

The program's own options and the loop over lines are here; the commands are in ``iocmds``.
"""

from __future__ import annotations

import sys

from ..errors import ByreError
from ..typing import Final
from . import common
from .common import FORCE_SHARE, FORMAT, IMAGE_OPTS, OBJECT, PROGRAM, QUIET, Given, Switch, UsageError
from .iocmds import breakpoints, control, opening, state, transfers
from .iocmds.prompt import Lines
from .iocmds.shell import Shell

__all__ = ["HELP", "OPTIONS", "run"]

OPTIONS: Final = (
    Switch("cmd", "c", "cmd", "COMMAND", "run a command; may be given several times"),
    FORMAT,
    IMAGE_OPTS,
    OBJECT,
    Switch("read-only", "r", "read-only", "", "open the image read-only"),
    Switch("snapshot", "s", "snapshot", "", "keep all changes in a temporary overlay"),
    Switch("nocache", "n", "nocache", "", "past the page cache, as '-t none'"),
    Switch("cache", "t", "cache", "MODE", "none, directsync, writethrough, writeback or unsafe"),
    Switch("discard", "d", "discard", "MODE", "ignore or unmap"),
    Switch("aio", "i", "aio", "MODE", "threads, native or io_uring (has no effect)"),
    Switch("native-aio", "k", "native-aio", "", "has no effect"),
    Switch("misalign", "m", "misalign", "", "use buffers that lie off a page boundary"),
    FORCE_SHARE,
    Switch("copy-on-read", "C", "copy-on-read", "", "keep what is read from backing files in the image"),
    Switch("trace", "T", "trace", "PATTERN", "has no effect"),
    QUIET,
    Switch("version", "V", "version", "", "show the version"),
)

HELP: Final = f"""\
usage: byre io [OPTIONS] [-c COMMAND]... [FILENAME]
Read and write a disk image by hand. Without -c, commands are read from standard input;
'help' lists them.

{common.option_help(OPTIONS)}"""

_COMMANDS: Final = (
    *transfers.COMMANDS,
    *state.COMMANDS,
    *opening.COMMANDS,
    *breakpoints.COMMANDS,
    *control.COMMANDS,
)


def run(arguments: list[str]) -> int:
    """:returns: 0, or 1 if any command failed
    :raises ByreError: the options are wrong, or the image cannot be opened
    """
    given = common.parse(OPTIONS, arguments)
    if given.has("version"):
        from .refusals import version

        sys.stdout.write(version(PROGRAM.get()))
        return 0
    settings = opening.Settings()
    for key, value in given.ordered:
        settings = opening.change(settings, key, value)
    if len(given.positional) > 1:
        raise UsageError("more than one file name")
    if given.has("format") and given.has("image-opts"):
        raise UsageError("--image-opts and -f are mutually exclusive")
    shell = Shell(given, _COMMANDS, misalign=given.has("misalign"))
    if given.positional:
        _open(shell, given, settings)
    try:
        succeeded = _loop(shell, given)
    except BaseException:
        _abandon(shell)
        raise
    shell.close()
    return 0 if succeeded else 1


def _open(shell: Shell, given: Given, settings: opening.Settings) -> None:
    name = given.positional[0]
    if given.has("image-opts"):
        opening.open_into(shell, "", common.image_options(name), "", settings)
    else:
        opening.open_into(shell, name, name, given.last("format"), settings)


def _loop(shell: Shell, given: Given) -> bool:
    """Run the commands given, or those typed; whether all succeeded."""
    succeeded = True
    if given.has("cmd"):
        for command in given.all("cmd"):
            if shell.finished:
                break
            succeeded &= shell.execute(command)
        return succeeded
    lines = Lines(shell)
    while not shell.finished and (line := lines.next()) is not None:
        succeeded &= shell.execute(line)
    return succeeded


def _abandon(shell: Shell) -> None:
    """Close after an interruption; what it is about is said by the caller."""
    try:
        shell.close()
    except ByreError as error:
        common.report(error)
