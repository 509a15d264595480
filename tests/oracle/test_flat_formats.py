"""vdi, qed, parallels and qcow against the peer, both ways: content, map, check, info, over options and fragments."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import byre
from byre.cli.main import main
from byre.image import Image

pytestmark = pytest.mark.oracle

MIB = 1 << 20
SIZE = 24 * MIB

GRID: dict[str, tuple[str, dict[str, Any]]] = {
    "vdi": ("vdi", {}),
    "vdi-static": ("vdi", {"static": "on"}),
    "qed": ("qed", {}),
    "qed-4k": ("qed", {"cluster_size": "4k", "table_size": "2"}),
    "qed-1M": ("qed", {"cluster_size": "1M", "table_size": "16"}),
    "parallels": ("parallels", {}),
    "parallels-64k": ("parallels", {"cluster_size": "64k"}),
    "qcow": ("qcow", {}),
}


def requests(seed: int) -> list[tuple[str, int, int, int]]:
    """(verb, offset, length, pattern), so that the image ends up in pieces."""
    chooser = random.Random(seed)
    found = []
    for _ in range(40):
        offset = chooser.randrange(SIZE // 512 - 8) * 512
        length = min(chooser.choice((512, 4096, 65536, 300_032)), SIZE - offset)
        found.append((chooser.choice(("write", "write", "write", "zero")), offset, length, chooser.randrange(1, 255)))
    return found


def apply(image: Image, content: bytearray, seed: int) -> None:
    for verb, offset, length, pattern in requests(seed):
        if verb == "write":
            image.write(offset, bytes([pattern]) * length)
            content[offset : offset + length] = bytes([pattern]) * length
        else:
            image.write_zeroes(offset, length, unmap=True)
            content[offset : offset + length] = bytes(length)


def options_of(options: dict[str, str]) -> list[str]:
    return ["-o", ",".join(f"{key}={value}" for key, value in options.items())] if options else []


def rows(text: str) -> list[tuple[Any, ...]]:
    """The map, neighbours joined: the two programs may cut it at different places."""
    found: list[list[Any]] = []
    for row in json.loads(text):
        key = [row["depth"], row["zero"], row["data"], row.get("offset")]
        if found and found[-1][2][:3] == key[:3]:
            last = found[-1]
            if key[3] is None or key[3] == last[2][3] + last[1]:
                last[1] += row["length"]
                continue
        found.append([row["start"], row["length"], key])
    return [(start, length, *key) for start, length, key in found]


@pytest.mark.parametrize("name", GRID)
def test_the_peer_reads_what_is_written_here(name: str, tmp_path: Path, qemu_img: Any, capsys: Any) -> None:
    format, options = GRID[name]
    path, raw = tmp_path / "image", tmp_path / "raw"
    byre.create(str(path), format, SIZE, options=options)
    content = bytearray(SIZE)
    for seed in (1, 2):
        with byre.open(str(path), read_only=False) as image:
            apply(image, content, seed)
    qemu_img("convert", "-f", format, "-O", "raw", path, raw)
    assert raw.read_bytes() == content
    if format != "qcow":
        qemu_img("check", "-f", format, path)
    capsys.readouterr()
    assert main(["map", "--output", "json", str(path)]) == 0
    theirs = qemu_img("map", "-f", format, "--output", "json", path).stdout
    assert rows(capsys.readouterr().out) == rows(theirs)


@pytest.mark.parametrize("name", GRID)
def test_what_the_peer_writes_is_read_here(name: str, tmp_path: Path, qemu_img: Any, qemu_io: Any) -> None:
    format, options = GRID[name]
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", format, *options_of(options), path, str(SIZE))
    content = bytearray(SIZE)
    commands: list[str] = []
    for verb, offset, length, pattern in requests(3):
        commands += ["-c", f"write -P {pattern if verb == 'write' else 0} {offset} {length}"]
        content[offset : offset + length] = bytes([pattern if verb == "write" else 0]) * length
    qemu_io("-f", format, *commands, path)
    with byre.open(str(path)) as image:
        assert image.format == format
        assert image.read(0, SIZE) == content
    if format != "qcow":
        assert main(["check", "-q", str(path)]) == 0
    with byre.open(str(path), read_only=False) as image:
        apply(image, content, 4)
    qemu_img("convert", "-f", format, "-O", "raw", path, tmp_path / "raw")
    assert (tmp_path / "raw").read_bytes() == content


@pytest.mark.parametrize("name", GRID)
def test_info_says_what_the_peer_says(name: str, tmp_path: Path, qemu_img: Any, capsys: Any) -> None:
    format, options = GRID[name]
    path = tmp_path / "image"
    byre.create(str(path), format, SIZE, options=options)
    capsys.readouterr()
    assert main(["info", "--output", "json", str(path)]) == 0
    ours = json.loads(capsys.readouterr().out)
    theirs = json.loads(qemu_img("info", "-f", format, "--output", "json", path).stdout)
    for key in ("format", "virtual-size", "cluster-size", "format-specific", "encrypted", "backing-filename"):
        assert ours.get(key) == theirs.get(key), key


@pytest.mark.parametrize("format", ["qed", "qcow"])
def test_overlays(format: str, tmp_path: Path, qemu_img: Any, qemu_io: Any) -> None:
    base = tmp_path / "base"
    base.write_bytes(bytes(range(1, 251)) * (4 * MIB // 250))
    top = tmp_path / "top"
    byre.create(str(top), format, SIZE, options={"backing_file": "base", "backing_fmt": "raw"})
    content = bytearray(base.read_bytes().ljust(SIZE, b"\0"))
    with byre.open(str(top), read_only=False) as image:
        apply(image, content, 5)
    qemu_io("-f", format, "-c", "write -P 7 1000k 100k", top)
    content[1000 << 10 : 1100 << 10] = b"\7" * (100 << 10)
    qemu_img("convert", "-f", format, "-O", "raw", top, tmp_path / "raw")
    assert (tmp_path / "raw").read_bytes() == content
    with byre.open(str(top)) as image:
        assert image.read(0, SIZE) == content


def test_compressed_clusters(tmp_path: Path, qemu_img: Any, qemu_io: Any) -> None:
    source = tmp_path / "source"
    source.write_bytes(random.Random(1).randbytes(512_000) + b"text" * 102_400 + bytes(512_000))
    assert main(["convert", "-c", "-O", "qcow", str(source), str(tmp_path / "ours")]) == 0
    qemu_img("compare", "-f", "raw", "-F", "qcow", source, tmp_path / "ours")
    theirs = tmp_path / "theirs"
    qemu_img("create", "-q", "-f", "qcow", theirs, "1M")
    qemu_io("-f", "qcow", *(word for at in (0, 4, 8, 100) for word in ("-c", f"write -c -P {at + 1} {at}k 4k")), theirs)
    with byre.open(str(theirs)) as image:
        assert image.read(0, 12288) == b"\1" * 4096 + b"\5" * 4096 + b"\x09" * 4096
        assert image.read(100 << 10, 4096) == b"e" * 4096


def test_encrypted_images(tmp_path: Path, qemu_img: Any, qemu_io: Any) -> None:
    (tmp_path / "key").write_bytes(b"0123456789")
    secret = ["--object", f"secret,id=s,file={tmp_path / 'key'}"]
    path = tmp_path / "image"
    opened = f"driver=qcow,encrypt.key-secret=s,file.filename={path}"
    qemu_img("create", "-q", "-f", "qcow", *secret, "-o", "encrypt.format=aes,encrypt.key-secret=s", path, "4M")
    qemu_io(*secret, "--image-opts", "-c", "write -P 5 100k 70k", opened)
    assert main(["io", *secret, "--image-opts", "-c", "read -P 5 100k 70k", "-c", "write -P 6 1M 3k", opened]) == 0
    done = qemu_io(*secret, "--image-opts", "-c", "read -P 6 1M 3k", "-c", "read -P 0 0 100k", opened)
    assert "failed" not in done.stdout


def broken(path: Path, at: int, value: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(value)


def counts(text: str) -> dict[str, int]:
    found = json.loads(text)
    return {key: found.get(key, 0) for key in ("corruptions", "leaks", "check-errors")}


DAMAGE: dict[str, tuple[str, Callable[[Path], None]]] = {
    "qed-outside": ("qed", lambda path: broken(path, 3 * 65536, (1 << 40).to_bytes(8, "little"))),
    "parallels-outside": ("parallels", lambda path: broken(path, 64 + 4, (500).to_bytes(4, "little"))),
    "parallels-open": ("parallels", lambda path: broken(path, 44, (0x746F6E59).to_bytes(4, "little"))),
    "parallels-tail": ("parallels", lambda path: broken(path, 30 * MIB, b"x")),
    "vdi-large": ("vdi", lambda path: broken(path, 512, (77).to_bytes(4, "little"))),
    "vdi-twice": ("vdi", lambda path: broken(path, 512 + 40, (1).to_bytes(4, "little"))),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_check_of_damaged_images(name: str, tmp_path: Path, qemu_img: Any, qemu_io: Any, capsys: Any) -> None:
    format, damage = DAMAGE[name]
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", format, path, str(SIZE))
    qemu_io("-f", format, "-c", "write -P 3 0 3M", path)
    if format == "qed":
        # Where the first L2 table lies.
        table = int.from_bytes(path.read_bytes()[65536:65544], "little")
        broken(path, table, (1 << 40).to_bytes(8, "little"))
    else:
        damage(path)
    theirs = qemu_img("check", "-f", format, "--output", "json", path, check=False)
    capsys.readouterr()
    code = main(["check", "-f", format, "--output", "json", str(path)])
    ours = counts(capsys.readouterr().out)
    expected = counts(theirs.stdout)
    if format == "vdi":
        # The peer counts a difference of counts as damage as well.
        assert ours["corruptions"] <= expected["corruptions"]
        assert (code, theirs.returncode) == (2, 2)
        return
    assert (ours["corruptions"], code) == (expected["corruptions"], theirs.returncode)
    assert main(["check", "-q", "-r", "all", str(path)]) in (0, 3)
    assert qemu_img("check", "-f", format, path, check=False).returncode in (0, 3)
