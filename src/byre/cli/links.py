"""``links``: executables named ``qemu-img``, ``qemu-io``, ... that start byre in their place.

Each is a small Python script for the interpreter that made it, started directly, so that a command stays one
process. The interpreter is told to leave out its own set-up (``-I -S``), which costs more than the script: the
folders where byre and its dependencies lie are written into the script.
"""

from __future__ import annotations

import os
import sys
from typing import Final

from ..errors import AlreadyExists, InvalidArgument, from_oserror
from . import common

__all__ = ["HELP", "run", "script"]

_TABLE: Final = (
    common.Switch("force", "", "force", "", "replace files of these names that are not byre's"),
    common.QUIET,
)

HELP: Final = f"""\
usage: byre links [OPTIONS] DIR
Make the programs qemu-img, qemu-io, qemu-nbd and qemu-storage-daemon in DIR, which start byre.

{common.option_help(_TABLE)}"""

NAMES: Final = ("qemu-img", "qemu-io", "qemu-nbd", "qemu-storage-daemon")

_SHEBANG_LIMIT: Final = 127
"""Older kernels cut the first line of a script behind this many bytes."""

_MARK: Final = "# Made by `byre links`."


def _make_folder(folder: str) -> None:
    if os.path.isdir(folder):
        return
    if os.path.lexists(folder):
        raise InvalidArgument("is not a folder", where=folder)
    try:
        os.mkdir(folder)
    except OSError as error:
        raise from_oserror(error, "cannot make the folder", folder) from None


def run(arguments: list[str]) -> int:
    given = common.parse(_TABLE, arguments)
    if len(given.positional) != 1:
        raise common.UsageError("expecting one folder")
    folder = given.positional[0]
    _make_folder(folder)
    if not sys.executable:
        raise InvalidArgument("cannot tell where the Python interpreter lies")
    text = script(sys.executable, _folders())
    paths = [os.path.join(folder, name) for name in NAMES]
    for path in paths:
        if not given.has("force") and not _is_ours(path):
            raise AlreadyExists("exists and was not made by byre", where=path, hint="use --force to replace it")
    for path in paths:
        _install(path, text)
        if not given.has("quiet"):
            sys.stdout.write(f"{path}\n")
    return 0


def script(interpreter: str, folders: list[str]) -> str:
    """The text of a link.

    :param interpreter: absolute path
    :param folders: what the script looks for modules in, besides the standard library
    """
    line = f"#!{interpreter} -IS\n"
    if len(os.fsencode(line)) > _SHEBANG_LIMIT or any(c.isspace() for c in interpreter):
        # A line for both: the shell runs it, Python takes it for a string.
        quoted = "'" + interpreter.replace("'", "'\"'\"'") + "'"
        line = f"#!/bin/sh\n'''exec' {quoted} -IS \"$0\" \"$@\"\n' '''\n"
    return (
        f"{line}{_MARK}\nimport gc, sys\ngc.set_threshold(20000, 20, 20)\nsys.path += {folders!a}\n"
        "from byre.cli.main import entry\nentry()\n"
    )


def _folders() -> list[str]:
    """Where byre and what it needs lie, in the order of this interpreter's search path."""
    standard = {os.path.realpath(path) for path in (os.path.dirname(os.__file__), _zip_name(), _dynload())}
    here = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    others = [path for path in sys.path if os.path.isabs(path) and os.path.realpath(path) not in standard]
    scripts = os.path.dirname(os.path.abspath(sys.argv[0]))
    return [here, *(path for path in others if path not in (here, scripts) and os.path.isdir(path))]


def _zip_name() -> str:
    version = sys.version_info
    return os.path.join(os.path.dirname(os.path.dirname(os.__file__)), f"python{version.major}{version.minor}.zip")


def _dynload() -> str:
    return os.path.join(os.path.dirname(os.__file__), "lib-dynload")


def _is_ours(path: str) -> bool:
    """Whether ``path`` is free, or a link that byre made."""
    if not os.path.lexists(path):
        return True
    try:
        with open(path, "rb") as file:
            return _MARK.encode() in file.read(4096)
    except OSError:
        return False


def _install(path: str, text: str) -> None:
    """Write the script beside its place and move it there, so that a running program is not cut off."""
    temporary = f"{path}.{os.getpid()}"
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o755)
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError as error:
        try:
            os.unlink(temporary)
        except OSError:
            pass
        raise from_oserror(error, "cannot write", path) from None
