"""convert as a user types it; its images are those of qemu-img."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import byre
from byre.cli.main import main

Run = Callable[..., "subprocess.CompletedProcess[str]"]
K = 1024
BAD_SECTOR = (
    "driver=raw,file.driver=blkdebug,file.image.driver=file,file.image.filename=a,"
    "file.inject-error.0.event=read_aio,file.inject-error.0.errno=5,file.inject-error.0.sector=9"
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mixed(path: Path, size: int = 6 << 20, seed: int = 1) -> bytes:
    """A sparse file with data, written zeroes and holes of many lengths, at sector offsets."""
    choose = random.Random(seed)
    data = bytearray(size)
    with path.open("wb") as file:
        file.truncate(size)
        position = 0
        while position < size:
            length = min(choose.choice([512, 2048, 4096, 12288, 65536, 300_032, 1 << 20]), size - position)
            kind = choose.random()
            piece = b""
            if kind < 0.4:
                piece = choose.randbytes(length)
            elif kind < 0.6:
                piece = bytes(length)
            elif kind < 0.75:
                piece = (b"text and zeroes" + bytes(1500)).ljust(2048, b"\0") * (length // 2048)
            file.seek(position)
            file.write(piece)
            data[position : position + len(piece)] = piece
            position += length
    return bytes(data)


def read(path: str, format: str) -> bytes:
    with byre.open(path, format=format) as image:
        return image.read(0, image.size)


@pytest.mark.parametrize("source", ["raw", "qcow2"])
@pytest.mark.parametrize("target", ["raw", "qcow2"])
@pytest.mark.parametrize(
    "more", [[], ["-S", "0"], ["-S", "64k"], ["-m", "1"], ["-W"], ["-m", "16", "-W"], ["-r", "1G"]]
)
def test_content_survives(here: Path, source: str, target: str, more: list[str]) -> None:
    data = mixed(here / "a")
    if source == "qcow2":
        assert main(["convert", "-f", "raw", "-O", "qcow2", "a", "b"]) == 0
    name = "a" if source == "raw" else "b"
    assert main(["convert", *more, "-f", source, "-O", target, name, "c"]) == 0
    assert read("c", target) == data


@pytest.mark.oracle
@pytest.mark.parametrize(
    "more",
    [
        ["-O", "raw"],
        ["-O", "raw", "-S", "0"],
        ["-O", "raw", "-S", "12k"],
        ["-O", "raw", "-S", "512"],
        ["-O", "raw", "-S", "64k"],
        ["-O", "qcow2"],
        ["-O", "qcow2", "-S", "0"],
        ["-O", "qcow2", "-S", "1M"],
        ["-O", "qcow2", "-o", "cluster_size=4k,compat=0.10"],
        ["-O", "qcow2", "-o", "cluster_size=2M"],
        ["-O", "qcow2", "-o", "extended_l2=on"],
        ["-O", "qcow2", "-o", "preallocation=metadata"],
        ["-O", "qcow2", "-o", "data_file=DATA,data_file_raw=on"],
        ["-O", "qcow2", "-c"],
        ["-O", "qcow2", "-c", "-o", "compression_type=zstd,cluster_size=16k"],
    ],
    ids=lambda more: " ".join(more),
)
def test_the_same_map_as_the_peer(
    here: Path, qemu_img: Run, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    mixed(here / "a", seed=len(" ".join(more)))
    ours = [word.replace("DATA", "d1") for word in more]
    theirs = [word.replace("DATA", "d2") for word in more]
    assert main(["convert", "-f", "raw", *ours, "a", "ours"]) == 0
    qemu_img("convert", "-f", "raw", *theirs, "a", "theirs")
    format = more[1]
    qemu_img("compare", "-f", "raw", "-F", format, "a", "ours")
    if format == "qcow2":
        qemu_img("check", "-q", "ours")

    def shape(name: str) -> list[tuple[object, ...]]:
        rows = json.loads(qemu_img("map", "-f", format, "--output=json", name).stdout)
        joined: list[tuple[object, ...]] = []
        for row in rows:
            # Parts of a cluster that were not written may be holes in the file, or not.
            kind = (row["present"], row["zero"] and not row["data"], row["data"])
            if joined and joined[-1][1] == kind:
                continue
            joined.append((row["start"], kind))
        return joined

    # The peer always allocates the first block of a raw file it makes.
    expected, found = shape("theirs"), shape("ours")
    if format == "raw":
        expected = [row for row in expected if int(str(row[0])) > 4096]
        found = [row for row in found if int(str(row[0])) > 4096]
    assert found == expected


@pytest.mark.oracle
def test_over_a_backing_file_as_the_peer(here: Path, qemu_img: Run, qemu_io: Run) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "base", "3M")
    qemu_io("-c", "write -P 1 0 3M", "base")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top", "5M")
    qemu_io(
        "-c",
        "write -P 2 64k 64k",
        "-c",
        "write -z 1M 100k",
        "-c",
        "write -z 3500k 64k",
        "-c",
        "write -P 3 4M 10k",
        "top",
    )
    for more in ([], ["-c"], ["-S", "0"]):
        options = ["convert", *more, "-O", "qcow2", "-B", "base", "-F", "qcow2", "top"]
        assert main([*options, "ours"]) == 0
        qemu_img(*options, "theirs")
        maps = [qemu_img("map", "--output=json", name).stdout for name in ("ours", "theirs")]
        shapes = [
            [(r["start"], r["length"], r["depth"], r["zero"], r["data"]) for r in json.loads(text)] for text in maps
        ]
        assert shapes[0] == shapes[1], more
        qemu_img("compare", "ours", "top")


def test_several_sources_and_odd_sizes(here: Path) -> None:
    parts = [os.urandom(1000), os.urandom(70_000), os.urandom(512)]
    for index, part in enumerate(parts):
        (here / str(index)).write_bytes(part)
    whole = b"".join(part.ljust(-(-len(part) // 512) * 512, b"\0") for part in parts)
    for more in ([], ["-c"]):
        assert main(["convert", *more, "-f", "raw", "-O", "qcow2", "0", "1", "2", "out"]) == 0
        assert read("out", "qcow2") == whole


def test_filling_an_existing_target(here: Path) -> None:
    data = mixed(here / "a")
    byre.create("b", "qcow2", 8 << 20)
    with byre.open("b", read_only=False) as image:
        image.write(0, b"\xff" * (8 << 20))
    assert main(["convert", "-n", "-f", "raw", "-O", "qcow2", "a", "b"]) == 0
    assert read("b", "qcow2") == data + b"\xff" * (2 << 20)
    options = "driver=qcow2,file.driver=file,file.filename=b"
    assert main(["convert", "-n", "--target-image-opts", "-f", "raw", "a", options]) == 0


def test_the_source_is_not_touched(here: Path) -> None:
    mixed(here / "a")
    before = (here / "a").stat().st_mtime_ns
    assert main(["convert", "-f", "raw", "-O", "qcow2", "a", "b"]) == 0
    assert main(["convert", "-f", "raw", "a", "a"]) == 1
    assert main(["convert", "-n", "-f", "raw", "a", "a"]) == 1
    assert (here / "a").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-S", "100", "a", "o"], "invalid buffer size for sparse output"),
        (["-S", "17M", "a", "o"], "invalid buffer size for sparse output"),
        (["--target-is-zero", "a", "o"], "--target-is-zero requires use of -n flag"),
        (["-c", "-C", "a", "o"], "cannot enable copy offloading when -c is used"),
        (["-S", "4k", "-C", "a", "o"], "cannot enable copy offloading when -S is used"),
        (["--salvage", "-C", "a", "o"], "cannot use copy offloading in salvaging mode"),
        (["-o", "cluster_size=4k", "-n", "a", "o"], "-o has no effect when skipping image creation"),
        (["--target-image-opts", "a", "driver=raw"], "--target-image-opts requires use of -n flag"),
        (["--skip-broken-bitmaps", "a", "o"], "--skip-broken-bitmaps requires --bitmaps"),
        (["-O", "nope", "a", "o"], "nope"),
        (["-m", "17", "a", "o"], "allowed are 1 to 16"),
        (["-m", "0", "a", "o"], "allowed are 1 to 16"),
        (["-r", "abc", "a", "o"], "invalid rate limit"),
        (["-t", "foo", "a", "o"], "invalid cache option"),
        (["-T", "foo", "a", "o"], "invalid source cache option"),
        (["a"], "must specify"),
        (["-B", "a", "a", "o"], "backing file not supported"),
        (["-O", "qcow2", "-B", "a", "a", "o"], "requires an explicit backing format"),
        (["-O", "qcow2", "-B", "a", "-F", "raw", "a", "a", "o"], "concatenating"),
        (["-c", "a", "o"], "compression not supported for this file format"),
        (["-c", "-O", "qcow2", "-o", "preallocation=full", "a", "o"], "compression and preallocation"),
        (["--level", "3", "a", "o"], "--level needs -c"),
        (["-c", "--level", "99", "-O", "qcow2", "a", "o"], "compression level"),
        (["-l", "snap", "a", "o"], "does not support temporarily loading"),
        (["--bitmaps", "a", "o"], "Source lacks bitmap support"),
        (["-n", "a", "missing"], "missing"),
        (["missing", "o"], "missing"),
        (["-O", "qcow2", "-o", "cluster_size=5", "a", "o"], "cluster"),
        (["--progress", "loud", "a", "o"], "--progress"),
    ],
)
def test_refusals_leave_nothing(here: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    (here / "a").write_bytes(bytes(1 << 20))
    assert main(["convert", *words]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") <= 2
    assert sorted(p.name for p in here.iterdir()) == ["a"]


def test_a_smaller_target_is_refused_and_kept(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "a").write_bytes(b"a" * (2 << 20))
    (here / "b").write_bytes(b"b" * (1 << 20))
    assert main(["convert", "-n", "-f", "raw", "a", "b"]) == 1
    assert "output file is smaller than input file" in capsys.readouterr().err
    assert (here / "b").read_bytes() == b"b" * (1 << 20)


def test_a_failed_conversion_removes_what_it_made(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "a").write_bytes(os.urandom(1 << 20))
    assert main(["convert", "--image-opts", BAD_SECTOR, "c"]) == 1
    assert "error while reading at byte" in capsys.readouterr().err
    assert not (here / "c").exists()
    (here / "c").write_bytes(bytes(1 << 20))
    assert main(["convert", "-n", "--image-opts", BAD_SECTOR, "c"]) == 1
    assert "c is only partly overwritten" in capsys.readouterr().err
    assert main(["convert", "--image-opts", BAD_SECTOR, "c"]) == 1
    assert "left behind incomplete" in capsys.readouterr().err


def test_salvage_warns_and_goes_on(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = os.urandom(1 << 20)
    (here / "a").write_bytes(data)
    assert main(["convert", "--salvage", "--image-opts", BAD_SECTOR, "b"]) == 0
    assert "error while reading offset 4608" in capsys.readouterr().err
    expected = bytearray(data)
    expected[4608:5120] = bytes(512)
    assert (here / "b").read_bytes() == bytes(expected)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_salvage_warns_of_what_a_filter_above_a_format_cannot_tell(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = random.Random(7).randbytes(1 << 20)
    byre.create("a.qcow2", "qcow2", 1 << 20)
    with byre.open("a.qcow2", read_only=False) as image:
        image.write(0, data)
    rules = [{"event": "none", "iotype": "block-status", "errno": 5, "sector": sector} for sector in (16, 1025)]
    rules.append({"event": "none", "iotype": "read", "errno": 5, "sector": 1025})
    source = {"driver": "blkdebug", "image": {"driver": "qcow2", "file": {"driver": "file", "filename": "a.qcow2"}},
              "inject-error": rules}  # fmt: skip
    name = "json:" + json.dumps(source)
    assert main(["convert", "--salvage", name, "b"]) == 0
    said = capsys.readouterr().err
    for sector in (16, 1025):
        assert f"warning: error while reading block status at offset {sector * 512}: " in said
    assert f"warning: error while reading offset {1025 * 512}: " in said
    assert len(said.splitlines()) == 3
    found = Path("b").read_bytes()
    kept = data[: 1025 * 512] + bytes(512) + data[1026 * 512 :]
    assert hashlib.sha256(found).digest() == hashlib.sha256(kept).digest()
    assert main(["convert", name, "b"]) == 1
    assert "Input/output error" in capsys.readouterr().err


def test_salvage_warns_of_what_an_image_cannot_tell(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only there is it taken for data: the hole around it stays one."""
    with (here / "a").open("wb") as file:
        file.truncate(8 << 20)
        file.write(b"x")
    source = BAD_SECTOR.replace("event=read_aio", "event=none").replace("sector=9", "sector=9001")
    source += ",file.inject-error.0.iotype=block-status"
    for options in ([], ["-p"], ["-B", "below", "-F", "raw", "-O", "qcow2"]):
        (here / "below").write_bytes(bytes(4096))
        assert main(["convert", "--salvage", *options, "--image-opts", source, "b"]) == 0
        warning = capsys.readouterr().err
        assert warning.count("error while reading block status at offset 4608512") == 1
        assert warning.count("\n") == 1
        assert (here / "b").stat().st_blocks * 512 < 1 << 20
        if "-B" not in options:
            assert digest(here / "b") == digest(here / "a")
    assert main(["convert", "--image-opts", source, "b"]) == 1
    assert "cannot block-status" in capsys.readouterr().err


def test_ctrl_c_removes_the_target(here: Path) -> None:
    (here / "a").write_bytes(os.urandom(8 << 20))
    process = subprocess.Popen([sys.executable, "-m", "byre.cli", "convert", "-r", "1M", "-f", "raw", "a", "b"]
                               if (Path(byre.__file__).parent / "cli" / "__main__.py").exists() else
                               [sys.executable, "-c", "from byre.cli.main import entry; entry()", "convert", "-r", "1M",
                                "-f", "raw", "a", "b"])  # fmt: skip
    deadline = time.monotonic() + 20
    while not (here / "b").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert not (here / "b").exists()


def test_progress_as_the_peer_prints_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixed(here / "a")
    assert main(["convert", "-p", "-f", "raw", "a", "b"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("    (0.00/100%)\r")
    assert out.endswith("    (100.00/100%)\r\n")
    assert main(["convert", "-p", "-q", "-f", "raw", "a", "b"]) == 0
    assert capsys.readouterr().out == ""


def test_progress_in_json(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "a").write_bytes(os.urandom(2 << 20))
    assert main(["convert", "--progress", "json", "-f", "raw", "a", "b"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(set(line) == {"job", "offset", "total", "rate", "eta"} for line in lines)
    assert lines[0]["offset"] <= lines[-1]["offset"] == lines[-1]["total"] == 2 << 20


def test_option_help(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "-O", "qcow2", "-o", "help"]) == 0
    assert "cluster_size=<size>" in capsys.readouterr().out


def test_a_denser_level(here: Path) -> None:
    import typing

    (here / "a").write_bytes(Path(typing.__file__).read_bytes() * 40)
    for level in ("1", "9"):
        assert main(["convert", "-c", "--level", level, "-f", "raw", "-O", "qcow2", "a", level]) == 0
    assert (here / "9").stat().st_size < (here / "1").stat().st_size
    assert read("9", "qcow2") == read("1", "qcow2")


def test_only_create_says_twice_that_a_backing_file_cannot_be_opened(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second line belongs to the peer's ``create``; its ``convert`` has none."""
    (here / "a").write_bytes(bytes(K))
    assert (
        main(["convert", "-f", "raw", "-O", "qcow2", "-o", "backing_file=none,backing_fmt=raw", "a", "b"], "qemu-img")
        == 1
    )
    assert "Could not open backing image" not in capsys.readouterr().err
    assert main(["create", "-q", "-f", "qcow2", "-b", "none", "-F", "raw", "b"], "qemu-img") == 1
    assert "Could not open backing image" in capsys.readouterr().err
