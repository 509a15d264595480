"""Every codec, found by name: any bytes give a record or an ImageError (ProtocolError on the wire), in bounded time.

A new ``decode_*`` function in any module of byre is fuzzed without being listed. Those that need more than bytes
are called with values drawn for the parameters they name.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import byre
from byre.errors import ImageError, ProtocolError
from byre.formats import bochs, qcow, vdi
from byre.formats.parallels import layout as parallels
from byre.formats.qcow2 import layout
from byre.formats.qed import layout as qed
from support import vmdk

VALID_HEADER = layout.Header(
    size=1 << 30, l1_size=2, l1_table_offset=3 << 16, refcount_table_offset=1 << 16, refcount_table_clusters=1,
    header_length=112, extra=bytes(7),
)  # fmt: skip
VALID_CLUSTER = layout.header_bytes(
    VALID_HEADER._replace(cluster_bits=12, l1_size=512),
    [
        layout.Extension(layout.EXTENSION_BACKING_FORMAT, b"raw"),
        layout.Extension(layout.EXTENSION_FEATURE_NAMES, layout.encode_feature_names()),
    ],
    "base.raw",
)
SEEDS = (
    VALID_CLUSTER,
    layout.encode_bitmaps_extension(layout.BitmapsExtension(1, 32, 1 << 16)),
    layout.encode_crypto_pointer(layout.CryptoPointer(1 << 16, 4096)),
    layout.encode_snapshot_table([layout.Snapshot(1 << 16, 1, 0, 0, 0, 0, layout.snapshot_extra(0, 1), "1", "a")] * 2),
    layout.encode_bitmap_directory([layout.BitmapEntry(1 << 16, 1, 0, 1, 16, b"", name) for name in "ab"]),
    vdi.encode_header(vdi.Header(block_count=4, disk_size=4 << 20)),
    qed.encode_header(qed.Header(size=1 << 30)),
    qcow.encode_header(qcow.Header(size=1 << 30)),
    parallels.encode_header(parallels.Header(entries=4, sectors=8192, data_sector=2048)),
    bochs.encode_header(bochs.Header(bochs.VERSION_2, 512, 8, 4, 16384, 100_000)),
    vmdk.header(2048, redundant=21, directory=40, overhead=128),
    vmdk.stream(bytes(4096))[-1536:],
    vmdk.cowd(bytes(4096))[:64],
    vmdk.sesparse(bytes(4096))[:1024],
    vmdk.descriptor(['RW 8 SPARSE "a"', 'RW 8 FLAT "b" 0'], more='parentFileNameHint="c"'),
)


def codecs() -> Iterator[tuple[str, Callable[..., Any]]]:
    """(name, function) of every public ``decode_*`` defined in a module of byre."""
    for module_info in pkgutil.walk_packages(byre.__path__, "byre."):
        if module_info.name.endswith("__main__"):
            continue
        module = importlib.import_module(module_info.name)
        for name, function in vars(module).items():
            if name.startswith("decode_") and inspect.isfunction(function) and function.__module__ == module.__name__:
                yield f"{module_info.name}.{name}", function


CODECS = dict(codecs())

#: What to give a parameter that is not the bytes themselves, by its name.
ARGUMENTS: dict[str, st.SearchStrategy[Any]] = {
    "count": st.one_of(st.integers(0, 4), st.integers(0, 1 << 32)),
    "cluster_bits": st.integers(9, 21),
    "header": st.builds(
        lambda bits, offset, size: VALID_HEADER._replace(
            cluster_bits=bits, backing_file_offset=offset, backing_file_size=size
        ),
        st.integers(9, 21),
        st.one_of(st.just(0), st.integers(112, 512)),
        st.integers(0, 1023),
    ),
    "extended": st.booleans(),
    "width": st.sampled_from([4, 8]),
    "kind": st.sampled_from([0, 1, 2, 5, 6, 0x8001, 0x8002]),
    "repair": st.booleans(),
    "size": st.integers(0, 1 << 63),
    "file_size": st.integers(0, 1 << 63),
}

#: Decoders of whole units, whose callers choose the length: bytes per unit.
UNITS = {"byre.io.tables.decode_words": 8}


def test_there_are_codecs() -> None:
    assert "byre.formats.qcow2.layout.decode_header" in CODECS


@st.composite
def stored_bytes(draw: st.DrawFn) -> bytes:
    if draw(st.booleans()):
        return draw(st.binary(max_size=300))
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(0, 8))):
        at = draw(st.integers(0, min(len(data), 600) - 1))
        data[at] = draw(st.sampled_from((0, 1, 0x7F, 0x80, 0xFF, draw(st.integers(0, 255)))))
    return bytes(data[: draw(st.integers(0, len(data)))]) if draw(st.booleans()) else bytes(data)


@pytest.mark.parametrize("name", sorted(CODECS))
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_bytes_give_a_record_or_an_error(name: str, data: st.DataObject) -> None:
    function = CODECS[name]
    first, *others = inspect.signature(function).parameters.values()
    given: dict[str, Any] = {}
    for parameter in others:
        if parameter.name in ARGUMENTS:
            given[parameter.name] = data.draw(ARGUMENTS[parameter.name])
        elif parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            pytest.skip(f"{name}: no values are known for parameter {parameter.name!r}; add them to ARGUMENTS")
    stored = data.draw(stored_bytes())
    stored = stored[: len(stored) - len(stored) % UNITS.get(name, 1)]
    started = time.monotonic()
    try:
        function(stored, **given)
    except (ImageError, ProtocolError) as error:
        said = str(error)
    else:
        said = "a record"
    assert said
    assert time.monotonic() - started < 2
    assert first.name
