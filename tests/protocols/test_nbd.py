"""The nbd node: the contract over several peers, options, names, errors, block status, dirty bitmaps, reconnecting."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import byre
from byre.cli.main import main
from byre.errors import AccessDenied, ByreError, InvalidArgument, IOFailure, NotFound, NotSupported, ReadOnly
from byre.graph.graph import Graph
from byre.graph.node import PERM_ALL, PERM_READ, PERM_WRITE, Node
from byre.graph.opening import Opener, OpenFlags, Policy
from byre.io.extent import DATA, FUA, MAY_UNMAP, NO_FALLBACK, NOT_COUNTED, ZERO
from byre.nbd import wire
from byre.protocols.nbd import NbdNode
from conftest import Run
from contracts.node import ProtocolContract, patchwork, read, write
from support.nbd_servers import FLAGS, SIZE, greet, nbdkit, qemu_nbd, requests, running, scripted, simple_disk

MIB = 1 << 20


def opened(spec: object, **flags: object) -> NbdNode:
    own = OpenFlags(read_only=False)._replace(**flags)  # type: ignore[arg-type]
    node = Opener(Graph(), Policy()).open(spec, own, protocol=True)
    assert isinstance(node, NbdNode)
    return node


def used(spec: object) -> Iterator[Node]:
    graph = Graph()
    node = Opener(graph, Policy()).open(spec, OpenFlags(read_only=False), protocol=True)
    root = graph.attach_image(node, "test", PERM_READ | PERM_WRITE, PERM_ALL)
    yield node
    graph.detach(root)
    graph.release(node)


class Contract(ProtocolContract):
    """An export is as long as it is."""

    def test_a_write_past_the_end_grows_it(self, node: Node) -> None:
        with pytest.raises(ByreError, match="ends at"):
            write(node, len(self.content) - 1, b"far")
        with pytest.raises(ByreError, match="ends at"):
            node.write_zeroes(len(self.content) - 1, 2)
        assert node.size == len(self.content)


class TestScripted(Contract):
    """A server without structure, block sizes or status: everything is simple."""

    @pytest.fixture
    def node(self, tmp_path: Path) -> Iterator[Node]:
        with scripted(tmp_path, simple_disk(bytearray(self.content))) as server:
            yield from used(server.uri)


class TestBlocks(Contract):
    """Nothing but blocks of 4 KiB, at most 64 KiB at once."""

    @pytest.fixture
    def node(self, tmp_path: Path) -> Iterator[Node]:
        disk = simple_disk(bytearray(self.content), block_sizes=(4096, 8192, 65536))
        with scripted(tmp_path, disk) as server:
            yield from used(server.uri)


class TestWithoutZeroes(Contract):
    """A server that can only read and write."""

    @pytest.fixture
    def node(self, tmp_path: Path) -> Iterator[Node]:
        disk = simple_disk(bytearray(self.content), flags=wire.TRANSMISSION_HAS_FLAGS)
        with scripted(tmp_path, disk) as server:
            yield from used(server.uri)


class TestByre(Contract):
    """byre's own server: extended headers, status of any length."""

    @pytest.fixture
    def node(self, tmp_path: Path) -> Iterator[Node]:
        from byre.exports.nbd import NbdExport
        from byre.nbd.server import Server
        from byre.protocols.memory import MemoryNode

        graph, server = Graph(), Server()
        memory = MemoryNode(self.content)
        graph.add(memory)
        with byre.Image(memory, graph, read_only=False) as image:
            export = NbdExport(image, "disk", writable=True)
            server.add(export)
            server.listen_unix(str(tmp_path / "s"))
            server.start()
            yield from used(f"nbd+unix:///disk?socket={tmp_path / 's'}")
            server.stop()
            export.close()


@pytest.mark.oracle
class TestQemuNbd(Contract):
    @pytest.fixture
    def node(self, tmp_path: Path) -> Iterator[Node]:
        (tmp_path / "disk").write_bytes(self.content)
        with qemu_nbd(tmp_path, tmp_path / "disk", "--discard=unmap") as server:
            yield from used(server.uri)


@pytest.mark.oracle
class TestQemuNbdQcow2(Contract):
    """Through the older name, over two connections."""

    @pytest.fixture
    def node(self, tmp_path: Path, qemu_img: Run) -> Iterator[Node]:
        (tmp_path / "disk").write_bytes(self.content)
        qemu_img("convert", "-f", "raw", "-O", "qcow2", tmp_path / "disk", tmp_path / "disk.qcow2")
        with qemu_nbd(tmp_path, tmp_path / "disk.qcow2", format="qcow2") as server:
            yield from used({"driver": "nbd", "filename": f"nbd:unix:{server.path}", "connections": 2})


@pytest.mark.oracle
class TestNbdkit(Contract):
    """Requests are late, in any order, and zeroes may be refused as too slow."""

    @pytest.fixture
    def node(self, tmp_path: Path) -> Iterator[Node]:
        (tmp_path / "disk").write_bytes(self.content)
        with nbdkit(tmp_path, "--filter=delay", "--filter=fua", "file", str(tmp_path / "disk"), "rdelay=1ms",
                    "fuamode=emulate") as server:  # fmt: skip
            yield from used({"driver": "nbd", "path": str(server.path), "connections": "4"})


@pytest.mark.oracle
class TestNbdkitBlocks(Contract):
    content = patchwork(SIZE - 32768)

    @pytest.fixture
    def node(self, tmp_path: Path) -> Iterator[Node]:
        (tmp_path / "disk").write_bytes(self.content)
        with nbdkit(tmp_path, "--filter=blocksize-policy", "file", str(tmp_path / "disk"), "blocksize-minimum=32768",
                    "blocksize-preferred=32768", "blocksize-maximum=131072",
                    "blocksize-error-policy=error") as server:  # fmt: skip
            yield from used(server.uri)


@pytest.mark.oracle
class TestStorageDaemon(Contract):
    @pytest.fixture
    def node(self, tmp_path: Path) -> Iterator[Node]:
        from conftest import peer_program

        (tmp_path / "disk").write_bytes(self.content)
        path = tmp_path / "qsd.sock"
        command = [
            peer_program("qemu-storage-daemon"), "--blockdev", f"file,node-name=disk,filename={tmp_path / 'disk'}",
            "--nbd-server", f"addr.type=unix,addr.path={path}",
            "--export", "nbd,id=e,node-name=disk,name=the disk,writable=on",
        ]  # fmt: skip
        with running(command, path) as server:
            yield from used(f"nbd+unix:///the%20disk?socket={server.path}")


# -- what is where --------------------------------------------------------------------------------


@pytest.mark.oracle
def test_holes_of_a_sparse_disk_are_seen(tmp_path: Path) -> None:
    with nbdkit(tmp_path, "memory", "1T") as server:
        node = opened(server.uri)
        write(node, 1 << 39, b"x" * 65536)
        rows = list(node.extents(0, node.size))
        assert [(row.kind, row.offset, row.length) for row in rows] == [
            (ZERO, 0, 1 << 39), (DATA, 1 << 39, 65536), (ZERO, (1 << 39) + 65536, (1 << 39) - 65536),
        ]  # fmt: skip
        node.write_zeroes(1 << 39, 65536, MAY_UNMAP)
        assert node.block_status(0, node.size).kind == ZERO
        node.close()


@pytest.mark.oracle
def test_a_random_sparse_disk_is_copied_whole(tmp_path: Path) -> None:
    copy = tmp_path / "copy.qcow2"
    with nbdkit(tmp_path, "-r", "sparse-random", "256M", "seed=1", "percent=5") as server:
        assert main(["convert", "-f", "raw", "-O", "qcow2", server.uri, str(copy)]) == 0
        assert main(["compare", "-f", "raw", server.uri, str(copy)]) == 0
        assert copy.stat().st_size < 64 * MIB
        with pytest.raises(ReadOnly, match="read-only"):
            opened(server.uri)
        node = opened(server.uri, auto_read_only=True)
        assert node.read_only
        node.close()


def status_server(*extents: tuple[int, int], context: str = "base:allocation", block_sizes: object = None):  # type: ignore[no-untyped-def]
    """Answers block status with ``extents``, cut at the request's start, and nothing else."""
    import struct

    def script(sock):  # type: ignore[no-untyped-def]
        greet(sock, mode="structured", contexts=(context,), block_sizes=block_sizes)  # type: ignore[arg-type]
        for request, _ in requests(sock):
            rows, at = [], 0
            for length, flags in extents:
                start, at = at, at + length
                if at > request.offset:
                    rows.append((at - max(start, request.offset), flags))
            payload = struct.pack(">I", 7) + b"".join(struct.pack(">II", *row) for row in rows)
            sock.sendall(wire.encode_chunk(wire.Chunk(1, 5, request.cookie, len(payload)), False) + payload)

    return script


def test_extents_that_reach_beyond_the_request_and_the_disk(tmp_path: Path) -> None:
    with scripted(tmp_path, status_server((SIZE // 2, 0), (0xFFFFFFFF, 3))) as server:
        node = opened(server.uri)
        rows = list(node.extents(1000, SIZE))
        assert [(row.offset, row.length, row.kind) for row in rows] == [
            (1000, SIZE // 2 - 1000, DATA), (SIZE // 2, SIZE // 2, ZERO), (SIZE, 1000, ZERO),
        ]  # fmt: skip
        assert node.block_status(SIZE // 2 + 1, 10 * SIZE).end == SIZE
        node.close()


def test_extents_that_do_not_keep_to_blocks_are_data(tmp_path: Path) -> None:
    script = status_server((8192, 3), (100, 3), (SIZE, 3), block_sizes=(4096, 4096, 1 << 20))
    with scripted(tmp_path, script) as server:
        node = opened(server.uri)
        rows = list(node.extents(0, SIZE))
        assert [(row.offset, row.length, row.kind) for row in rows] == [(0, 8192, ZERO), (8192, SIZE - 8192, DATA)]
        assert node.block_status(8200, 100).kind == DATA
        node.close()


def test_a_million_extents_are_bounded(tmp_path: Path) -> None:
    one_byte = [(1, index % 2 * 3) for index in range(20_000)]
    with scripted(tmp_path, status_server(*one_byte, (SIZE, 3))) as server:
        node = opened(server.uri)
        found = node.extents(0, SIZE)
        assert found.end == SIZE
        assert len(found) == 20_000
        node.close()


@pytest.mark.parametrize("flags", [1, 3])
def test_holes_with_unknown_content_and_dirty_areas_are_read_as_data(tmp_path: Path, flags: int) -> None:
    context = "base:allocation" if flags == 1 else "qemu:dirty-bitmap:b"
    script = status_server((4096, flags), (SIZE, 0), context=context)
    with scripted(tmp_path, script) as server:
        bitmap = {} if flags == 1 else {"x-dirty-bitmap": context}
        node = opened({"driver": "nbd", "path": str(server.path), **bitmap})
        first, second = node.extents(0, SIZE)
        assert (first.length, first.kind, first.source) == (4096, DATA, NOT_COUNTED)
        assert (second.kind, second.source) == (DATA, 0)
        node.close()


@pytest.mark.oracle
def test_a_dirty_bitmap_is_shown_as_the_peer_shows_it(
    tmp_path: Path, qemu_img: Run, qemu_io: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "disk.qcow2"
    qemu_img("create", "-f", "qcow2", image, "4M")
    qemu_io("-c", "write -P 1 0 1M", image)
    qemu_img("bitmap", "--add", image, "b0")
    qemu_io("-c", "write -P 2 1M 128k", "-c", "write -z 3M 64k", image)
    with qemu_nbd(tmp_path, image, "-B", "b0", format="qcow2") as server:
        options = f"driver=nbd,server.type=unix,server.path={server.path},x-dirty-bitmap=qemu:dirty-bitmap:b0"
        assert main(["map", "--output=json", "--image-opts", options]) == 0
        ours = json.loads(capsys.readouterr().out)
        theirs = json.loads(qemu_img("map", "--output=json", "--image-opts", options).stdout)
        assert [{key: value for key, value in row.items() if key != "compressed"} for row in ours] == theirs
        assert main(["convert", "-O", "raw", "--image-opts", options, str(tmp_path / "copy")]) == 0
        qemu_img("compare", "-U", "-f", "raw", "-F", "qcow2", tmp_path / "copy", image)
        with pytest.raises(NotFound, match="no metadata context"):
            opened({"driver": "nbd", "path": str(server.path), "x-dirty-bitmap": "qemu:dirty-bitmap:none"})


@pytest.mark.oracle
def test_zeroes_that_are_no_hole_are_shown_as_the_peer_shows_them(
    tmp_path: Path, qemu_img: Run, qemu_io: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """Allocated clusters that lie in holes of the file are zeroes and data; so is a depth of two, the peer says."""
    base, image = tmp_path / "base.qcow2", tmp_path / "disk.qcow2"
    qemu_img("create", "-f", "qcow2", "-o", "preallocation=metadata", base, "1M")
    qemu_img("create", "-f", "qcow2", "-b", base, "-F", "qcow2", image, "2M")
    qemu_io("-c", "write 128k 64k", "-c", "write -z 256k 64k", image)
    with qemu_nbd(tmp_path, image, "-A", format="qcow2") as server:
        for context in ("", ",x-dirty-bitmap=qemu:allocation-depth"):
            options = f"driver=nbd,path={server.path}{context}"
            assert main(["map", "--output=json", "--image-opts", options]) == 0
            ours = json.loads(capsys.readouterr().out)
            theirs = json.loads(qemu_img("map", "--output=json", "--image-opts", options).stdout)
            assert [{key: value for key, value in row.items() if key != "compressed"} for row in ours] == theirs
            assert any(row["zero"] and row["data"] for row in theirs)
        assert main(["map", "-f", "raw", server.uri]) == 0
        assert capsys.readouterr().out == qemu_img("map", "-f", "raw", server.uri).stdout


@pytest.mark.oracle
def test_commands_say_what_the_peer_says(
    tmp_path: Path, qemu_img: Run, qemu_io: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    image, copy = tmp_path / "disk", tmp_path / "copy"
    qemu_img("create", "-f", "raw", image, "16M")
    qemu_io("-f", "raw", "-c", "write -P 3 1M 2M", "-c", "write -P 4 9M 64k", image)
    with qemu_nbd(tmp_path, image, "-D", "test disk") as server:
        for command in (["measure", "-f", "raw", "-O", "qcow2", "--output=json"], ["map", "-f", "raw"]):
            assert main([*command, server.uri]) == 0
            assert capsys.readouterr().out == qemu_img(*command, server.uri).stdout
        assert main(["convert", "-f", "raw", "-O", "raw", server.uri, str(copy)]) == 0
        assert copy.stat().st_blocks * 512 < 4 * MIB
        assert main(["compare", "-f", "raw", "-F", "raw", server.uri, str(copy)]) == 0
        qemu_io("-f", "raw", "-c", "write -P 9 0 12M", server.uri)
        assert main(["convert", "-n", "-f", "raw", "-O", "raw", str(copy), server.uri]) == 0
        qemu_img("compare", "-f", "raw", "-F", "raw", server.uri, copy)
        capsys.readouterr()
        assert main(["info", server.uri]) == 0
        text = capsys.readouterr().out
        assert f"image: nbd+unix://?socket={server.path}" in text
        assert "protocol type: nbd" in text
        assert main(["io", "-f", "raw", "-c", "read -P 3 1M 2M", "-c", "write -P 5 0 64k", server.uri]) == 0
        assert "failed" not in capsys.readouterr().out


@pytest.mark.oracle
def test_images_are_made_over_an_export(tmp_path: Path, qemu_img: Run) -> None:
    with nbdkit(tmp_path, "memory", "16M") as server:
        assert main(["create", "-q", "-f", "qcow2", server.uri, "8M"]) == 0
        with byre.open(server.uri, read_only=False) as image:
            assert image.format == "qcow2"
            image.write(MIB, b"z" * MIB)
        qemu_img("check", server.uri)
        assert main(["check", server.uri]) == 0
        assert main(["create", "-q", "-f", "raw", server.uri, "8M"]) == 0
        with byre.open(server.uri) as image:
            assert image.format == "raw"
        assert main(["create", "-q", "-f", "raw", server.uri, "32M"]) == 1


def test_zeroes_are_asked_for_as_they_are_meant(tmp_path: Path) -> None:
    seen: list[wire.Request] = []

    def script(sock):  # type: ignore[no-untyped-def]
        greet(sock, flags=FLAGS | wire.TRANSMISSION_FAST_ZERO)
        for request, _ in requests(sock):
            seen.append(request)
            error = 95 if request.flags & wire.CMD_FLAG_FAST_ZERO else 0
            sock.sendall(wire.encode_simple_reply(wire.SimpleReply(error, request.cookie)))

    with scripted(tmp_path, script) as server:
        node = opened(server.uri)
        node.write_zeroes(512, 1024)
        node.write_zeroes(512, 1024, MAY_UNMAP)
        with pytest.raises(NotSupported):
            node.write_zeroes(512, 1024, NO_FALLBACK | MAY_UNMAP)
        assert [request.flags for request in seen] == [wire.CMD_FLAG_NO_HOLE, 0, wire.CMD_FLAG_FAST_ZERO]
        node.close()


def test_a_flush_reaches_the_server_whatever_the_cache_mode(tmp_path: Path) -> None:
    seen: list[int] = []

    def script(sock):  # type: ignore[no-untyped-def]
        greet(sock)
        for request, _ in requests(sock):
            seen.append(request.command)
            sock.sendall(wire.encode_simple_reply(wire.SimpleReply(0, request.cookie)))

    with scripted(tmp_path, script) as server:
        with byre.open(server.uri, format="raw", read_only=False, cache="unsafe") as image:
            image.write(0, b"x" * 512)
        assert seen == [wire.CMD_WRITE, wire.CMD_FLUSH]


def test_without_fua_a_durable_write_is_flushed(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def script(sock):  # type: ignore[no-untyped-def]
        greet(sock, flags=FLAGS & ~wire.TRANSMISSION_FUA)
        for request, _ in requests(sock):
            seen.append((request.command, request.flags))
            sock.sendall(wire.encode_simple_reply(wire.SimpleReply(0, request.cookie)))

    with scripted(tmp_path, script) as server:
        node = opened(server.uri)
        write(node, 0, b"x" * 512, FUA)
        node.write_zeroes(0, 512, FUA | MAY_UNMAP)
        node.close()
    flush = (wire.CMD_FLUSH, 0)
    assert seen == [(wire.CMD_WRITE, 0), flush, (wire.CMD_WRITE_ZEROES, 0), flush]


# -- opening --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, "address missing"),
        ({"server": {"type": "unix"}}, "path"),
        ({"server": {"type": "inet", "host": "h"}}, "port"),
        ({"server": {"type": "inet", "host": "h", "port": "70000"}}, "65536"),
        ({"server": {"type": "smoke", "path": "x"}}, "smoke"),
        ({"path": "a", "host": "b"}, "same time"),
        ({"port": "5"}, "without host"),
        ({"path": "a", "server": {"type": "unix", "path": "b"}}, "same time"),
        ({"path": "a", "reconnect-delay": "-1"}, "negative"),
        ({"path": "a", "reconnect-delay": 1 << 40}, "allowed"),
        ({"path": "a", "tls-creds": "none"}, "No TLS credentials"),
        ({"path": "a", "tls": "on"}, "host name"),
        ({"path": "a", "tls-hostname": "x"}, "no TLS"),
        ({"path": "a", "tls": "on", "tls-type": "anon"}, "anonymous"),
        ({"path": "a", "export": "x" * 5000}, "longer"),
        ({"path": "a" * 300}, "long"),
        ({"server": {"type": "inet", "host": "h", "port": "1", "ipv4": False, "ipv6": False}}, "neither"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, object], why: str) -> None:
    with pytest.raises(ByreError, match=why):
        opened({"driver": "nbd", **options})


def test_names_options_and_what_is_shown(tmp_path: Path) -> None:
    with scripted(tmp_path, simple_disk(bytearray(SIZE))) as server:
        path = server.path
        for spec, shown in (
            (server.uri, f"nbd+unix://?socket={path}"),
            (f"nbd:unix:{path}:exportname=a b", f"nbd+unix:///a%20b?socket={path}"),
            ({"driver": "nbd", "server": {"type": "unix", "path": str(path)}, "export": ""}, f"nbd+unix:///?socket={path}"),
            ({"driver": "nbd", "path": str(path)}, f"nbd+unix://?socket={path}"),
            (f"json:{{'driver':'nbd','path':'{path}','export':'x'}}", f"nbd+unix:///x?socket={path}"),
        ):  # fmt: skip
            node = opened(spec)
            assert node.filename == shown
            node.close()


def test_only_the_command_line_names_servers(tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.qcow2"
    with scripted(tmp_path, simple_disk(bytearray(b"x" * SIZE))) as server:
        assert main(["create", "-q", "-f", "qcow2", "-b", server.uri, "-F", "raw", str(overlay)]) == 0
        connections = server.connections
        with pytest.raises(AccessDenied, match="allow-ref"):
            byre.open(overlay)
        assert server.connections == connections
        with byre.open(overlay, policy=Policy(allow_references=True)) as image:
            assert image.read(0, 3) == b"xxx"


def test_an_export_has_no_folder(tmp_path: Path) -> None:
    from byre.graph.opening import resolve_backing

    assert resolve_backing("nbd://host/disk", "/abs/olute") == "/abs/olute"
    with pytest.raises(InvalidArgument, match="folder"):
        resolve_backing("nbd+unix:///a/b?socket=/tmp/s", "base.qcow2")


def test_sizes_that_are_no_multiple_of_a_sector(tmp_path: Path) -> None:
    content = patchwork(1000)
    with scripted(tmp_path, simple_disk(bytearray(content))) as server, byre.open(server.uri, format="raw") as image:
        assert image.size == 1024
        assert image.read(0, 1024) == content + bytes(24)


# -- faults ---------------------------------------------------------------------------------------


@pytest.mark.oracle
def test_errors_reach_the_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with nbdkit(tmp_path, "--filter=error", "pattern", "4M", "error-pread=EIO", "error-pread-rate=100%") as server:
        assert main(["convert", "-f", "raw", "-O", "raw", server.uri, str(tmp_path / "copy")]) == 1
        assert "refuses a read" in capsys.readouterr().err
        assert main(["compare", "-f", "raw", "-F", "raw", server.uri, server.uri]) > 1
    with nbdkit(tmp_path, "--filter=error", "memory", "4M", "error-pwrite=ENOSPC",
                "error-pwrite-rate=100%") as server:  # fmt: skip
        node = opened(server.uri)
        with pytest.raises(IOFailure) as caught:
            write(node, 0, b"x" * 4096)
        assert caught.value.errno == 28
        node.close()


@pytest.mark.oracle
@pytest.mark.parametrize("connections", [1, 4])
def test_a_server_that_is_killed_and_started_again(tmp_path: Path, connections: int) -> None:
    """Readers and writers go on as if nothing had been; what was written is there; all connections are made again."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(4 * MIB))
    with qemu_nbd(tmp_path, disk) as server:
        options = {"driver": "nbd", "path": str(server.path), "reconnect-delay": 20, "connections": connections}
        node = opened(options)
        assert len(node.client._lines) == connections
        stop = threading.Event()
        written = [0] * 4
        failures: list[BaseException] = []

        def work(index: int) -> None:
            try:
                turn = 0
                while not stop.is_set():
                    turn = turn % 250 + 1
                    write(node, index * MIB + turn * 4096, bytes([turn]) * 4096)
                    assert read(node, index * MIB + turn * 4096, 4096) == bytes([turn]) * 4096
                    written[index] += 1
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(3):
            time.sleep(0.2)
            server.kill()
            before = sum(written)
            server.start()
            deadline = time.monotonic() + 10
            while sum(written) < before + 20 and time.monotonic() < deadline and not failures:
                time.sleep(0.01)
        while any(line.load == 1 << 62 for line in node.client._lines) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert all(line.load < 1 << 62 for line in node.client._lines)
        stop.set()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        assert not failures, failures
        node.flush()
        node.close()


def test_copying_survives_a_server_that_hangs_up(tmp_path: Path) -> None:
    disk = bytearray(patchwork(4 * MIB))
    scripts = [simple_disk(disk, answers=2)] * 4 + [simple_disk(disk)]
    with scripted(tmp_path, *scripts) as server:
        options = f"driver=nbd,path={server.path},reconnect-delay=30"
        assert main(["convert", "-O", "raw", "--image-opts", options, str(tmp_path / "copy")]) == 0
    assert (tmp_path / "copy").read_bytes() == disk


def test_many_threads_over_one_connection(tmp_path: Path) -> None:
    disk = bytearray(patchwork(8 * MIB))

    def work(node: Node, index: int, check: Callable[[bool], None]) -> None:
        for turn in range(60):
            offset = (index * 7919 + turn * 104_729) % (7 * MIB)
            length = (1, 4096, 70_000, 300_000)[turn % 4]
            check(read(node, offset, length) == disk[offset : offset + length])

    with scripted(tmp_path, simple_disk(disk)) as server:
        node = opened(server.uri)
        results: list[bool] = []
        threads = [threading.Thread(target=work, args=(node, index, results.append)) for index in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(results) == 16 * 60
        assert all(results)
        assert server.connections == 1
        node.close()


@pytest.mark.oracle
def test_several_connections_where_the_server_allows_them(tmp_path: Path) -> None:
    with nbdkit(tmp_path, "--filter=multi-conn", "memory", "4M", "multi-conn-mode=disable") as server:
        node = opened({"driver": "nbd", "path": str(server.path), "connections": 4})
        assert len(node.client._lines) == 1
        node.close()
    with nbdkit(tmp_path, "memory", "4M") as server:
        node = opened({"driver": "nbd", "path": str(server.path), "connections": 4})
        assert len(node.client._lines) == 4
        write(node, 0, b"seen" * 1000)
        assert read(node, 0, 4000) == b"seen" * 1000
        node.close()


def test_reopening(tmp_path: Path) -> None:
    with (
        scripted(tmp_path, simple_disk(bytearray(SIZE))) as server,
        byre.open(server.uri, format="raw", read_only=False) as image,
    ):
        image.reopen(read_only=True)
        with pytest.raises(ReadOnly):
            image.write(0, b"x")
        image.reopen(read_only=False)
        image.write(0, b"x")
        for options in ({"file.export": "other"}, {"file.reconnect-delay": 7}):
            with pytest.raises(InvalidArgument, match="cannot change"):
                image.reopen(options=options)
        assert image.read(0, 1) == b"x"


def test_a_disk_too_large_to_be_counted(tmp_path: Path) -> None:
    def script(sock):  # type: ignore[no-untyped-def]
        greet(sock, size=(1 << 63) - 1)
        sock.recv(1)

    with scripted(tmp_path, script) as server, pytest.raises(ByreError, match="possible are"):
        opened(server.uri)


def test_an_empty_disk(tmp_path: Path) -> None:
    with scripted(tmp_path, simple_disk(bytearray())) as server:
        assert main(["map", "-f", "raw", server.uri]) == 0
        assert main(["convert", "-f", "raw", "-O", "raw", server.uri, str(tmp_path / "copy")]) == 0
    assert (tmp_path / "copy").read_bytes() == b""
