"""VMDK disks that nobody should vouch for: see test_hostile_images."""

from __future__ import annotations

import os
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from hostile.test_hostile_images import CONVERT, LOOK, NEVER, READ, WRITE, Attempts, attempts, folder, judge
from support import vmdk

__all__ = ["attempts", "folder"]

MIB = 1 << 20
CONTENT = b"x" * 4096 + bytes(MIB - 4096)
GOOD = vmdk.hosted(CONTENT, grain=4096)
STREAM = vmdk.stream(b"x" * MIB)


class Case(NamedTuple):
    """:ivar named: what the image names
    :ivar broken: it cannot be converted
    """

    name: str
    content: Callable[[], bytes]
    named: tuple[str, ...] = ()
    broken: bool = True
    length: int = 0


def head(data: bytes = GOOD, **changes: int) -> bytes:
    """``data`` with other numbers in its header."""
    given: dict[str, int] = {"capacity": 2048, "grain": 8, "redundant": 0, "directory": 0, "overhead": 1, **changes}
    return vmdk.header(**given) + data[512:]  # type: ignore[arg-type]


def patched(at: int, code: str, *values: int, data: bytes = GOOD) -> bytes:
    body = bytearray(data)
    struct.pack_into(code, body, at, *values)
    return bytes(body)


def text(*lines: str, kind: str = "custom", more: str = "") -> bytes:
    return vmdk.descriptor(lines, kind, more=more)


def one_table_twice() -> bytes:
    data = vmdk.hosted(CONTENT, grain=4096, per_table=8)
    directory = struct.unpack_from("<Q", data, 56)[0] * 512
    return patched(directory + 4, "<I", *struct.unpack_from("<I", data, directory), data=data)


DIRECTORY = struct.unpack_from("<Q", GOOD, 56)[0] * 512
TABLE = struct.unpack_from("<I", GOOD, DIRECTORY)[0] * 512

CASES = (
    Case("good", lambda: GOOD, broken=False),
    Case("stream", lambda: STREAM, broken=False),
    Case("signature alone", lambda: b"KDMV"),
    Case("cut", lambda: GOOD[:600]),
    Case("cut tables", lambda: GOOD[: DIRECTORY + 100]),
    Case("grain of exabytes", lambda: head(grain=0xFFFFFFFFFFFFFFFF)),
    Case("grain of a gigabyte", lambda: head(grain=1 << 21)),
    Case("no grain", lambda: head(grain=0)),
    Case("no table entries", lambda: head(per_table=0)),
    Case("table entries", lambda: head(per_table=0xFFFFFFFF)),
    Case("capacity of exabytes", lambda: head(capacity=0xFFFFFFFFFFFFFFFF)),
    Case("directory of 32 MiB", lambda: head(capacity=8 << 20, grain=1, per_table=1, directory=100)),
    Case("directory of 32 MiB, there", lambda: head(capacity=8 << 20, grain=1, per_table=1, directory=100),
         broken=False, length=64 * MIB),
    Case("directory nowhere", lambda: head(directory=1 << 60)),
    Case("descriptor of a terabyte", lambda: head(text=1 << 31)),
    Case("descriptor nowhere", lambda: head(text_at=1 << 50)),
    Case("table nowhere", lambda: patched(DIRECTORY, "<I", 0xFFFFFFF0)),
    Case("table over the header", lambda: patched(DIRECTORY, "<I", 1), broken=False),
    Case("one table twice", one_table_twice),
    Case("one table many times", lambda: vmdk.header(1 << 34, grain=8, directory=64, overhead=64)
         + text('RW 1 SPARSE "x"').ljust(63 * 512, b"\0") + struct.pack("<I", 40) * 4194304),
    Case("grain past the end", lambda: patched(TABLE, "<I", 0xFFFFFFF0), broken=False),
    Case("grain over the header", lambda: patched(TABLE, "<I", 1), broken=False),
    Case("all grains in one place", lambda: patched(TABLE, "<256I", *[len(GOOD) // 512 - 8] * 256), broken=False),
    Case("line ends changed", lambda: patched(73, "<I", 0)),
    Case("footer missing", lambda: STREAM[:-1024]),
    Case("footer points to itself", lambda: STREAM[:-1024] + STREAM[:512] + STREAM[-512:]),
    Case("marker of 4 GiB", lambda: patched(21 * 512 + 8, "<I", 0xFFFFFFFF, data=STREAM)),
    Case("marker of nothing", lambda: patched(21 * 512 + 8, "<I", 0, data=STREAM)),
    Case("grain that is no stream", lambda: patched(21 * 512 + 12, "<Q", 0, data=STREAM)),
    Case("bomb", lambda: vmdk.stream(b"x" * MIB, payload=zlib.compress(bytes(64 * MIB), 9))),
    Case("grains of 16 MiB", lambda: vmdk.stream(b"x" * 64 * MIB, grain=16 * MIB, per_table=4), broken=False),
    Case("cowd cut", lambda: vmdk.cowd(CONTENT)[:40]),
    Case("cowd of terabytes", lambda: patched(12, "<I", 0xFFFFFFFF, data=vmdk.cowd(CONTENT))),
    Case("sesparse of exabytes", lambda: patched(16, "<Q", 1 << 62, data=vmdk.sesparse(CONTENT))),
    Case("sesparse tables nowhere", lambda: patched(144, "<Q", 1 << 53, data=vmdk.sesparse(CONTENT))),
    Case("descriptor alone", lambda: text()),
    Case("30000 extents of zeroes", lambda: text(*["RW 1 ZERO"] * 30000)),
    Case("only zeroes", lambda: text("RW 100 ZERO")),
    Case("negative extent", lambda: text('RW -5 FLAT "plain" 0')),
    Case("extent of no length", lambda: text('RW 0 FLAT "plain" 0')),
    Case("extents of exabytes", lambda: text(*['RW 9007199254740991 FLAT "plain" 0'] * 3)),
    Case("one file 1000 times", lambda: text(*['RW 2048 FLAT "plain" 0'] * 1000), ("plain",), broken=False),
    Case("plain extent", lambda: text('RW 2048 FLAT "plain" 0'), ("plain",), broken=False),
    Case("secret extent", lambda: text('RW 1 FLAT "/etc/shadow" 0'), ("/etc/shadow",), broken=False),
    Case("sparse extent that is none", lambda: text('RW 2048 SPARSE "plain"'), ("plain",)),
    Case("extent: FIFO", lambda: text('RW 2048 FLAT "fifo" 0'), ("fifo",)),
    Case("extent: sparse FIFO", lambda: text('RW 2048 SPARSE "fifo"'), ("fifo",)),
    Case("extent: terminal", lambda: text('RW 2048 FLAT "/dev/tty" 0'), ("/dev/tty",)),
    Case("extent: zeroes", lambda: text('RW 2048 FLAT "/dev/zero" 0'), ("/dev/zero",)),
    Case("extent: process", lambda: text('RW 2048 FLAT "/proc/self/environ" 0'), ("/proc/self/environ",)),
    Case("extent: itself", lambda: text('RW 1 FLAT "image" 0')),
    Case("extent: folder", lambda: text('RW 1 FLAT "." 0')),
    Case("extent: protocol", lambda: text('RW 2048 FLAT "file:plain" 0'), ("plain",)),
    Case("extent: json", lambda: text("RW 2048 FLAT \"json:{'driver':'file','filename':'plain'}\" 0"), ("plain",)),
    Case("extent: server", lambda: text('RW 2048 FLAT "nbd://127.0.0.1:1/x" 0')),
    Case("extent: escapes", lambda: text('RW 2048 FLAT "\x1b[31mred\x07\x9b" 0')),
    Case("extent: unknown", lambda: text('RW 2048 VMFSRDM "plain"'), ("plain",)),
    Case("parent: FIFO", lambda: vmdk.hosted(CONTENT, text=text(more='parentFileNameHint="fifo"')), ("fifo",)),
    Case("parent: itself", lambda: vmdk.hosted(CONTENT, text=text(more='parentFileNameHint="image"'))),
    Case("parent: plain", lambda: vmdk.hosted(CONTENT, text=text(more='parentFileNameHint="plain"')), ("plain",)),
    Case("parent: escapes", lambda: vmdk.hosted(CONTENT, text=text(more='parentFileNameHint="\x1b]0;x\x07"'))),
    Case("parent: json", lambda: vmdk.hosted(CONTENT, text=text(more='parentFileNameHint="json:{}"'))),
    Case("escapes in the type", lambda: text('RW 1 FLAT "plain" 0', kind="\x1b[31m")),
    *(Case(f"damaged {seed}", lambda seed=seed: damaged(GOOD, seed), broken=False) for seed in range(8)),  # type: ignore[misc]
    *(Case(f"damaged stream {seed}", lambda seed=seed: damaged(STREAM, seed), broken=False) for seed in range(4)),  # type: ignore[misc]
)  # fmt: skip


def damaged(data: bytes, seed: int) -> bytes:
    """Bytes of header, descriptor and tables at random."""
    chooser = random.Random(seed)
    content = bytearray(data)
    for _ in range(6):
        start, length = chooser.choice([(0, 80), (512, 400), (DIRECTORY, 64), (TABLE, 1024), (len(data) - 1024, 80)])
        content[min(start + chooser.randrange(length), len(data) - 1)] = chooser.choice((0, 1, 0x7F, 0x80, 0xFF))
    return bytes(content)


ATTEMPTS = [
    pytest.param(case, untrusted, id=case.name.replace(" ", "-") + ("-untrusted" if untrusted else ""))
    for case in CASES
    for untrusted in ((False, True) if case.named or case.name == "good" else (False,))
]


@pytest.mark.parametrize(("case", "untrusted"), ATTEMPTS)
def test_every_command_survives(case: Case, untrusted: bool, folder: Path, attempts: Attempts) -> None:
    content = case.content()
    (folder / "image").write_bytes(content)
    if case.length:
        os.truncate(folder / "image", case.length)
    (folder / "empty").write_bytes(b"")
    (folder / "plain").write_bytes(bytes(MIB))
    os.mkfifo(folder / "fifo")
    before = (folder / "image").read_bytes()
    extra = ["--untrusted"] if untrusted else []
    wrong: list[str] = []
    codes = {}
    for words in (*LOOK, *READ, *WRITE):
        if words in WRITE and words == WRITE[0]:
            assert (folder / "image").read_bytes() == before, "the source was changed"
        got = attempts(folder, [words[0], *extra, *words[1:]])
        named = set(case.named)
        wrong += judge(words, got, named if untrusted or words in LOOK else named & NEVER)
        codes[tuple(words)] = got["code"]
        for name in ("out", "overlay"):
            (folder / name).unlink(missing_ok=True)
    assert not wrong, "\n".join(wrong)
    if case.broken:
        assert codes[tuple(CONVERT)] == 1, "a broken image was converted"
