"""Random damage in the metadata of every format: see mutations.py.

The short run belongs to every test run; the long one (``-m slow``) to whoever changes a format. What was found once is
kept in ``FOUND``.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from byre.catalog import formats
from hostile.mutations import Bench
from support.samples import SAMPLES, Sample

SHORT = 70
LONG = int(os.environ.get("BYRE_MUTATIONS", "3000"))
FIX_EVERY = 6
"""Every so many images are also mended and written to."""

FOUND = (
    ("qcow2-data-file", 1909), ("vhdx", 1321), ("vhdx-child", 1030), ("cloop", 0), ("asif", 34), ("dmg", 1364),
    ("dmg-fork", 1058), ("ewf", 2262), ("ewf-segments", 1965), ("vhdx-logged", 20448), ("vhdx-child", 20013),
    ("parallels", 20309), ("parallels-bitmap", 50342), ("parallels-bitmap", 52065),
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where the disk is no bottleneck, if there is such a place."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


def run(sample: Sample, folder: Path, first: int, count: int) -> Bench:
    bench = Bench(sample, folder)
    for seed in range(first, first + count):
        bench.attempt(seed, fix=seed % FIX_EVERY == 0)
    return bench


def test_every_format_has_a_sample() -> None:
    assert {sample.format for sample in SAMPLES} == {row.name for row in formats()} - {"raw"}


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_damage(sample: Sample, folder: Path) -> None:
    bench = run(sample, folder, 0, SHORT)
    # It is damage, but not so much that nothing is looked at.
    assert bench.outcomes["info fine"] >= SHORT // 10, bench.outcomes
    refused = sum(count for name, count in bench.outcomes.items() if name.endswith("refused"))
    assert refused >= SHORT // 20, bench.outcomes


@pytest.mark.parametrize(("name", "seed"), FOUND)
def test_what_was_found_once(name: str, seed: int, folder: Path) -> None:
    sample = next(sample for sample in SAMPLES if sample.name == name)
    Bench(sample, folder).attempt(seed, fix=True)


@pytest.mark.slow
@pytest.mark.skipif("BYRE_MUTATIONS" not in os.environ, reason="takes minutes: set BYRE_MUTATIONS to a number")
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_damage_for_long(sample: Sample, folder: Path) -> None:
    run(sample, folder, 10_000, LONG)
