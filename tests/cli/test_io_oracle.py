"""The same command scripts through ``byre io`` and ``qemu-io``: the same output, exit code and image."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from byre.cli.main import main

pytestmark = pytest.mark.oracle

_TIMING = re.compile(r"(\d+ ops;) .*")
_MACHINE = re.compile(r"^(\d+,\d+),\d+:\d\d:\d\d\.\d\d,[\d.]+,[\d.]+$", re.M)
_USAGE = re.compile(r"^(\w+) .*?-- .*$", re.M)


def normal(text: str) -> str:
    """Output without what differs from run to run, and without the wording of usage lines."""
    return _USAGE.sub(r"\1 USAGE", _MACHINE.sub(r"\1", _TIMING.sub(r"\1", text)))


SCRIPTS: dict[str, list[str]] = {
    "plain": [
        "read 0 64k",
        "write -P 7 4k 8k",
        "read -P 7 4k 8k",
        "read -P 0 0 4k",
        "read -P 0 12k 52k",
        "flush",
        "length",
    ],
    "unaligned": ["write -P 1 1 1", "write -P 2 511 3", "read -v 0 600", "write -P 9 65535 65538", "read -v 65500 64"],
    "vectors": [
        "writev -P 3 0 1k 2k 512",
        "readv -P 3 0 3k 512",
        "readv -v 0 16 17",
        "writev 1 2 3 4",
        "readv -v 0 0 12 0",
    ],
    "zeroes": [
        "write -P 5 0 512k",
        "write -z 64k 64k",
        "read -P 0 64k 64k",
        "write -z -u 128k 64k",
        "read -P 0 128k 64k",
        "write -z 1000 3000",
        "read -P 0 1000 3000",
        "read -P 5 0 1000",
        "aio_write -z 256k 64k",
        "aio_flush",
        "read -P 0 256k 64k",
    ],
    "discard": [
        "write -P 5 0 512k",
        "discard 64k 128k",
        "discard -q 300k 1",
        "discard 0 0",
        "read -P 5 0 64k",
        "read -P 5 192k 64k",
    ],
    "patterns fail": [
        "write -P 5 0 64k",
        "read -P 6 0 64k",
        "read -P 5 -s 1k -l 2k 0 64k",
        "read -P 6 -s 1k -l 2k 0 64k",
        "read -P 6 -s 1k 0 64k",
        "readv -P 6 0 1k 1k",
        "read -q -P 6 0 512",
        "read -v -P 6 0 16",
    ],
    "machine readable": ["write -C 0 64k", "read -C 0 64k", "readv -C 0 1k 1k", "writev -C 0 1k", "discard -C 0 64k"],
    "quiet": [
        "write -q 0 64k",
        "read -q 0 64k",
        "readv -q 0 1k 1k",
        "writev -q 0 1k",
        "aio_write -q 0 1k",
        "aio_read -q 0 1k",
        "aio_flush",
    ],
    "empty": [
        "read 0 0",
        "write 0 0",
        "readv 0 0 0",
        "writev 0 0",
        "read -v 0 0",
        "read 1M 0",
        "discard 1M 0",
        "write -z 0 0",
    ],
    "out of bounds": [
        "read 1M 512",
        "read 1048575 2",
        "write 1M 1",
        "read 2M 0",
        "writev 1M 1",
        "readv 1M 1",
        "discard 1M 1",
        "write -z 1M 1",
        "write -z -n 0 3G",
        "aio_read 0 4M",
        "aio_flush",
        "aio_write 0 4M",
        "aio_flush",
    ],
    "numbers": [
        "alloc -1",
        "alloc 1.5",
        "alloc 1.5k",
        "alloc 0x1e",
        "alloc 1e3",
        "alloc 1.",
        "alloc .5k",
        "alloc 1.0",
        "alloc +5",
        "alloc 8E",
        "alloc 7E",
        "alloc 16E",
        "alloc 99999999999999999999",
        "alloc 1.5.5",
        "alloc 010",
        "alloc k",
        "alloc 1kb",
        "alloc 1k 0",
        "alloc 2M 4k",
        "alloc 1b",
        "alloc 1.00001k",
        "alloc 0x",
        "alloc 0x1.8k",
        "alloc 5x",
    ],
    "bad arguments": [
        "read -x 0 1",
        "read -P",
        "read 0",
        "read 0 1 2",
        "read -s 1 0 5",
        "read -l 6 -P 0 0 5",
        "read -P 0 -l 2 -s 4 0 5",
        "read -P 256 0 1",
        "read -P 0x1g 0 1",
        "read -P -5 0 8",
        "read 0 3G",
        "read 0 x",
        "read -1 5",
        "read -b 1 2",
        "read -b 0 2",
        "write -z -P 1 0 1",
        "write -b -z 0 1",
        "write -f -c 0 1",
        "write -f -b 0 1",
        "write -n 0 1",
        "write -u 0 1",
        "write 0 3G",
        "write -z 0 3G",
        "write -c 1 512",
        "write -c 0 1",
        "write -s /nonexistent/file 0 5",
        "write -s /dev/null 0 5",
        "writev 0 2G",
        "writev 0 1G 1G",
        "writev 0 x",
        "writev 0",
        "discard 0 3G",
        "discard 0 -1",
        "discard 0",
        "aio_write -z 0 5 5",
        "aio_write -u 0 5",
        "aio_read 0 x",
        "readv -s 1 0 5",
    ],
    "counts": [
        "close 1",
        "help a b",
        "flush 1",
        "length 1",
        "map 1",
        "info 1",
        "resume",
        "wait_break",
        "alloc",
        "alloc 1 2 3",
        "truncate",
        "truncate 1 2 3 4",
        "sleep",
        "sigraise",
        "break x",
        "nonsense",
        "  ",
        "read",
    ],
    "octal and hex patterns": ["write -P 010 0 512", "read -P 8 0 512", "write -P 0xff 0 512", "read -P 255 0 512"],
    "invalid requests": ["aio_read -i 0 5", "aio_write -i 0 5", "aio_read -i", "aio_flush"],
    "truncate": [
        "truncate 2M",
        "length",
        "read -P 0 1M 1M",
        "truncate 512k",
        "length",
        "truncate -m off 1M",
        "read -P 0 512k 512k",
        "truncate -m nonsense 1M",
        "truncate -m",
        "truncate 5x",
        "length",
    ],
    "map": [
        "map",
        "alloc 0",
        "alloc 0 1M",
        "write 64k 64k",
        "map",
        "alloc 32k 64k",
        "write -z 256k 128k",
        "map",
        "alloc 0 2M",
    ],
    "info": ["info", "length", "i", "l"],
    "closing": ["close", "length", "read 0 512", "close", "close", "sleep 1"],
    "sleep": ["sleep 1", "sleep x", "sleep -1", "sleep 0x2"],
    "signals": ["sigraise x", "sigraise 500", "sigraise 0", "length"],
    "reopen": [
        "reopen -r",
        "write 0 512",
        "read 0 512",
        "reopen -w",
        "write 0 512",
        "reopen -r -w",
        "reopen x",
        "reopen -c foo",
        "reopen -o read-only=on -r",
        "reopen -c none -o cache.direct=on",
        "reopen -c unsafe",
        "write 0 512",
        "reopen",
    ],
    "open twice": ["open x", "open -t nonsense", "open -d nonsense", "open -i nonsense", "open -z", "open a b"],
    "help": ["help nonsense", "help length", "? f"],
    "quit": ["length", "quit now", "length"],
    "no faults below": ["break write_aio A", "resume A", "remove_break A"],
    "from a file": ["write -s {source} 0 64k", "read -v 0 64", "write -s {source} 64k 5", "read -v 65530 16"],
    "force unit access": ["write -f 0 64k", "writev -f 0 1k 1k", "write -z -f 64k 64k", "write -f -z -u 128k 64k"],
    "aliases": ["w 0 512", "r 0 512", "f", "l", "a 0", "d 0 512", "t 1M", "q"],
}

QCOW2: dict[str, list[str]] = {
    "compressed": [
        "write -c -P 5 0 64k",
        "read -P 5 0 64k",
        "write -c 64k 128k",
        "read 64k 128k",
        "write -c 512 64k",
        "write -c 0 512",
        "write -c 1M 64k",
        "map",
        "write -P 6 10k 1k",
        "read -P 6 10k 1k",
        "read -P 5 0 10k",
    ],
    "allocation": ["write -z 0 128k", "map", "discard 0 64k", "map", "write -z -n 256k 64k", "map"],
}


def compare(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    qemu_img: Callable[..., object],
    qemu_io: Callable[..., object],
    format: str,
    script: list[str],
    *options: str,
) -> None:
    """Run ``script`` through both programs and hold everything they leave side by side."""
    source = tmp_path / "source"
    source.write_bytes(bytes(range(1, 200)))
    lines = [line.format(source=source) for line in script]
    theirs, ours = tmp_path / "theirs" / "disk", tmp_path / "ours" / "disk"
    for path in (theirs, ours):
        path.parent.mkdir(exist_ok=True)
    qemu_img("create", "-f", format, theirs, "1M")
    shutil.copy(theirs, ours)
    arguments = ["-f", format, *options, *(word for line in lines for word in ("-c", line))]
    peer = qemu_io(*arguments, theirs, check=False)
    capsys.readouterr()
    code = main([*arguments, str(ours)], "qemu-io")
    out, err = capsys.readouterr()
    assert normal(out) == normal(peer.stdout)  # type: ignore[attr-defined]
    assert [line.partition(":")[0] for line in err.splitlines()] == [
        line.partition(":")[0]
        for line in peer.stderr.splitlines()  # type: ignore[attr-defined]
    ]
    assert code == peer.returncode  # type: ignore[attr-defined]
    qemu_img("compare", "-f", format, "-F", format, theirs, ours)
    if format != "raw":
        qemu_img("check", "-f", format, ours)


@pytest.mark.parametrize("format", ["raw", "qcow2"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_script(name, format, tmp_path, capsys, qemu_img, qemu_io):  # type: ignore[no-untyped-def]
    compare(tmp_path, capsys, qemu_img, qemu_io, format, SCRIPTS[name])


@pytest.mark.parametrize("name", QCOW2)
def test_qcow2_script(name, tmp_path, capsys, qemu_img, qemu_io):  # type: ignore[no-untyped-def]
    compare(tmp_path, capsys, qemu_img, qemu_io, "qcow2", QCOW2[name])


@pytest.mark.parametrize("options", [["-r"], ["-s"], ["-n"], ["-t", "unsafe"], ["-d", "ignore"], ["-m"], ["-r", "-U"]])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_options(options, format, tmp_path, capsys, qemu_img, qemu_io):  # type: ignore[no-untyped-def]
    script = ["write -P 3 0 64k", "read 0 64k", "write -z 1k 5", "discard 64k 64k", "map", "length"]
    if options == ["-s"]:
        script.remove("map")  # the overlay is ours and theirs: same size, other clusters
    compare(tmp_path, capsys, qemu_img, qemu_io, format, script, *options)


@pytest.mark.parametrize(
    "options",
    [
        "compat=0.10",
        "cluster_size=512",
        "extended_l2=on,cluster_size=16k",
        "lazy_refcounts=on",
        "refcount_bits=64",
        "compression_type=zstd",
        "cluster_size=2M",
    ],
)
def test_info_and_map_of_qcow2_variants(options, tmp_path, capsys, qemu_img, qemu_io):  # type: ignore[no-untyped-def]
    disk, base = tmp_path / "disk", tmp_path / "base"
    qemu_img("create", "-f", "raw", base, "3M")
    qemu_img("create", "-f", "qcow2", "-o", options, "-b", base, "-F", "raw", disk, "5M")
    qemu_io("-f", "qcow2", "-c", "write 10k 100k", "-c", "write -z 1M 70k", "-c", "discard 64k 64k", disk)
    arguments = ["-f", "qcow2", *(word for line in ("info", "map", "alloc 0 5M", "length") for word in ("-c", line))]
    expected = qemu_io(*arguments, disk)
    capsys.readouterr()
    assert main([*arguments, str(disk)], "qemu-io") == 0
    assert capsys.readouterr().out == expected.stdout
