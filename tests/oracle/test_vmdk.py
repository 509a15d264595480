"""VMDK both ways with the peer, and with a third reader: what one writes the others read, check and map alike."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import byre
from byre.errors import ImageError
from byre.graph.creating import create
from byre.jobs.job import Control
from conftest import Run
from support import vmdk

pytestmark = pytest.mark.oracle

MIB = 1 << 20
SIZE = 9 * MIB + 512 * 7

GRID: dict[str, dict[str, str]] = {
    "monolithicSparse": {},
    "zeroed-grain": {"zeroed_grain": "on"},
    "monolithicFlat": {"subformat": "monolithicFlat"},
    "twoGbMaxExtentSparse": {"subformat": "twoGbMaxExtentSparse"},
    "twoGbMaxExtentFlat": {"subformat": "twoGbMaxExtentFlat"},
    "streamOptimized": {"subformat": "streamOptimized"},
    "machine": {"adapter_type": "lsilogic", "hwversion": "13", "toolsversion": "7"},
    "compat6": {"compat6": "on", "adapter_type": "legacyESX"},
}
WRITABLE = [name for name in GRID if name != "streamOptimized"]


def words(options: dict[str, str]) -> list[str]:
    return ["-o", ",".join(f"{key}={value}" for key, value in options.items())] if options else []


def fragments(size: int, seed: int) -> list[tuple[int, bytes]]:
    """Writes in random order, some over others, with holes in between."""
    chooser = random.Random(seed)
    return [
        (chooser.randrange(size // 512 - 300) * 512, chooser.randbytes(512 * chooser.randrange(1, 300)))
        for _ in range(25)
    ]


def applied(size: int, writes: list[tuple[int, bytes]]) -> bytes:
    content = bytearray(size)
    for offset, data in writes:
        content[offset : offset + len(data)] = data
    return bytes(content)


def peer_bytes(qemu_img: Run, path: Path) -> bytes:
    target = path.with_suffix(".peer-raw")
    qemu_img("convert", "-f", "vmdk", "-O", "raw", path, target)
    return target.read_bytes()


def own_bytes(path: Path) -> bytes:
    with byre.open(path) as image:
        return image.read(0, image.size)


@pytest.fixture
def run_byre(tmp_path: Path) -> Callable[..., str]:
    def run(*arguments: object) -> str:
        command = [sys.executable, "-m", "byre", *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=60).stdout

    return run


# -- content --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITABLE)
def test_fragmented_disks_both_ways(name: str, qemu_img: Run, qemu_io: Run, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.vmdk", tmp_path / "theirs.vmdk"
    create(str(ours), "vmdk", SIZE, options=GRID[name])
    qemu_img("create", "-q", "-f", "vmdk", *words(GRID[name]), theirs, SIZE)
    writes = fragments(SIZE, 5)
    for path in (ours, theirs):
        with byre.open(path, read_only=False) as image:
            for offset, data in writes:
                image.write(offset, data)
            image.write_zeroes(MIB, 300_000)
    expected = bytearray(applied(SIZE, writes))
    expected[MIB : MIB + 300_000] = bytes(300_000)
    for path in (ours, theirs):
        qemu_img("check", "-f", "vmdk", path)
        assert peer_bytes(qemu_img, path) == expected
        # And the peer writes on.
        qemu_io("-f", "vmdk", "-c", "write -P 7 5000000 70000", "-c", "write -z 0 131072", path)
        assert own_bytes(path) == peer_bytes(qemu_img, path)
        with byre.open(path, check=True) as image:
            result = image.node.check(Control())  # type: ignore[attr-defined]
            assert (result.corruptions, result.leaks) == (0, 0), result.messages


@pytest.mark.parametrize("name", GRID)
def test_conversion_both_ways(name: str, qemu_img: Run, run_byre: Callable[..., str], tmp_path: Path) -> None:
    content = applied(SIZE, fragments(SIZE, 6))
    (tmp_path / "raw").write_bytes(content)
    run_byre("convert", "-f", "raw", "-O", "vmdk", *words(GRID[name]), "raw", "ours.vmdk")
    qemu_img("convert", "-f", "raw", "-O", "vmdk", *words(GRID[name]), "raw", "theirs.vmdk", cwd=tmp_path)
    assert peer_bytes(qemu_img, tmp_path / "ours.vmdk") == content
    assert own_bytes(tmp_path / "theirs.vmdk") == content
    qemu_img("check", "ours.vmdk", cwd=tmp_path)
    assert run_byre("check", "theirs.vmdk") == "No errors were found on the image.\n"
    run_byre("convert", "-O", "qcow2", "theirs.vmdk", "back.qcow2")
    qemu_img("compare", "-f", "raw", "-F", "qcow2", "raw", "back.qcow2", cwd=tmp_path)


def test_a_stream_through_a_pipe(qemu_img: Run, tmp_path: Path) -> None:
    content = applied(SIZE, fragments(SIZE, 7))
    (tmp_path / "raw").write_bytes(content)
    command = [sys.executable, "-m", "byre", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized",
               "raw", "-"]  # fmt: skip
    with (tmp_path / "out.vmdk").open("wb") as file:
        done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, check=True, timeout=60)
        file.write(done.stdout)
    assert peer_bytes(qemu_img, tmp_path / "out.vmdk") == content
    qemu_img("check", "out.vmdk", cwd=tmp_path)


@pytest.mark.parametrize("kind", ["grain-4k", "one-copy", "zero-grains", "stream", "cowd", "sesparse"])
def test_forged_disks_read_alike(kind: str, qemu_img: Run, tmp_path: Path) -> None:
    content = applied(4 * MIB, fragments(4 * MIB, 8))
    path = tmp_path / "disk.vmdk"
    if kind in ("cowd", "sesparse"):
        data = vmdk.cowd(content) if kind == "cowd" else vmdk.sesparse(content)
        (tmp_path / "disk-delta.vmdk").write_bytes(data)
        line = f'RW {len(content) // 512} {"VMFSSPARSE" if kind == "cowd" else "SESPARSE"} "disk-delta.vmdk"'
        path.write_bytes(vmdk.descriptor([line], "vmfsSparse" if kind == "cowd" else "seSparse"))
    elif kind == "stream":
        path.write_bytes(vmdk.stream(content))
    else:
        options: dict[str, dict[str, Any]] = {
            "grain-4k": {"grain": 4096},
            "one-copy": {"redundant": False},
            "zero-grains": {"zero_grains": True, "version": 2},
        }
        path.write_bytes(vmdk.hosted(content, **options[kind]))
    assert own_bytes(path) == content
    assert peer_bytes(qemu_img, path) == content
    same_map(qemu_img, path)


# -- what is said ---------------------------------------------------------------------------------


def same_map(qemu_img: Run, path: Path) -> None:
    theirs = json.loads(qemu_img("map", "--output=json", path).stdout)
    done = subprocess.run([sys.executable, "-m", "byre", "map", "--output=json", str(path)], check=True,
                          capture_output=True, timeout=60)  # fmt: skip
    ours = json.loads(done.stdout)
    compressed = sum(row.pop("compressed") for row in ours)
    for row in theirs:
        row.pop("compressed", None)
    # Older releases end a row at every compressed grain.
    assert _merged(ours) == (_merged(theirs) if compressed else theirs)


def _merged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    merged: list[dict[str, Any]] = []
    for row in rows:
        before = merged[-1] if merged else None
        alike = before is not None and all(before[key] == row[key] for key in ("depth", "present", "zero", "data"))
        if before is not None and alike and "offset" not in row and "offset" not in before:
            before["length"] += row["length"]
        else:
            merged.append(dict(row))
    return merged


@pytest.mark.parametrize("name", GRID)
def test_info_and_map_say_the_same(name: str, qemu_img: Run, run_byre: Callable[..., str], tmp_path: Path) -> None:
    content = applied(SIZE, fragments(SIZE, 9))
    (tmp_path / "raw").write_bytes(content)
    run_byre("convert", "-f", "raw", "-O", "vmdk", *words(GRID[name]), "raw", "disk.vmdk")
    same_map(qemu_img, tmp_path / "disk.vmdk")
    theirs = json.loads(qemu_img("info", "--output=json", "disk.vmdk", cwd=tmp_path).stdout)
    ours = json.loads(run_byre("info", "--output=json", "disk.vmdk"))
    for each in (ours, theirs):
        each.pop("children", None)
    assert ours == theirs
    assert list(ours["format-specific"]["data"]) == list(theirs["format-specific"]["data"])
    text = qemu_img("info", "disk.vmdk", cwd=tmp_path).stdout.rstrip()
    assert run_byre("info", "disk.vmdk").startswith(text)


@pytest.mark.parametrize("name", GRID)
def test_creation_says_and_makes_the_same(name: str, qemu_img: Run, run_byre: Callable[..., str],
                                          tmp_path: Path) -> None:  # fmt: skip
    (tmp_path / "ours").mkdir()
    (tmp_path / "theirs").mkdir()
    theirs = qemu_img("create", "-f", "vmdk", *words(GRID[name]), "disk.vmdk", "5G", cwd=tmp_path / "theirs").stdout
    command = [sys.executable, "-m", "byre", "create", "-f", "vmdk", *words(GRID[name]), "disk.vmdk", "5G"]
    ours = subprocess.run(command, cwd=tmp_path / "ours", check=True, capture_output=True, text=True, timeout=60).stdout
    assert ours == theirs
    sizes = [
        {path.name: path.stat().st_size for path in (tmp_path / who).iterdir() if path.stat().st_size > 4096}
        for who in ("ours", "theirs")
    ]
    assert sizes[0] == sizes[1]


def test_overlays_both_ways(qemu_img: Run, qemu_io: Run, run_byre: Callable[..., str], tmp_path: Path) -> None:
    run_byre("create", "-q", "-f", "vmdk", "base.vmdk", "4M")
    qemu_io("-c", "write -P 1 0 2M", "base.vmdk", cwd=tmp_path)
    run_byre("create", "-q", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", "ours.vmdk")
    qemu_img("create", "-q", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", "theirs.vmdk", cwd=tmp_path)
    for name in ("ours.vmdk", "theirs.vmdk"):
        with byre.open(tmp_path / name, read_only=False) as image:
            image.write(100_000, b"mine")
        qemu_io("-c", "write -P 3 1M 100k", name, cwd=tmp_path)
        assert own_bytes(tmp_path / name) == peer_bytes(qemu_img, tmp_path / name)
    # Writing to the parent breaks both, for both.
    with byre.open(tmp_path / "base.vmdk", read_only=False) as image:
        image.write(0, b"changed")
    for name in ("ours.vmdk", "theirs.vmdk"):
        assert qemu_io("-c", "read 0 512", name, cwd=tmp_path, check=False).returncode == 1
        with byre.open(tmp_path / name) as image, pytest.raises(ImageError, match="content ID"):
            image.read(0, 512)


def test_old_content_ids_are_noticed_by_the_peer(qemu_img: Run, qemu_io: Run, tmp_path: Path) -> None:
    create(str(tmp_path / "base.vmdk"), "vmdk", MIB)
    qemu_img("create", "-q", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", "top.vmdk", cwd=tmp_path)
    qemu_io("-r", "-c", "read -P 0 0 512", "top.vmdk", cwd=tmp_path)
    with byre.open(tmp_path / "base.vmdk", read_only=False) as image:
        image.write(0, b"changed")
    assert qemu_io("-r", "-c", "read 0 512", "top.vmdk", cwd=tmp_path, check=False).returncode == 1


# -- the third reader -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "streamOptimized", "pipe"]
)
def test_a_third_reader_agrees(name: str, run_byre: Callable[..., str], tmp_path: Path) -> None:
    from dissect.hypervisor.disk.vmdk import VMDK

    size = 9 * MIB
    content = applied(size, fragments(size, 10))
    (tmp_path / "raw").write_bytes(content)
    path = tmp_path / "disk.vmdk"
    if name == "pipe":
        command = [sys.executable, "-m", "byre", "convert", "-O", "vmdk", "-o", "subformat=streamOptimized", "raw", "-"]
        path.write_bytes(subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, check=True, timeout=60).stdout)
    else:
        run_byre("convert", "-f", "raw", "-O", "vmdk", "-o", f"subformat={name}", "raw", "disk.vmdk")
    assert VMDK(path).read(size) == content


def test_a_third_reader_agrees_on_forged_disks(tmp_path: Path) -> None:
    """The descriptions our forgeries follow are understood by others as well."""
    from dissect.hypervisor.disk.vmdk import VMDK

    content = applied(4 * MIB, fragments(4 * MIB, 11))
    for data in (vmdk.hosted(content), vmdk.stream(content)):
        (tmp_path / "disk.vmdk").write_bytes(data)
        assert VMDK(tmp_path / "disk.vmdk").read(len(content)) == content
    for data, kind in ((vmdk.cowd(content), "VMFSSPARSE"), (vmdk.sesparse(content), "SESPARSE")):
        (tmp_path / "part.vmdk").write_bytes(data)
        line = f'RW {len(content) // 512} {kind} "part.vmdk"'
        (tmp_path / "disk.vmdk").write_bytes(vmdk.descriptor([line], "vmfsSparse"))
        assert VMDK(tmp_path / "disk.vmdk").read(len(content)) == content
