"""The NBD server: every command in every mode, what is refused, flushes, limits, and how it stops."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import byre
from byre.errors import AlreadyExists, Busy, IOFailure, NotFound
from byre.exports.nbd import NbdExport
from byre.graph.creating import create
from byre.nbd import handshake, wire
from byre.nbd.server import Server
from byre.protocols.memory import PAGE, MemoryNode
from support.nbd_talk import Reply, Served, Talk, assembled, image_of, in_thread, serving, wait_until

SIZE = 4 << 20
MODES = ("simple", "structured", "extended")
EPERM, EIO, EINVAL, ENOSPC, ENOTSUP = 1, 5, 22, 28, 95


def pattern(offset: int, length: int, seed: int = 1) -> bytes:
    return random.Random(offset * 7 + seed).randbytes(length)


CONTENT = random.Random(5).randbytes(SIZE)


@pytest.fixture
def content() -> bytes:
    return CONTENT


@pytest.fixture
def raw(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(content)
    return path


@pytest.fixture(scope="session")
def qcow2_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("nbd") / "disk.qcow2"
    create(str(path), "qcow2", SIZE)
    with byre.open(path, read_only=False) as image:
        image.write(0, CONTENT)
    return path.read_bytes()


@pytest.fixture
def qcow2(tmp_path: Path, qcow2_bytes: bytes) -> Path:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(qcow2_bytes)
    return path


@pytest.fixture(params=["raw", "qcow2", "memory"])
def image(request: pytest.FixtureRequest, content: bytes) -> Iterator[byre.Image]:
    """A writable image of each kind, full of ``content``."""
    if request.param == "memory":
        with image_of(MemoryNode(content)) as opened:
            yield opened
        return
    path = request.getfixturevalue(request.param)
    with byre.open(path, format=request.param, read_only=False) as opened:
        yield opened


@pytest.fixture
def served(image: byre.Image, tmp_path: Path) -> Iterator[Served]:
    with serving(tmp_path / "nbd.sock", NbdExport(image, writable=True)) as server:
        yield server


@pytest.fixture(params=MODES)
def talk(request: pytest.FixtureRequest, served: Served) -> Iterator[Talk]:
    with Talk(served.path) as client:
        yield client.start(request.param)


class TestReading:
    @pytest.mark.parametrize(
        ("offset", "length"),
        [(0, 1), (0, 512), (511, 4096), (65535, 2), (0, 65536), (1000, 65537), (3, 262144), (5, 262145), (0, 2 << 20),
         (12345, 3 << 20), (0, SIZE), (SIZE - 1, 1), (100, 0)],
    )  # fmt: skip
    def test_any_range(self, talk: Talk, content: bytes, offset: int, length: int) -> None:
        assert talk.read(offset, length) == content[offset : offset + length]

    def test_many_at_once(self, talk: Talk, content: bytes) -> None:
        asked: dict[int, tuple[int, int]] = {}
        chooser = random.Random(2)
        for _ in range(300):
            offset, length = chooser.randrange(SIZE - 9000), chooser.choice((512, 4096, 9000))
            asked[talk.request(wire.CMD_READ, offset, length)] = offset, length
        for _ in range(300):
            if talk.mode == "simple":
                head = wire.decode_simple_reply(talk.receive(16))
                offset, length = asked.pop(head.cookie)
                data = talk.receive(length)
            else:
                cookie, reply = talk.reply()
                offset, length = asked.pop(cookie)
                data = assembled(reply, offset, length)
            assert data == content[offset : offset + length]
        assert not asked

    @pytest.mark.parametrize("length", [4096, 100_000, 2 << 20])
    def test_df_asks_for_one_piece(self, served: Served, content: bytes, length: int) -> None:
        with Talk(served.path) as talk:
            talk.start("structured")
            reply = talk.ask(wire.CMD_READ, 1000, length, flags=wire.CMD_FLAG_DF)
            kinds = [chunk.kind for chunk, _ in reply.chunks]
            assert kinds == [wire.CHUNK_OFFSET_DATA]
            assert assembled(reply, 1000, length) == content[1000 : 1000 + length]

    def test_holes(self, tmp_path: Path) -> None:
        with image_of(MemoryNode(size=SIZE)) as image:
            image.write(1 << 20, b"x" * 4096)
            with serving(tmp_path / "s", NbdExport(image)) as served, Talk(served.path) as talk:
                talk.start("structured")
                reply = talk.ask(wire.CMD_READ, 0, SIZE)
                assert any(chunk.kind == wire.CHUNK_OFFSET_HOLE for chunk, _ in reply.chunks)
                assert sum(len(data) for _, data in reply.chunks) < 1 << 20
                assert assembled(reply, 0, SIZE) == image.read(0, SIZE)

    def test_requests_in_pieces(self, talk: Talk, content: bytes) -> None:
        request = wire.encode_request(wire.Request(wire.CMD_READ, 0, 1, 0, 512), talk.extended)
        for byte in request * 3:
            talk.send(bytes([byte]))
        assert all(talk.reply(512)[1].error == 0 for _ in range(3))


class TestWriting:
    @pytest.mark.parametrize(
        ("offset", "length"),
        [(0, 1), (0, 512), (700, 4096), (65530, 20), (0, 262144), (9, 294912), (1, 300_000), (0, 2 << 20), (7, 3 << 20),
         (SIZE - 5, 5), (0, SIZE), (50, 0)],
    )  # fmt: skip
    def test_any_range(self, talk: Talk, image: byre.Image, content: bytes, offset: int, length: int) -> None:
        data = pattern(offset, length)
        assert talk.write(offset, data) == 0
        assert image.read(0, SIZE) == content[:offset] + data + content[offset + length :]
        assert talk.read(offset, length) == data

    def test_many_at_once(self, talk: Talk, image: byre.Image, content: bytes) -> None:
        model = bytearray(content)
        chooser = random.Random(3)
        flags = wire.CMD_FLAG_PAYLOAD_LEN if talk.extended else 0
        stream = b""
        offsets = list(range(0, SIZE, 16384))
        chooser.shuffle(offsets)
        for number, offset in enumerate(offsets):
            data = pattern(offset, chooser.choice((512, 4096, 10000)))
            model[offset : offset + len(data)] = data
            request = wire.Request(wire.CMD_WRITE, flags, number, offset, len(data))
            stream += wire.encode_request(request, talk.extended) + data
        thread = in_thread(talk.send, stream)
        assert sorted(talk.reply()[0] for _ in offsets) == list(range(len(offsets)))
        thread.join()
        assert image.read(0, SIZE) == model

    def test_fua(self, talk: Talk, image: byre.Image) -> None:
        assert talk.write(512, b"d" * 512, flags=wire.CMD_FLAG_FUA) == 0
        assert image.read(512, 512) == b"d" * 512

    @pytest.mark.parametrize("flags", [0, wire.CMD_FLAG_NO_HOLE, wire.CMD_FLAG_FUA, wire.CMD_FLAG_FAST_ZERO])
    def test_write_zeroes(self, talk: Talk, image: byre.Image, content: bytes, flags: int) -> None:
        assert talk.ask(wire.CMD_WRITE_ZEROES, 1 << 20, 1 << 20, flags=flags).error in (
            0,
            ENOTSUP if flags == 16 else 0,
        )
        if not flags & wire.CMD_FLAG_FAST_ZERO:
            assert image.read(0, SIZE) == content[: 1 << 20] + bytes(1 << 20) + content[2 << 20 :]

    def test_fast_zero_says_when_it_is_not_fast(self, qcow2: Path, tmp_path: Path) -> None:
        with (
            byre.open(qcow2, read_only=False) as image,
            serving(tmp_path / "s", NbdExport(image, writable=True)) as served,
            Talk(served.path) as talk,
        ):
            talk.start()
            assert talk.ask(wire.CMD_WRITE_ZEROES, 65536, 65536, flags=wire.CMD_FLAG_FAST_ZERO).error == 0
            assert talk.ask(wire.CMD_WRITE_ZEROES, 200_000, 512, flags=wire.CMD_FLAG_FAST_ZERO).error == ENOTSUP
            assert image.read(65536, 65536) == bytes(65536)

    def test_trim_cache_and_flush(self, talk: Talk) -> None:
        assert talk.ask(wire.CMD_TRIM, 65536, 65536).error == 0
        assert talk.ask(wire.CMD_CACHE, 0, 1 << 20).error == 0
        assert talk.ask(wire.CMD_FLUSH).error == 0

    def test_an_error_of_the_disk_reaches_the_client(self, tmp_path: Path) -> None:
        class Broken(MemoryNode):
            def write_from(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
                raise IOFailure("the disk is on fire", errno=28 if offset else 5)

            def read_into(self, offset: int, buffer: memoryview) -> None:
                raise IOFailure("the disk is on fire")

            def read_cached(self, offset: int, buffer: memoryview) -> bool:
                return False

        with image_of(Broken(b"y" * SIZE)) as image, serving(tmp_path / "s", NbdExport(image, writable=True)) as served:
            for mode in MODES:
                with Talk(served.path) as talk:
                    talk.start(mode)
                    assert talk.write(0, b"x" * 512) == EIO
                    assert talk.write(512, b"x" * 512) == ENOSPC
                    for length in (512, 100_000, 1 << 20):
                        reply = talk.ask(wire.CMD_READ, 0, length)
                        assert reply.error == EIO
                        assert mode == "simple" or "on fire" in reply.message
                    assert talk.ask(wire.CMD_FLUSH).error == 0

    def test_a_read_that_fails_behind_its_beginning(self, tmp_path: Path) -> None:
        class Torn(MemoryNode):
            def read_into(self, offset: int, buffer: memoryview) -> None:
                if offset + len(buffer) > 1 << 20:
                    raise IOFailure("torn")
                super().read_into(offset, buffer)

        with image_of(Torn(bytes(b"y" * SIZE))) as image, serving(tmp_path / "s", NbdExport(image)) as served:
            with Talk(served.path) as talk:
                talk.start("structured")
                assert talk.ask(wire.CMD_READ, 0, SIZE).error == EIO
                assert talk.read(0, 512) == b"y" * 512
            with Talk(served.path) as talk:
                talk.start("simple")
                assert talk.ask(wire.CMD_READ, 0, SIZE).error == EIO
                assert talk.read(0, 512) == b"y" * 512


class TestRefusals:
    @pytest.fixture
    def image(self, content: bytes) -> Iterator[byre.Image]:
        with image_of(MemoryNode(content)) as opened:
            yield opened

    @pytest.mark.parametrize(
        ("command", "offset", "length", "flags", "error"),
        [
            (wire.CMD_READ, SIZE, 1, 0, EINVAL),
            (wire.CMD_READ, SIZE - 512, 1024, 0, EINVAL),
            (wire.CMD_READ, (1 << 64) - 512, 1024, 0, EINVAL),
            (wire.CMD_READ, 0, 512, 64, EINVAL),
            (wire.CMD_READ, 0, 512, wire.CMD_FLAG_NO_HOLE, EINVAL),
            (wire.CMD_TRIM, SIZE, 512, 0, EINVAL),
            (wire.CMD_CACHE, SIZE, 512, 0, EINVAL),
            (wire.CMD_WRITE_ZEROES, SIZE - 1, 512, 0, ENOSPC),
            (wire.CMD_BLOCK_STATUS, 0, 512, 0, EINVAL),
            (wire.CMD_RESIZE, 1 << 30, 0, 0, EINVAL),
            (99, 0, 512, 0, EINVAL),
            (0xFFFF, 0, 0, 0xFFDF, EINVAL),
        ],
    )
    def test_requests_that_cannot_be(
        self, talk: Talk, content: bytes, command: int, offset: int, length: int, flags: int, error: int
    ) -> None:
        reply = talk.ask(command, offset, length, flags=flags)
        assert reply.error == error
        assert talk.mode == "simple" or reply.message
        assert talk.read(0, 512) == content[:512]

    @pytest.mark.parametrize("length", [512, 300_000, 4 << 20])
    def test_a_write_past_the_end_is_read_and_thrown_away(self, talk: Talk, content: bytes, length: int) -> None:
        assert talk.write(SIZE - 256, b"z" * length) == ENOSPC
        assert talk.read(SIZE - 256, 256) == content[-256:]

    def test_a_read_only_export(self, tmp_path: Path, content: bytes) -> None:
        with image_of(MemoryNode(content)) as image, serving(tmp_path / "s", NbdExport(image)) as served:
            for mode in MODES:
                with Talk(served.path) as talk:
                    talk.start(mode)
                    assert talk.flags & wire.TRANSMISSION_READ_ONLY
                    assert talk.write(0, b"x" * 512) == EPERM
                    assert talk.write(0, b"x" * 300_000) == EPERM
                    for command in (wire.CMD_TRIM, wire.CMD_WRITE_ZEROES):
                        assert talk.ask(command, 0, 512).error == EPERM
                    assert talk.ask(wire.CMD_FLUSH).error == 0
                    assert talk.read(0, SIZE) == content

    def test_df_needs_structured_replies(self, served: Served) -> None:
        with Talk(served.path) as talk:
            assert talk.start("simple").ask(wire.CMD_READ, 0, 512, flags=wire.CMD_FLAG_DF).error == EINVAL

    @pytest.mark.parametrize("flags", [0, wire.CMD_FLAG_DF])
    @pytest.mark.parametrize("length", [(32 << 20) + 1, (1 << 32) - 1])
    def test_a_read_of_more_than_32_mib_is_refused(self, tmp_path: Path, length: int, flags: int) -> None:
        """There is nothing behind it that would have to be skipped, so the connection goes on, as with the peer."""
        path = tmp_path / "large.raw"
        path.touch()
        os.truncate(path, 8 << 30)
        with byre.open(path, format="raw") as image, serving(tmp_path / "s", NbdExport(image)) as served:
            for mode in MODES:
                with Talk(served.path) as talk:
                    talk.start(mode)
                    talk.request(wire.CMD_READ, 0, length, flags=flags if mode != "simple" else 0)
                    assert talk.reply()[1].error == EINVAL
                    assert talk.read(0, 512) == bytes(512)

    def test_a_payload_of_more_than_32_mib_ends_it(self, talk: Talk) -> None:
        talk.request(wire.CMD_WRITE, 0, wire.MAX_PAYLOAD + 1)
        assert talk.reply()[1].error == EINVAL
        assert talk.ended()


class TestBlockStatus:
    @pytest.fixture
    def overlay(self, tmp_path: Path) -> Path:
        """A: base holds [0, 1M), the overlay [512k, 768k), zeroes at [2M, 3M)."""
        base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
        create(str(base), "qcow2", SIZE)
        with byre.open(base, read_only=False) as image:
            image.write(0, b"b" * (1 << 20))
        create(str(top), "qcow2", SIZE, options={"backing_file": str(base), "backing_fmt": "qcow2"})
        with byre.open(top, read_only=False) as image:
            image.write(512 << 10, b"t" * (256 << 10))
            image.write_zeroes(2 << 20, 1 << 20)
        return top

    @pytest.mark.parametrize("mode", ["structured", "extended"])
    def test_allocation_and_depth(self, overlay: Path, tmp_path: Path, mode: str) -> None:
        with (
            byre.open(overlay) as image,
            serving(tmp_path / "s", NbdExport(image, allocation_depth=True)) as served,
            Talk(served.path) as talk,
        ):
            talk.start(mode, contexts=("base:allocation", "qemu:allocation-depth"))
            assert talk.status(0, SIZE) == {
                0: [(1 << 20, 0), (3 << 20, 3)],
                1: [(512 << 10, 2), (256 << 10, 1), (256 << 10, 2), (1 << 20, 0), (1 << 20, 1), (1 << 20, 0)],
            }
            assert talk.status(4096, 1 << 20, flags=wire.CMD_FLAG_REQ_ONE) == {
                0: [((1 << 20) - 4096, 0)], 1: [((512 << 10) - 4096, 2)]
            }  # fmt: skip
            assert talk.ask(wire.CMD_BLOCK_STATUS, 0, 0).error == EINVAL
            assert talk.ask(wire.CMD_BLOCK_STATUS, 0, SIZE + 1).error == EINVAL

    def test_many_extents(self, tmp_path: Path) -> None:
        size = 512 * PAGE
        with image_of(MemoryNode(size=size)) as image:
            for offset in range(0, size, 2 * PAGE):
                image.write(offset, b"x" * 512)
            with serving(tmp_path / "s", NbdExport(image)) as served, Talk(served.path) as talk:
                talk.start("structured", contexts=("base:allocation",))
                assert talk.status(0, size) == {0: [(PAGE, 0), (PAGE, 3)] * 256}
                assert talk.status(PAGE // 2, 20 * PAGE)[0][0] == (PAGE // 2, 0)

    def test_payload_chooses_contexts(self, overlay: Path, tmp_path: Path) -> None:
        with (
            byre.open(overlay) as image,
            serving(tmp_path / "s", NbdExport(image, allocation_depth=True)) as served,
            Talk(served.path) as talk,
        ):
            talk.start("extended", contexts=("base:allocation", "qemu:allocation-depth"))
            assert talk.flags & wire.TRANSMISSION_BLOCK_STATUS_PAYLOAD
            flag = wire.CMD_FLAG_PAYLOAD_LEN

            def status(payload: bytes, offset: int = 0) -> Reply:
                return talk.ask(wire.CMD_BLOCK_STATUS, offset, len(payload), flags=flag, payload=payload)

            good = SIZE.to_bytes(8, "big") + (1).to_bytes(4, "big")
            ((chunk, data),) = status(good).chunks
            assert chunk.kind == wire.CHUNK_BLOCK_STATUS_EXT
            assert wire.decode_block_status(data, True)[0] == 1
            for bad in (b"", good[:-1], good[:8], good + (1).to_bytes(4, "big"), good + bytes(8),
                        SIZE.to_bytes(8, "big") + (7).to_bytes(4, "big"), bytes(8) + good[8:],
                        (SIZE + 1).to_bytes(8, "big") + good[8:]):  # fmt: skip
                assert status(bad).error == EINVAL
            assert status(good, 512).error == EINVAL

    def test_64_bit_lengths(self, tmp_path: Path) -> None:
        path = tmp_path / "big.qcow2"
        create(str(path), "qcow2", 16 << 40)
        with (
            byre.open(path, read_only=False) as image,
            serving(tmp_path / "s", NbdExport(image, writable=True)) as served,
            Talk(served.path, timeout=60) as talk,
        ):
            talk.start("extended", contexts=("base:allocation",))
            assert talk.status(0, 16 << 40) == {0: [(16 << 40, 3)]}
            assert talk.ask(wire.CMD_WRITE_ZEROES, 0, 1 << 30).error == 0
            assert talk.ask(wire.CMD_TRIM, 0, 1 << 30).error == 0


class TestClients:
    def test_several_exports(self, tmp_path: Path) -> None:
        with image_of(MemoryNode(b"a" * 512)) as first, image_of(MemoryNode(b"b" * 1024)) as second:
            exports = NbdExport(first, "one", description="first"), NbdExport(second, "two", writable=True)
            with serving(tmp_path / "s", *exports) as served:
                with Talk(served.path) as talk:
                    talk.start(name="two")
                    assert talk.size == 1024
                    assert talk.read(0, 4) == b"bbbb"
                with Talk(served.path) as talk:
                    talk.greet()
                    listed = [
                        handshake.decode_server_entry(data) for kind, data in talk.option(handshake.OPT_LIST)[:-1]
                    ]
                    assert listed == [("one", "first"), ("two", "")]
                with pytest.raises(AlreadyExists):
                    served.server.add(NbdExport(first, "one"))
                with pytest.raises(NotFound):
                    served.server.remove("three")
                with Talk(served.path) as talk:
                    talk.start(name="one")
                    with pytest.raises(Busy):
                        served.server.remove("one")
                    served.server.remove("one", force=True)
                    assert talk.ended()

    def test_an_export_takes_so_many_clients(self, tmp_path: Path) -> None:
        with (
            image_of(MemoryNode(b"a" * 512)) as image,
            serving(tmp_path / "s", NbdExport(image, connections=1)) as served,
        ):
            with Talk(served.path) as first:
                first.start()
                assert not first.flags & wire.TRANSMISSION_MULTI_CONN
                with Talk(served.path) as second:
                    second.greet()
                    kind = second.option(handshake.OPT_GO, b"\0\0\0\0\0\0")[-1][0]
                    assert kind == handshake.REP_ERR_POLICY
            wait_until(lambda: served.server.connection_count == 0)
            with Talk(served.path) as third:
                third.start()

    def test_who_comes_beyond_the_limit_is_turned_away(self, tmp_path: Path) -> None:
        with (
            image_of(MemoryNode(b"a" * 512)) as image,
            serving(tmp_path / "s", NbdExport(image), connections=2) as served,
            Talk(served.path) as first,
            Talk(served.path) as second,
        ):
            first.start()
            second.start()
            with Talk(served.path) as third:
                assert third.ended()
            assert first.read(0, 1) == b"a"

    def test_one_after_the_other_always_finds_a_place(self, tmp_path: Path) -> None:
        with (
            image_of(MemoryNode(b"a" * 512)) as image,
            serving(tmp_path / "s", NbdExport(image), connections=1) as served,
        ):
            for number in range(30):
                with Talk(served.path) as talk:
                    assert talk.start().read(0, 1) == b"a"
                    if number % 2:
                        talk.request(wire.CMD_DISC)

    def test_multi_conn_sees_and_flushes_what_others_wrote(self, qcow2: Path, tmp_path: Path) -> None:
        with (
            byre.open(qcow2, read_only=False) as image,
            serving(tmp_path / "s", NbdExport(image, writable=True)) as served,
        ):
            with Talk(served.path) as one, Talk(served.path) as two:
                assert one.start().flags & wire.TRANSMISSION_MULTI_CONN
                two.start()
                for offset in range(0, SIZE, 65536):
                    assert one.write(offset, b"1" * 4096) == 0
                    assert two.read(offset, 4096) == b"1" * 4096
                before = image.stats.as_dict()["flush"]["operations"]
                assert two.ask(wire.CMD_FLUSH).error == 0
                assert image.stats.as_dict()["flush"]["operations"] == before + 1
            copy = tmp_path / "copy.qcow2"
            copy.write_bytes(qcow2.read_bytes())  # as a crash would leave it
            with byre.open(copy) as again:
                assert again.read(SIZE - 65536, 4096) == b"1" * 4096

    def test_half_close_gets_its_answers(self, talk: Talk, content: bytes) -> None:
        cookies = [talk.request(wire.CMD_READ, number * 4096, 4096) for number in range(20)]
        cookies.append(talk.request(wire.CMD_FLUSH))
        talk.socket.shutdown(socket.SHUT_WR)
        seen = set()
        for _ in cookies:
            if talk.mode == "simple":
                head = wire.decode_simple_reply(talk.receive(16))
                seen.add(head.cookie)
                if head.cookie != cookies[-1]:
                    talk.receive(4096)
            else:
                seen.add(talk.reply()[0])
        assert seen == set(cookies)
        assert talk.ended()

    def test_disconnect_is_not_answered(self, talk: Talk) -> None:
        talk.request(wire.CMD_DISC)
        assert talk.ended()

    def test_memory_of_idle_connections(self, raw: Path, tmp_path: Path) -> None:
        """A MiB each at most, also after they were busy."""
        count = 20
        with byre.open(raw, format="raw") as image, serving(tmp_path / "s", NbdExport(image)) as served:
            before = _resident()
            talks = [Talk(served.path).start() for _ in range(count)]
            for talk in talks:
                for number in range(64):
                    talk.request(wire.CMD_READ, number * 4096, 65536)
                for _ in range(64):
                    talk.reply()
            assert (_resident() - before) / count < 1 << 20
            for talk in talks:
                talk.socket.close()


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


class TestStopping:
    def test_clients_in_any_state(self, qcow2: Path, tmp_path: Path) -> None:
        path = tmp_path / "s"
        with byre.open(qcow2, read_only=False) as image, serving(path, NbdExport(image, writable=True)) as served:
            mute, greeted, idle, half, deaf = (Talk(path) for _ in range(5))
            greeted.greet()
            idle.start()
            half.start()
            half.send(wire.encode_request(wire.Request(wire.CMD_WRITE, 0, 1, 0, 1 << 20), False) + bytes(1000))
            deaf.start()
            for _ in range(40):
                deaf.request(wire.CMD_READ, 0, SIZE)
            time.sleep(0.3)
            before = time.monotonic()
            served.server.stop()
            assert time.monotonic() - before < 5
            for talk in (mute, greeted, idle, half, deaf):
                assert talk.ended()
                talk.socket.close()
        assert not path.exists()
        wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("nbd")], 1)

    def test_requests_under_way_are_finished(self, tmp_path: Path) -> None:
        entered, leave = threading.Event(), threading.Event()

        class Slow(MemoryNode):
            def flush(self) -> None:
                entered.set()
                leave.wait(5)

        with (
            image_of(Slow(size=SIZE)) as image,
            serving(tmp_path / "s", NbdExport(image, writable=True)) as served,
            Talk(served.path) as talk,
        ):
            talk.start()
            talk.request(wire.CMD_FLUSH)
            entered.wait(5)
            thread = in_thread(served.server.stop)
            time.sleep(0.2)
            leave.set()
            assert talk.reply()[1].error == 0
            thread.join(5)
            assert not thread.is_alive()

    def test_a_stale_socket_is_replaced_and_a_living_one_is_not(self, tmp_path: Path) -> None:
        path = tmp_path / "s"
        old = socket.socket(socket.AF_UNIX)
        old.bind(str(path))
        old.close()
        with image_of(MemoryNode(b"a" * 512)) as image, serving(path, NbdExport(image)):
            assert path.stat().st_mode & 0o777 == 0o600
            other = Server()
            with pytest.raises(Busy):
                other.listen_unix(str(path))
            other.stop()
            with Talk(path) as talk:
                assert talk.start().read(0, 1) == b"a"
        (tmp_path / "file").write_text("precious")
        server = Server()
        with pytest.raises(AlreadyExists):
            server.listen_unix(str(tmp_path / "file"))
        server.stop()

    def test_tcp(self, tmp_path: Path) -> None:
        with image_of(MemoryNode(b"a" * 512)) as image:
            server = Server()
            server.add(NbdExport(image))
            server.listen_tcp("127.0.0.1", 0)
            server.start()
            (address,) = server.addresses
            with socket.create_connection(address) as client:  # type: ignore[arg-type]
                assert client.recv(8) == b"NBDMAGIC"
            server.stop()


def test_an_answer_about_a_fragmented_disk_is_short(tmp_path: Path) -> None:
    """Whatever it asks for, a client gets the status of a bounded number of extents; asking on, it gets all of them."""
    with (
        image_of(MemoryNode(bytes(8 << 20))) as image,
        serving(tmp_path / "s", NbdExport(image)) as served,
        Talk(served.path) as talk,
    ):
        alternating = [(512, 3), (512, 0)] * (8 << 10)
        export = served.server.disks()[0]
        export._contexts["base:allocation"] = lambda _image, at, _length, limit: alternating[at // 512 :][:limit]  # type: ignore[attr-defined]
        talk.start("extended", contexts=("base:allocation",))
        found: list[tuple[int, int]] = []
        at = 0
        while at < 8 << 20:
            (extents,) = talk.status(at, (8 << 20) - at).values()
            assert 0 < len(extents) <= 4096
            found += extents
            at += sum(length for length, _ in extents)
        assert found == alternating
