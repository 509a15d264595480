"""Progress: a bar on a terminal, the peer's lines elsewhere, a line when asked."""

from __future__ import annotations

import io
import itertools
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import byre
from byre.cli.main import main
from byre.cli.progress import Display, mode_for
from byre.jobs.job import Control

COMMAND = [sys.executable, "-c", "from byre.cli.main import entry; entry()"]


@pytest.fixture
def slow(tmp_path: Path) -> list[str]:
    """Arguments of a conversion that takes a second or two."""
    (tmp_path / "a").write_bytes(os.urandom(4 << 20))
    return ["convert", "-r", "3M", "-f", "raw", str(tmp_path / "a"), str(tmp_path / "b")]


def test_a_terminal_gets_a_bar(slow: list[str]) -> None:
    leader, follower = pty.openpty()
    process = subprocess.Popen([*COMMAND, *slow, "-p"], stdout=follower, stderr=subprocess.PIPE,
                               env={**os.environ, "TERM": "xterm", "COLUMNS": "120"})  # fmt: skip
    os.close(follower)
    shown = b""
    while select.select([leader], [], [], 20)[0]:
        try:
            piece = os.read(leader, 65536)
        except OSError:
            break
        if not piece:
            break
        shown += piece
    assert process.wait(20) == 0
    os.close(leader)
    assert b"convert" in shown
    assert b"MiB" in shown
    assert b"100%" in shown


def test_sigusr1_prints_a_line(slow: list[str]) -> None:
    process = subprocess.Popen([*COMMAND, *slow], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 20
    while not Path(slow[-1]).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0
    assert out == b""
    assert err.startswith(b"    (")
    assert err.endswith(b"/100%)\n")


def test_rich_is_loaded_only_for_a_bar(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(1 << 20))
    code = (
        "import sys; from byre.cli.main import main; "
        f"main(['convert', '-p', '-f', 'raw', {str(tmp_path / 'a')!r}, {str(tmp_path / 'b')!r}]); "
        "sys.exit('rich' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0


def test_modes() -> None:
    assert mode_for(False, "", False) == "none"
    assert mode_for(True, "", False) == "text"
    assert mode_for(True, "json", False) == "json"
    assert mode_for(True, "json", True) == "none"


def test_text_prints_at_each_step(capsys: pytest.CaptureFixture[str]) -> None:
    control = Control(200)
    with Display(control, "job", "text", least=10.0):
        for _ in range(4):
            control.advance(50)
            time.sleep(0.25)
    out = capsys.readouterr().out
    assert out.startswith("    (0.00/100%)\r")
    assert "    (50.00/100%)\r" in out
    assert out.endswith("    (100.00/100%)\r\n")


def test_a_failure_does_not_claim_to_be_complete(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError), Display(Control(200), "job", "text"):
        raise ValueError
    assert "100.00" not in capsys.readouterr().out


def test_json_comes_even_where_nothing_moves(capsys: pytest.CaptureFixture[str]) -> None:
    with Display(Control(200), "job", "json"):
        time.sleep(1.4)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 3
    assert [line["offset"] for line in lines] == [0, 0, 200]
    assert lines[0] == {"job": "job", "offset": 0, "total": 200, "rate": 0, "eta": None}


# -- each step ------------------------------------------------------------------------------------


def percents(out: str) -> list[str]:
    return [line.strip().removeprefix("(").removesuffix("/100%)") for line in out.split("\r")[:-1]]


def test_every_step_is_printed_however_fast_they_come(capsys: pytest.CaptureFixture[str]) -> None:
    control = Control(1000)
    with Display(control, "job", "text"):
        for _ in range(1000):
            control.count(1)
    shown = [float(one) for one in percents(capsys.readouterr().out)]
    assert (shown[0], shown[-2:]) == (0.0, [100.0, 100.0])
    assert len(shown) <= 101
    assert all(1 < after - before < 1.11 for before, after in itertools.pairwise(shown[:-2]))


def test_a_total_that_grows_never_goes_back(capsys: pytest.CaptureFixture[str]) -> None:
    control = Control(0)
    with Display(control, "job", "text"):
        control.count(0)
        for total in (100, 200, 400):
            control.total = total
            control.count(50)
    shown = [float(one) for one in percents(capsys.readouterr().out)]
    assert shown == [0.0, 50.0, 100.0]


def test_a_reader_that_does_not_read_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that copies prints nothing itself."""
    written, read = threading.Event(), threading.Event()

    class Stuck(io.StringIO):
        def write(self, text: str) -> int:
            written.set()
            assert threading.current_thread() is threading.main_thread() or read.wait(20)
            return super().write(text)

    out = Stuck()
    monkeypatch.setattr(sys, "stdout", out)
    control = Control(200)
    with Display(control, "job", "text"):
        for _ in range(4):
            control.count(50)
        read.set()
    assert written.is_set()
    assert percents(out.getvalue()) == ["0.00", "25.00", "50.00", "75.00", "100.00", "100.00"]


@pytest.fixture
def pieces(tmp_path: Path) -> str:
    """Four pieces of 1 MiB in 128 MiB."""
    byre.create(str(tmp_path / "a"), "qcow2", 128 << 20)
    with byre.open(str(tmp_path / "a"), read_only=False) as image:
        for offset in (0, 2, 4, 32):
            image.write(offset << 20, b"\xcd" * (1 << 20))
    return str(tmp_path / "a")


QUARTERS = ["0.00", "25.00", "50.00", "75.00", "100.00"]


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_what_scripts_see_of_a_short_conversion(pieces: str, format: str, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(3):
        assert main(["convert", "-p", "-f", "qcow2", "-O", format, pieces, pieces + ".out"]) == 0
        assert percents(capsys.readouterr().out) == [*QUARTERS, "100.00"]


def test_what_scripts_see_of_a_commit(pieces: str, capsys: pytest.CaptureFixture[str]) -> None:
    os.rename(pieces, pieces + ".top")
    byre.create(pieces, "qcow2", 128 << 20)
    assert main(["rebase", "-u", "-f", "qcow2", "-b", pieces, "-F", "qcow2", pieces + ".top"]) == 0
    assert main(["commit", "-p", "-f", "qcow2", pieces + ".top"]) == 0
    assert percents(capsys.readouterr().out) == [*QUARTERS, "100.00"]


def test_what_scripts_see_of_a_comparison(pieces: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "-p", "-f", "qcow2", "-F", "qcow2", pieces, pieces]) == 0
    shown = percents(capsys.readouterr().out)
    assert shown[0] == "0.00"
    assert shown.count("100.00") == 1
    assert len(shown) >= 4
    byre.create(pieces + ".b", "qcow2", 128 << 20)
    assert main(["compare", "-p", "-f", "qcow2", "-F", "qcow2", pieces, pieces + ".b"]) == 1
    assert "100.00" not in percents(capsys.readouterr().out)


@pytest.mark.oracle
def test_the_peer_prints_the_same(pieces: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["convert", "-p", "-f", "qcow2", "-O", "raw", pieces, pieces + ".out"]
    found = subprocess.run(["qemu-img", *arguments], capture_output=True, check=True).stdout
    assert main(arguments) == 0
    assert capsys.readouterr().out.encode() == found
