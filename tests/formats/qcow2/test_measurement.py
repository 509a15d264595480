"""How large a file gets: byte for byte what the peer's ``measure`` prints."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from byre.errors import InvalidArgument
from byre.formats import qcow2
from byre.formats.qcow2.measurement import touched_bytes
from byre.options import OptionValues

Run = Callable[..., subprocess.CompletedProcess[str]]


def values(**options: object) -> OptionValues:
    return qcow2.CREATE_OPTIONS.parse(options, what="qcow2")


def peer(qemu_img: Run, options: dict[str, object], *source: object) -> tuple[int, int]:
    given = ["-o", ",".join(f"{k}={v}" for k, v in options.items())] if options else []
    found = json.loads(qemu_img("measure", "--output=json", "-O", "qcow2", *given, *source).stdout)
    return found["required"], found["fully-allocated"]


GRID: list[dict[str, object]] = [
    {"cluster_size": cluster, "refcount_bits": bits}
    for cluster, bits in itertools.product((512, 4096, 65536, 2 << 20), (1, 16, 64))
] + [
    {},
    {"compat": "0.10"},
    {"extended_l2": "on"},
    {"extended_l2": "on", "cluster_size": 16384, "refcount_bits": 8},
    {"preallocation": "metadata"},
    {"preallocation": "falloc"},
    {"preallocation": "full", "cluster_size": 1024},
]


@pytest.mark.oracle
@pytest.mark.parametrize("options", GRID, ids=lambda options: ",".join(map(str, options.values())))
def test_sizes_as_the_peer_says(qemu_img: Run, options: dict[str, object]) -> None:
    for size in (0, 1, 512, 1 << 20, (1 << 30) + 512, 127 << 30):
        assert qcow2.measure(values(**options), size) == peer(qemu_img, options, "--size", size)


@pytest.mark.oracle
@pytest.mark.parametrize("options", [*GRID[::4], {"backing_file": "x"}], ids=str)
def test_sources_as_the_peer_says(tmp_path: Path, qemu_img: Run, options: dict[str, object]) -> None:
    source = tmp_path / "a.raw"
    held = [(0, 4096), (1 << 20, 70000), (3 << 20, 512), ((3 << 20) + 65536, 65536), ((9 << 20) - 4096, 4096 + 512)]
    with source.open("wb") as file:
        for offset, length in held:
            file.seek(offset)
            file.write(b"x" * length)
        size = file.tell()
    # Files are kept in pages: a page that holds a byte is data.
    spans = [
        (offset // 4096 * 4096, -(-(offset + length) // 4096) * 4096 - offset // 4096 * 4096) for offset, length in held
    ]
    spans[-1] = (spans[-1][0], size - spans[-1][0])
    data = touched_bytes(spans, values(**options).number("cluster_size"))
    assert qcow2.measure(values(**options), size, data) == peer(qemu_img, options, "-f", "raw", source)


def test_touched_clusters_are_counted_once() -> None:
    assert touched_bytes([(0, 1), (1, 65535), (65536, 1), (65537, 1), (1 << 20, 65537)], 65536) == 4 * 65536
    assert touched_bytes([], 65536) == 0


def test_refusals() -> None:
    for options in ({"cluster_size": 1000}, {"refcount_bits": 3}, {"compat": "0.10", "refcount_bits": 1}):
        with pytest.raises(InvalidArgument):
            qcow2.measure(values(**options), 1 << 20)
    with pytest.raises(InvalidArgument, match="too large"):
        qcow2.measure(values(cluster_size=512), 1 << 40)


def test_a_luks_header_is_counted() -> None:
    # LUKS1 with aes-256-xts: eight slots of 4000 stripes of 64 bytes, about 2 MiB.
    plain, _ = qcow2.measure(values(), 1 << 30)
    encrypted, _ = qcow2.measure(values(**{"encrypt.format": "luks", "encrypt.key-secret": "s"}), 1 << 30)
    assert 8 * 4000 * 64 <= encrypted - plain <= 3 << 20
