"""``snapshot``, and ``-l`` of ``convert`` and ``measure``."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

from byre.cli.main import main
from conftest import Run

Output = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def disk() -> str:
    """1 MiB of which the first half was 0x11 when "one" was taken, and is 0x22 now."""
    assert main(["create", "-q", "-f", "qcow2", "disk", "1M"]) == 0
    io("write -P 0x11 0 512k")
    assert main(["snapshot", "-c", "one", "disk"]) == 0
    io("write -P 0x22 0 512k")
    return "disk"


def io(*commands: str, file: str = "disk", format: str = "qcow2") -> None:
    assert main(["io", "-f", format, *(word for command in commands for word in ("-c", command)), file]) == 0


def test_nothing_is_printed_where_there_is_none(capsys: Output) -> None:
    for format in ("raw", "qcow2"):
        assert main(["create", "-q", "-f", format, format, "1M"]) == 0
        assert main(["snapshot", "-l", format]) == 0
        assert main(["snapshot", format]) == 0
    assert capsys.readouterr().out == ""


def test_the_list(capsys: Output, disk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    capsys.readouterr()
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    assert main(["snapshot", "-c", "a name that is longer than its column", disk]) == 0
    assert main(["snapshot", "-l", disk]) == 0
    found = capsys.readouterr()
    lines = found.out.splitlines()
    assert lines[:2] == [
        "Snapshot list:",
        "ID      TAG               VM_SIZE                DATE        VM_CLOCK     ICOUNT",
    ]
    row = r"{:<7} {:<16}      0 B \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d  0000:00:00\.000          0"
    assert re.fullmatch(row.format("1", "one"), lines[2])
    assert re.fullmatch(row.format("2", "a name that is longer than its column"), lines[3])
    assert found.err == ""
    assert main(["info", disk]) == 0
    assert "\n".join(lines) in capsys.readouterr().out


def test_create_apply_delete(capsys: Output, disk: str) -> None:
    assert main(["snapshot", "-c", "two", disk]) == 0
    assert main(["snapshot", "-q", "-a", "1", disk]) == 0
    io("read -P 0x11 0 512k", "read -P 0 512k 512k")
    assert main(["snapshot", "-a", "two", "--image-opts", f"driver=qcow2,file.filename={disk}"]) == 0
    io("read -P 0x22 0 512k")
    assert main(["snapshot", "-d", "one", disk]) == 0
    assert main(["snapshot", "-d", "2", disk]) == 0
    capsys.readouterr()
    assert main(["snapshot", "-l", "-U", disk]) == 0
    assert capsys.readouterr().out == ""
    assert main(["check", disk]) == 0


def test_the_list_of_an_overlay_does_not_open_what_it_names(capsys: Output) -> None:
    assert main(["create", "-q", "-u", "-f", "qcow2", "-b", "not there", "-F", "raw", "top", "1M"]) == 0
    for arguments in (["-c", "one"], ["-l"], ["-a", "one"], ["-d", "one"]):
        assert main(["snapshot", *arguments, "top"]) == 0
    assert "one" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["-a", "gone", "disk"], "byre: disk: could not apply snapshot 'gone': there is no snapshot 'gone'\n"),
        (["-d", "gone", "disk"], "byre: disk: could not delete snapshot 'gone': there is no snapshot 'gone'\n"),
        (["-c", "n" * 256, "disk"], "the name of a snapshot may have 255 bytes\n"),
        (["-l", "-c", "x", "disk"], "byre: cannot mix '-l', '-a', '-c', '-d'; try 'byre --help'\n"),
        (["-l"], "byre: expecting one image file name; try 'byre --help'\n"),
        (["-l", "disk", "disk"], "byre: expecting one image file name; try 'byre --help'\n"),
        (["-c"], "byre: missing argument for option '-c'; try 'byre --help'\n"),
    ],
)
def test_refusals(capsys: Output, disk: str, arguments: list[str], text: str) -> None:
    before = Path(disk).read_bytes()
    capsys.readouterr()
    assert main(["snapshot", *arguments]) == 1
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.endswith(text)
    assert found.err.count("\n") == 1
    assert Path(disk).read_bytes() == before


def test_a_raw_image_cannot_have_any(capsys: Output) -> None:
    assert main(["create", "-q", "-f", "raw", "x", "1M"]) == 0
    assert main(["snapshot", "-c", "one", "-f", "raw", "x"]) == 1
    assert "driver 'raw' has no internal snapshots" in capsys.readouterr().err


@pytest.mark.oracle
@pytest.mark.parametrize("arguments", [["-d", "gone"], ["-a", "gone"]])
def test_under_the_peers_name_the_peers_words(capsys: Output, qemu_img: Run, arguments: list[str]) -> None:
    assert main(["create", "-q", "-f", "qcow2", "-o", "refcount_bits=1", "disk", "1M"]) == 0
    io("write 0 64k")
    capsys.readouterr()
    assert main(["snapshot", *arguments, "disk"], "qemu-img") == 1
    theirs = qemu_img("snapshot", *arguments, "disk", check=False)
    assert capsys.readouterr().err == theirs.stderr
    assert theirs.returncode == 1
    assert main(["snapshot", "-c", "narrow", "disk"], "qemu-img") == 1
    assert capsys.readouterr().err == "qemu-img: Could not create snapshot 'narrow': Invalid argument\n"  # release 10


# -- convert -l, measure -l -----------------------------------------------------------------------


@pytest.mark.parametrize("which", ["one", "1", "snapshot.id=1", "snapshot.name=one", "snapshot.id=1,snapshot.name=one"])
def test_convert(disk: str, which: str) -> None:
    before = Path(disk).read_bytes()
    assert main(["convert", "-l", which, "-O", "raw", disk, "raw"]) == 0
    assert Path("raw").read_bytes() == b"\x11" * (512 << 10) + bytes(512 << 10)
    assert Path(disk).read_bytes() == before


def test_convert_takes_the_size_it_had_then(disk: str) -> None:
    assert main(["resize", "-q", disk, "3M"]) == 0
    assert main(["convert", "-l", "one", "-O", "raw", disk, "raw"]) == 0
    assert os.path.getsize("raw") == 1 << 20


def test_measure(capsys: Output, disk: str) -> None:
    io("write 512k 512k")
    capsys.readouterr()
    assert main(["measure", "-O", "qcow2", "-l", "one", disk]) == 0
    small = capsys.readouterr().out
    assert main(["measure", "-O", "qcow2", disk]) == 0
    large = capsys.readouterr().out

    def required(text: str) -> int:
        return int(text.split()[2])

    assert required(large) - required(small) == 512 << 10


@pytest.mark.parametrize(
    ("which", "text"),
    [("gone", "there is no snapshot 'gone'"), ("snapshot.id=7", "there is no snapshot with id '7'")],
)
def test_convert_refuses(capsys: Output, disk: str, which: str, text: str) -> None:
    capsys.readouterr()
    assert main(["convert", "-l", which, "-O", "raw", disk, "raw"]) == 1
    found = capsys.readouterr().err
    assert "Failed to load snapshot: " in found
    assert text in found
    assert not os.path.exists("raw")
    assert main(["convert", "-l", "one", "-O", "raw", disk, disk, "raw"]) == 1
    assert "cannot be concatenated" in capsys.readouterr().err


def test_a_malformed_parameter_is_refused_before_anything_else(capsys: Output, disk: str) -> None:
    capsys.readouterr()
    for verb in (
        ["measure", "-l", "snapshot.foo=bar"],
        ["convert", "-l", "snapshot.id=1,snapshot.foo=bar", "gone", "raw"],
    ):
        assert main(verb) == 1
        assert capsys.readouterr().err == (
            f"byre: Failed in parsing snapshot param {verb[2]!r}; known are snapshot.id=ID and snapshot.name=NAME\n"
        )
        assert main(verb, "qemu-img") == 1
        lines = capsys.readouterr().err.splitlines()
        assert lines[0] == "qemu-img: Invalid parameter 'snapshot.foo'"
        assert lines[1].startswith(f"qemu-img: Failed in parsing snapshot param {verb[2]!r}")
        assert len(lines) == 2
