"""``bitmap``, ``convert --bitmaps`` and ``measure`` of bitmaps, beside the peer where its output is the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import byre
from byre.bitmaps.bitmap import Bitmap
from byre.cli.main import main
from conftest import Run

Output = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make(*names: str, size: str = "10M", options: str = "compat=1.1") -> None:
    for name in names:
        assert main(["create", "-q", "-f", "qcow2", "-o", options, name, size]) == 0


def bitmaps(path: str) -> dict[str, Bitmap]:
    with byre.open(path, format="qcow2", backing=False) as image:
        node: Any = image.node
        return {bitmap.name: bitmap for bitmap in node.bitmap_store().all()}


def dirty(bitmap: Bitmap) -> list[tuple[int, int]]:
    return [row for part in bitmap.runs() for row in zip(*(column.tolist() for column in part), strict=True)]


def write(path: str, *places: int) -> None:
    with byre.open(path, format="qcow2", read_only=False) as image:
        for place in places:
            image.write(place, b"x")


def test_a_life(capsys: Output) -> None:
    make("x")
    assert main(["bitmap", "--add", "-g", "4k", "x", "b"]) == 0
    write("x", 5000)
    assert main(["bitmap", "--disable", "x", "b"]) == 0
    write("x", 50000)
    found = bitmaps("x")["b"]
    assert (found.granularity, found.enabled, dirty(found)) == (4096, False, [(4096, 4096)])
    assert main(["bitmap", "--enable", "--clear", "x", "b"]) == 0
    write("x", 0)
    assert dirty(bitmaps("x")["b"]) == [(0, 4096)]
    assert main(["bitmap", "--remove", "x", "b"]) == 0
    assert bitmaps("x") == {}
    assert capsys.readouterr() == ("", "")


def test_actions_are_carried_out_in_their_order() -> None:
    make("x")
    assert main(["bitmap", "--add", "--disable", "x", "a"]) == 0
    assert main(["bitmap", "--add", "--merge", "a", "--clear", "--disable", "--enable", "x", "b"]) == 0
    assert main(["bitmap", "--remove", "--add", "-g", "2M", "x", "b"]) == 0
    found = bitmaps("x")
    assert {name: (bitmap.granularity, bitmap.enabled) for name, bitmap in found.items()} == {
        "a": (65536, False),
        "b": (2 << 20, True),
    }


def test_what_went_before_a_failure_is_kept(capsys: Output) -> None:
    make("x")
    assert main(["bitmap", "--add", "--merge", "nope", "--disable", "x", "b"]) == 1
    assert capsys.readouterr().err == "byre: Operation merge on bitmap b failed: Dirty bitmap 'nope' not found\n"
    assert bitmaps("x")["b"].enabled


def test_merging_from_another_image() -> None:
    make("x", "y")
    main(["bitmap", "--add", "y", "theirs"])
    write("y", 0, 1 << 20)
    before = Path("y").read_bytes()
    assert main(["bitmap", "--add", "--merge", "theirs", "-b", "y", "-F", "qcow2", "-g", "512", "x", "mine"]) == 0
    assert dirty(bitmaps("x")["mine"]) == [(0, 65536), (1 << 20, 65536)]
    assert Path("y").read_bytes() == before


def test_backing_files_are_left_alone() -> None:
    make("base")
    assert main(["create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "x"]) == 0
    Path("base").unlink()
    assert main(["bitmap", "--add", "x", "b"]) == 0
    assert main(["bitmap", "--clear", "--image-opts", "driver=qcow2,file.filename=x", "b"]) == 0
    assert list(bitmaps("x")) == ["b"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x", "b"], "need at least one of --add, --remove"),
        (["--clear", "-g", "512", "x", "b"], "granularity only supported with --add"),
        (["--add", "-F", "raw", "x", "b"], "-F only supported with -b"),
        (["--clear", "-b", "x", "x", "b"], "only supported with --merge"),
        (["--add", "x"], "expecting filename and bitmap name"),
        (["--add", "x", "b", "c"], "expecting filename and bitmap name"),
        (["--add", "-g", "many", "x", "b"], "invalid granularity"),
        (["--add", "-g", "1000", "x", "b"], "power of 2"),
        (["--add", "-g", "4G", "x", "b"], "power of 2"),
        (["--add", "x", ""], "cannot be empty"),
        (["--add", "x", "b" * 1024], "Name length"),
        (["--add", "x", "there"], "Bitmap already exists: there"),
        (["--remove", "x", "b"], "Dirty bitmap 'b' not found"),
        (["--enable", "x", "b"], "not found"),
        (["--merge", "there", "-b", "small", "x", "there"], "different sizes"),
        (["--add", "old", "b"], "Cannot store dirty bitmaps in qcow2 v2 files"),
        (["--add", "-f", "raw", "raw", "b"], "Can't store persistent bitmaps to raw"),
        (["--clear", "-f", "raw", "raw", "b"], "Dirty bitmap 'b' not found"),
        (["--merge", "b", "-b", "raw", "-F", "raw", "x", "there"], "Dirty bitmap 'b' not found"),
        (["--add", "missing", "b"], "No such file"),
        (["--merge", "there", "-b", "missing", "x", "there"], "No such file"),
        (["--merge"], "missing argument"),
        (["--add", "--image-opts", "-f", "qcow2", "x", "b"], "exclude each other"),
    ],
)
def test_refusals_change_nothing(capsys: Output, words: list[str], message: str) -> None:
    make("x")
    make("small", size="5M")
    make("old", options="compat=0.10")
    main(["bitmap", "--add", "x", "there"])
    main(["bitmap", "--add", "small", "there"])
    Path("raw").write_bytes(bytes(1 << 20))
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    assert main(["bitmap", *words]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == before


def test_an_inconsistent_bitmap(capsys: Output) -> None:
    make("x")
    main(["bitmap", "--add", "x", "b"])
    with byre.open("x", format="qcow2", read_only=False) as image:
        image.write(0, b"x")
        image.flush()
        shutil.copy("x", "left")
    for action in ("--clear", "--enable", "--disable"):
        assert main(["bitmap", action, "left", "b"]) == 1
        assert "Bitmap 'b' is inconsistent and cannot be used" in capsys.readouterr().err
    assert main(["resize", "left", "20M"]) == 1
    assert "inconsistent" in capsys.readouterr().err
    assert main(["convert", "--bitmaps", "-O", "qcow2", "left", "copy"]) == 1
    assert "Cannot copy inconsistent bitmap 'b'" in capsys.readouterr().err
    assert not Path("copy").exists()
    assert main(["convert", "--bitmaps", "--skip-broken-bitmaps", "-O", "qcow2", "left", "copy"]) == 0
    assert capsys.readouterr().err == "byre: warning: Skipping inconsistent bitmap 'b'\n"
    assert bitmaps("copy") == {}
    assert main(["bitmap", "--remove", "--add", "left", "b"]) == 0
    assert main(["resize", "-q", "left", "20M"]) == 0


def test_convert_copies_bitmaps() -> None:
    make("x")
    main(["bitmap", "--add", "-g", "512", "x", "on"])
    main(["bitmap", "--add", "--disable", "-g", "2M", "x", "off"])
    write("x", 1 << 20)
    main(["bitmap", "--merge", "on", "x", "off"])
    assert main(["convert", "--bitmaps", "-O", "qcow2", "-o", "cluster_size=4k", "x", "y"]) == 0
    before, after = bitmaps("x"), bitmaps("y")
    for name in ("on", "off"):
        assert dirty(after[name]) == dirty(before[name])
        assert after[name].granularity == before[name].granularity
        assert after[name].enabled == before[name].enabled
    assert main(["convert", "-O", "qcow2", "x", "z"]) == 0
    assert bitmaps("z") == {}
    assert main(["convert", "-n", "--bitmaps", "-O", "qcow2", "x", "z"]) == 0
    assert list(bitmaps("z")) == ["on", "off"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-O", "raw", "x", "o"], "Format driver 'raw' does not support bitmaps"),
        (["-O", "qcow2", "-o", "compat=0.10", "x", "o"], "does not support bitmaps"),
        (["-f", "raw", "-O", "qcow2", "x", "o"], "Source lacks bitmap support"),
        (["-O", "qcow2", "old", "o"], "Source lacks bitmap support"),
        (["-O", "qcow2", "x", "x", "o"], "single source"),
        (["-n", "-O", "qcow2", "x", "same"], "Failed to create bitmap b: Bitmap already exists: b"),
        (["-n", "-O", "qcow2", "x", "large"], "Failed to populate bitmap b: Bitmaps are of different sizes"),
    ],
)
def test_convert_refuses(capsys: Output, words: list[str], message: str) -> None:
    make("x", "same")
    make("large", size="20M")
    make("old", options="compat=0.10")
    for name in ("x", "same"):
        main(["bitmap", "--add", name, "b"])
    assert main(["convert", "--bitmaps", *words]) == 1
    assert message in capsys.readouterr().err
    assert not Path("o").exists()
    assert bitmaps("large") == {}


@pytest.mark.oracle
@pytest.mark.parametrize("options", ["cluster_size=64k", "cluster_size=512", "cluster_size=2M", "compat=0.10"])
def test_measure_as_the_peer(capsys: Output, qemu_img: Run, options: str) -> None:
    make("x", size="2G")
    for name, granularity in (("a" * 300, "512"), ("b", "2M"), ("c", "64k")):
        assert main(["bitmap", "--add", "-g", granularity, "x", name]) == 0
    with byre.open("x", format="qcow2", read_only=False) as image:
        image.write(0, b"x" * 65536)
        image.flush()
        shutil.copy("x", "left")
    for name in ("x", "left"):
        words = ["measure", "-O", "qcow2", "-o", options, "-f", "qcow2", name]
        assert main(words) == 0
        assert capsys.readouterr().out == qemu_img(*words).stdout


@pytest.mark.oracle
def test_side_by_side_with_the_peer(capsys: Output, qemu_img: Run) -> None:
    commands = [
        ["--add", "-g", "64k", "IMAGE", "one"],
        ["--add", "--disable", "-g", "512", "IMAGE", "two"],
        ["--add", "IMAGE", "one"],
        ["--merge", "two", "--merge", "one", "IMAGE", "two"],
        ["--add", "--add", "IMAGE", "three"],
        ["--disable", "--clear", "IMAGE", "one"],
        ["--enable", "IMAGE", "two"],
        ["--remove", "IMAGE", "four"],
        ["--remove", "--add", "-g", "1M", "IMAGE", "one"],
    ]
    make("ours", "theirs")
    for words in commands:
        ours = main(["bitmap", *[word.replace("IMAGE", "ours") for word in words]])
        theirs = qemu_img("bitmap", *[word.replace("IMAGE", "theirs") for word in words], check=False)
        assert ours == theirs.returncode, words
        assert capsys.readouterr().err.partition(": ")[2] == theirs.stderr.partition(": ")[2], words
        found = [json.loads(qemu_img("info", "--output=json", name).stdout) for name in ("ours", "theirs")]
        one, other = (each["format-specific"]["data"].get("bitmaps", []) for each in found)
        assert one == other, words
        qemu_img("check", "ours")
    # And each goes on where the other stopped.
    qemu_img("bitmap", "--add", "ours", "last")
    assert main(["bitmap", "--add", "theirs", "last"]) == 0
    qemu_img("check", "theirs")
    assert list(bitmaps("ours")) == list(bitmaps("theirs"))
