"""``check`` of every format: 0, 2, 3 where there are checks, 63 and the very words where not, as the peer has it."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from byre.formats.abilities import Checkable
from formats.test_parallels import damaged
from support.samples import SAMPLES, Sample
from support.vdi import small_vdi
from support.vmdk import hosted

Run = Callable[..., "subprocess.CompletedProcess[str]"]
UNSUPPORTED = "This image format does not support checks"
WITHOUT_CHECKS = {"raw", "luks", "qcow", "bochs", "cloop", "dmg", "uimage", "asif", "ewf", "vma", "ova", "ovf"}
OPENED_HERE_ONLY = {"qed", "vdi-child", "vhdx-logged", "vhdx-child", "vmdk-cowd", "vmdk-sesparse", "parallels-bitmap"}
"""What the peer refuses (tables of one cluster, parents, a log that is not replayed) or takes for something else."""


def check(path: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "byre", "check", *more, path], capture_output=True, text=True,
                          timeout=60, stdin=subprocess.DEVNULL)  # fmt: skip


@pytest.mark.parametrize(
    "sample", [sample for sample in SAMPLES if sample.format != "luks"], ids=lambda sample: sample.name
)
def test_good_images(sample: Sample, tmp_path: Path) -> None:
    path = sample.make(tmp_path)
    before = path.read_bytes(), path.stat().st_mtime_ns
    done = check(path)
    if sample.format in WITHOUT_CHECKS or sample.name == "parallels-bundle":
        assert (done.returncode, done.stdout, done.stderr) == (63, "", f"byre: {UNSUPPORTED}\n")
    else:
        assert done.returncode == 0, done.stderr
        assert "No errors were found on the image." in done.stdout
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


@pytest.mark.oracle
def test_the_peer_gives_the_same_codes(tmp_path: Path, qemu_img: Run) -> None:
    for sample in SAMPLES:
        if sample.format in ("luks", "vpc") or sample.name in OPENED_HERE_ONLY:
            continue  # the peer has no check of vpc
        folder = tmp_path / sample.name
        folder.mkdir()
        path = sample.make(folder)
        peer = qemu_img("check", path, check=False)
        assert check(path).returncode == peer.returncode, sample.name


def test_raw_says_so(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    done = check(path)
    assert (done.returncode, done.stderr) == (63, f"byre: {UNSUPPORTED}\n")
    assert check(path, "--output", "json").returncode == 63
    assert check(path, "-r", "all").returncode == 63


def _vmdk() -> bytes:
    data = bytearray(hosted(bytes(4096) + b"x" * (1 << 20), grain=65536))
    directory = struct.unpack_from("<Q", data, 56)[0] * 512
    table = struct.unpack_from("<I", data, directory)[0] * 512
    struct.pack_into("<I", data, table, 0xFFFFFF)
    return bytes(data)


def _vdi(entries: tuple[int, ...], allocated: int) -> bytes:
    data = bytearray(small_vdi(4 << 20, 1 << 20).to_bytes())
    struct.pack_into(f"<{len(entries)}I", data, 512, *entries)
    struct.pack_into("<I", data, 388, allocated)
    return bytes(data) + bytes(4 << 20)


DAMAGED: dict[str, tuple[Callable[[], bytes], int, int]] = {
    "parallels, outside": (lambda: damaged(entries={0: 1 << 30}).to_bytes(), 2, 2),
    "parallels, leak": (lambda: damaged(grown=4096 * 3).to_bytes(), 3, 3),
    "vdi, outside": (lambda: _vdi((99,), 1), 2, 2),
    "vdi, one block twice": (lambda: _vdi((0, 0), 1), 2, 2),
    "vdi, leak": (lambda: _vdi((0,), 3), 3, 2),
    "vmdk, grain outside": (_vmdk, 2, 1),
}
"""What makes it, the code, and that of the peer: it stops at the first such grain, and takes space that the header of a
VDI counts but no entry names for damage.
"""


@pytest.mark.oracle
@pytest.mark.parametrize("name", DAMAGED)
def test_damage_and_leaks(name: str, tmp_path: Path, qemu_img: Run) -> None:
    make, code, of_the_peer = DAMAGED[name]
    path = tmp_path / "image"
    path.write_bytes(make())
    assert check(path).returncode == code
    assert qemu_img("check", path, check=False).returncode == of_the_peer


def test_what_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "image"
    for content in (b"QED\0", b"conectix", b"vhdxfile", b"KDMV", b"WithoutFreeSpace\2\0\0\0", b"QFI\xfb\0\0\0\1"):
        path.write_bytes(content.ljust(600, b"\xff"))
        done = check(path)
        assert done.returncode == 1, content
        assert len(done.stderr.splitlines()) == 1
    assert check(tmp_path / "missing").returncode == 1


def test_the_list_is_whole() -> None:
    import byre.catalog

    for row in byre.catalog.formats():
        assert (row.name in WITHOUT_CHECKS) == (not _checkable(row.name)), row.name


def _checkable(format: str) -> bool:
    """By the class that the sample opens as."""
    import tempfile

    import byre

    if format in ("raw", "luks"):
        return False
    sample = next(sample for sample in SAMPLES if sample.format == format)
    with tempfile.TemporaryDirectory() as folder, byre.open(str(sample.make(Path(folder)))) as image:
        return isinstance(image.node, Checkable)
