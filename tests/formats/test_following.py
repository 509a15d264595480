"""Every format goes on over other nodes that hold the same bytes: filters put below it, files exchanged, under load."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from time import sleep

import pytest

import byre
from byre.filters.base import FilterNode
from byre.filters.faults import FaultNode
from byre.graph import live
from byre.graph.graph import Graph
from byre.graph.opening import Opener, OpenFlags, Policy
from byre.image import Image
from byre.jobs.job import Control
from byre.protocols.file import FileNode
from contracts.node import patchwork
from formats.ewf.test_ewf import forge as forge_ewf
from formats.test_bochs import forge as forge_bochs
from formats.test_cloop import forge as forge_cloop
from support.load import load

SIZE = 4 << 20
LUKS = {"key-secret": "s", "iter-time": 10}

WRITABLE: dict[str, tuple[str, dict[str, object]]] = {
    "raw": ("raw", {}),
    "qcow2": ("qcow2", {"cluster_size": 512}),
    "qcow2 with a data file": ("qcow2", {"data_file": "data"}),
    "qcow2 with luks": ("qcow2", {"encrypt.format": "luks", **{f"encrypt.{key}": LUKS[key] for key in LUKS}}),
    "luks": ("luks", LUKS),
    "qcow": ("qcow", {}),
    "qed": ("qed", {"cluster_size": 4096, "table_size": 1}),
    "vdi": ("vdi", {}),
    "parallels": ("parallels", {}),
    "vhdx": ("vhdx", {"block_size": 1 << 20}),
    "vhdx fixed": ("vhdx", {"subformat": "fixed"}),
    "vpc": ("vpc", {}),
    "vpc fixed": ("vpc", {"subformat": "fixed"}),
    "vmdk": ("vmdk", {}),
    "vmdk flat": ("vmdk", {"subformat": "monolithicFlat"}),
    "vmdk split": ("vmdk", {"subformat": "twoGbMaxExtentSparse"}),
    "vmdk flat split": ("vmdk", {"subformat": "twoGbMaxExtentFlat"}),
}


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make(kind: str) -> Image:
    format, options = WRITABLE[kind]
    byre.create("disk", format, SIZE, options=options, secrets={"s": b"pass"})
    return open_again(kind)


def open_again(kind: str, name: str = "disk", **more: object) -> Image:
    format, options = WRITABLE[kind]
    given = {name: "s" for name in options if name.endswith("key-secret")}
    spec = {"driver": format, "file": {"driver": "file", "filename": name}, **given, **more}
    return byre.open(spec, read_only=False, secrets={"s": b"pass"}, graph=Graph())


def files_below(image: Image) -> list[FileNode]:
    return [node for node in image.graph.below(image.node) if isinstance(node, FileNode)]


class Witness(FilterNode):
    driver = "witness"

    def __init__(self) -> None:
        super().__init__()
        self.writes = 0

    def write_from(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
        super().write_from(offset, buffer, flags)
        self.writes += 1

    def writev_from(self, offset: int, buffers: object, flags: int = 0) -> None:
        super().writev_from(offset, buffers, flags)  # type: ignore[arg-type]
        self.writes += 1


@pytest.mark.parametrize("kind", list(WRITABLE))
def test_all_writes_go_through_a_filter_that_comes_below(kind: str) -> None:
    with make(kind) as image:
        graph, files = image.graph, files_below(image)
        with load(image) as busy:
            for _ in range(3):
                witnesses = []
                with live.quiesce(graph, files):
                    for file in files:
                        witness = Witness()
                        graph.add(witness)
                        live.insert_filter(graph, witness, file)
                        witnesses.append((witness, file, file.stats.operation_count[1]))
                goal = busy.count + 60
                while busy.count < goal and not busy.errors:
                    sleep(0.001)
                image.flush()
                with live.quiesce(graph, files):
                    for witness, file, before in witnesses:
                        assert witness.writes == file.stats.operation_count[1] - before
                    assert any(witness.writes for witness, *_ in witnesses)
                    for witness, *_ in witnesses:
                        live.remove_filter(graph, witness)
            content = busy.end()
        assert image.read(0, image.size) == content
    with open_again(kind) as image:
        assert image.read(0, image.size) == content


def exchange(image: Image, file: FileNode) -> str:
    """The file is another one from now on, with the same bytes; the old one is closed."""
    name = file.filename + "-moved"
    with live.quiesce(image.graph, [file]):
        image.node.flush()
        shutil.copy(file.filename, name)
        given = {"driver": "file", "filename": name}
        other = Opener(image.graph, Policy()).open(given, OpenFlags(read_only=file.read_only), protocol=True)
        live.replace_node(image.graph, file, other)
        image.graph.release(file)
    assert file.closed
    return name


@pytest.mark.parametrize("kind", list(WRITABLE))
def test_a_file_is_exchanged_for_a_copy_of_it(kind: str) -> None:
    with make(kind) as image:
        with load(image) as busy:
            for file in files_below(image):
                goal = busy.count + 40
                while busy.count < goal and not busy.errors:
                    sleep(0.001)
                exchange(image, file)
            goal = busy.count + 40
            while busy.count < goal and not busy.errors:
                sleep(0.001)
            content = busy.end()
        assert image.read(0, image.size) == content
        if hasattr(image.node, "check"):
            image.flush()
            assert image.node.check(Control()).corruptions == 0
    for moved in Path().glob("*-moved"):
        moved.rename(moved.name.removesuffix("-moved"))
    with open_again(kind) as image:
        assert image.read(0, image.size) == content


@pytest.mark.parametrize("kind", ["luks", "qcow2 with luks"])
def test_key_slots_are_changed_in_the_file_there_is(kind: str) -> None:
    with make(kind) as image:
        before = Path("disk").read_bytes()
        exchange(image, files_below(image)[0])
        area = image.node.area  # type: ignore[attr-defined]
        area.write(0, area.read(0, 512))
        image.flush()
        assert area.file.filename == "disk-moved"
        assert Path("disk").read_bytes() == before


READABLE: dict[str, Callable[[bytes], Path]] = {
    "bochs": lambda content: _written("disk", forge_bochs(content)),
    "cloop": lambda content: _written("disk", forge_cloop(content)),
    "ewf": lambda content: forge_ewf(Path(), content, segments=3),
}


def _written(name: str, content: bytes) -> Path:
    Path(name).write_bytes(content)
    return Path(name)


@pytest.mark.parametrize("kind", list(READABLE))
def test_formats_that_are_only_read_follow_as_well(kind: str) -> None:
    content = patchwork(1 << 20)
    with byre.open(str(READABLE[kind](content)), format=kind) as image:
        assert image.read(0, 4096) == content[:4096]
        for file in files_below(image):
            exchange(image, file)
        assert image.read(0, len(content)) == content


def test_faults_are_told_of_by_a_filter_that_comes_later() -> None:
    with make("qcow2") as image:
        file = files_below(image)[0]
        faults = FaultNode()
        image.graph.add(faults)
        live.insert_filter(image.graph, faults, file)
        assert image.node.report is not None  # type: ignore[attr-defined]
        live.remove_filter(image.graph, faults)
        assert image.node.report is None  # type: ignore[attr-defined]
