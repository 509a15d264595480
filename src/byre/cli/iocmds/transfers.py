"""Commands that move bytes: ``read``, ``write`` and their kin, ``discard``, ``flush``, and the ``aio_`` ones."""

from __future__ import annotations

import errno
import os

from ...errors import ByreError, InvalidArgument, IOFailure, NotSupported
from ...graph.node import Stats
from ...typing import TYPE_CHECKING, Final
from ...units import SECTOR
from . import buffers
from .getopt import Given, UsageError, scan
from .shell import Command, Failed
from .text import MAX_REQUEST, Refused, dump_lines, parse_number, parse_pattern, report

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...image import Image
    from .requests import Request
    from .shell import Shell

__all__ = ["COMMANDS"]

_READ_FILL: Final = 0xAB
"""What a buffer holds before it is read into, so that bytes nobody filled are seen."""
_WRITE_FILL: Final = 0xCD

_NUMBERS: Final = {"P": parse_pattern, "l": parse_number, "s": parse_number}
_PATTERN: Final = {"P": parse_pattern}


# -- one request ----------------------------------------------------------------------------------


def check_range(image: Image, offset: int, length: int) -> None:
    """:raises IOFailure: EIO: the range is not inside the image"""
    if offset + length > image.size:
        raise IOFailure(f"{length} bytes at {offset:#x} are not inside the image, which ends at {image.size:#x}",
                        where=image.filename)  # fmt: skip


def perform(shell: Shell, verb: str, action: Callable[[], None]) -> float:
    """Run one request and wait for it; the seconds it took.

    :raises Failed: it failed, which was said
    """
    try:
        return shell.perform(action)
    except ByreError as error:
        shell.failed(verb, error)
        raise Failed from None


def start(shell: Shell, action: Callable[[], None], completed: Callable[[Request], None]) -> None:
    """Begin one request beside the shell."""
    shell.requests.settle(shell.requests.start(action, completed))


def single_range(given: Given, limit_note: str = "", *, limited: bool = True) -> tuple[int, int]:
    """Offset and length, the two arguments of most commands.

    :raises Refused: no numbers, or longer than a request may be
    """
    if len(given.rest) != 2:
        raise UsageError
    offset = parse_number(given.rest[0])
    length = parse_number(given.rest[1])
    if limited and length > MAX_REQUEST:
        raise Refused(f"length cannot exceed {MAX_REQUEST}{limit_note}, given {given.rest[1]}")
    return offset, length


def check_sectors(offset: int, length: int) -> None:
    """:raises Refused: not whole sectors"""
    for value, name in ((offset, "offset"), (length, "count")):
        if value % SECTOR:
            raise Refused(f"{value} is not a sector-aligned value for '{name}'")


# -- reading --------------------------------------------------------------------------------------


def read(shell: Shell, arguments: list[str]) -> None:
    given = scan("read", arguments, "bCl:pP:qrs:v", _NUMBERS)
    offset, length = single_range(given)
    if "P" not in given and ("l" in given or "s" in given):
        raise UsageError
    first = given.number("s")
    count = given.number("l", length - first)
    if count < 0 or first + count > length:
        raise Refused("pattern verification range exceeds end of read data")
    if "b" in given:
        check_sectors(offset, length)
        if "r" in given:
            raise Refused("I/O buffer registration is not supported when reading from vmstate")
    image = shell.opened
    view = buffers.allocate(length, _READ_FILL, misalign=shell.misalign)

    def action() -> None:
        if "b" in given:
            vm_state(image, "load_vmstate")(offset, view)
        else:
            check_range(image, offset, length)
            image.read_into(offset, view)

    seconds = perform(shell, "read", action)
    show_read(shell, given, offset, view, seconds, first, count)


def show_read(
    shell: Shell, given: Given, offset: int, view: memoryview, seconds: float, first: int = 0, count: int = -1
) -> None:
    """Compare what was read, dump it and report.

    :raises Failed: it is not the pattern
    """
    count = len(view) if count < 0 else count
    wrong = "P" in given and buffers.differs(view[first : first + count], given.number("P"))
    if wrong:
        shell.say(f"Pattern verification failed at offset {offset + first}, {count} bytes\n")
    if "q" not in given:
        if "v" in given:
            show_dump(shell, offset, view)
        shell.say(report("read", seconds, offset, len(view), len(view), 1, machine="C" in given))
    if wrong:
        raise Failed


def show_dump(shell: Shell, offset: int, view: memoryview) -> None:
    step = 1 << 16
    for at in range(0, len(view), step):
        shell.say("".join(dump_lines(bytes(view[at : at + step]), offset + at)))


def readv(shell: Shell, arguments: list[str]) -> None:
    given = scan("readv", arguments, "CP:qrv", _PATTERN)
    offset, parts = vector(given)
    image = shell.opened
    view = buffers.allocate(sum(parts), _READ_FILL, misalign=shell.misalign)
    seconds = perform(shell, "readv", reader(image, offset, view, parts))
    show_read(shell, given, offset, view, seconds)


def vector(given: Given) -> tuple[int, list[int]]:
    """Offset and lengths of a vectored request."""
    if len(given.rest) < 2:
        raise UsageError
    return parse_number(given.rest[0]), buffers.lengths(given.rest[1:])


def reader(image: Image, offset: int, view: memoryview, parts: list[int]) -> Callable[[], None]:
    def action() -> None:
        check_range(image, offset, len(view))
        image.readv_into(offset, buffers.split(view, parts))

    return action


def aio_read(shell: Shell, arguments: list[str]) -> None:
    given = scan("aio_read", arguments, "CiP:qrv", _PATTERN)
    image = shell.opened
    if "i" in given:
        shell.say("injecting invalid read request\n")
        image.stats.failed(Stats.READ)
        return
    offset, parts = vector(given)
    view = buffers.allocate(sum(parts), _READ_FILL, misalign=shell.misalign)

    def completed(request: Request) -> None:
        if request.error is not None:
            shell.failed("readv", request.error)
            return
        try:
            show_read(shell, given, offset, view, request.seconds)
        except Failed:
            pass  # said; the command itself succeeded when the request was begun

    start(shell, reader(image, offset, view, parts), completed)


# -- writing --------------------------------------------------------------------------------------


def write(shell: Shell, arguments: list[str]) -> None:
    given = scan("write", arguments, "bcCfnpP:qrs:uz", _PATTERN)
    if len(given.rest) != 2:
        raise UsageError
    check_write(given)
    offset, length = single_range(given, " without -n", limited="n" not in given)
    if "b" in given or "c" in given:
        check_sectors(offset, length)
    image = shell.opened
    if "z" in given:
        if "r" in given:
            raise Refused("cannot combine zero write with registered I/O buffer")
        action = zero_writer(image, given, offset, length)
    else:
        action = writer(image, given, offset, write_buffer(shell, given, length))
    seconds = perform(shell, "write", action)
    if "q" not in given:
        shell.say(report("wrote", seconds, offset, length, length, 1, machine="C" in given))


def check_write(given: Given) -> None:
    """:raises Refused: options of ``write`` that exclude each other"""
    if "b" in given and "z" in given:
        raise Refused("-b and -z cannot be specified at the same time")
    if "f" in given and ("b" in given or "c" in given):
        raise Refused("-f and -b or -c cannot be specified at the same time")
    for letter in "nu":
        if letter in given and "z" not in given:
            raise Refused(f"-{letter} requires -z to be specified")
    if sum(letter in given for letter in "zPs") > 1:
        raise Refused("Only one of -z, -P, and -s can be specified at the same time")


def write_buffer(shell: Shell, given: Given, length: int) -> memoryview:
    """:raises Failed: the file to take the bytes from cannot be used, which was said"""
    if "s" not in given:
        return buffers.allocate(length, given.number("P", _WRITE_FILL), misalign=shell.misalign)
    name = given.text("s")
    try:
        return buffers.filled_from_file(length, name, misalign=shell.misalign)
    except OSError as error:
        shell.complain(f"{name}: {os.strerror(error.errno or errno.EIO)}")
    except Refused as error:
        shell.complain(str(error))
    raise Failed


def zero_writer(image: Image, given: Given, offset: int, length: int) -> Callable[[], None]:
    def action() -> None:
        check_range(image, offset, length)
        image.write_zeroes(offset, length, unmap="u" in given, fua="f" in given, fallback="n" not in given)

    return action


def writer(image: Image, given: Given, offset: int, view: memoryview) -> Callable[[], None]:
    def action() -> None:
        if "b" in given:
            vm_state(image, "save_vmstate")(offset, view)
            return
        check_range(image, offset, len(view))
        if "c" in given:
            write_compressed(image, offset, view)
        else:
            image.write(offset, view, fua="f" in given)

    return action


def write_compressed(image: Image, offset: int, view: memoryview) -> None:
    """Write whole clusters compressed, one after the other; the last may end with the image.

    :raises InvalidArgument: other than whole clusters
    """
    step = getattr(image.node, "cluster_size", 0) or len(view) or 1
    if offset % step or (len(view) % step and offset + len(view) != image.size):
        raise InvalidArgument(f"compressed writes cover whole clusters of {step} bytes", where=image.filename)
    for at in range(0, len(view), step):
        image.write_compressed(offset + at, view[at : at + step])
    if image.writethrough:
        image.flush()


def vm_state(image: Image, method: str) -> Callable[[int, memoryview], None]:
    """:raises NotSupported: the format has no room for the state of a machine"""
    found: Callable[[int, memoryview], None] | None = getattr(image.node, method, None)
    if found is None:
        raise NotSupported(f"driver {image.format!r} cannot hold the state of a machine", where=image.filename)
    return found


def writev(shell: Shell, arguments: list[str]) -> None:
    given = scan("writev", arguments, "CfP:qr", _PATTERN)
    offset, parts = vector(given)
    view = buffers.allocate(sum(parts), given.number("P", _WRITE_FILL), misalign=shell.misalign)
    seconds = perform(shell, "writev", vector_writer(shell.opened, given, offset, view, parts))
    if "q" not in given:
        shell.say(report("wrote", seconds, offset, len(view), len(view), 1, machine="C" in given))


def vector_writer(image: Image, given: Given, offset: int, view: memoryview, parts: list[int]) -> Callable[[], None]:
    def action() -> None:
        check_range(image, offset, len(view))
        image.writev(offset, buffers.split(view, parts), fua="f" in given)

    return action


def aio_write(shell: Shell, arguments: list[str]) -> None:
    given = scan("aio_write", arguments, "CfiP:qruz", _PATTERN)
    image = shell.opened
    if "i" in given:
        shell.say("injecting invalid write request\n")
        image.stats.failed(Stats.WRITE)
        return
    if len(given.rest) < 2:
        raise UsageError
    check_aio_write(given)
    if "z" in given:
        offset, length = (parse_number(text) for text in given.rest)
        action = zero_writer(image, given, offset, length)
    else:
        offset, parts = vector(given)
        length = sum(parts)
        view = buffers.allocate(length, given.number("P", _WRITE_FILL), misalign=shell.misalign)
        action = vector_writer(image, given, offset, view, parts)

    def completed(request: Request) -> None:
        if request.error is not None:
            shell.failed("aio_write", request.error)
        elif "q" not in given:
            shell.say(report("wrote", request.seconds, offset, length, length, 1, machine="C" in given))

    start(shell, action, completed)


def check_aio_write(given: Given) -> None:
    """:raises Refused: options of ``aio_write`` that exclude each other"""
    if "z" in given and len(given.rest) != 2:
        raise Refused("-z supports only a single length parameter")
    if "u" in given and "z" not in given:
        raise Refused("-u requires -z to be specified")
    if "z" in given and "P" in given:
        raise Refused("-z and -P cannot be specified at the same time")
    if "z" in given and "r" in given:
        raise Refused("cannot combine zero write with registered I/O buffer")


# -- the rest -------------------------------------------------------------------------------------


def discard(shell: Shell, arguments: list[str]) -> None:
    given = scan("discard", arguments, "Cq")
    offset, length = single_range(given)
    image = shell.opened

    def action() -> None:
        check_range(image, offset, length)
        image.discard(offset, length)

    seconds = perform(shell, "discard", action)
    if "q" not in given:
        shell.say(report("discard", seconds, offset, length, length, 1, machine="C" in given))


def flush(shell: Shell, _arguments: list[str]) -> None:
    try:
        shell.perform(shell.opened.flush)
    except ByreError as error:
        shell.explain(error)  # on standard output there is nothing: the exit code tells
        raise Failed from None


def aio_flush(shell: Shell, _arguments: list[str]) -> None:
    shell.requests.drain()


_COMMON_FLAGS: Final = """\
 -C  report in one machine readable line: bytes,ops,time,bytes/sec,ops/sec
 -q  do not report
"""
_READ_FLAGS: Final = f"""{_COMMON_FLAGS}\
 -r  register the buffer (accepted, has no effect)
 -P  compare every byte with this number
 -v  dump what was read
"""
_WRITE_FLAGS: Final = f"""{_COMMON_FLAGS}\
 -r  register the buffer (accepted, has no effect)
 -f  be durable on return (force unit access)
 -P  the byte to write; 0xcd without it
"""
_ZERO_FLAGS: Final = """\
 -z  write zeroes by the quickest way there is
 -u  with -z: the space may be given back
"""
_AIO_NOTE: Final = """\
 -i  count an invalid request, do nothing

 The command returns when the request has begun and succeeds whatever becomes of it;
 'aio_flush' waits for all.

"""
_READ_HELP: Final = f"""
 Example: 'read -v 512 1k' reads and dumps the kilobyte behind the first sector.

{_READ_FLAGS}\
 -s  with -P: where in the range to begin comparing
 -l  with -P: how many bytes to compare
 -b  read from the state of the machine instead of the disk
 -p  ignored

"""
_WRITE_HELP: Final = f"""
 Example: 'write -P 7 512 1k' fills the kilobyte behind the first sector with sevens.

{_WRITE_FLAGS}{_ZERO_FLAGS}\
 -n  with -z: fail rather than write zeroes as data
 -s  take the bytes from a file, repeated as often as it takes
 -c  write compressed clusters
 -b  write to the state of the machine instead of the disk
 -p  ignored

"""

COMMANDS = (
    Command("read", read, "read bytes from one range", "[-bCqrv] [-P pattern [-s off] [-l len]] off len",
            2, -1, "r", help=_READ_HELP),
    Command("readv", readv, "read bytes from one range into several buffers",
            "[-Cqrv] [-P pattern] off len [len..]", 2, -1, help=f"\n{_READ_FLAGS}\n"),
    Command("write", write, "write bytes to one range", "[-bcCfnqruz] [-P pattern | -s source_file] off len",
            2, -1, "w", writes=True, help=_WRITE_HELP),
    Command("writev", writev, "write bytes to one range from several buffers",
            "[-Cfqr] [-P pattern] off len [len..]", 2, -1, writes=True, help=f"\n{_WRITE_FLAGS}\n"),
    Command("aio_read", aio_read, "begin to read bytes", "[-Ciqrv] [-P pattern] off len [len..]",
            2, -1, help=f"\n{_READ_FLAGS}{_AIO_NOTE}"),
    Command("aio_write", aio_write, "begin to write bytes", "[-Cfiqruz] [-P pattern] off len [len..]",
            2, -1, writes=True, help=f"\n{_WRITE_FLAGS}{_ZERO_FLAGS}{_AIO_NOTE}"),
    Command("aio_flush", aio_flush, "wait for all requests that were begun"),
    Command("flush", flush, "make everything written so far durable", alias="f"),
    Command("discard", discard, "give up bytes of one range", "[-Cq] off len", 2, -1, "d", writes=True,
            help=f"\n{_COMMON_FLAGS}\n"),
)  # fmt: skip
