"""The frame: which verb, what becomes of errors, and the options every verb has."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from byre.cli import common
from byre.cli.main import main, program_name


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/usr/bin/qemu-img", "qemu-img"),
        ("qemu-io", "qemu-io"),
        ("./qemu-nbd", "qemu-nbd"),
        ("/x/qemu-storage-daemon", "qemu-storage-daemon"),
        ("/venv/bin/byre", "byre"),
        ("qemu-image", "byre"),
        ("", "byre"),
    ],
)
def test_the_name_decides_which_program_it_is(path: str, name: str) -> None:
    assert program_name(path) == name


@pytest.mark.parametrize("prog", ["byre", "qemu-img"])
def test_help_lists_the_formats_for_scripts(capsys: pytest.CaptureFixture[str], prog: str) -> None:
    assert main(["--help"], prog) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Supported formats: ")]
    assert len(lines) == 1
    assert {"raw", "qcow2", "file"} <= set(lines[0].split()[2:])


def test_help_of_a_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["create", "-h"]) == 0
    out = capsys.readouterr().out
    assert "usage: byre create" in out
    assert "-F, --backing-format" in out
    assert "Supported formats: " in out


@pytest.mark.parametrize(("prog", "start"), [("byre", "byre 0."), ("qemu-img", "qemu-img version 10."),
                                             ("qemu-nbd", "qemu-nbd 10.")])  # fmt: skip
@pytest.mark.parametrize("option", ["--version", "-V"])
def test_version(capsys: pytest.CaptureFixture[str], prog: str, start: str, option: str) -> None:
    assert main([option], prog) == 0
    assert capsys.readouterr().out.startswith(start)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "not enough arguments"),
        (["frobnicate"], "command not found: frobnicate"),
        (["-Z"], "unrecognized option '-Z'"),
        (["info"], "expecting one image file name"),
        (["info", "a", "b"], "expecting one image file name"),
        (["info", "-Z"], "unrecognized option '-Z'"),
        (["info", "-f"], "missing argument for option '-f'"),
        (["info", "--backing-chain=3", "x"], "takes no argument"),
        (["info", "--output", "xml", "x"], "--output must be"),
        (["info", "--object", "iothread,id=a", "x"], "objects of type 'iothread' are not supported"),
        (["info", "--object", "secret,data=a", "x"], "needs an id"),
        (["info", "/nonexistent/x"], "No such file"),
        (["info", "/nonexistent/\x1b[31m\udcff"], "\\x1b[31m\\udcff"),
        (["create"], "expecting image file name"),
        (["daemon"], "daemon is not part of byre 0.1.0 yet (the storage daemon)"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(
    capsys: pytest.CaptureFixture[str], arguments: list[str], part: str
) -> None:
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("byre: ")
    assert captured.err.count("\n") == 1
    assert part in captured.err


def test_messages_carry_the_name_it_was_started_under(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "/nonexistent"], "qemu-img") == 1
    assert capsys.readouterr().err.startswith("qemu-img: ")


def test_own_verbs_belong_to_byre_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["formats"], "qemu-img") == 1
    assert "command not found" in capsys.readouterr().err


def test_trace_options_are_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-T", "x*", "--trace=y", "--version"], "qemu-img") == 0
    assert capsys.readouterr().out.startswith("qemu-img version")


class TestForeseenAndUnforeseen:
    def run_with(self, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
        def broken(arguments: list[str]) -> int:
            raise error

        monkeypatch.setattr("byre.cli.formats.run", broken)
        return main(["formats"])

    def test_interrupt(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.run_with(monkeypatch, KeyboardInterrupt()) == 130
        assert capsys.readouterr().err == ""

    def test_internal_error(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.delenv("BYRE_DEBUG", raising=False)
        assert self.run_with(monkeypatch, ZeroDivisionError("a\nb")) == 70
        assert capsys.readouterr().err == "byre: internal error, please report: ZeroDivisionError: a\\nb\n"

    def test_debugging(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("BYRE_DEBUG", "1")
        with pytest.raises(ZeroDivisionError):
            self.run_with(monkeypatch, ZeroDivisionError())

    def test_out_of_memory(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.run_with(monkeypatch, MemoryError()) == 1
        assert capsys.readouterr().err == "byre: out of memory\n"


START = "import sys; from byre.cli.main import entry; sys.argv[0] = 'byre'; entry()"


def byre(*arguments: str, **more: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-c", START, *arguments], timeout=60, **more)  # type: ignore[call-overload,no-any-return]


def test_a_full_disk_behind_stdout_is_an_error() -> None:
    with open("/dev/full", "wb") as full:
        done = byre("formats", stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr == b"byre: cannot write to standard output: No space left on device\n"


def test_a_closed_pipe_is_quiet() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = byre("formats", stdout=writer, stderr=subprocess.PIPE)
    finally:
        os.close(writer)
    assert done.stderr == b""
    assert done.returncode == 141


def test_a_terminated_command_leaves_without_noise(tmp_path: Path) -> None:
    program = (
        "import sys, time, byre.cli.formats as f\n"
        "def run(arguments):\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "f.run = run\nfrom byre.cli.main import entry\nsys.argv = ['byre', 'formats']\nentry()\n"
    )
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        with subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as running:
            assert running.stdout is not None
            assert running.stdout.readline() == b"ready\n"
            running.send_signal(number)
            assert running.wait(30) == code
            assert running.stderr is not None
            assert running.stderr.read() == b""


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1), (0, 1, 2)])
def test_descriptors_closed_at_start_are_not_given_to_an_image(tmp_path: Path, closed: tuple[int, ...]) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(4096))
    program = "import sys; sys.argv[0] = 'qemu-io'; from byre.cli.main import entry; entry()"
    command = [sys.executable, "-c", program, "-f", "raw", "-c", "read -v 0 16", "-c", "nonsense", str(path)]

    def close() -> None:
        for fd in closed:
            os.close(fd)

    done = subprocess.run(command, preexec_fn=close, capture_output=True, timeout=30)
    assert path.read_bytes() == bytes(4096)
    assert done.returncode == 1
    assert (1 in closed) == (done.stdout == b"")


class TestOptionTables:
    TABLE = (
        common.FORMAT,
        common.QUIET,
        common.Switch("start", "s", "start-offset", "N"),
        common.Switch("stop", "", "start-over", ""),
        common.Switch("only-long", "", "size", "N"),
    )

    def parse(self, *arguments: str) -> common.Given:
        return common.parse(self.TABLE, arguments)

    def test_values_in_every_form(self) -> None:
        for words in (["-f", "raw"], ["-fraw"], ["--format", "raw"], ["--format=raw"], ["--fo=raw"], ["-qf", "raw"]):
            assert self.parse(*words).last("format") == "raw"

    def test_options_may_follow_names_and_two_dashes_end_them(self) -> None:
        given = self.parse("a", "-q", "b", "--", "-f", "c")
        assert given.positional == ["a", "b", "-f", "c"]
        assert given.has("quiet")
        assert not given.has("format")

    def test_a_dash_alone_is_a_name(self) -> None:
        assert self.parse("-").positional == ["-"]

    def test_the_last_value_counts_and_all_are_kept(self) -> None:
        given = self.parse("-f", "raw", "-f", "qcow2", "--size", "-1")
        assert given.last("format") == "qcow2"
        assert given.all("format") == ["raw", "qcow2"]
        assert given.last("only-long") == "-1"
        assert given.last("start", "none") == "none"

    def test_an_exact_name_is_not_ambiguous_but_a_part_is(self) -> None:
        with pytest.raises(common.UsageError, match="ambiguous"):
            self.parse("--start=1")
        assert self.parse("--start-over").has("stop")

    def test_help(self) -> None:
        with pytest.raises(common.HelpRequested):
            self.parse("x", "--help")
        assert "-s, --start-offset=N" in common.option_help(self.TABLE)


class TestCreateOptions:
    def test_later_ones_replace_earlier_ones(self) -> None:
        assert common.create_options(["a=1,b=2", "a=3,c"]) == {"a": "3", "b": "2", "c": "on"}

    def test_a_doubled_comma_is_a_comma(self) -> None:
        assert common.create_options(["a=x,,help,b=,,"]) == {"a": "x,help", "b": ","}

    @pytest.mark.parametrize("texts", [["help"], ["a=1,help"], ["?"], ["a=1", "?"]])
    def test_help(self, texts: list[str]) -> None:
        assert common.create_options(texts) is None

    @pytest.mark.parametrize("text", ["", ",", ",,", "a=1,", ",a=1", ",,a=1"])
    def test_malformed_lists(self, text: str) -> None:
        with pytest.raises(common.InvalidArgument, match="invalid option list"):
            common.create_options(["b=1", text])


class TestPolicy:
    def test_environment_and_options(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def made(*arguments: str) -> tuple[str, bool, int]:
            found = common.policy(common.parse((), arguments))
            return found.mode, found.allow_references, found.max_size

        assert made() == ("allow", False, 0)
        assert made("--allow-ref") == ("allow", True, 0)
        assert made("--untrusted") == ("deny", False, 16 << 40)
        assert made("--untrusted", "--max-size", "1G") == ("deny", False, 1 << 30)
        monkeypatch.setenv("BYRE_UNTRUSTED", "1")
        assert made("--allow-ref")[0] == "deny"
        monkeypatch.setenv("BYRE_UNTRUSTED", "0")
        monkeypatch.setenv("BYRE_ALLOW_REF", "1")
        assert made() == ("allow", True, 0)


@pytest.mark.parametrize(("text", "size"), [("1024", 1024), ("1024b", 1024), ("1024.0", 1024), ("1024.0b", 1024),
                                            ("1k", 1024), ("1.5K", 1536), ("0.5M", 1 << 19), ("0x10", 16)])  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert common.size_argument(text, "size") == size


@pytest.mark.parametrize("text", ["-1024", "-1k", "1kilobyte", "foobar", "", "1.5", "9E", "1_0"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(common.InvalidArgument):
        common.size_argument(text, "size")


LOSES = """
import os, signal, sys, time, weakref
from byre.cli import main

class Thing:
    pass

def run(arguments):
    thing = Thing()
    reference = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.{name}) or [None for _ in range(99)])
    del thing
    time.sleep(20)
    return 0

sys.modules["byre.cli.formats"] = type(sys)("formats")
sys.modules["byre.cli.formats"].run = run
sys.argv = ["byre", "formats"]
main.entry()
"""


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 143)])
def test_an_interrupt_where_python_drops_exceptions_is_not_lost(name: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOSES.replace("{name}", name)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (code, "")
