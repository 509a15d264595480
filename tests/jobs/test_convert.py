"""What convert decides to copy, to zero and to leave alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import byre
from byre.errors import Busy, InvalidArgument, NoSpace
from byre.image import Image
from byre.jobs.blockcopy import COPY, ZERO, CopySettings, Segment, SourceDisk
from byre.jobs.convert import ConvertJob, Layout, MadeFiles, check_not_source, plan

K = 1024


def sparse_file(path: Path, size: int, *data: tuple[int, int]) -> Image:
    with path.open("wb") as file:
        file.truncate(size)
        for offset, length in data:
            file.seek(offset)
            file.write(os.urandom(length))
    return byre.open(str(path), format="raw")


def qcow2(path: Path, size: int | None = None, backing: Path | None = None, **options: object) -> Image:
    if backing is not None:
        options |= {"backing_file": str(backing), "backing_fmt": "qcow2"}
    byre.create(str(path), "qcow2", size, options=options)
    return byre.open(str(path), format="qcow2", read_only=False)


def test_holes_are_zero_and_neighbours_are_joined(tmp_path: Path) -> None:
    with sparse_file(tmp_path / "a", 512 << 20, (0, 64 * K), (256 << 20, 64 * K)) as image:
        found = list(plan(SourceDisk([image]), Layout()))
    assert found == [
        Segment(0, 64 * K, COPY),
        Segment(64 * K, (256 << 20) - 64 * K, ZERO),
        Segment(256 << 20, 64 * K, COPY),
        Segment((256 << 20) + 64 * K, (256 << 20) - 64 * K, ZERO),
    ]


def test_full_allocation_copies_zeroes_as_data(tmp_path: Path) -> None:
    with sparse_file(tmp_path / "a", 1 << 20, (0, 4096)) as image:
        assert list(plan(SourceDisk([image]), Layout(keep_zeroes=True))) == [Segment(0, 1 << 20, COPY)]


def test_compressed_clusters_are_planned_whole(tmp_path: Path) -> None:
    with sparse_file(tmp_path / "a", (1 << 20) + 512, (60 * K, 8 * K), (512 * K, 64 * K)) as image:
        found = list(plan(SourceDisk([image]), Layout(cluster=64 * K)))
    assert found == [
        Segment(0, 128 * K, COPY),
        Segment(128 * K, 384 * K, ZERO),
        Segment(512 * K, 64 * K, COPY),
        Segment(576 * K, (1 << 20) + 512 - 576 * K, ZERO),
    ]


def test_over_a_backing_file_only_the_top_layer_is_copied(tmp_path: Path) -> None:
    with qcow2(tmp_path / "base", 1 << 20) as base:
        base.write(0, b"b" * (1 << 20))
    with qcow2(tmp_path / "top", 2 << 20, tmp_path / "base") as top:
        top.write(64 * K, b"t" * 64 * K)
        top.write_zeroes(256 * K, 64 * K)
        disk = SourceDisk([top])
        assert list(plan(disk, Layout(over_backing=True))) == [
            Segment(64 * K, 64 * K, COPY),
            Segment(256 * K, 64 * K, ZERO),
            Segment(1 << 20, 1 << 20, ZERO),
        ]
        # Behind the end of the target's backing file nothing needs to be zeroed.
        found = list(plan(disk, Layout(over_backing=True, backing_size=288 * K)))
        assert found == [Segment(64 * K, 64 * K, COPY), Segment(256 * K, 32 * K, ZERO)]


def test_preallocated_clusters_that_were_never_written_are_not_read(tmp_path: Path) -> None:
    with qcow2(tmp_path / "a", 16 << 20, preallocation="metadata") as image:
        image.write(8 << 20, b"x" * 64 * K)
        found = [segment for segment in plan(SourceDisk([image]), Layout()) if segment.action == COPY]
        assert sum(segment.length for segment in found) <= 128 * K
        assert any(segment.offset <= 8 << 20 < segment.offset + segment.length for segment in found)


def test_a_smaller_target_is_refused(tmp_path: Path) -> None:
    with (
        sparse_file(tmp_path / "a", 2 << 20) as source,
        qcow2(tmp_path / "b", 1 << 20) as target,
        pytest.raises(InvalidArgument, match="output file is smaller than input file"),
    ):
        ConvertJob([source], target, CopySettings())


@pytest.mark.parametrize("new", [True, False])
def test_a_used_target_is_zeroed_where_the_source_is(tmp_path: Path, new: bool) -> None:
    with sparse_file(tmp_path / "a", 1 << 20, (64 * K, 64 * K)) as source, qcow2(tmp_path / "b", 1 << 20) as target:
        target.write(0, b"\xff" * (1 << 20))
        ConvertJob([source], target, CopySettings(), target_is_new=False, target_is_zero=new).execute()
        expected = bytearray((b"\xff" if new else b"\0") * (1 << 20))
        expected[64 * K : 128 * K] = source.read(64 * K, 64 * K)
        assert target.read(0, 1 << 20) == bytes(expected)


def test_the_total_is_what_is_copied_when_somebody_watches(tmp_path: Path) -> None:
    with sparse_file(tmp_path / "a", 1 << 30, (0, 1 << 20)) as source, qcow2(tmp_path / "b", 1 << 30) as target:
        job = ConvertJob([source], target, CopySettings(), target_is_new=True, measure=True)
        job.execute()
        assert job.progress().total == job.progress().offset == 1 << 20


def test_the_target_may_not_be_part_of_the_source(tmp_path: Path) -> None:
    with qcow2(tmp_path / "base", 1 << 20):
        pass
    with qcow2(tmp_path / "top", None, tmp_path / "base") as top:
        os.link(tmp_path / "base", tmp_path / "same")
        for name in ("top", "base", "same"):
            with pytest.raises(Busy, match="output file is a file of the input image"):
                check_not_source([top], str(tmp_path / name))
        check_not_source([top], str(tmp_path / "other"))


def test_only_files_that_were_made_are_removed(tmp_path: Path) -> None:
    refused = NoSpace("refused")
    (tmp_path / "old").write_bytes(b"x")
    made = MadeFiles(str(tmp_path / "new"), {"data_file": "old"})
    (tmp_path / "new").write_bytes(b"y")
    assert made.remove(refused) == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["old"]
    made = MadeFiles(str(tmp_path / "old"), {})
    assert made.remove(refused) == ""
    assert made.remove(KeyboardInterrupt()) == f"{tmp_path / 'old'} was left behind incomplete"
    made.begun = True
    assert made.remove(refused) == f"{tmp_path / 'old'} was left behind incomplete"
    assert (tmp_path / "old").exists()
