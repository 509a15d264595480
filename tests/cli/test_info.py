"""``info``: human and JSON output, chains, and what it must not open."""

from __future__ import annotations

import json
import os
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from byre.cli.main import main

Output = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BYRE_UNTRUSTED", raising=False)
    monkeypatch.delenv("BYRE_ALLOW_REF", raising=False)


def run(capsys: Output, *arguments: str) -> str:
    assert main(list(arguments)) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def create(*arguments: str) -> None:
    assert main(["create", "-q", *arguments]) == 0


def info(capsys: Output, *arguments: str) -> Any:
    return json.loads(run(capsys, "info", "--output", "json", *arguments))


def test_human_output_of_a_raw_image(capsys: Output) -> None:
    create("x.raw", "1M")
    assert run(capsys, "info", "x.raw") == (
        "image: x.raw\nfile format: raw\nvirtual size: 1 MiB (1048576 bytes)\ndisk size: 4 KiB\n"
        "Child node '/file':\n    filename: x.raw\n    protocol type: file\n"
        "    file length: 1 MiB (1048576 bytes)\n    disk size: 4 KiB\n"
    )


def test_human_output_of_an_overlay(capsys: Output) -> None:
    os.mkdir("d")
    create("d/base", "64M")
    create("-f", "qcow2", "-b", "base", "-F", "raw", "-o", "lazy_refcounts=on", "d/x.qcow2")
    lines = run(capsys, "info", "d/x.qcow2").splitlines()
    assert lines[:3] == ["image: d/x.qcow2", "file format: qcow2", "virtual size: 64 MiB (67108864 bytes)"]
    assert lines[3].startswith("disk size: ")
    assert lines[4:15] == [
        "cluster_size: 65536",
        "backing file: base (actual path: d/base)",
        "backing file format: raw",
        "Format specific information:",
        "    compat: 1.1",
        "    compression type: zlib",
        "    lazy refcounts: true",
        "    refcount bits: 16",
        "    corrupt: false",
        "    extended l2: false",
        "Child node '/file':",
    ]
    assert lines[15:17] == ["    filename: d/x.qcow2", "    protocol type: file"]


def test_json_of_a_qcow2_image(capsys: Output) -> None:
    create("-f", "qcow2", "x", "1M")
    found = info(capsys, "x")
    assert list(found) == ["children", "virtual-size", "filename", "cluster-size", "format", "actual-size",
                           "format-specific", "dirty-flag"]  # fmt: skip
    assert found["dirty-flag"] is False
    assert found["format-specific"]["type"] == "qcow2"
    (child,) = found["children"]
    assert list(child) == ["name", "info"]
    assert list(child["info"]) == ["children", "virtual-size", "filename", "format", "actual-size", "format-specific",
                                   "dirty-flag"]  # fmt: skip
    assert child["info"]["format-specific"] == {"type": "file", "data": {}}
    assert child["info"]["virtual-size"] == os.path.getsize("x")


@pytest.mark.oracle
@pytest.mark.parametrize(
    "arguments",
    ["-f qcow2 x 1M", "-f qcow2 -o compat=0.10 x 1M", "-f qcow2 -o cluster_size=512,refcount_bits=1 x 1M",
     "-f qcow2 -b base -F raw x", "-f raw x 12345k", "-f qcow2 -o extended_l2=on,cluster_size=2M x 1T",
     "-f qcow2 -o data_file=d,data_file_raw=on x 1M", "-f qcow2 -o compression_type=zstd,lazy_refcounts=on x 1M"],
)  # fmt: skip
def test_the_peer_says_the_same_but_for_the_children(arguments: str, capsys: Output, qemu_img: Any) -> None:
    Path("base").write_bytes(bytes(1 << 20))
    qemu_img("create", "-q", *arguments.split())
    text = run(capsys, "info", "--output", "json", "x")
    found = json.loads(text)
    del found["children"]
    theirs = qemu_img("info", "--output", "json", "x").stdout
    assert json.dumps(found) == json.dumps(json.loads(theirs))
    human = run(capsys, "info", "x")
    assert human.partition("Child node")[0] == qemu_img("info", "x").stdout


@pytest.mark.oracle
def test_snapshots_and_bitmaps(capsys: Output, qemu_img: Any) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "x", "1M")
    qemu_img("snapshot", "-c", "before", "x")
    qemu_img("bitmap", "--add", "-g", "32k", "--disable", "x", "b0")
    qemu_img("bitmap", "--add", "x", "b1")
    found = info(capsys, "x")
    theirs = json.loads(qemu_img("info", "--output", "json", "x").stdout)
    assert json.dumps(found["snapshots"]) == json.dumps(theirs["snapshots"])
    assert json.dumps(found["format-specific"]) == json.dumps(theirs["format-specific"])
    lines = run(capsys, "info", "x").splitlines()
    at = lines.index("Snapshot list:")
    assert lines[at + 1] == "ID      TAG               VM_SIZE                DATE        VM_CLOCK     ICOUNT"
    date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(theirs["snapshots"][0]["date-sec"]))
    assert lines[at + 2] == f"1       before                0 B {date}  0000:00:00.000          0"


def test_a_chain(capsys: Output) -> None:
    create("base", "1M")
    create("-f", "qcow2", "-b", "base", "-F", "raw", "mid")
    create("-f", "qcow2", "-b", "mid", "-F", "qcow2", "top")
    found = info(capsys, "--backing-chain", "top")
    assert [(layer["filename"], layer["format"]) for layer in found] == [
        ("top", "qcow2"), ("mid", "qcow2"), ("base", "raw"),
    ]  # fmt: skip
    text = run(capsys, "info", "--backing-chain", "top")
    assert [part.split("\n")[0] for part in text.split("\n\n")] == ["image: top", "image: mid", "image: base"]


def test_what_the_image_names_is_not_opened(capsys: Output) -> None:
    os.mkfifo("fifo")
    create("-f", "qcow2", "-u", "-b", "fifo", "-F", "raw", "x", "1M")
    assert info(capsys, "x")["backing-filename"] == "fifo"
    assert info(capsys, "--untrusted", "x")["full-backing-filename"] == "fifo"
    assert main(["info", "--backing-chain", "x"]) == 1
    assert "fifo" in capsys.readouterr().err


def test_a_data_file_that_is_missing(capsys: Output) -> None:
    create("-f", "qcow2", "-o", "data_file=d", "x", "1M")
    os.unlink("d")
    found = info(capsys, "x")
    assert found["format-specific"]["data"]["data-file"] == "d"
    assert [child["name"] for child in found["children"]] == ["file"]


@pytest.mark.parametrize(
    ("name", "options", "part"),
    [
        ("missing", [], "missing"),
        ("base", ["--untrusted"], "not opened for an untrusted image"),
        ("json:{}", [], "--allow-ref"),
        ("nbd://localhost:1", [], "--allow-ref"),
    ],
)
def test_a_chain_passes_the_policy(capsys: Output, name: str, options: list[str], part: str) -> None:
    create("base", "1M")
    create("-f", "qcow2", "-u", "-b", name, "-F", "raw", "x", "1M")
    assert main(["info", *options, "x"]) == 0
    capsys.readouterr()
    assert main(["info", "--backing-chain", *options, "x"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert part in captured.err
    assert captured.err.count("\n") == 1


def test_rings_are_refused(capsys: Output) -> None:
    create("-f", "qcow2", "-u", "-b", "b", "-F", "qcow2", "a", "1M")
    create("-f", "qcow2", "-u", "-b", "c", "-F", "qcow2", "b", "1M")
    os.link("a", "c")
    assert main(["info", "--backing-chain", "a"]) == 1
    assert "twice" in capsys.readouterr().err


def test_long_chains_are_refused(capsys: Output) -> None:
    create("-f", "qcow2", "0", "1M")
    for number in range(1, 202):
        create("-f", "qcow2", "-u", "-b", str(number - 1), "-F", "qcow2", str(number), "1M")
    assert len(info(capsys, "--backing-chain", "199")) == 200
    assert main(["info", "--backing-chain", "200"]) == 1
    assert "longer than 200" in capsys.readouterr().err


def test_names_from_an_image_are_escaped(capsys: Output) -> None:
    create("-f", "qcow2", "-u", "-b", "\x1b[31m\udcff\n", "-F", "raw", "x", "1M")
    human = run(capsys, "info", "x")
    assert "backing file: \\x1b[31m\\udcff\\n\n" in human
    assert info(capsys, "x")["backing-filename"] == "\x1b[31m�\n"


def test_image_options(capsys: Output) -> None:
    create("-f", "qcow2", "x", "1M")
    found = info(capsys, "--image-opts", "driver=qcow2,file.driver=file,file.filename=x")
    assert found["format"] == "qcow2"
    assert info(capsys, "-f", "raw", "x")["format"] == "raw"
    assert main(["info", "--image-opts", "-f", "raw", "driver=qcow2,file.filename=x"]) == 1
    assert "exclude each other" in capsys.readouterr().err


def test_an_image_that_is_not_shut_down(capsys: Output) -> None:
    create("-f", "qcow2", "-o", "lazy_refcounts=on", "x", "1M")
    with open("x", "r+b") as file:
        file.seek(79)
        file.write(b"\x03")  # dirty and corrupt
    assert info(capsys, "x")["dirty-flag"] is True
    human = run(capsys, "info", "x")
    assert "\ncleanly shut down: no\n" in human
    assert "\n    corrupt: true\n" in human


def test_names_of_snapshots_that_lie_at_length(capsys: Output) -> None:
    """An image says that ids and names have 64 KiB: what is shown is as long as programs make them, up to a NUL."""
    create("-f", "qcow2", "-o", "compat=0.10", "x", "1M")
    fixed = struct.pack(">QIHHIIQII", 0, 0, 65535, 65535, 0, 0, 0, 0, 0)
    with open("x", "r+b") as file:
        file.seek(60)
        file.write(struct.pack(">IQ", 2, 1 << 20))
        file.seek(1 << 20)
        for name in (b"kept\0" + b"\x01" * 65530, b"\x1b" * 65535):
            file.write((fixed + b"\0" * 65535 + name).ljust(131112, b"\0"))
    rows = info(capsys, "x")["snapshots"]
    assert [(row["id"], row["name"]) for row in rows] == [("", "kept"), ("", "\x1b" * 255)]
    human = run(capsys, "info", "x")
    assert "\n        kept             " in human
    assert len(human) < 4096
