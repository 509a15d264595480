"""``check``: text, JSON, exit codes, and that nothing changes without ``-r``."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from byre.cli.main import main

Output = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def damaged(*, leak: bool = False, corrupt: bool = False) -> None:
    """The image "x": six clusters of data, a leaked one, one that is used twice."""
    assert main(["create", "-q", "-f", "qcow2", "x", "1M"]) == 0
    assert main(["io", "-c", "write -q 0 384k", "x"]) == 0
    data = bytearray(Path("x").read_bytes())
    l1 = struct.unpack_from(">Q", data, 40)[0]
    l2 = struct.unpack_from(">Q", data, l1)[0] & 0xFFFFFFFFFFFE00
    table = struct.unpack_from(">Q", data, 48)[0]
    block = struct.unpack_from(">Q", data, table)[0]
    if leak:
        host = struct.unpack_from(">Q", data, l2)[0] & 0xFFFFFFFFFFFE00
        struct.pack_into(">Q", data, l2, 0)
        assert data[block + 2 * (host >> 16) + 1] == 1
    if corrupt:
        struct.pack_into(">Q", data, l2 + 8 * 5, struct.unpack_from(">Q", data, l2 + 8 * 4)[0])
    Path("x").write_bytes(data)


def test_a_sound_image(capsys: Output) -> None:
    damaged()
    assert main(["check", "x"]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "No errors were found on the image.",
        "6/16 = 37.50% allocated, 0.00% fragmented, 0.00% compressed clusters",
        f"Image end offset: {Path('x').stat().st_size}",
    ]
    assert captured.err == ""


def test_leaks(capsys: Output) -> None:
    damaged(leak=True)
    assert main(["check", "x"]) == 3
    captured = capsys.readouterr()
    assert "\n1 leaked clusters were found on the image.\n" in captured.out
    assert captured.err.startswith("Leaked cluster ")


def test_corruption(capsys: Output) -> None:
    damaged(leak=True, corrupt=True)
    before = Path("x").read_bytes()
    assert main(["check", "-q", "x"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "ERROR cluster" in captured.err
    assert Path("x").read_bytes() == before


@pytest.mark.parametrize(("fix", "code"), [("leaks", 2), ("all", 0)])
def test_repair(capsys: Output, fix: str, code: int) -> None:
    damaged(leak=True, corrupt=True)
    assert main(["check", "-r", fix, "x"]) == code
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "The following inconsistencies were found and repaired:"
    assert lines[5] == "Double checking the fixed image now..."
    assert ("No errors were found on the image." in lines) == (fix == "all")


def test_an_image_marked_corrupt_can_be_mended(capsys: Output) -> None:
    damaged(corrupt=True)
    with open("x", "r+b") as file:
        file.seek(79)
        file.write(b"\x02")
    assert main(["io", "-c", "write 0 1", "x"]) == 1
    assert main(["check", "-r", "all", "x"]) == 0
    assert main(["io", "-c", "write 0 1", "x"]) == 0


def test_json(capsys: Output) -> None:
    damaged(leak=True)
    assert main(["check", "--output=json", "x"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert found["leaks"] == 1
    assert list(found)[-2:] == ["filename", "format"]


@pytest.mark.oracle
@pytest.mark.parametrize("leak", [False, True])
@pytest.mark.parametrize("corrupt", [False, True])
@pytest.mark.parametrize("fix", ["", "leaks", "all"])
def test_the_peer_says_the_same(capsys: Output, qemu_img: Any, leak: bool, corrupt: bool, fix: str) -> None:
    damaged(leak=leak, corrupt=corrupt)
    options = ["-r", fix] if fix else []
    for output in ("human", "json"):
        shutil.copy("x", "mine")
        shutil.copy("x", "theirs")
        done = qemu_img("check", *options, "--output", output, "theirs", check=False)
        assert main(["check", *options, "--output", output, "mine"]) == done.returncode
        captured = capsys.readouterr()
        assert captured.out == done.stdout.replace("theirs", "mine")
        assert captured.err == done.stderr


def test_formats_without_checks(capsys: Output) -> None:
    assert main(["create", "-q", "r", "1M"]) == 0
    assert main(["check", "r"], "qemu-img") == 63
    assert capsys.readouterr().err == "qemu-img: This image format does not support checks\n"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["x", "y"], "expecting one image file name"),
        (["-r", "some", "x"], "unknown value for -r"),
        (["missing"], "missing"),
        (["-f", "qcow2", "junk"], "junk"),
    ],
)
def test_refusals(capsys: Output, arguments: list[str], part: str) -> None:
    Path("junk").write_bytes(b"junk" * 1000)
    assert main(["check", *arguments]) == 1
    captured = capsys.readouterr()
    assert part in captured.err
    assert captured.err.count("\n") == 1


def test_backing_files_are_not_needed(capsys: Output) -> None:
    assert main(["create", "-q", "-f", "qcow2", "-u", "-b", "missing", "-F", "raw", "x", "1M"]) == 0
    assert main(["check", "--untrusted", "x"]) == 0
