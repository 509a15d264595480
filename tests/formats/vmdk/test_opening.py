"""Opening: which files a descriptor may name, limits, what can only be read."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import pytest

import byre
from byre.errors import AccessDenied, ByreError, ImageError, InvalidArgument, NotFound, NotSupported
from byre.graph.graph import Graph
from byre.graph.opening import Policy
from byre.protocols.memory import MemoryNode
from support import vmdk
from support.images import open_image

MIB = 1 << 20
CONTENT = bytes(4096) + b"x" * 4096 + bytes(MIB - 8192)


def split(folder: Path, names: tuple[str, ...] = ("disk-f001.vmdk", "disk-f002.vmdk")) -> Path:
    """disk.vmdk over flat files of 1 MiB, which hold CONTENT."""
    path = folder / "disk.vmdk"
    path.write_bytes(vmdk.descriptor([f'RW 2048 FLAT "{name}" 0' for name in names], "twoGbMaxExtentFlat"))
    for name in names:
        if "/" not in name:
            (folder / name).write_bytes(CONTENT)
    return path


def test_extents_beside_the_image(tmp_path: Path) -> None:
    with byre.open(split(tmp_path)) as image:
        assert image.read(0, image.size) == CONTENT * 2
        assert list(image.node.children) == ["file", "extents.0", "extents.1"]


def test_untrusted_images_get_no_extent(tmp_path: Path) -> None:
    with pytest.raises(AccessDenied, match="untrusted"):
        byre.open(split(tmp_path), policy=Policy.untrusted())
    with pytest.raises(AccessDenied, match="outside"):
        byre.open(split(tmp_path), policy=Policy("below", (str(tmp_path / "elsewhere"),)))


@pytest.mark.parametrize("name", ["file:disk-f002.vmdk", "nbd://localhost/x", "json:{}", "fd:0"])
def test_only_plain_files(tmp_path: Path, name: str) -> None:
    path = split(tmp_path, ("disk-f001.vmdk",))
    path.write_bytes(vmdk.descriptor([f'RW 2048 FLAT "{name}" 0'], "monolithicFlat"))
    with pytest.raises(AccessDenied, match="plain files"):
        byre.open(path, policy=Policy(allow_references=True))


def test_only_regular_files(tmp_path: Path) -> None:
    """4 of the faults of peers: a FIFO was waited for."""
    os.mkfifo(tmp_path / "disk-fifo")
    for name in ("disk-fifo", "/dev/tty", "/dev/zero", "/proc/self/mem", "."):
        with pytest.raises(ByreError):
            byre.open(_naming(tmp_path, name))
        with byre.open(tmp_path / "disk.vmdk", no_io=True) as image:
            assert image.size == MIB


def _naming(folder: Path, name: str, kind: str = "FLAT") -> Path:
    path = folder / "disk.vmdk"
    path.write_bytes(vmdk.descriptor([f'RW 2048 {kind} "{name}"{" 0" if kind == "FLAT" else ""}'], "custom"))
    return path


def test_files_named_twice(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="twice"):
        byre.open(_naming(tmp_path, "disk.vmdk"))
    (tmp_path / "a").write_bytes(CONTENT)
    os.link(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ImageError, match="twice"):
        byre.open(split(tmp_path, ("a", "b")))
    (tmp_path / "s").write_bytes(vmdk.hosted(CONTENT, text=b""))
    path = tmp_path / "disk.vmdk"
    path.write_bytes(vmdk.descriptor(['RW 2048 SPARSE "s"'] * 2, "custom"))
    with pytest.raises(ImageError, match="two extents"):
        byre.open(path)


def test_parts_of_one_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(CONTENT + b"y" * MIB)
    path = tmp_path / "disk.vmdk"
    path.write_bytes(vmdk.descriptor(['RW 2048 FLAT "a" 2048', 'RW 2048 FLAT "a" 0'], "custom"))
    with byre.open(path, read_only=False) as image:
        assert image.read(0, image.size) == b"y" * MIB + CONTENT
        image.write(MIB, b"new")
    assert (tmp_path / "a").read_bytes()[:3] == b"new"
    path.write_bytes(vmdk.descriptor(['RW 2048 FLAT "a" 1', 'RW 2048 FLAT "a" 0'], "custom"))
    with pytest.raises(NotSupported, match="overlap"):
        byre.open(path, read_only=False)
    byre.open(path).close()


def test_zero_and_read_only_extents(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(CONTENT)
    path = tmp_path / "disk.vmdk"
    lines = ['RDONLY 8 FLAT "a" 8', "RW 100 ZERO", 'RW 8 FLAT "a" 0', 'NOACCESS 8 FLAT "a" 8']
    path.write_bytes(vmdk.descriptor(lines, "partitionedDevice"))
    with byre.open(path, read_only=False) as image:
        assert image.read(0, image.size) == b"x" * 4096 + bytes(51200) + bytes(4096) + bytes(4096)
        image.write(55306, b"good")
        for offset in (0, 5000, 60000):
            with pytest.raises(ByreError, match="cannot be written"):
                image.write(offset, b"bad")
        image.write_zeroes(4096, 51200)
    assert (tmp_path / "a").read_bytes()[10:14] == b"good"


def test_looking_opens_only_what_is_called_after_the_image(tmp_path: Path) -> None:
    path = split(tmp_path, ("disk-f001.vmdk", "other.vmdk"))
    with byre.open(path, no_io=True) as image:
        assert image.size == 2 * MIB
        assert list(image.node.children) == ["file", "extents.0"]
        extents: Any = image.node.format_info()["extents"]  # type: ignore[attr-defined]
        assert [extent["filename"] for extent in extents] == [
            str(tmp_path / "disk-f001.vmdk"),
            str(tmp_path / "other.vmdk"),
        ]
    with byre.open(path, no_io=True, policy=Policy.untrusted()) as image:
        assert list(image.node.children) == ["file"]
    (tmp_path / "disk-f001.vmdk").unlink()
    with byre.open(path, no_io=True) as image:
        assert list(image.node.children) == ["file"]
    with pytest.raises(NotFound, match="cannot open extent 0"):
        byre.open(path)


def test_extents_the_user_gives(tmp_path: Path) -> None:
    path = split(tmp_path, ("/nowhere/a", "/nowhere/b"))
    for name in ("mine", "other"):
        (tmp_path / name).write_bytes(CONTENT)
    given = {"driver": "vmdk", "file": {"driver": "file", "filename": str(path)}}
    files = [{"driver": "file", "filename": str(tmp_path / name)} for name in ("mine", "other")]
    with byre.open({**given, "extents": files}, policy=Policy.untrusted()) as image:
        assert image.read(0, image.size) == CONTENT * 2
    with byre.open({**given, "extents": dict(zip("01", files, strict=True))}) as image:
        assert image.read(0, image.size) == CONTENT * 2


def test_too_many_extents(tmp_path: Path) -> None:
    path = tmp_path / "disk.vmdk"
    path.write_bytes(vmdk.descriptor(["RW 1 ZERO"] * 4097 + ['RW 1 FLAT "a" 0'], "custom"))
    with pytest.raises(ImageError, match="allowed are 4096"):
        byre.open(path)
    path.write_bytes(vmdk.descriptor(['RW 1 FLAT "a" 0'], "custom") + b"# " + b"x" * MIB)
    with pytest.raises(ImageError, match="1048576"):
        byre.open(path, format="vmdk")


def test_the_size_limit_of_untrusted_images() -> None:
    memory = MemoryNode(vmdk.hosted(CONTENT))
    with pytest.raises(ImageError, match="untrusted"):
        open_image(memory, "vmdk", read_only=True, policy=Policy.untrusted(max_size=1000))


# -- sparse extents -------------------------------------------------------------------------------


def damaged(at: int, code: str, *values: int, data: bytes = b"") -> MemoryNode:
    body = bytearray(data or vmdk.hosted(CONTENT))
    struct.pack_into(code, body, at, *values)
    return MemoryNode(bytes(body))


def test_truncated_extents() -> None:
    data = vmdk.hosted(CONTENT)
    for length in (4, 100, 511, 512, 5000, 11000):
        with pytest.raises(ImageError):
            open_image(MemoryNode(data[:length]), "vmdk", read_only=True)
    with pytest.raises(ImageError, match="truncated"):
        open_image(MemoryNode(data[:12000]), "vmdk", read_only=True)


def test_tables_past_the_end() -> None:
    memory = damaged(28 * 512 // 512 * 512, "<I", 0)
    directory = struct.unpack_from("<Q", memory.to_bytes(), 56)[0] * 512
    with (
        open_image(damaged(directory, "<I", 0x7FFFFFFF), "vmdk", read_only=True) as image,
        pytest.raises(ImageError, match="directory"),
    ):
        image.read(0, 100)
    with pytest.raises(ImageError, match="grain directory"):
        open_image(damaged(56, "<Q", 1 << 50), "vmdk", read_only=True)


def test_directories_are_not_believed_in() -> None:
    """A header may ask for a directory of 32 MiB, but then the file must have it."""
    header = vmdk.header(8 << 20, grain=1, per_table=1, directory=100)
    with pytest.raises(ImageError, match="past the end"):
        open_image(MemoryNode(header + vmdk.descriptor([])), "vmdk", read_only=True)


def test_extents_that_are_shorter_than_the_descriptor_says(tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(vmdk.hosted(CONTENT, text=b""))
    path = tmp_path / "disk.vmdk"
    path.write_bytes(vmdk.descriptor(['RW 2049 SPARSE "s"'], "custom"))
    with pytest.raises(ImageError, match="the descriptor says"):
        byre.open(path)
    path.write_bytes(vmdk.descriptor(['RW 1000 SPARSE "s"'], "custom"))
    with byre.open(path) as image:
        assert image.read(0, image.size) == CONTENT[:512000]


def test_an_extent_alone_is_no_disk() -> None:
    with pytest.raises(ImageError, match="descriptor file that names it"):
        open_image(MemoryNode(vmdk.hosted(CONTENT, text=b"")), "vmdk", read_only=True)


@pytest.mark.parametrize("kind", ["cowd", "sesparse"])
def test_lone_delta_files_are_read_with_a_warning(kind: str) -> None:
    data = vmdk.cowd(CONTENT) if kind == "cowd" else vmdk.sesparse(CONTENT)
    graph = Graph()
    with open_image(MemoryNode(data), "vmdk", graph=graph, read_only=True) as image:
        assert image.read(0, image.size) == CONTENT
    assert "no descriptor" in graph.warnings[0]


def test_a_cowd_extent_with_its_descriptor() -> None:
    text = vmdk.descriptor(['RW 2048 VMFSSPARSE "x"'], "vmfsSparse", cid="77")
    with open_image(MemoryNode(vmdk.cowd(CONTENT, text=text)), "vmdk", read_only=True) as image:
        assert image.read(0, image.size) == CONTENT
        assert image.node.cid == 0x77  # type: ignore[attr-defined]


def test_a_journal_must_be_replayed() -> None:
    with pytest.raises(ImageError, match="journal"):
        open_image(MemoryNode(vmdk.sesparse(CONTENT, replay=1)), "vmdk", read_only=True)


def test_sesparse_entries_that_make_no_sense() -> None:
    data = bytearray(vmdk.sesparse(CONTENT))
    table = 9 * 512
    for entry in (5, 4 << 60, 3 << 60 | 0xFFFFFFFFFFFF):
        struct.pack_into("<Q", data, table, entry)
        with open_image(MemoryNode(bytes(data)), "vmdk", read_only=True) as image:
            for look in (lambda: image.read(0, 10), lambda: image.node.extents(0, 100000)):
                with pytest.raises(ImageError, match="makes no sense"):
                    look()


READ_ONLY = {
    "version 3": vmdk.hosted(CONTENT, version=3),
    "footer": vmdk.stream(CONTENT),
    "markers": vmdk.stream(CONTENT, markers=False),
    "COWD": vmdk.cowd(CONTENT),
    "space-efficient": vmdk.sesparse(CONTENT),
}


@pytest.mark.parametrize("name", READ_ONLY)
def test_what_can_only_be_read(name: str) -> None:
    memory = MemoryNode(READ_ONLY[name])
    with pytest.raises(NotSupported, match="read"):
        open_image(memory, "vmdk")
    graph = Graph()
    with open_image(memory, "vmdk", graph=graph, read_only=True) as image:
        assert image.read(0, image.size) == CONTENT
        with pytest.raises(NotSupported, match="read"):
            image.reopen(read_only=False)
        assert image.read(4096, 5) == b"xxxxx"


def test_version_2_and_3_streams_are_found_by_their_footer() -> None:
    data = bytearray(vmdk.stream(CONTENT, per_table=4, grain=4096))
    with open_image(MemoryNode(bytes(data)), "vmdk", read_only=True) as image:
        assert image.read(0, image.size) == CONTENT
        assert image.node.create_type == "streamOptimized"  # type: ignore[attr-defined]
    with pytest.raises(ImageError, match="footer"):
        open_image(MemoryNode(bytes(data[:-1024])), "vmdk", read_only=True)
    with pytest.raises(ImageError, match="footer"):
        open_image(MemoryNode(bytes(data[: 21 * 512])), "vmdk", read_only=True)


def test_an_empty_extent_that_names_others(tmp_path: Path) -> None:
    (tmp_path / "disk-flat.vmdk").write_bytes(CONTENT)
    text = vmdk.descriptor(['RW 2048 FLAT "disk-flat.vmdk" 0'], "monolithicFlat")
    head = vmdk.header(0, overhead=0, directory=0)
    (tmp_path / "disk.vmdk").write_bytes((head + text).ljust(21 * 512, b"\0"))
    with byre.open(tmp_path / "disk.vmdk", read_only=False) as image:
        assert image.read(0, image.size) == CONTENT
        image.write(0, b"abc")
    assert b"CID=12345678" not in (tmp_path / "disk.vmdk").read_bytes()


def test_an_extent_with_tables_that_do_not_exist_reads_as_zeroes() -> None:
    with open_image(MemoryNode(vmdk.hosted(CONTENT, grain=4096, per_table=4, missing_tables=True)), "vmdk") as image:
        assert image.read(0, image.size) == CONTENT


def test_a_directory_entry_of_one_is_a_table_of_zero_grains() -> None:
    data = bytearray(vmdk.hosted(CONTENT, grain=4096, per_table=4, zero_grains=True, version=2))
    for field in (48, 56):
        directory = struct.unpack_from("<Q", data, field)[0] * 512
        struct.pack_into("<I", data, directory + 8, 1)
    memory = MemoryNode(bytes(data))
    with open_image(memory, "vmdk") as image:
        assert image.read(0, image.size) == CONTENT
        image.write(2 * 16384 + 4096, b"new")
        assert image.read(2 * 16384, 8192) == bytes(4096) + b"new" + bytes(4093)
    assert vmdk.look_through(memory.to_bytes()) == ([], [])


def test_misuse_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="no option"):
        open_image(MemoryNode(vmdk.hosted(CONTENT)), "vmdk", options={"l2-cache-size": 5})
    (tmp_path / "text").write_bytes(b"hello world\n")
    with pytest.raises(ImageError):
        byre.open(tmp_path / "text", format="vmdk")
