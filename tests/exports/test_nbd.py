"""NBD exports of images: what peers see of raw, qcow2, chains and bitmaps, and that flushed data survives a kill."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import byre
from byre.errors import Busy, InvalidArgument, NotFound, ReadOnly
from byre.exports.contexts import whole_blocks
from byre.exports.nbd import NbdExport
from byre.formats.abilities import HasBitmaps
from byre.graph.creating import create
from byre.nbd import wire
from byre.protocols.memory import MemoryNode
from conftest import Run, peer_program
from support.nbd_talk import Served, Talk, image_of, in_thread, listens, serving, wait_until

SIZE = 4 << 20
CONTENT = random.Random(4).randbytes(SIZE)


@contextmanager
def exported(folder: Path, image: byre.Image, **more: object) -> Iterator[Served]:
    with serving(folder / "s", NbdExport(image, **more)) as served:  # type: ignore[arg-type]
        yield served


def run(program: str, *arguments: object, check: bool = True, folder: Path | None = None) -> str:
    command = [peer_program(program), *map(str, arguments)]
    done = subprocess.run(command, text=True, capture_output=True, timeout=60, stdin=subprocess.DEVNULL, cwd=folder)
    assert not check or done.returncode == 0, done.stderr
    return done.stdout + (done.stderr if not check else "")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "a.raw"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def qcow2(tmp_path: Path) -> Path:
    path = tmp_path / "a.qcow2"
    create(str(path), "qcow2", SIZE)
    with byre.open(path, read_only=False) as image:
        image.write(0, CONTENT)
    return path


class TestExport:
    def test_flags(self) -> None:
        with image_of(MemoryNode(CONTENT)) as image:
            base = (
                wire.TRANSMISSION_HAS_FLAGS | wire.TRANSMISSION_FLUSH | wire.TRANSMISSION_FUA | wire.TRANSMISSION_CACHE
            )
            multi = wire.TRANSMISSION_MULTI_CONN
            assert NbdExport(image).offer.flags == base | multi | wire.TRANSMISSION_READ_ONLY
            assert NbdExport(image, connections=1).offer.flags == base | wire.TRANSMISSION_READ_ONLY
            writable = wire.TRANSMISSION_TRIM | wire.TRANSMISSION_WRITE_ZEROES | wire.TRANSMISSION_FAST_ZERO
            assert NbdExport(image, writable=True).offer.flags == base | multi | writable

    def test_refusals(self) -> None:
        with image_of(MemoryNode(CONTENT), read_only=True) as image:
            with pytest.raises(ReadOnly):
                NbdExport(image, writable=True)
            for more in ({"name": "x" * 4097}, {"description": "ä" * 2049}):
                with pytest.raises(InvalidArgument):
                    NbdExport(image, **more)  # type: ignore[arg-type]
            with pytest.raises(NotFound):
                NbdExport(image, bitmaps=["none"])

    def test_a_file_whose_last_sector_is_not_whole(self, tmp_path: Path) -> None:
        path = tmp_path / "odd.raw"
        path.write_bytes(b"x" * 1000)
        with (
            byre.open(path, format="raw", read_only=False) as image,
            exported(tmp_path, image, writable=True) as served,
            Talk(served.path) as talk,
        ):
            talk.start()
            assert talk.size == 1024
            assert talk.read(0, 1024) == b"x" * 1000 + bytes(24)
            assert talk.read(990, 34) == b"x" * 10 + bytes(24)
            assert talk.write(1010, b"y" * 14) == 0
            assert talk.read(0, 1024) == b"x" * 1000 + bytes(10) + b"y" * 14

    def test_a_disk_that_was_only_probed_is_offered_by_sectors(self, tmp_path: Path) -> None:
        """Its block size is a sector, and so are its extents, as the protocol demands; any range is served."""
        path = tmp_path / "odd.raw"
        path.write_bytes(b"x" * 1000)
        with byre.open(path, read_only=False) as image, exported(tmp_path, image, writable=True) as served:
            with Talk(served.path) as talk:
                talk.start("structured", contexts=("base:allocation",))
                assert talk.status(0, 1024) == {0: [(1024, 0)]}
                assert talk.status(0, 1024, flags=wire.CMD_FLAG_REQ_ONE) == {0: [(512, 0)]}
                assert talk.status(512, 512, flags=wire.CMD_FLAG_REQ_ONE) == {0: [(512, 0)]}
                assert talk.read(990, 34) == b"x" * 10 + bytes(24)
            assert NbdExport(image).offer.block_sizes[0] == 512
        with byre.open(path, format="raw") as image:
            assert NbdExport(image).offer.block_sizes[0] == 1

    @pytest.mark.parametrize(
        ("runs", "blocks"),
        [
            ([(512, 3), (1024, 0)], [(512, 3), (1024, 0)]),
            ([(100, 3), (412, 3)], [(512, 3)]),
            ([(1000, 3), (24, 0), (1024, 3)], [(512, 3), (512, 0), (1024, 3)]),
            ([(100, 3), (10, 0), (10, 3), (904, 0)], [(1024, 0)]),
            ([(1100, 0), (100, 3)], [(1024, 0)]),
            ([(100, 3)], [(512, 0)]),
        ],
    )
    def test_extents_in_whole_blocks(self, runs: list[tuple[int, int]], blocks: list[tuple[int, int]]) -> None:
        assert whole_blocks(runs, 512) == blocks

    def test_writethrough(self, qcow2: Path, tmp_path: Path) -> None:
        with (
            byre.open(qcow2, read_only=False, cache="writethrough") as image,
            exported(tmp_path, image, writable=True) as served,
            Talk(served.path) as talk,
        ):
            talk.start()
            before = image.node.stats.as_dict()["flush"]["operations"]
            assert talk.write(0, b"z" * 512) == 0
            assert image.node.stats.as_dict()["flush"]["operations"] == before + 1

    def test_statistics_count_what_clients_do(self, raw: Path, tmp_path: Path) -> None:
        with (
            byre.open(raw, format="raw", read_only=False) as image,
            exported(tmp_path, image, writable=True) as served,
            Talk(served.path) as talk,
        ):
            talk.start()
            for number in range(10):
                talk.read(number * 4096, 4096)
                talk.write(number * 4096, b"x" * 512)
            stats = image.stats.as_dict()
            assert stats["read"]["operations"] == 10
            assert stats["read"]["bytes"] == 40960
            assert stats["write"]["operations"] == 10
            assert stats["write"]["bytes"] == 5120

    def test_a_paused_image_holds_clients_back(self, raw: Path, tmp_path: Path) -> None:
        with (
            byre.open(raw, format="raw") as image,
            exported(tmp_path, image) as served,
            Talk(served.path) as talk,
        ):
            talk.start()
            image.pause()
            talk.request(wire.CMD_READ, 0, 4096)
            talk.socket.settimeout(0.2)
            with pytest.raises(TimeoutError):
                talk.receive(1)
            image.resume()
            talk.socket.settimeout(5)
            assert talk.reply()[1].error == 0

    @pytest.mark.parametrize("format", ["raw", "qcow2"])
    def test_without_the_page_cache(self, request: pytest.FixtureRequest, tmp_path: Path, format: str) -> None:
        """Direct reads go to the kernel many at once; those that are not aligned find another way."""
        path = request.getfixturevalue(format)
        with (
            byre.open(path, format=format, read_only=False, cache="none") as image,
            exported(tmp_path, image, writable=True) as served,
            Talk(served.path) as talk,
        ):
            talk.start("structured")
            chooser = random.Random(6)
            ranges = []
            for _ in range(200):
                offset = chooser.choice((chooser.randrange(900) * 4096, chooser.randrange(SIZE - 70000)))
                length = chooser.choice((512, 4096, 8192, 65536))
                ranges.append((offset, min(length, SIZE - offset)))
            thread = in_thread(lambda: [talk.request(wire.CMD_READ, *place) for place in ranges])
            for _ in range(200):
                for chunk, data in talk.reply()[1].chunks:
                    if chunk.kind == wire.CHUNK_OFFSET_DATA:
                        at = int.from_bytes(data[:8], "big")
                        assert data[8:] == CONTENT[at : at + len(data) - 8]
            thread.join()
            for offset, length in ((0, 4096), (5, 700), (1 << 20, 300_000)):
                assert talk.write(offset, b"d" * length) == 0
                assert talk.read(offset, length) == b"d" * length


class TestBitmaps:
    @pytest.fixture
    def image(self, qcow2: Path) -> Iterator[byre.Image]:
        with byre.open(qcow2, read_only=False) as opened:
            node = opened.node
            assert isinstance(node, HasBitmaps)
            node.bitmap_store().add("b0", 65536)
            opened.write(65536, b"x" * 100)
            opened.write(1 << 20, b"x" * 200_000)
            yield opened

    def test_what_is_dirty(self, image: byre.Image, tmp_path: Path) -> None:
        with exported(tmp_path, image, writable=True, bitmaps=["b0"]) as served, Talk(served.path) as talk:
            talk.start("structured", contexts=("qemu:dirty-bitmap:b0",))
            dirty = [(65536, 0), (65536, 1), (917504, 0), (262144, 1), (SIZE - (1 << 20) - 262144, 0)]
            assert talk.status(0, SIZE) == {1: dirty}
            assert talk.status(70000, 100_000) == {1: [(61072, 1), (38928, 0)]}
            assert talk.status(1 << 20, 1 << 20, flags=wire.CMD_FLAG_REQ_ONE) == {1: [(262144, 1)]}
            assert talk.write(0, b"y") == 0
            assert talk.status(0, 65536) == {1: [(65536, 1)]}

    def test_a_bitmap_is_busy_while_it_is_exported(self, image: byre.Image) -> None:
        export = NbdExport(image, writable=True, bitmaps=["b0"])
        with pytest.raises(Busy):
            NbdExport(image, "other", writable=True, bitmaps=["b0"])
        export.close()
        export.close()
        NbdExport(image, writable=True, bitmaps=["b0"]).close()

    def test_an_enabled_bitmap_does_not_go_with_a_read_only_export(self, image: byre.Image) -> None:
        with pytest.raises(InvalidArgument, match="Enabled bitmap"):
            NbdExport(image, bitmaps=["b0"])


@pytest.mark.oracle
class TestPeers:
    """Every peer reads what is there, and what a peer writes is there."""

    @pytest.mark.parametrize("format", ["raw", "qcow2"])
    def test_tools(
        self, request: pytest.FixtureRequest, tmp_path: Path, format: str, qemu_img: Run, qemu_io: Run
    ) -> None:
        path = request.getfixturevalue(format)
        with (
            byre.open(path, format=format, read_only=False) as image,
            exported(tmp_path, image, writable=True, description="a disk") as served,
        ):
            info = json.loads(run("nbdinfo", "--json", served.uri))["exports"][0]
            assert (info["export-size"], info["is_read_only"], info["can_multi_conn"]) == (SIZE, False, True)
            assert info["description"] == "a disk"
            copy = tmp_path / "copy"
            run("nbdcopy", served.uri, copy)
            assert copy.read_bytes() == CONTENT
            changed = random.Random(7).randbytes(SIZE)
            copy.write_bytes(changed)
            run("nbdcopy", "--flush", copy, served.uri)
            assert image.read(0, SIZE) == changed
            qemu_img("compare", "-f", "raw", "-F", "raw", copy, served.uri)
            commands = ("write -P 1 100k 300k", "read -P 1 100k 300k", "write -z 1M 1M", "read -P 0 1M 1M",
                        "discard 3M 512k", "flush", "write -f -P 2 0 4k", "read -P 2 0 4k")  # fmt: skip
            out = qemu_io("-f", "raw", *(word for command in commands for word in ("-c", command)), served.uri).stdout
            assert "failed" not in out
        if format == "qcow2":
            qemu_img("check", path)

    def test_map(self, tmp_path: Path, qemu_img: Run, qemu_nbd: Run) -> None:
        """Block status as the peer's own server gives it, for a chain with holes, zeroes and compressed clusters."""
        base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
        source = tmp_path / "source.raw"
        source.write_bytes(CONTENT[: 1 << 20] + bytes(3 << 20))
        qemu_img("convert", "-c", "-O", "qcow2", source, base)
        qemu_img("create", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
        with byre.open(top, read_only=False) as image:
            image.write(100_000, b"t" * 300_000)
            image.write_zeroes(700_000, 200_000)
            image.discard(2 << 20, 65536)
        peer = tmp_path / "peer.sock"
        command = [peer_program("qemu-nbd"), "-r", "-t", "-A", "-f", "qcow2", "-k", peer, top]
        for context in ("base:allocation", "qemu:allocation-depth"):
            with subprocess.Popen(command) as process:
                try:
                    wait_until(lambda: listens(peer) or process.poll() is not None)
                    theirs = json.loads(run("nbdinfo", f"--map={context}", "--json", f"nbd+unix:///?socket={peer}"))
                finally:
                    process.terminate()
            with byre.open(top) as image, exported(tmp_path, image, allocation_depth=True) as served:
                ours = json.loads(run("nbdinfo", f"--map={context}", "--json", served.uri))
                if context == "base:allocation":
                    options = f"driver=nbd,path={served.path}"
                    assert qemu_img("map", "--output=json", "--image-opts", options).stdout
            assert _joined(ours) == _joined(theirs)

    def test_dirty_bitmap(self, qcow2: Path, tmp_path: Path, qemu_img: Run) -> None:
        qemu_img("bitmap", "--add", qcow2, "b0")
        qemu_img("bitmap", "--add", "--disable", qcow2, "b1")
        with byre.open(qcow2, read_only=False) as image:
            image.write(1 << 20, b"x" * 65536)
            with exported(tmp_path, image, writable=True, bitmaps=["b0", "b1"]) as served:
                options = f"driver=nbd,path={served.path},x-dirty-bitmap=qemu:dirty-bitmap:b0"
                rows = json.loads(qemu_img("map", "--output=json", "--image-opts", options).stdout)
                assert [(row["start"], row["data"]) for row in rows] == [
                    (0, True),
                    (1 << 20, False),
                    ((1 << 20) + 65536, True),
                ]

    def test_libnbd(self, qcow2: Path, tmp_path: Path) -> None:
        script = tmp_path / "script.py"
        script.write_text(LIBNBD)
        with byre.open(qcow2, read_only=False) as image, exported(tmp_path, image, writable=True) as served:
            probe = subprocess.run(["/usr/bin/python3", "-c", "import nbd"], capture_output=True)
            if probe.returncode:
                if os.environ.get("CI"):
                    pytest.fail("python3-libnbd is not installed")
                pytest.skip("python3-libnbd is not installed")
            done = subprocess.run(["/usr/bin/python3", script, served.uri], capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stderr
            assert image.read(8192, 4096) == b"l" * 4096

    def test_fio_verifies(self, tmp_path: Path, qemu_img: Run) -> None:
        path = tmp_path / "fio.qcow2"
        create(str(path), "qcow2", 32 << 20)
        with byre.open(path, read_only=False) as image, exported(tmp_path, image, writable=True) as served:
            out = run(
                "fio", "--name=x", "--ioengine=nbd", f"--uri={served.uri}", "--rw=randrw", "--bsrange=512-300k",
                "--bs_unaligned=1", "--iodepth=16", "--size=24m", "--verify=crc32c", "--verify_backlog=32",
                "--verify_state_save=0", folder=tmp_path,
            )  # fmt: skip
            assert "err= 0" in out
        qemu_img("check", path)


def _joined(rows: list[dict[str, int]]) -> list[tuple[int, int]]:
    """(end, type) with alike neighbours joined: how finely a server cuts is its own affair."""
    found: list[tuple[int, int]] = []
    for row in rows:
        entry = row["offset"] + row["length"], row["type"]
        if found and found[-1][1] == entry[1]:
            found[-1] = entry
        else:
            found.append(entry)
    return found


LIBNBD = """
import sys, nbd
h = nbd.NBD()
h.add_meta_context("base:allocation")
h.connect_uri(sys.argv[1])
assert h.get_size() == 4 << 20 and h.can_meta_context("base:allocation") and h.get_structured_replies_negotiated()
h.pwrite(b"l" * 4096, 8192)
h.flush()
assert h.pread(4096, 8192) == b"l" * 4096
assert h.pread(1000, 100) == h.pread_structured(1000, 100, lambda *rest: 0)
h.pwrite(b"f" * 512, 0, nbd.CMD_FLAG_FUA)
h.zero(65536, 65536)
h.zero(65536, 131072, nbd.CMD_FLAG_NO_HOLE)
h.trim(65536, 262144)
h.cache(1 << 20, 0)
seen = []
h.block_status(4 << 20, 0, lambda context, offset, entries, error: seen.append((context, entries)) or 0)
assert seen and seen[0][0] == "base:allocation" and sum(seen[0][1][::2]) == 4 << 20, seen
# Nothing of what the protocol forbids reaches the server by itself: ask for it.
h.set_strict_mode(0)
for call in (lambda: h.pread(512, 4 << 20), lambda: h.pwrite(b"x" * 512, 4 << 20), lambda: h.pread(512, 0, 64)):
    try:
        call()
    except nbd.Error as error:
        assert error.errno in ("EINVAL", "ENOSPC"), error
    else:
        raise AssertionError("a request that makes no sense succeeded")
buffers = [nbd.Buffer(4096) for _ in range(64)]
left = [h.aio_pread(buffer, index * 4096) for index, buffer in enumerate(buffers)]
while left:
    h.poll(-1)
    left = [cookie for cookie in left if not h.aio_command_completed(cookie)]
h.shutdown()
"""


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_flushed_data_survives_a_kill(tmp_path: Path, format: str) -> None:
    path, sock = tmp_path / f"disk.{format}", tmp_path / "s"
    create(str(path), format, SIZE)
    command = [sys.executable, "-m", "byre", "serve", "-t", "-f", format, "-k", str(sock), str(path)]
    with subprocess.Popen(command) as process:
        try:
            wait_until(lambda: listens(sock) or process.poll() is not None, 20)
            with Talk(sock) as talk:
                talk.start()
                for offset in range(0, SIZE // 2, 50_000):
                    assert talk.write(offset, CONTENT[offset : offset + 50_000]) == 0
                assert talk.ask(wire.CMD_FLUSH).error == 0
                for offset in range(SIZE // 2, SIZE, 50_000):  # of these nothing is promised
                    talk.request(wire.CMD_WRITE, offset, 100, payload=b"?" * 100)
                process.send_signal(signal.SIGKILL)
        finally:
            process.kill()
    with byre.open(path, format=format, read_only=False) as image:
        assert image.read(0, SIZE // 2) == CONTENT[: SIZE // 2]
        # The last of the flushed writes reached beyond the middle; of the rest, each byte is new or still zero.
        behind = -(-(SIZE // 2) // 50_000) * 50_000
        assert set(image.read(behind, SIZE - behind)) <= {0, ord("?")}
