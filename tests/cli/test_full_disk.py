"""Disks that are full, and files that may not grow: one line, exit code 1, nothing left behind, no damage.

A small tmpfs where one can be mounted; the limit on the length of files everywhere.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.small_disk import small_disk

MIB = 1 << 20
BYRE = [sys.executable, "-m", "byre"]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A folder with 8 MiB of space."""
    with small_disk(tmp_path / "small", 8) as folder:
        yield folder


def run(folder: Path, *words: str, length: int = 0) -> subprocess.CompletedProcess[str]:
    """:param length: no file may grow beyond it"""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (length, length))

    return subprocess.run([*BYRE, *words], cwd=folder, capture_output=True, text=True, timeout=60,
                          preexec_fn=limit if length else None)  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(os.urandom(16 * MIB))
    return path


CONVERSIONS = (
    ("-O", "raw"),
    ("-O", "qcow2"),
    ("-c", "-O", "qcow2"),
    ("-O", "qcow2", "-o", "preallocation=full"),
    ("-O", "qcow2", "-o", "data_file=data"),
    ("-t", "writethrough", "-W", "-O", "qcow2"),
)


@pytest.mark.parametrize("options", CONVERSIONS, ids=" ".join)
def test_converting_onto_a_full_disk(small: Path, source: Path, options: tuple[str, ...]) -> None:
    done = run(small, "convert", "-f", "raw", *options, str(source), "target")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "No space left on device" in done.stderr
    assert list(small.iterdir()) == []


@pytest.mark.parametrize("options", CONVERSIONS, ids=" ".join)
def test_converting_beyond_the_limit_of_files(source: Path, options: tuple[str, ...]) -> None:
    folder = source.parent
    done = run(folder, "convert", "-f", "raw", *options, "source", "target", length=8 * MIB)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "File too large" in done.stderr
    assert sorted(p.name for p in folder.iterdir()) == ["source"]


@pytest.mark.parametrize("preallocation", ["falloc", "full"])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_creating_on_a_full_disk(small: Path, format: str, preallocation: str) -> None:
    done = run(small, "create", "-q", "-f", format, "-o", f"preallocation={preallocation}", "target", "64M")
    assert done.returncode == 1
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)
    assert "No space left on device" in done.stderr
    assert list(small.iterdir()) == []


def test_a_target_that_was_there_stays_and_is_said(small: Path, source: Path) -> None:
    (small / "target").write_bytes(bytes(MIB))
    done = run(small, "convert", "-f", "raw", "-O", "raw", str(source), "target")
    assert done.returncode == 1
    assert "warning: target was left behind incomplete" in done.stderr
    assert (small / "target").exists()


def test_an_image_that_cannot_grow_stays_whole(small: Path) -> None:
    """What was acknowledged is there, what failed is not damage, and with space again it goes on."""
    assert run(small, "create", "-q", "-f", "qcow2", "image", "64M").returncode == 0
    (small / "ballast").write_bytes(bytes(2 * MIB))
    done = run(small, "io", "-c", "write -P 1 0 4M", "-c", "write -P 2 8M 8M", "-c", "read -P 1 0 4M", "image")
    assert done.returncode == 1
    assert "No space left on device" in done.stdout + done.stderr
    assert run(small, "check", "image").returncode in (0, 3)
    (small / "ballast").unlink()
    done = run(small, "io", "-c", "read -P 1 0 4M", "-c", "write -P 3 16M 1M", "-c", "read -P 3 16M 1M", "image")
    assert done.returncode == 0, done.stdout + done.stderr
    assert run(small, "check", "image").returncode in (0, 3)


def test_growing_an_image_on_a_full_disk(small: Path) -> None:
    assert run(small, "create", "-q", "-f", "raw", "image", "1M").returncode == 0
    done = run(small, "resize", "-f", "raw", "--preallocation=full", "image", "64M")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert (small / "image").stat().st_size == MIB


@pytest.mark.oracle
def test_the_peer_finds_no_damage_either(small: Path, qemu_img: Run) -> None:
    assert run(small, "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "image", "64M").returncode == 0
    for start in range(0, 16, 3):
        run(small, "io", "-c", f"write -P 7 {start}M 2M", "-c", f"write -z {start}M 512k", "image")
    assert qemu_img("check", small / "image", check=False).returncode in (0, 3)


@pytest.mark.parametrize("subformat", ["monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"])
@pytest.mark.parametrize("verb", ["mirror", "backup"])
def test_a_job_that_fails_leaves_none_of_the_files_of_its_target(tmp_path: Path, source: Path, verb: str,
                                                                 subformat: str) -> None:  # fmt: skip
    target = tmp_path / "target"
    target.mkdir()
    words = [verb, "-f", "raw", "-O", "vmdk", "-o", f"subformat={subformat}", str(source), "disk.vmdk"]
    done = run(target, *words, length=4 * MIB)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "File too large" in done.stderr
    assert list(target.iterdir()) == []
    done = subprocess.run([*BYRE, *words], cwd=target, env={**os.environ, "BYRE_UNTRUSTED": "1"})
    assert done.returncode == 0  # what was made on the user's word may be opened
    assert len(list(target.iterdir())) == 2
