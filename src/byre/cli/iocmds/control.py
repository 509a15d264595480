"""Commands about the shell itself: ``help``, ``quit``, ``close``, ``sleep``, signals; and those byre does not have."""

from __future__ import annotations

import os
import sys

from ...errors import NotSupported
from ...typing import TYPE_CHECKING
from .shell import Command
from .text import Refused, parse_integer, parse_number

if TYPE_CHECKING:
    from typing import NoReturn

    from .shell import Shell

__all__ = ["COMMANDS"]


def show_help(shell: Shell, arguments: list[str]) -> None:
    if not arguments:
        for command in shell.commands:
            shell.say(command.usage())
        shell.say("\nUse 'help commandname' for extended help.\n")
        return
    found = shell.find(arguments[0])
    if found is None:
        raise Refused(f"command {arguments[0]} not found")
    shell.say(found.usage(arguments[0]) + found.help)


def close(shell: Shell, _arguments: list[str]) -> None:
    shell.close()


def leave(shell: Shell, _arguments: list[str]) -> None:
    shell.finished = True


def sleep(shell: Shell, arguments: list[str]) -> None:
    from time import monotonic
    from time import sleep as pause

    milliseconds = parse_integer(arguments[0])
    if milliseconds is None or milliseconds < 0:
        raise Refused(f"{arguments[0]} is not a valid number")
    end = monotonic() + milliseconds / 1000
    while (left := end - monotonic()) > 0:
        shell.requests.settle()
        shell.requests.reap()
        pause(min(left, 0.05 if shell.requests.running else left))
    shell.requests.reap()


def flush_streams() -> None:
    """What was printed must not be lost with the process."""
    sys.stdout.flush()
    sys.stderr.flush()


def raise_signal(_shell: Shell, arguments: list[str]) -> None:
    import signal

    number = parse_number(arguments[0])
    if number > signal.NSIG:
        raise Refused(f"signal argument '{arguments[0]}' is too large to be a valid signal")
    flush_streams()
    try:
        if number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)  # it is meant for the process, not for our handlers
        os.kill(os.getpid(), number)
    except OSError:
        pass  # no such signal: nothing is raised


def abort(_shell: Shell, _arguments: list[str]) -> NoReturn:
    flush_streams()
    os.abort()


def refuse_zones(_shell: Shell, _arguments: list[str]) -> NoReturn:
    raise NotSupported("zoned devices are not supported")


def zone_command(name: str, alias: str, summary: str, args: str = "offset len", most: int = 2) -> Command:
    return Command(name, refuse_zones, f"{summary} (not supported)", args, 2 if most == 2 else 3, most, alias)


COMMANDS = (
    Command("help", show_help, "list the commands, or explain one", "[command]", 0, 1, "?", needs_image=False),
    Command("quit", leave, "leave the program", None, 0, -1, "q", needs_image=False),
    Command("close", close, "close the open image", alias="c"),
    Command("sleep", sleep, "wait a number of milliseconds; requests go on", "milliseconds", 1, 1, needs_image=False),
    Command("sigraise", raise_signal, "send a signal to this process", "signal", 1, 1, needs_image=False, help="""
 Example: 'sigraise 15' raises SIGTERM

"""),
    Command("abort", abort, "end this process as a crash would", needs_image=False),
    zone_command("zone_report", "zrp", "show zones", "offset number"),
    zone_command("zone_open", "zo", "open zones"),
    zone_command("zone_close", "zc", "close zones"),
    zone_command("zone_finish", "zf", "finish zones"),
    zone_command("zone_reset", "zrs", "reset zones"),
    zone_command("zone_append", "zap", "append to a zone", "offset len [len..]", 4),
)  # fmt: skip
