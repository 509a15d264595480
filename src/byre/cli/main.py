"""The frame of every command: which verb, and what becomes of errors and signals.

Started under the name ``qemu-img``, ``qemu-io``, ``qemu-nbd`` or ``qemu-storage-daemon`` (a link), byre is
that program. Only the module of the verb asked for is imported; start-up is part of every command's time.
"""

from __future__ import annotations

import os
import sys

from ..errors import ByreError
from ..typing import TYPE_CHECKING, Final
from .common import PROGRAM, HelpRequested, UsageError, report

if TYPE_CHECKING:
    from sys import UnraisableHookArgs
    from types import FrameType, ModuleType

__all__ = ["entry", "main", "program_name"]

GC_THRESHOLDS: Final = (20000, 20, 20)

EXIT_FAILED: Final = 1
EXIT_INTERNAL: Final = 70
EXIT_INTERRUPTED: Final = 130
EXIT_PIPE: Final = 141
EXIT_TERMINATED: Final = 143

PEERS: Final = ("qemu-img", "qemu-io", "qemu-nbd", "qemu-storage-daemon")
IMAGE_VERBS: Final = (
    "amend", "bench", "bitmap", "check", "commit", "compare", "convert", "create", "dd", "info", "map", "measure",
    "rebase", "resize", "snapshot",
)  # fmt: skip
OWN_VERBS: Final = ("backup", "formats", "io", "links", "lint", "mirror", "serve", "stream")
LATER_OWN_VERBS: Final = ("daemon",)


class Terminated(KeyboardInterrupt):
    """SIGTERM: leaves by the same way as Ctrl-C."""


def entry() -> int:
    """The console script. Does not return: the interpreter's own tidying up costs more than many commands."""
    _open_standard_files()
    import gc

    # Start-up makes many objects and no garbage; looking for some takes a twentieth of a short command's time.
    gc.set_threshold(*GC_THRESHOLDS)
    # numpy's linear algebra, which is not used here, would start a thread per processor that spins for a while.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if sys.argv[1:2] != ["info"]:  # it leaves nothing to tidy up, and is to start fast
        _catch_signals()
    code = main(sys.argv[1:], program_name(sys.argv[0]))
    sys.stderr.flush()
    os._exit(code)


def _open_standard_files() -> None:
    """Descriptors 0 to 2 that were closed at start lead to /dev/null.

    Otherwise an image would be opened under such a number, and what is printed would be written into it.
    """
    fd = os.open(os.devnull, os.O_RDWR)
    while fd <= 2:
        fd = os.dup(fd)
    os.close(fd)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))


def _catch_signals() -> None:
    import signal

    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # else somebody wants it to outlive the terminal
        signal.signal(signal.SIGHUP, _terminate)
    # It asks for the progress; also before there is any, and after.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    sys.unraisablehook = _not_lost


def _terminate(number: int, _frame: FrameType | None) -> None:
    raise Terminated(number)


def _not_lost(lost: UnraisableHookArgs) -> None:
    """An interrupt may hit where Python drops exceptions (the end of an import, a finalizer): it comes again."""
    if not isinstance(lost.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(lost)
        return
    import signal

    number = lost.exc_value.args[0] if isinstance(lost.exc_value, Terminated) else signal.SIGINT

    def again(_alarm: int, _frame: FrameType | None) -> None:
        signal.raise_signal(number)

    signal.signal(signal.SIGALRM, again)
    signal.setitimer(signal.ITIMER_REAL, 0.01)


def program_name(path: str) -> str:
    """Which program ``path`` (argv[0]) asks for."""
    name = os.path.basename(path)
    return name if name in PEERS else "byre"


def main(argv: list[str], prog: str = "byre") -> int:
    """Run one command line.

    :param argv: the arguments without the program's name
    :param prog: "byre", or the peer whose place it takes
    :returns: the exit code; everything is printed and flushed
    """
    token = PROGRAM.set(prog)
    try:
        for stream in (sys.stdout, sys.stderr):
            reconfigure = getattr(stream, "reconfigure", None)
            if reconfigure is not None:
                reconfigure(errors="backslashreplace")
        return _flushed(_guarded(argv, prog))
    finally:
        PROGRAM.reset(token)


def _guarded(argv: list[str], prog: str) -> int:
    """The verb's exit code, every failure turned into one line."""
    try:
        return _dispatch(argv, prog)
    except UsageError as error:
        report(f"{error}; try '{prog} --help'")
    except ByreError as error:
        report(error)
        if prog != "byre":
            # The peer's second line, which scripts may look for.
            sys.stderr.write("".join(f"{note}\n" for note in getattr(error, "__notes__", ())))
    except Terminated:
        return EXIT_TERMINATED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return EXIT_PIPE
    except MemoryError:
        report("out of memory")
    except OSError as error:
        if not _from_printing(error):
            return _unforeseen(error)
        _drop_stdout()
        report(f"cannot write to standard output: {error.strerror}")
    except Exception as error:
        return _unforeseen(error)
    return EXIT_FAILED


def _unforeseen(error: Exception) -> int:
    if os.environ.get("BYRE_DEBUG", "") not in ("", "0"):
        raise error
    report(f"internal error, please report: {type(error).__name__}: {error}")
    return EXIT_INTERNAL


def _from_printing(error: OSError) -> bool:
    """Whether ``error`` came from writing to stdout: only modules of this folder do that, and they touch no files."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and os.path.dirname(trace.tb_frame.f_code.co_filename) == os.path.dirname(__file__)


def _drop_stdout() -> None:
    """What could not be written must not be tried again."""
    fd = os.open(os.devnull, os.O_WRONLY)
    os.dup2(fd, 1)
    os.close(fd)


def _flushed(code: int) -> int:
    """Flush what was printed; a failure of that is a failure of the command."""
    try:
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        code = EXIT_PIPE
    except OSError as error:
        report(f"cannot write to standard output: {error.strerror}")
        code = code or EXIT_FAILED
    _drop_stdout()
    return code


def _dispatch(argv: list[str], prog: str) -> int:
    if prog == "qemu-io":
        return _run("io", argv)
    if prog == "qemu-nbd":
        return _run("serve", argv)
    if prog == "qemu-storage-daemon":
        from .refusals import refuse

        return refuse(prog, argv)
    if not argv:
        raise UsageError("not enough arguments")
    words = list(argv)
    while words and words[0].startswith("-") and len(words[0]) > 1:
        option = words.pop(0)
        if option in ("-h", "--help"):
            from .refusals import general_help

            sys.stdout.write(general_help(prog))
            return 0
        if option in ("-V", "--version"):
            from .refusals import version

            sys.stdout.write(version(prog))
            return 0
        if option in ("-T", "--trace") and words:
            words.pop(0)  # there are no trace events to select
        elif not option.startswith(("-T", "--trace=")):
            raise UsageError(f"unrecognized option '{option}'")
    if not words:
        return 0
    return _verb(words[0], words[1:], prog)


def _verb(verb: str, arguments: list[str], prog: str) -> int:
    if verb in IMAGE_VERBS or (prog == "byre" and verb in OWN_VERBS):
        return _run(verb, arguments)
    if prog == "byre" and verb in LATER_OWN_VERBS:
        from .refusals import refuse

        return refuse(verb, arguments)
    raise UsageError(f"command not found: {verb}")


def _run(verb: str, arguments: list[str]) -> int:
    """Import the verb's module and run it."""
    name = f"byre.cli.{verb}"
    __import__(name)
    module: ModuleType = sys.modules[name]
    try:
        code: int = module.run(arguments)
        return code
    except HelpRequested:
        from .refusals import supported_formats

        sys.stdout.write(f"{module.HELP.rstrip()}\n\n{supported_formats()}\n")
        return 0
