"""vvfat: a folder as a disk; other programs check the file system and take the files out of it."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import byre
from byre.cli.main import main
from byre.errors import ByreError, InvalidArgument, NotFound, NotSupported, ReadOnly
from byre.graph.node import Node
from byre.image import Image
from byre.io.extent import DATA, ZERO
from byre.protocols.vvfat import parse_filename
from byre.protocols.vvfat.tree import short_name
from contracts.node import NodeContract

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def fill(folder: Path, seed: int = 1) -> dict[str, bytes]:
    """A tree with awkward names and sizes; returns what it holds, by path."""
    chooser = random.Random(seed)
    files = {
        "readme.txt": b"hello\n",
        "EMPTY.BIN": b"",
        "exactly one cluster": chooser.randbytes(8192),
        "no extension but a long name": chooser.randbytes(8193),
        "ünïcode – name.tar.gz": chooser.randbytes(100_000),
        ".hidden": b"x",
        "sub/UPPER.TXT": b"y" * 511,
        "sub/lower.txt": b"z" * 513,
        "sub/a long name 1.txt": b"1",
        "sub/a long name 2.txt": b"2",
        "sub/deeper/and deeper/file.dat": chooser.randbytes(20_000),
    }
    files |= {f"many/file number {n:03}.txt": f"{n}".encode() for n in range(300)}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return files


def show(folder: Path, **options: object) -> Image:
    return byre.open({"driver": "raw", "file": {"driver": "vvfat", "dir": str(folder), **options}})


class TestContract(NodeContract):
    @pytest.fixture
    def node(self, tmp_path: Path) -> Iterator[Node]:
        fill(tmp_path)
        with show(tmp_path, floppy=True) as image:
            node = image.node.children["file"].node
            # The right bytes are for the tests below; here, all ways to read must agree.
            whole = bytearray(node.size)
            node.read_into(0, memoryview(whole))
            self.content = bytes(whole)
            yield node

    def test_it_is_not_written(self, node: Node) -> None:
        with pytest.raises(ReadOnly):
            node.write_from(0, memoryview(b"x"))
        with pytest.raises(ReadOnly):
            node.write_zeroes(0, 512)


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("options", "start"),
    [({"floppy": True}, 0), ({"fat-type": 12}, 63), ({"fat-type": 16}, 63), ({"fat-type": 32}, 63), ({}, 63)],
)
def test_other_programs_find_every_file(
    tmp_path: Path, fsck_fat: Run, mcopy: Run, options: dict[str, object], start: int
) -> None:
    folder, system, out = tmp_path / "folder", tmp_path / "system.img", tmp_path / "out"
    folder.mkdir()
    out.mkdir()
    files = fill(folder)
    with show(folder, **options) as image, open(system, "wb") as file:
        length = image.size - start * 512
        file.truncate(length)
        for extent in image.node.extents(start * 512, length):
            if extent.kind == DATA:
                file.seek(extent.offset - start * 512)
                file.write(image.read(extent.offset, extent.length))
    fsck_fat("-n", str(system))
    environment = {**os.environ, "MTOOLS_SKIP_CHECK": "0", "LC_ALL": "C.UTF-8"}
    mcopy("-s", "-n", "-i", str(system), "::*", str(out), env=environment)
    found = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    # Names that fit the old form are told in capital letters.
    by_name = {name.lower(): content for name, content in found.items()}
    assert by_name == {name.lower(): content for name, content in files.items()}


def test_large_folders_get_large_clusters(tmp_path: Path, fsck_fat: Run) -> None:
    with open(tmp_path / "large", "wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(InvalidArgument, match="does not fit onto a disk with FAT12"):
        show(tmp_path, **{"fat-type": 12})
    with pytest.raises(InvalidArgument, match="does not fit onto a floppy"):
        show(tmp_path, floppy=True)
    for bits in (16, 32):
        with show(tmp_path, **{"fat-type": bits}) as image:
            assert image.size > 1 << 30
            assert image.read(image.size - 512, 512) == bytes(512)


def test_map_shows_what_is_free(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * 1000)
    with show(tmp_path) as image:
        rows = list(image.node.extents(0, image.size))
        assert {row.kind for row in rows} == {DATA, ZERO}
        assert rows[-1].kind == ZERO
        assert rows[-1].length > 500 << 20


def test_convert_and_info_take_the_name_of_the_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "f").write_bytes(b"x" * 1000)
    assert main(["info", f"fat:floppy:{folder}"]) == 0
    assert "virtual size: 1.41 MiB (1474560 bytes)" in capsys.readouterr().out
    assert main(["convert", "-O", "qcow2", f"fat:32:{folder}", str(tmp_path / "x.qcow2")]) == 0
    assert main(["convert", "-O", "qcow2", f"fat:{folder}/nosuch", str(tmp_path / "y.qcow2")]) == 1
    assert "nosuch" in capsys.readouterr().err
    assert parse_filename("floppy:12:rw:a:b") == {"floppy": True, "fat-type": 12, "rw": True, "dir": "a:b"}


def test_files_that_shrink_or_vanish(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode() * 10_000)
    with show(tmp_path, floppy=True) as image:
        places = {name: image.read(0, image.size).index(name.encode() * 10_000) for name in ("a", "b")}
    with show(tmp_path, floppy=True) as image:
        (tmp_path / "a").write_bytes(b"y" * 100)
        (tmp_path / "b").unlink()
        assert image.read(places["a"], 10_000) == b"y" * 100 + bytes(9_900)
        with pytest.raises(NotFound, match="b: cannot read"):
            image.read(places["b"], 10_000)


def test_what_is_neither_file_nor_folder_is_left_out(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "ring").symlink_to(tmp_path)
    (tmp_path / "file").write_bytes(b"here")
    (tmp_path / "link").symlink_to("file")
    with show(tmp_path, floppy=True) as image:
        data = image.read(0, image.size)
        assert b"FIFO" not in data
        assert b"DANGLING" not in data
        assert data.count(b"SUB        ") == 1
        assert data.count(b"here") == 2


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"rw": True}, NotSupported, "read-only"),
        ({"fat-type": 13}, InvalidArgument, "fat-type is 13"),
        ({"floppy": True, "fat-type": 16}, InvalidArgument, "expected 12"),
        ({"label": "much too long a label"}, InvalidArgument, "label"),
    ],
)
def test_options_that_make_no_disk(
    tmp_path: Path, options: dict[str, object], error: type[ByreError], said: str
) -> None:
    with pytest.raises(error, match=said):
        show(tmp_path, **options)
    with pytest.raises(InvalidArgument, match="no folder"):
        (tmp_path / "f").write_bytes(b"")
        show(tmp_path / "f")


def test_a_file_larger_than_fat_allows(tmp_path: Path) -> None:
    with open(tmp_path / "large", "wb") as file:
        file.truncate(1 << 32)
    with pytest.raises(InvalidArgument, match="FAT allows"):
        show(tmp_path)


def test_short_names() -> None:
    taken: set[bytes] = set()
    for name, short in (
        ("README.TXT", b"README  TXT"),
        ("readme.txt", b"README~1TXT"),
        ("a long name.tar.gz", b"ALONGN~1GZ "),
        ("a long name.tar.gzip", b"ALONGN~1GZI"),
        (".profile", b"PROFIL~1   "),
        ("ß", b"SS         "),
        ("日", b"_~1        "),
        ("...", b"_~2        "),
    ):
        made = short_name(name, taken)
        assert made == short, name
        taken.add(made)
