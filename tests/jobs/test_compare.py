"""compare finds the first sector that differs, whatever the formats, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import byre
from byre.errors import ByreError
from byre.image import Image
from byre.jobs.compare import CompareJob, Result, StatusError


def raw(path: Path, content: bytes) -> Image:
    path.write_bytes(content)
    return byre.open(str(path), format="raw")


def qcow2(path: Path, size: int) -> Image:
    byre.create(str(path), "qcow2", size)
    return byre.open(str(path), format="qcow2", read_only=False)


def compare(one: Image, two: Image, *, strict: bool = False) -> Result:
    job = CompareJob(one, two, strict=strict)
    job.execute()
    return job.result


@pytest.mark.parametrize("where", [0, 511, 512, 1 << 20, (5 << 20) + 700, (6 << 20) - 1])
def test_the_first_difference_is_found_to_the_sector(tmp_path: Path, where: int) -> None:
    data = bytearray(os.urandom(6 << 20))
    with raw(tmp_path / "a", bytes(data)) as one:
        data[where] ^= 1
        for later in range(where + 1, min(where + 4 << 20, len(data)), 100_000):
            data[later] ^= 1
        with raw(tmp_path / "b", bytes(data)) as two:
            assert compare(one, two) == Result(False, where // 512 * 512)


def test_equal_across_formats(tmp_path: Path) -> None:
    data = os.urandom(1 << 20) + bytes(1 << 20) + os.urandom(1 << 20)
    with raw(tmp_path / "a", data) as one, qcow2(tmp_path / "b", len(data)) as two:
        two.write(0, data[: 1 << 20])
        two.write(2 << 20, data[2 << 20 :])
        assert compare(one, two) == Result(True)
        two.write((1 << 20) + 66_000, b"\1")
        assert compare(one, two) == Result(False, ((1 << 20) + 66_000) // 512 * 512)
        assert compare(two, one) == Result(False, ((1 << 20) + 66_000) // 512 * 512)


def test_a_longer_image_may_end_in_zeroes(tmp_path: Path) -> None:
    data = os.urandom(1 << 20)
    with raw(tmp_path / "a", data) as one, raw(tmp_path / "b", data + bytes(1 << 20)) as two:
        assert compare(one, two) == Result(True, sizes_differ=True)
        assert compare(two, one) == Result(True, sizes_differ=True)
        assert compare(one, two, strict=True) == Result(False, sizes_differ=True)
    with raw(tmp_path / "b", data + bytes(700_000) + b"x" * 512) as two, raw(tmp_path / "a", data) as one:
        assert compare(one, two).offset == ((1 << 20) + 700_000) // 512 * 512


def test_strict_looks_at_what_is_allocated_but_content_that_differs_earlier_counts(tmp_path: Path) -> None:
    with qcow2(tmp_path / "a", 1 << 20) as one, qcow2(tmp_path / "b", 1 << 20) as two:
        one.write(128 << 10, bytes(64 << 10))
        assert compare(one, two) == Result(True)
        assert compare(one, two, strict=True) == Result(False, 128 << 10, by_status=True)
        one.write(0, b"1" * (64 << 10))
        two.write(0, b"2" * (64 << 10))
        assert compare(one, two, strict=True) == Result(False, 0)


def test_empty_images_are_equal(tmp_path: Path) -> None:
    with raw(tmp_path / "a", b"") as one, raw(tmp_path / "b", b"") as two:
        assert compare(one, two, strict=True).equal


def test_errors_tell_reading_from_looking(tmp_path: Path) -> None:
    with raw(tmp_path / "a", b"1" * 4096) as one, raw(tmp_path / "b", b"1" * 4096) as two:

        def fail(*_: object) -> None:
            raise ByreError("broken")

        two.node.read_into = fail  # type: ignore[method-assign, assignment]
        with pytest.raises(ByreError, match="error while reading offset 0: broken"):
            compare(one, two)
        two.node.extents = fail  # type: ignore[method-assign, assignment]
        with pytest.raises(StatusError, match="sector allocation test failed: broken"):
            compare(one, two)
