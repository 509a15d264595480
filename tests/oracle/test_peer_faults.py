"""Faults seen in peers while testing them (docs/reliability.md): byre does not have those that concern raw and qcow2.

The peer is not run on what makes it crash or hang; where it is right it is the judge.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hostile import forge

Run = Callable[..., subprocess.CompletedProcess[str]]
MIB = 1 << 20


@pytest.fixture
def byre(tmp_path: Path) -> Run:
    def run(*words: object, check: bool = True, timeout: float = 30) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([sys.executable, "-m", "byre", *map(str, words)], cwd=tmp_path, capture_output=True,
                              text=True, timeout=timeout, stdin=subprocess.DEVNULL)  # fmt: skip
        assert done.returncode in ((0,) if check else (0, 1, 2, 3)), f"{words}\n{done.stdout}{done.stderr}"
        return done

    return run


def test_encryption_method_without_its_header(tmp_path: Path, byre: Run) -> None:
    """1: ``info`` dereferenced what was not there."""
    forge.write(tmp_path / "image", forge.Head(crypt_method=2))
    for words in (["info", "image"], ["check", "image"], ["convert", "-O", "raw", "image", "out"]):
        done = byre(*words, check=False)
        assert done.returncode == 1
        assert "encryption header" in done.stderr


@pytest.mark.parametrize("kind", ["backing", "data file"])
def test_a_fifo_that_the_image_names(tmp_path: Path, byre: Run, kind: str) -> None:
    """4: every command waited for a writer that never comes."""
    os.mkfifo(tmp_path / "fifo")
    if kind == "backing":
        forge.write(tmp_path / "image", backing=b"fifo", extensions=forge.extension(0xE2792ACA, b"raw"))
    else:
        forge.write(tmp_path / "image", forge.Head(incompatible=4), extensions=forge.extension(0x44415441, b"fifo"))
    for words in (
        ["check", "image"],
        ["convert", "-O", "raw", "image", "out"],
        ["map", "image"],
        ["compare", "image", "image"],
    ):
        done = byre(*words, check=False, timeout=15)
        if done.returncode == 0:
            assert words[0] == "check"
        else:
            assert "FIFO" in done.stderr
    byre("info", "image", timeout=15)


@pytest.mark.parametrize("verb", ["convert", "check", "map", "measure"])
def test_a_sparse_file_of_terabytes(tmp_path: Path, byre: Run, verb: str) -> None:
    """5: the walk followed the length of the file, 2^33 clusters."""
    path = Path("/dev/shm") / f"byre-sparse-{os.getpid()}" if os.access("/dev/shm", os.W_OK) else tmp_path / "sparse"
    try:
        forge.write(path, forge.Head(cluster_bits=9, size=MIB, l1_size=32, l1_offset=3 << 9, refcount_offset=512),
                    length=4 * forge.TIB)  # fmt: skip
        more = {"convert": ["-O", "qcow2", path, "out"], "measure": ["-O", "qcow2", path]}.get(verb, [path])
        byre(verb, *more, check=False, timeout=20)
    finally:
        path.unlink(missing_ok=True)


@pytest.mark.oracle
def test_what_a_shrink_cut_off_stays_off(byre: Run, qemu_io: Run, tmp_path: Path) -> None:
    """7: growing again showed the old bytes."""
    for size, smaller in (("1M", "100k"), ("1M", "66048")):
        for options in ("cluster_size=64k,extended_l2=on", "compat=0.10"):
            byre("create", "-q", "-f", "qcow2", "-o", options, "image", size)
            byre("io", "-c", "write -P 9 0 1M", "image")
            byre("resize", "-q", "--shrink", "image", smaller)
            byre("resize", "-q", "image", size)
            kept = byre("info", "--output", "json", "image").stdout
            assert '"virtual-size": 1048576' in kept
            start = {"100k": 102400, "66048": 66048}[smaller]
            done = qemu_io("-c", f"read -P 0 {start} {MIB - start}", tmp_path / "image")
            assert "failed" not in done.stdout, (smaller, options)
            done = qemu_io("-c", f"read -P 9 0 {start}", tmp_path / "image")
            assert "failed" not in done.stdout, (smaller, options)


@pytest.mark.oracle
def test_raw_too(byre: Run, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"\x09" * MIB)
    byre("resize", "-q", "-f", "raw", "--shrink", "image", "1536")
    byre("resize", "-q", "-f", "raw", "image", "1M")
    data = (tmp_path / "image").read_bytes()
    assert data[:1536] == b"\x09" * 1536
    assert not any(data[1536:])


EVENTS = ("l1_update", "refblock_alloc_hookup", "l2_update", "flush_to_disk", "write_compressed", "write_aio")
FAULTY = """\
[inject-error]
event = "{event}"
errno = "5"
once = "on"
immediately = "off"
"""


@pytest.mark.oracle
@pytest.mark.parametrize("event", EVENTS)
def test_a_failure_behind_a_table_leaves_no_damage(event: str, byre: Run, qemu_img: Run, tmp_path: Path) -> None:
    """9: memory was rolled back and the disk was not: tables in use had a count of 0 afterwards."""
    (tmp_path / "rules").write_text(FAULTY.format(event=event))
    byre("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "image", "16M")
    byre("io", "-c", "write -P 1 0 64k", "image")
    below = '{"driver":"blkdebug","config":"rules","image":{"driver":"file","filename":"image"}}'
    name = f'json:{{"driver":"qcow2","file":{below}}}'
    done = byre("io", "-c", "write -P 2 1M 64k", "-c", "flush", "-c", "write -c -P 3 4M 512", "-c",
         "write -P 4 8M 200k", "-c", "flush", name, check=False)  # fmt: skip
    assert "Input/output error" in done.stdout + done.stderr, "nothing was injected"
    assert qemu_img("check", tmp_path / "image", check=False).returncode in (0, 3)
    done = byre("io", "-c", "read -P 1 0 64k", "-c", "write -P 5 2M 4k", "-c", "read -P 5 2M 4k", "image")
    assert "failed" not in done.stdout
    assert qemu_img("check", tmp_path / "image", check=False).returncode in (0, 3)


def test_escape_sequences_stay_in_the_image(tmp_path: Path, byre: Run) -> None:
    """10: they reached the terminal."""
    forge.write(
        tmp_path / "image",
        backing=b"\x1b]0;owned\x07\x1b[2J\x9b1m",
        extensions=forge.extension(0xE2792ACA, b"raw\x1b[31m"),
    )
    for words in (
        ["info"],
        ["info", "--backing-chain"],
        ["info", "--output", "json"],
        ["map"],
        ["check"],
        ["measure", "-O", "raw"],
    ):
        done = byre(*words, "image", check=False)
        assert not any((ord(c) < 32 and c != "\n") or 127 <= ord(c) < 160 for c in done.stdout + done.stderr), words


@pytest.mark.oracle
@pytest.mark.parametrize("skip", [0, 1, 3, 7, 8, 9])
@pytest.mark.parametrize("count", [None, 1, 4, 5, 20])
def test_dd_copies_as_many_blocks_as_asked(tmp_path: Path, byre: Run, skip: int, count: int | None) -> None:
    """10: with ``skip=`` and ``count=`` it copied ``skip`` blocks too few. dd itself is the judge."""
    dd = shutil.which("dd")
    assert dd is not None
    data = os.urandom(8 * 4096)
    (tmp_path / "in").write_bytes(data)
    operands = [f"skip={skip}", "bs=4096"] + ([f"count={count}"] if count is not None else [])
    byre("dd", "-f", "raw", "-O", "raw", "if=in", "of=out", *operands)
    subprocess.run([dd, "if=in", "of=right", *operands], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "out").read_bytes() == (tmp_path / "right").read_bytes()


@pytest.mark.oracle
def test_old_images_keep_the_snapshot(tmp_path: Path, byre: Run, qemu_img: Run, qemu_io: Run) -> None:
    """6, as far as writing goes: a zeroed cluster of a version 2 image is not zeroed for its snapshot."""
    byre("create", "-q", "-f", "qcow2", "-o", "compat=0.10", "image", "1M")
    byre("io", "-c", "write -P 5 0 64k", "image")
    byre("snapshot", "-c", "s", "image")
    byre("io", "-c", "write -z 0 64k", "image")
    qemu_img("check", tmp_path / "image")
    byre("snapshot", "-a", "s", "image")
    assert "failed" not in qemu_io("-c", "read -P 5 0 64k", tmp_path / "image").stdout


@pytest.mark.oracle
@pytest.mark.parametrize("zero", ["write -z 16k 32k", "write -z -u 0 128k"])
def test_going_down_a_version_keeps_the_snapshot(tmp_path: Path, byre: Run, qemu_img: Run, qemu_io: Run,
                                                 zero: str) -> None:  # fmt: skip
    """6: the cluster that both have was zeroed in place for the sake of the active layer."""
    byre("create", "-q", "-f", "qcow2", "-o", "cluster_size=16k", "image", "1M")
    byre("io", "-c", "write -P 5 0 128k", "image")
    byre("snapshot", "-c", "s", "image")
    qemu_io("-c", zero, tmp_path / "image")
    before = byre("map", "--output", "json", "image").stdout
    assert '"zero": true' in before
    qemu_img("convert", "-O", "raw", tmp_path / "image", tmp_path / "whole")
    byre("amend", "-o", "compat=0.10", "image")
    qemu_img("check", tmp_path / "image")
    byre("compare", "-F", "raw", "image", "whole")
    byre("snapshot", "-a", "s", "image")
    qemu_img("check", tmp_path / "image")
    assert "failed" not in qemu_io("-c", "read -P 5 0 128k", tmp_path / "image").stdout


@pytest.mark.oracle
@pytest.mark.parametrize("event", ["l2_update", "flush_to_disk", "cow_write"])
@pytest.mark.parametrize("onto", ["", "other"])
def test_a_rebase_that_fails_keeps_what_came_from_the_base(onto: str, event: str, byre: Run, qemu_img: Run,
                                                           tmp_path: Path) -> None:  # fmt: skip
    """8: the header was written before the tables, and a failure behind that lost the base's content."""
    (tmp_path / "rules").write_text(FAULTY.format(event=event))
    (tmp_path / "base").write_bytes(b"\x07" * MIB)
    (tmp_path / "other").write_bytes(bytes(MIB))
    byre("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "-b", "base", "-F", "raw", "image")
    byre("io", "-c", "write -P 1 64k 64k", "image")
    qemu_img("convert", "-O", "raw", tmp_path / "image", tmp_path / "whole")
    below = '{"driver":"blkdebug","config":"rules","image":{"driver":"file","filename":"image"}}'
    name = f'json:{{"driver":"qcow2","file":{below}}}'
    done = byre("rebase", "-b", onto, *(["-F", "raw"] if onto else []), name, check=False)
    named = f'"backing-filename": "{onto}"' if onto else '"backing-filename"'
    shown = byre("info", "--output", "json", "image").stdout
    assert ((named in shown) == bool(onto)) == (done.returncode == 0), done.stderr
    assert qemu_img("check", tmp_path / "image", check=False).returncode in (0, 3)
    byre("compare", "-F", "raw", "image", "whole")


@pytest.mark.oracle
def test_repairing_loses_no_snapshots(tmp_path: Path, byre: Run, qemu_img: Run, qemu_io: Run) -> None:
    """qemu-img 7.2 with ``-r all`` on an image that has enabled bitmaps: the header forgets all snapshots."""
    path = tmp_path / "image"
    byre("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "image", "1M")
    byre("io", "-c", "write -P 5 0 64k", "image")
    byre("snapshot", "-c", "s", "image")
    byre("bitmap", "--add", "image", "b")
    data = bytearray(path.read_bytes())
    l1 = int.from_bytes(data[40:48], "big")
    data[l1] ^= 0x80  # the COPIED flag of the first L2 table
    path.write_bytes(data)
    assert "1 corruptions" in byre("check", "-r", "all", "image").stdout
    qemu_img("check", path)
    shown = byre("info", "--output", "json", "image").stdout
    assert '"name": "s"' in shown
    assert '"name": "b"' in shown
    byre("bitmap", "--remove", "image", "b")
    qemu_img("snapshot", "-a", "s", path)
    assert "failed" not in qemu_io("-c", "read -P 5 0 64k", path).stdout
