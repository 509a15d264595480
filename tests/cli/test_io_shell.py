"""The io shell as its user meets it: lines in, text and bytes out."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from byre.cli.main import main
from byre.graph.creating import create

_ENTRY = "import sys; sys.argv[0] = 'qemu-io'; from byre.cli.main import entry; entry()"


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(1 << 20))
    return path


class Ran:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.err = code, err
        self.out = re.sub(r"(\d+ ops;) .*", r"\1", out)


@pytest.fixture
def io(capsys):  # type: ignore[no-untyped-def]
    def run(*arguments: object, program: str = "qemu-io") -> Ran:
        capsys.readouterr()
        words = [str(word) for word in arguments]
        code = main(words if program != "byre" else ["io", *words], program)
        out, err = capsys.readouterr()
        return Ran(code, out, err)

    return run


def commands(*lines: str) -> list[str]:
    return [word for line in lines for word in ("-c", line)]


def piped(text: str, *arguments: object, timeout: float = 30) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _ENTRY, *map(str, arguments)],
        input=text,
        text=True,
        capture_output=True,
        timeout=timeout,
        check=False,
    )


# -- lines ----------------------------------------------------------------------------------------


def test_commands_from_standard_input_with_prompts(disk: Path) -> None:
    done = piped("write -P 1 0 512\n\n  length \nnonsense\nquit\nlength\n", "-f", "raw", disk)
    assert done.returncode == 1
    assert done.stdout.startswith("qemu-io> wrote 512/512 bytes at offset 0\n512 bytes, 1 ops; ")
    assert done.stdout.endswith("qemu-io> qemu-io> 1 MiB\nqemu-io> qemu-io> ")
    assert done.stderr == 'command "nonsense" not found\n'
    assert disk.read_bytes()[:513] == b"\1" * 512 + b"\0"


def test_end_of_input_without_a_line_end(disk: Path) -> None:
    done = piped("length", "-f", "raw", disk)
    assert (done.stdout, done.returncode) == ("qemu-io> 1 MiB\nqemu-io> ", 0)


def test_closed_standard_input(disk: Path) -> None:
    command = ["sh", "-c", 'exec "$@" <&-', "sh", sys.executable, "-c", _ENTRY, "-f", "raw", str(disk)]
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "qemu-io> ", "")


def test_a_line_may_be_long_and_hold_any_byte(disk: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _ENTRY], input=b"\xff\x1b[31m " + b"x" * 5000 + b"\n", capture_output=True, check=False
    )
    assert done.returncode == 1
    assert b"\x1b" not in done.stderr
    assert b"not found" in done.stderr


def test_without_an_image(io) -> None:  # type: ignore[no-untyped-def]
    done = io(*commands("length", "help", "sleep 1", "close"))
    assert done.code == 1
    assert done.err == "no file open, try 'help open'\n" * 2
    for name in ("read", "write", "aio_flush", "map", "wait_break", "zone_report", "sigraise"):
        assert re.search(rf"^{name} .*-- ", done.out, re.M)


def test_every_command_explains_itself(io) -> None:  # type: ignore[no-untyped-def]
    names = re.findall(r"^(\w+) ", io("-c", "help").out, re.M)
    for name in names[:-1]:
        assert io("-c", f"help {name}").out.startswith(name)


def test_options_of_the_program(io, disk: Path) -> None:  # type: ignore[no-untyped-def]
    assert io("-V").out.startswith("qemu-io version ")
    assert "usage" in io("--help").out
    for bad, words in (
        (["-f", "raw", "--image-opts", disk], "mutually exclusive"),
        ([disk, disk], "more than one"),
        (["-t", "nonsense", disk], "Invalid cache option: nonsense"),
        (["-d", "nonsense", disk], "Invalid discard option: nonsense"),
        (["-i", "nonsense", disk], "Invalid aio option: nonsense"),
        (["-C", "-r", disk], "Can't use copy-on-read on read-only device"),
        (["--nonsense"], "unrecognized"),
        ([disk.with_name("missing")], "can't open device"),
    ):
        done = io(*bad)
        assert (done.code, done.out) == (1, "")
        assert done.err.startswith("qemu-io: ")
        assert words in done.err
    assert io("-k", "-T", "x", "-f", "raw", "--cache=none", "--aio", "threads", "-c", "length", disk).out == "1 MiB\n"


def test_byre_io_says_why(io, disk: Path) -> None:  # type: ignore[no-untyped-def]
    done = io("-f", "raw", "-c", "read 1M 512", disk, program="byre")
    assert (done.code, done.out) == (1, "read failed: Input/output error\n")
    assert done.err.startswith("byre: ")
    assert "ends at 0x100000" in done.err


# -- the image ------------------------------------------------------------------------------------


def test_open_adds_options_to_a_json_name(io, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """What is given with it comes first, and names the driver of the node itself."""
    image = tmp_path / "a.qcow2"
    create(str(image), "qcow2", 1 << 20)
    plain, nested = f'json:{{"file.filename":"{image}"}}', f'json:{{"driver":"qcow2","file":{{"filename":"{image}"}}}}'
    for options, name, driver in (
        ("driver=qcow2", plain, "qcow2"),
        ("driver=raw", nested, "raw"),
        ("file.locking=off", nested, "qcow2"),
    ):
        done = io("-c", f"open -o {options} {name}", "-c", "info")
        assert done.out.startswith(f"format name: {driver}\n"), done
        assert not done.err


def test_open_and_close(io, disk: Path) -> None:  # type: ignore[no-untyped-def]
    done = io(
        *commands(
            f"open -o driver=raw {disk}",
            "write -P 5 0 1k",
            "close",
            "length",
            f"open -r -o driver=raw {disk}",
            "read -P 5 0 1k",
            "write 0 512",
            f"open {disk}",
        )
    )
    assert done.code == 1
    assert done.out.count("ops;") == 2
    assert done.err.splitlines() == [
        "no file open, try 'help open'",
        "qemu-io: Block node is read-only",
        "qemu-io: file open already, try 'help close'",
    ]


def test_open_with_options_for_the_file_below(io, disk: Path) -> None:  # type: ignore[no-untyped-def]
    done = io(
        *commands(
            f"open -o driver=raw,file.align=4k blkdebug::{disk}",
            "write -P 9 512 512",
            "read -P 9 512 512",
            "read -P 0 0 512",
            "read -P 0 1k 3k",
        )
    )
    assert (done.code, done.err) == (0, "")


def test_image_options(io, disk: Path) -> None:  # type: ignore[no-untyped-def]
    text = f"driver=raw,file.driver=file,file.filename={disk}"
    assert io("--image-opts", "-c", "length", text).out == "1 MiB\n"
    assert io("--image-opts", *commands(f"open {text}", "length")).out == "1 MiB\n"
    done = io("--image-opts", "-c", f"open -o {text}")
    assert (done.code, done.out) == (1, "--image-opts and 'open -o' are mutually exclusive\n")
    assert "conflicts" in io("--image-opts", "-U", "-r", "-c", "length", text + ",force-share=off").err


def test_memory_devices(io) -> None:  # type: ignore[no-untyped-def]
    done = io(
        "--image-opts",
        *commands("write -P 4 1k 1k", "read -P 4 1k 1k", "read -P 0 0 1k"),
        "driver=raw,file.driver=memory,file.size=1M",
    )
    assert done.code == 0
    assert io("--image-opts", "-c", "length", "driver=raw,file.driver=null-co,file.size=3G").out == "3 GiB\n"


def test_machine_state_needs_a_format_for_it(io, disk: Path) -> None:  # type: ignore[no-untyped-def]
    done = io("-f", "raw", *commands("write -b 0 512", "read -b 0 512"), disk)
    assert (done.code, done.out) == (1, "write failed: Operation not supported\nread failed: Operation not supported\n")


def test_zones_are_refused(io, disk: Path) -> None:  # type: ignore[no-untyped-def]
    done = io("-f", "raw", *commands("zone_report 0 1", "zrs 0 1", "zap -p 0 512 512"), disk)
    assert done.code == 1
    assert done.err == "qemu-io: zoned devices are not supported\n" * 3


def test_writes_from_a_file(io, disk: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "source").write_bytes(b"0123456789")
    assert io("-f", "raw", "-c", f"write -s {tmp_path / 'source'} 512 25", disk).code == 0
    assert disk.read_bytes()[510:540] == b"\0\0" + b"0123456789" * 2 + b"01234" + bytes(3)


def test_a_temporary_overlay_takes_all_changes(io, disk: Path, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    script = commands("write -P 5 0 64k", "read -P 5 0 64k", "read -P 0 64k 64k")
    assert io("-s", "-f", "raw", *script, disk).code == 0
    assert io(*commands(f"open -s -o driver=raw {disk}"), *script).code == 0
    assert not any(disk.read_bytes())
    assert list((tmp_path / "scratch").iterdir()) == []


# -- requests beside the shell ---------------------------------------------------------------------


def test_a_held_request_does_not_hold_the_shell(disk: Path) -> None:
    done = piped(
        "break pwritev A\naio_write -P 1 0 1k\nwait_break A\nlength\nread -P 0 64k 1k\nresume A\n"
        "aio_flush\nread -P 1 0 1k\n",
        "-f",
        "raw",
        f"blkdebug::{disk}",
    )
    assert done.returncode == 0, done.stderr
    out = re.sub(r"(\d+ ops;) .*", r"\1", done.stdout).replace("qemu-io> ", "")
    assert out == (
        "blkdebug: Suspended request 'A'\n1 MiB\nread 1024/1024 bytes at offset 65536\n1 KiB, 1 ops;\n"
        "blkdebug: Resuming request 'A'\nwrote 1024/1024 bytes at offset 0\n1 KiB, 1 ops;\n"
        "read 1024/1024 bytes at offset 0\n1 KiB, 1 ops;\n"
    )


def test_several_held_requests_are_told_apart(io, disk: Path) -> None:  # type: ignore[no-untyped-def]
    done = io(
        "-f",
        "raw",
        *commands(
            "break pwritev A",
            "aio_write -P 1 0 1k",
            "break pwritev B",
            "aio_write -P 2 2k 1k",
            "wait_break A",
            "wait_break B",
            "resume B",
            "aio_write -q -P 3 4k 1k",
            "resume A",
            "aio_flush",
        ),
        f"blkdebug::{disk}",
    )
    assert done.code == 0
    assert [line.split()[-1] for line in done.out.splitlines() if "offset" in line] == ["2048", "0"]
    data = disk.read_bytes()
    assert (data[0], data[2048], data[4096]) == (1, 2, 3)


def test_waiting_for_a_held_request_ends_with_an_error(io, disk: Path) -> None:  # type: ignore[no-untyped-def]
    started = time.monotonic()
    done = io(
        "-f",
        "raw",
        *commands("break pwritev A", "aio_write 0 1k", "aio_flush", "break pwritev B", "write 2k 1k", "wait_break C"),
        f"blkdebug::{disk}",
    )
    assert time.monotonic() - started < 20
    assert done.code == 1
    assert "held at a breakpoint; use resume first" in done.err
    assert "no request is left that could reach breakpoint 'C'" in done.err
    assert "write failed: Device or resource busy\n" in done.out
    # What was held is let go when the image is closed.
    assert disk.read_bytes()[:1024] == b"\xcd" * 1024


def test_a_request_that_waits_for_a_held_one_keeps_no_other_waiting(io, disk: Path) -> None:  # type: ignore[no-untyped-def]
    # Blocks of 4 KiB: the second request overlaps the first, which is held, and the third the second alone.
    done = io(
        *commands(
            f"open -o driver=raw,file.align=4k blkdebug::{disk}",
            "break pwritev_rmw_after_tail A",
            "aio_write -P 1 0xa000 0x200",
            "wait_break A",
            "aio_write -P 2 0xa800 0x1000",
            "aio_write -P 3 0xbe00 0x200",
            "sleep 50",
            "resume A",
            "aio_flush",
            "read -P 1 0xa000 0x200",
            "read -P 2 0xa800 0x1000",
            "read -P 3 0xbe00 0x200",
        )
    )
    assert done.code == 0, done.out
    wrote = [line.split()[-1] for line in done.out.splitlines() if line.startswith("wrote")]
    assert wrote == [str(0xBE00), str(0xA000), str(0xA800)]


def test_remove_break_lets_go(io, disk: Path) -> None:  # type: ignore[no-untyped-def]
    done = io(
        "-f",
        "raw",
        *commands(
            "break pwritev A",
            "aio_write 0 1k",
            "remove_break A",
            "aio_flush",
            "remove_break A",
            "resume A",
            "break nonsense A",
        ),
        f"blkdebug::{disk}",
    )
    lines = done.out.splitlines()
    assert lines[:3] == [
        "blkdebug: Suspended request 'A'",
        "blkdebug: Resuming request 'A'",
        "wrote 1024/1024 bytes at offset 0",
    ]
    assert [line.partition(":")[0] for line in lines[-3:]] == [
        "Could not remove breakpoint A",
        "Could not resume request",
        "Could not set breakpoint",
    ]


def test_requests_run_at_the_same_time(io) -> None:  # type: ignore[no-untyped-def]
    started = time.monotonic()
    done = io(
        "--image-opts",
        *commands(*["aio_read 0 4k"] * 8, "aio_flush"),
        "driver=raw,file.driver=null-co,file.size=1M,file.latency-ns=500000000",
    )
    assert done.out.count("ops;") == 8
    assert time.monotonic() - started < 2


def test_requests_keep_their_order(io, disk: Path) -> None:  # type: ignore[no-untyped-def]
    script = commands(*[f"aio_write -q -P {n} 0 64k" for n in range(1, 40)], "aio_flush", "read -P 39 0 64k")
    assert io("-f", "raw", *script, disk).code == 0


def test_failures_of_requests_beside_the_shell(io, disk: Path) -> None:  # type: ignore[no-untyped-def]
    config = "inject-error.0.event=pwritev,inject-error.0.errno=28,inject-error.0.iotype=write"
    done = io(
        "--image-opts",
        *commands("aio_write 0 1k", "aio_flush", "aio_read -P 1 0 1k", "aio_flush", "write 0 1k"),
        f"driver=raw,file.driver=blkdebug,file.{config.replace(',', ',file.')},file.image.filename={disk}",
    )
    assert done.out.startswith(
        "aio_write failed: No space left on device\nPattern verification failed at offset 0, 1024 bytes\n"
    )
    assert done.out.endswith("write failed: No space left on device\n")
    assert done.code == 1


# -- ends of the process ---------------------------------------------------------------------------


def test_signals(disk: Path) -> None:
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        done = piped("", "-f", "raw", *commands("write -P 7 0 512", f"sigraise {int(number)}", "length"), disk)
        assert done.returncode == -number
        assert done.stdout.startswith("wrote 512/512")
        assert "MiB\n" not in done.stdout


def test_abort(disk: Path) -> None:
    done = piped("", "-f", "raw", *commands("length", "abort"), disk)
    assert (done.returncode, done.stdout) == (-signal.SIGABRT, "1 MiB\n")


def test_requests_still_running_at_the_end_are_reported(disk: Path) -> None:
    done = piped(
        "aio_write -P 3 0 1k\n", "--image-opts", "driver=raw,file.driver=null-co,file.size=1M,file.latency-ns=100000000"
    )
    assert done.returncode == 0
    assert "wrote 1024/1024 bytes at offset 0\n" in done.stdout


def test_an_image_found_corrupt_is_said_once(io, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "damaged.qcow2"
    assert main(["create", "-q", "-f", "qcow2", str(path), "64M"]) == 0
    with open(path, "r+b") as file:  # the counts call every cluster free, the header's among them
        file.seek(0x20000)
        file.write(bytes(8))
    ran = io(*commands("write 64k 64k", "write 1M 64k"), path)
    assert ran.code == 1
    assert ran.out.count("write failed: Input/output error\n") == 2
    (line,) = ran.err.splitlines()
    assert line.startswith("qcow2: Marking image as corrupt: ")
    assert line.endswith("; further corruption events will be suppressed")
