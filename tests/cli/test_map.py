"""``map``: rows as the peer prints and merges them."""

from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from byre.cli.main import main

Output = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def create(*arguments: str) -> None:
    assert main(["create", "-q", *arguments]) == 0


def io(name: str, *commands: str) -> None:
    assert main(["io", *(word for command in commands for word in ("-c", command)), name]) == 0


def run(capsys: Output, *arguments: str) -> str:
    capsys.readouterr()
    assert main(["map", *arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def as_peer_7(text: str) -> str:
    """Without the field that later releases added."""
    return re.sub(r', "compressed": (true|false)', "", text)


def test_json_rows_are_laid_out_as_the_peer_does(capsys: Output) -> None:
    create("-f", "qcow2", "x", "256k")
    io("x", "write -q 0 64k", "write -q -z 128k 64k")
    assert run(capsys, "--output=json", "x") == (
        '[{ "start": 0, "length": 65536, "depth": 0, "present": true, "zero": false, "data": true, '
        '"compressed": false, "offset": 327680},\n'
        '{ "start": 65536, "length": 65536, "depth": 0, "present": false, "zero": true, "data": false, '
        '"compressed": false},\n'
        '{ "start": 131072, "length": 65536, "depth": 0, "present": true, "zero": true, "data": false, '
        '"compressed": false},\n'
        '{ "start": 196608, "length": 65536, "depth": 0, "present": false, "zero": true, "data": false, '
        '"compressed": false}]\n'
    )


def test_human_rows(capsys: Output) -> None:
    create("-f", "qcow2", "x%d", "256k")
    io("x%d", "write -q 0 64k", "write -q 192k 64k")
    assert run(capsys, "x%d") == (
        "Offset          Length          Mapped to       File\n"
        "0               0x10000         0x50000         x%d\n"
        "0x30000         0x10000         0x60000         x%d\n"
    )


def test_a_raw_image_begins_at_zero(capsys: Output) -> None:
    Path("r").write_bytes(b"x" * 4096)
    assert run(capsys, "r").splitlines()[1] == "0               0x1000          0               r"


def test_nothing_to_map(capsys: Output) -> None:
    create("-f", "qcow2", "x", "0")
    row = (
        '[{ "start": %d, "length": 0, "depth": 0, "present": false, "zero": false, "data": false, '
        '"compressed": false}]\n'
    )
    assert run(capsys, "--output=json", "x") == row % 0
    assert run(capsys, "--output=json", "-s", "1M", "x") == row % (1 << 20)
    assert run(capsys, "x") == "Offset          Length          Mapped to       File\n"


def test_a_part(capsys: Output) -> None:
    create("-f", "qcow2", "x", "1M")
    io("x", "write -q 0 1M")
    rows = json.loads(run(capsys, "--output=json", "--start-offset", "100k", "--max-length", "1000", "x"))
    assert [(row["start"], row["length"], row["offset"]) for row in rows] == [(102400, 1000, 327680 + 102400)]


def test_compressed_clusters(capsys: Output) -> None:
    Path("r").write_bytes(b"text" * 32768)
    assert main(["convert", "-c", "-O", "qcow2", "r", "x"]) == 0
    (row,) = json.loads(run(capsys, "--output=json", "x"))
    assert row == {"start": 0, "length": 131072, "depth": 0, "present": True, "zero": False, "data": True,
                   "compressed": True}  # fmt: skip
    assert main(["map", "x"]) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith("Offset")
    assert "compressed" in captured.err


def test_depths_of_a_chain_with_shorter_layers(capsys: Output) -> None:
    Path("base").write_bytes(b"b" * 65536)
    create("-f", "qcow2", "-b", "base", "-F", "raw", "mid", "192k")
    create("-f", "qcow2", "-b", "mid", "-F", "qcow2", "top", "320k")
    io("mid", "write -q 64k 64k")
    rows = json.loads(run(capsys, "--output=json", "top"))
    assert [(r["start"], r["length"], r["depth"], r["present"], r["zero"], r["data"]) for r in rows] == [
        (0, 65536, 2, True, False, True),
        (65536, 65536, 1, True, False, True),
        (131072, 65536, 1, False, True, False),
        (196608, 131072, 0, False, True, False),
    ]


@pytest.mark.oracle
@pytest.mark.parametrize("cluster", ["512", "64k", "2M"])
@pytest.mark.parametrize("seed", range(4))
def test_the_peer_prints_the_same(capsys: Output, qemu_img: Any, cluster: str, seed: int) -> None:
    chance = random.Random(f"{cluster} {seed}")
    size = 3000000 // 512 * 512
    Path("base").write_bytes(chance.randbytes(chance.randrange(1, size // 4096) * 4096))
    names = ["base", "a", "b"]
    for below, name in itertools.pairwise(names):
        create("-f", "qcow2", "-o", f"cluster_size={cluster}", "-b", below, "-F", "raw" if below == "base" else "qcow2",
               name, str(chance.randrange(size // 2, size) // 512 * 512))  # fmt: skip
        length = min(Path("base").stat().st_size, size // 2)
        commands = []
        for _ in range(12):
            at = chance.randrange(length // 512) * 512
            count = min(chance.choice([512, 4096, 65536, 300032]), length - at)
            commands.append(chance.choice(["write -q", "write -q", "write -q -z", "discard -q"]) + f" {at} {count}")
        io(name, *commands)
    for output in ("json", "human"):
        assert as_peer_7(run(capsys, "--output", output, "b")) == qemu_img("map", "--output", output, "b").stdout


@pytest.mark.oracle
@pytest.mark.parametrize("options", ["cluster_size=64k", "cluster_size=4k,refcount_bits=1", "data_file=d"])  # fmt: skip
def test_preallocated_metadata(capsys: Output, qemu_img: Any, options: str) -> None:
    create("-f", "qcow2", "-o", f"preallocation=metadata,{options}", "x", "8M")
    io("x", "write -q 1000k 100k", "write -q 3M 4k")
    create("-f", "qcow2", "-b", "x", "-F", "qcow2", "top", "10M")
    io("top", "write -q 2M 1M", "write -q -z 5M 1M")
    for name in ("x", "top"):
        for output in ("json", "human"):
            assert as_peer_7(run(capsys, "--output", output, name)) == qemu_img("map", "--output", output, name).stdout


@pytest.mark.oracle
def test_many_rows_in_several_windows(capsys: Output, qemu_img: Any) -> None:
    create("-f", "qcow2", "-o", "cluster_size=512", "x", "1G")
    io("x", *(f"write -q {n * 3 * 512} 512" for n in range(3000)), "write -q 127M 3M", "write -q 1000M 1k")
    for output in ("json", "human"):
        assert as_peer_7(run(capsys, "--output", output, "x")) == qemu_img("map", "--output", output, "x").stdout


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "expecting one image file name"),
        (["a", "b"], "expecting one image file name"),
        (["-s", "-1", "x"], "start offset"),
        (["-l", "many", "x"], "max length"),
        (["--output", "xml", "x"], "--output must be"),
        (["missing"], "missing"),
    ],
)
def test_refusals(capsys: Output, arguments: list[str], part: str) -> None:
    assert main(["map", *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert part in captured.err
    assert captured.err.count("\n") == 1


def test_offsets_are_those_of_the_file_that_is_named(tmp_path: Path, capsys: Output) -> None:
    """Also where the image lies in a slice of it; where another image lies between, there are none."""
    create("-f", "qcow2", "a", "1M")
    io("a", "write 64k 64k")
    (plain,) = [row for row in json.loads(run(capsys, "--output=json", "a")) if row["data"]]
    (tmp_path / "b").write_bytes(bytes(1536) + (tmp_path / "a").read_bytes())
    slice_of = "driver=qcow2,file.driver=raw,file.offset=1024,file.file.driver=raw,file.file.offset=512,"
    options = ("--image-opts", "--output=json", slice_of + "file.file.file.filename=b")
    (sliced,) = [row for row in json.loads(run(capsys, *options)) if row["data"]]
    assert sliced["offset"] == plain["offset"] + 1536
    create("-f", "qcow2", "c", "2M")
    assert main(["convert", "-n", "-f", "raw", "-O", "qcow2", "a", "c"]) == 0
    options = (*options[:2], "driver=qcow2,file.driver=qcow2,file.file.filename=c")
    (nested,) = [row for row in json.loads(run(capsys, *options)) if row["data"]]
    assert "offset" not in nested
