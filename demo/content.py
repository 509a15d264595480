"""What the demo's disk holds: real files of this installation, and generated ones that look like a small server's."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import byre

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ext2 import Ext2

MIB = 1 << 20
PAGE = 4096
DATABASE = "/srv/db/accounts.db"
PAGE_COUNT = 6 * MIB // PAGE * 6

Files = dict[str, bytes]
Release = Callable[[int, int], None]
"""Called with (offset, length) of a byte range of the file system that nothing needs any more."""


def install(system: Ext2) -> Files:
    """The first state of the disk; returns every file written, to compare with later."""
    chance = random.Random(1)
    files: Files = {}
    files.update(_tree("/usr/src/byre", Path(byre.__file__).parent, 4 * MIB))
    files.update(_tree("/usr/share/doc/byre", Path(__file__).resolve().parent.parent / "docs", MIB))
    files.update(_tree("/usr/lib/python3", Path(sysconfig.get_path("stdlib")), 20 * MIB))
    files["/etc/hostname"] = b"byre-demo\n"
    files["/etc/release"] = b'NAME="byre demo disk"\nVERSION="1.0"\n'
    for day in range(1, 15):
        files[f"/var/log/server-{day:02}.log"] = log(chance, day, 8000)
    for number in range(1, 7):
        files[f"/var/cache/packages/package-{number}.bin"] = chance.randbytes(3 * MIB)
    files["/var/swap"] = bytes(16 * MIB)
    files["/srv/app/version-1.bin"] = _program(chance, 10 * MIB)
    files[DATABASE] = b"".join(page(chance, number, 1) for number in range(PAGE_COUNT))
    for number in range(1, 5):
        files[f"/home/ada/pictures/{number:04}.jpg"] = chance.randbytes(chance.randrange(2 * MIB, 5 * MIB))
    store(system, files)
    system.make_symlink("/srv/app/current", "version-1.bin")
    system.sync()
    return files


def update(system: Ext2, release: Release) -> tuple[Files, list[str]]:
    """A new release: files replaced and added, the package cache emptied.

    :returns: files written, files removed
    """
    chance = random.Random(2)
    files: Files = {
        "/etc/release": b'NAME="byre demo disk"\nVERSION="2.0"\n',
        "/srv/app/version-2.bin": _program(chance, 12 * MIB),
        "/var/log/update.log": log(chance, 15, 4000),
    }
    removed = [path for path in system.files("/var/cache/packages") if not path.endswith("-1.bin")]
    delete(system, removed, release)
    store(system, files)
    return files, removed


def today(system: Ext2, database: bytes, release: Release) -> tuple[Files, list[str]]:
    """A day's work: pages of the database rewritten all over the file, new files, an old program deleted.

    :param database: its content up to now
    :returns: as :func:`update`
    """
    chance = random.Random(3)
    content = bytearray(database)
    for number in sorted(chance.sample(range(PAGE_COUNT), 90)):
        fresh = page(chance, number, 2)
        content[number * PAGE : (number + 1) * PAGE] = fresh
        system.rewrite(DATABASE, number * PAGE, fresh)
    files: Files = {
        "/home/ada/report.txt": log(chance, 16, 2000),
        "/home/ada/pictures/0005.jpg": chance.randbytes(6 * MIB),
        "/var/log/server-15.log": log(chance, 16, 20000),
    }
    removed = ["/srv/app/version-1.bin"]
    delete(system, removed, release)
    store(system, files)
    files[DATABASE] = bytes(content)
    return files, removed


def delete(system: Ext2, paths: list[str], release: Release) -> None:
    """Remove files and give their space back, before anything else takes it."""
    for path in paths:
        for offset, length in system.remove(path):
            release(offset, length)


def store(system: Ext2, files: Files) -> None:
    for path, data in files.items():
        system.make_directories(path.rpartition("/")[0])
        system.write_file(path, data)
    system.sync()


def log(chance: random.Random, day: int, lines: int) -> bytes:
    """Text such as servers write."""
    verbs = ("GET", "GET", "GET", "POST", "HEAD")
    pages = ("/", "/index.html", "/accounts", "/accounts/17", "/static/site.css", "/login", "/search?q=byre")
    text = []
    for number in range(lines):
        second = number * 86400 // lines
        clock = f"{second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}"
        address = f"10.0.{chance.randrange(4)}.{chance.randrange(256)}"
        size = chance.randrange(200, 90000)
        text.append(
            f'{address} [2025-03-{day:02} {clock}] "{chance.choice(verbs)} {chance.choice(pages)}" 200 {size}\n'
        )
    return "".join(text).encode()


def page(chance: random.Random, number: int, version: int) -> bytes:
    """One page of a database: a header, some records, unused space."""
    records = [f"{number:08}|{row:03}|{chance.getrandbits(64):020}|version {version}\n" for row in range(40)]
    return (f"PAGE {number:08} v{version}\n" + "".join(records)).encode().ljust(PAGE, b"\0")


def _program(chance: random.Random, size: int) -> bytes:
    """Half noise, half text: compresses about as well as machine code does."""
    words = log(chance, 1, 3000)
    half = b"".join(chance.randbytes(2048) + words[at : at + 2048] for at in range(0, len(words) - 2048, 2048))
    return (half * (size // len(half) + 1))[:size]


def _tree(target: str, source: Path, limit: int) -> Iterator[tuple[str, bytes]]:
    """(path on the disk, content) of text files below a folder, at most ``limit`` bytes altogether."""
    taken = 0
    for path in sorted(source.rglob("*")):
        if path.suffix not in (".py", ".md", ".txt", ".typed") or not path.is_file() or "site-packages" in path.parts:
            continue
        data = path.read_bytes()
        if taken + len(data) > limit:
            return
        taken += len(data)
        yield f"{target}/{path.relative_to(source).as_posix()}", data
