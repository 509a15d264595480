"""Faults seen in peers that concern formats other than qcow2 (docs/reliability.md): byre does not have them.

The peer is not run on what makes it crash or hang.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from byre.exports.nbd import NbdExport
from byre.nbd import wire
from byre.protocols.memory import MemoryNode
from hostile import test_flat_formats as flat
from support import vmdk
from support.forged_vhd import Vhd, Vhdx
from support.nbd_talk import Talk, image_of, serving

Run = Callable[..., "subprocess.CompletedProcess[str]"]
MIB = 1 << 20
COMMANDS = (
    ["info"], ["info", "--output", "json"], ["info", "--backing-chain"], ["map"], ["check"], ["measure", "-O", "raw"],
)  # fmt: skip


@pytest.fixture
def byre(tmp_path: Path) -> Run:
    def run(*words: object, timeout: float = 15) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([sys.executable, "-m", "byre", *map(str, words)], cwd=tmp_path, capture_output=True,
                              text=True, timeout=timeout, stdin=subprocess.DEVNULL)  # fmt: skip
        assert done.returncode in (0, 1, 2, 3, 63), f"{words}\n{done.stdout}{done.stderr}"
        return done

    return run


EXTENTS = {
    "none": (),
    "negative": ('RW -1 FLAT "plain" 0',),
    "of no length": ('RW 0 SPARSE "plain"',),
    "zeroes": ("RW 1 ZERO",) * 30_000,
    "zeroes of no length": ("RW 0 ZERO",),
    "no access": ('NOACCESS 2048 FLAT "plain" 0',),
    "unknown": ('RW 2048 NOSUCH "plain" 0',),
}


@pytest.mark.parametrize("name", EXTENTS)
def test_descriptors_without_a_usable_extent(name: str, tmp_path: Path, byre: Run) -> None:
    """2: ``s->num_extents`` was asserted."""
    (tmp_path / "plain").write_bytes(bytes(MIB))
    (tmp_path / "image").write_bytes(vmdk.descriptor(EXTENTS[name], "monolithicFlat"))
    for words in ([*command, "image"] for command in (*COMMANDS, ["convert", "-O", "raw"])):
        done = byre(*words, *(["out"] if words[0] == "convert" else []))
        assert done.returncode in (0, 1)
        assert done.returncode == 0 or len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("sector", [1 << 54, 1 << 55, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 0x7FFFFFFFFFFFFF])
def test_an_extension_whose_place_turns_negative(sector: int, tmp_path: Path, byre: Run) -> None:
    """3: ``ext_off > 0`` was asserted."""
    with open(tmp_path / "image", "wb") as file:
        for at, data in flat.parallels(extension=sector).items():
            file.seek(at)
            file.write(data)
    for command in (*COMMANDS, ["convert", "-O", "raw"], ["check", "-r", "all"]):
        done = byre(*command, "image", *(["out"] if command[0] == "convert" else []))
        assert len(done.stderr.splitlines()) <= 3


def _parts(parts: dict[int, bytes]) -> bytes:
    data = bytearray(max(at + len(content) for at, content in parts.items()))
    for at, content in sorted(parts.items()):
        data[at : at + len(content)] = content
    return bytes(data)


def _ovf() -> bytes:
    from formats.test_appliance import descriptor

    return descriptor(("d", "fifo", "raw"))


NAMING: dict[str, Callable[[], bytes]] = {
    "vmdk, flat extent": lambda: vmdk.descriptor(['RW 2048 FLAT "fifo" 0'], "monolithicFlat"),
    "vmdk, sparse extent": lambda: vmdk.descriptor(['RW 2048 SPARSE "fifo"'], "twoGbMaxExtentSparse"),
    "vmdk, parent": lambda: vmdk.hosted(bytes(MIB), text=vmdk.descriptor(
        ['RW 2048 SPARSE "image"'], more='parentFileNameHint="fifo"')),
    "vhdx, parent": lambda: Vhdx(parent={"parent_linkage": "{}", "relative_path": "fifo"}).build(),
    "vpc, parent": lambda: Vhd(kind=4, locators=[(b"W2ru", "fifo".encode("utf-16-le"))]).build(),
    "vdi, parent": lambda: _parts(flat.vdi(kind=4, parent=b"p" * 16)),
    "qed, backing": lambda: _parts(flat.qed(features=5, name=b"fifo")),
    "qcow, backing": lambda: _parts(flat.qcow(name=b"fifo")),
    "parallels, bundle": lambda: _parts(flat.bundle("fifo")),
    "ovf, disk": _ovf,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMING)
def test_a_fifo_that_the_image_names(name: str, tmp_path: Path, byre: Run) -> None:
    """4: commands waited for a writer that never comes; ``info`` of VMDK as well."""
    os.mkfifo(tmp_path / "fifo")
    os.mkfifo(tmp_path / "other.vdi")  # looked at for a parent
    (tmp_path / "image").write_bytes(NAMING[name]())
    byre("info", "image")
    for words in (["check", "image"], ["convert", "-O", "raw", "image", "out"], ["map", "image"],
                  ["compare", "image", "image"], ["io", "-r", "-c", "read 0 4k", "image"]):  # fmt: skip
        done = byre(*words)
        # ``check`` has no use for what lies below.
        assert done.returncode in ((0, 1, 2, 3, 63) if words[0] == "check" else (1, 2)), (words, done.stdout)


ESCAPE = "\x1b]0;owned\x07\x1b[2J"


def _vma() -> bytes:
    from byre.formats import vma

    return vma.encode_header(vma.Header(bytes(16), 1, 0, (vma.Device(1, ESCAPE, MIB),), ((ESCAPE, b"x"),)))


def _uimage() -> bytes:
    from formats.test_uimage import forge

    return forge(b"x" * 600, name=ESCAPE.encode() + b"\x9b1m\xff")


def _ewf() -> bytes:
    import tempfile
    import zlib

    from formats.ewf import test_ewf

    with tempfile.TemporaryDirectory() as folder:
        data = test_ewf.forge(Path(folder), bytes(4096)).read_bytes()
    text = zlib.compress(f"1\nmain\nc\te\tt\n007\t{ESCAPE}\t\x9b1m\n\n".encode("utf-16"))
    segment = test_ewf.Segment(1)
    segment.add("header2", text)
    segment.data += data[13:]
    return bytes(segment.data)


ESCAPING: dict[str, Callable[[], bytes]] = {
    "vmdk, type": lambda: vmdk.descriptor(['RW 2048 FLAT "plain" 0'], ESCAPE),
    "vmdk, extent": lambda: vmdk.descriptor([f'RW 2048 FLAT "{ESCAPE}" 0'], "monolithicFlat"),
    "vmdk, parent": lambda: vmdk.hosted(bytes(MIB), text=vmdk.descriptor(
        ['RW 2048 SPARSE "image"'], more=f'parentFileNameHint="{ESCAPE}"')),
    "vmdk, database": lambda: vmdk.descriptor(['RW 2048 FLAT "plain" 0'], more=f'ddb.adapterType = "{ESCAPE}"'),
    "vhdx, parent": lambda: Vhdx(parent={"parent_linkage": ESCAPE, "relative_path": ESCAPE}).build(),
    "vpc, parent": lambda: Vhd(kind=4, parent_name=ESCAPE, application=b"\x1b[2J").build(),
    "qed, backing": lambda: _parts(flat.qed(features=5, name=ESCAPE.encode())),
    "qcow, backing": lambda: _parts(flat.qcow(name=ESCAPE.encode() + b"\x9b\xff")),
    "parallels, bundle": lambda: _parts(flat.bundle("&#155;1m&#127;&#133;")),
    "vma, names": _vma,
    "uimage, name": _uimage,
    "ewf, case": _ewf,
    "ovf, file": lambda: _ovf().replace(b'"fifo"', b'"&#155;1m&#127;"').replace(b'"d"', b'"&#155;2J"'),
}  # fmt: skip


@pytest.mark.parametrize("name", ESCAPING)
def test_escape_sequences_stay_in_the_image(name: str, tmp_path: Path, byre: Run) -> None:
    """10: those in fields of VMDK reached the terminal."""
    (tmp_path / "plain").write_bytes(bytes(MIB))
    (tmp_path / "image").write_bytes(ESCAPING[name]())
    for command in (*COMMANDS, ["convert", "-O", "raw"]):
        done = byre(*command, "image", *(["out"] if command[0] == "convert" else []))
        text = done.stdout + done.stderr
        assert not any((ord(c) < 32 and c != "\n") or 127 <= ord(c) < 160 for c in text), (command, text)


def test_a_client_that_leaves_with_many_reads_in_flight(tmp_path: Path) -> None:
    """11: ``sock >= 0`` was asserted."""
    content = os.urandom(8 * MIB)
    before = threading.active_count()
    with image_of(MemoryNode(content)) as image, serving(tmp_path / "socket", NbdExport(image)) as served:
        for mode in ("simple", "structured", "extended"):
            for _ in range(5):
                talk = Talk(served.path).start(mode)
                talk.socket.settimeout(0.2)
                with suppress(TimeoutError):  # the server takes only so many at once
                    for number in range(200):
                        talk.request(wire.CMD_READ, number % 8 * MIB, MIB)
                talk.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                talk.socket.close()
        with Talk(served.path) as talk:
            assert talk.start().read(MIB, 4096) == content[MIB : MIB + 4096]
    assert threading.active_count() <= before + 1


def test_a_write_to_a_read_only_export(tmp_path: Path, byre: Run) -> None:
    """12: the answer was EINVAL rather than EPERM."""
    with image_of(MemoryNode(bytes(MIB))) as image, serving(tmp_path / "socket", NbdExport(image)) as served:
        with Talk(served.path) as talk:
            assert talk.start().write(0, b"x" * 512) == 1
        done = byre("io", "-r", "-c", "read 0 512", "-f", "raw", f"nbd+unix:///?socket={served.path}")
        assert done.returncode == 0
