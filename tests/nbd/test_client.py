"""The client against byre's own server in one process, TLS against byre and peers, and lists of exports."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import byre
from byre.cli.main import main
from byre.errors import AccessDenied, ByreError, NotFound, ProtocolError
from byre.exports.nbd import NbdExport
from byre.graph.graph import Graph
from byre.nbd.client import Security
from byre.nbd.connection import Settings as ServerSettings
from byre.nbd.server import Server
from byre.nbd.session import list_exports
from byre.nbd.tls import Credentials, client_context, server_context
from byre.nbd.uri import Address
from byre.protocols.memory import MemoryNode
from contracts.node import SIZE, patchwork
from support.certificates import issue, make_authority
from support.nbd_servers import nbdkit, qemu_nbd

CONTENT = patchwork(SIZE)


@contextmanager
def serving(path: Path, *disks: MemoryNode, settings: ServerSettings | None = None) -> Iterator[Server]:
    """Exports "", "1", "2"... of byre's own server, writable."""
    server = Server(settings)
    images, exports = [], []
    for index, node in enumerate(disks):
        graph = Graph()
        graph.add(node)
        images.append(byre.Image(node, graph, read_only=False))
        exports.append(NbdExport(images[-1], str(index or ""), description=f"disk {index}", writable=True))
        server.add(exports[-1])
    server.listen_unix(str(path))
    server.start()
    try:
        yield server
    finally:
        server.stop()
        for export in exports:
            export.close()
        for image in images:
            image.close()


def test_a_disk_travels_both_ways(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with (
        serving(path, MemoryNode(CONTENT), MemoryNode(size=SIZE)),
        byre.open(f"nbd+unix:///?socket={path}", format="raw") as source,
        byre.open(f"nbd+unix:///1?socket={path}", format="raw", read_only=False) as target,
    ):
        assert source.node.children["file"].node.client.info.extended  # type: ignore[attr-defined]
        for extent in source.extents():
            target.write(extent.offset, source.read(extent.offset, extent.length))
        target.flush()
        assert target.read(0, SIZE) == CONTENT


def test_a_disk_larger_than_what_32_bits_count(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with (
        serving(path, MemoryNode(size=1 << 44)),
        byre.open(f"nbd+unix:///?socket={path}", format="raw", read_only=False) as image,
    ):
        image.write((1 << 43) - 3, b"across")
        image.write_zeroes(0, 1 << 42, unmap=True)
        image.discard(1 << 42, 1 << 42)
        assert image.read((1 << 43) - 3, 6) == b"\0\0\0oss"
        assert image.extents(0, 1 << 43).bytes_of(1) >= (1 << 43) - (1 << 20)


def test_threads_share_a_connection(tmp_path: Path) -> None:
    path = tmp_path / "s"
    disk = MemoryNode(size=16 << 20)
    with (
        serving(path, disk) as server,
        byre.open(f"nbd+unix:///?socket={path}", format="raw", read_only=False) as image,
    ):
        failures: list[object] = []

        def work(index: int) -> None:
            for turn in range(80):
                offset = (turn * 16 + index) * 4096
                data = bytes([index + 1, turn]) * 2048
                image.write(offset, data)
                if image.read(offset, 4096) != data:
                    failures.append((index, turn))

        threads = [threading.Thread(target=work, args=(index,)) for index in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not failures
        assert server.connection_count == 1


def test_the_list_of_exports(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with serving(path, MemoryNode(CONTENT), MemoryNode(size=512)):
        first, second = list_exports(Address("unix", path=str(path)))
    assert (first.name, first.description, second.name) == ("", "disk 0", "1")
    assert second.info is not None
    assert second.info.size == 512
    assert "base:allocation" in first.contexts


@pytest.mark.oracle
def test_the_list_of_a_peer(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    with qemu_nbd(tmp_path, tmp_path / "disk", "-x", "name", "-D", "what it is", "-r") as server:
        (export,) = list_exports(Address("unix", path=str(server.path)))
    assert (export.name, export.description) == ("name", "what it is")
    assert export.info is not None
    assert (export.info.size, export.info.minimum) == (1 << 20, 1)
    with pytest.raises(NotFound, match="Failed to connect"):
        list_exports(Address("unix", path=str(tmp_path / "absent")))


# -- TLS ------------------------------------------------------------------------------------------


class Keys:
    """Folders: ``server`` and ``client`` of one authority, ``stranger`` of another."""

    def __init__(self, folder: Path) -> None:
        authority = make_authority(folder / "ca")
        self.server = issue(authority, folder / "server", "server", "disk.example")
        self.client = issue(authority, folder / "client", "client", "alice")
        self.stranger = issue(make_authority(folder / "other", "Other CA"), folder / "stranger", "client", "alice")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def secure(tmp_path: Path, keys: Keys) -> Iterator[Path]:
    """byre's server, which demands TLS and a certificate."""
    settings = ServerSettings(tls=server_context(Credentials("t", "x509", "server", str(keys.server))))
    with serving(tmp_path / "s", MemoryNode(CONTENT), settings=settings):
        yield tmp_path / "s"


def name_of(path: Path, folder: Path, **more: str) -> str:
    parameters = {"tls-hostname": "disk.example", "tls-certificates": str(folder), **more}
    return f"nbds+unix:///?socket={path}&" + "&".join(f"{key}={value}" for key, value in parameters.items())


def test_reading_and_writing_through_tls(secure: Path, keys: Keys) -> None:
    with byre.open(name_of(secure, keys.client), format="raw", read_only=False) as image:
        assert image.filename == f"nbds+unix://?socket={secure}"
        assert image.read(0, SIZE) == CONTENT
        threads = [
            threading.Thread(target=image.write, args=(index * 50_000, bytes([index + 1]) * 50_000))
            for index in range(16)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert image.read(0, 800_000) == b"".join(bytes([index + 1]) * 50_000 for index in range(16))


def test_certificate_and_name_are_checked(secure: Path, keys: Keys) -> None:
    for name, why in (
        (name_of(secure, keys.stranger), "certificate|unknown ca"),
        (name_of(secure, keys.client, **{"tls-hostname": "else.example"}), "Hostname mismatch"),
    ):
        with pytest.raises(AccessDenied, match=why):
            byre.open(name, format="raw")
    with pytest.raises(ByreError, match="host name"):
        byre.open(f"nbds+unix:///?socket={secure}&tls-certificates={keys.client}", format="raw")
    unchecked = name_of(secure, keys.client, **{"tls-hostname": "else.example", "tls-verify-peer": "0"})
    with byre.open(unchecked, format="raw") as image:
        assert image.size == SIZE


def test_one_side_alone_wants_tls(tmp_path: Path, secure: Path, keys: Keys) -> None:
    with pytest.raises(AccessDenied, match="demands TLS"):
        byre.open(f"nbd+unix:///?socket={secure}", format="raw")
    with (
        serving(tmp_path / "plain", MemoryNode(CONTENT)) as server,
        pytest.raises(AccessDenied, match="TLS is demanded"),
    ):
        byre.open(name_of(tmp_path / "plain", keys.client), format="raw")
    del server


def test_the_list_through_tls(secure: Path, keys: Keys) -> None:
    with pytest.raises(AccessDenied, match="demands TLS"):
        list_exports(Address("unix", path=str(secure)))
    security = Security(client_context(Credentials("t", "x509", "client", str(keys.client))), "disk.example")
    (export,) = list_exports(Address("unix", path=str(secure)), tls="require", security=security)
    assert export.info is not None
    assert export.info.tls


def test_credentials_as_objects(secure: Path, keys: Keys, capsys: pytest.CaptureFixture[str]) -> None:
    target = f"driver=raw,file.driver=nbd,file.path={secure},file.tls-creds=t,file.tls-hostname=disk.example"
    creds = f"tls-creds-x509,id=t,endpoint=client,dir={keys.client}"
    assert main(["info", "--output=json", "--object", creds, "--image-opts", target]) == 0
    assert json.loads(capsys.readouterr().out)["virtual-size"] == SIZE
    assert main(["info", "--object", creds.replace("=client,", "=server,"), "--image-opts", target]) == 1
    assert "client endpoint" in capsys.readouterr().err
    assert main(["info", "--image-opts", target]) == 1
    assert "No TLS credentials with id 't'" in capsys.readouterr().err
    assert main(["io", "--object", creds, "--image-opts", "-c", "read 0 1M", target]) == 0


def test_disks_behind_tls_are_targets(secure: Path, keys: Keys, tmp_path: Path) -> None:
    """What writes images writes them there as well, with credentials in the name or as an object."""
    source = tmp_path / "source"
    source.write_bytes(bytes(reversed(CONTENT[: SIZE // 2])))
    name = name_of(secure, keys.client)
    creds = f"tls-creds-x509,id=t,endpoint=client,dir={keys.client}"
    assert main(["create", "-q", "-f", "qcow2", name, str(SIZE // 2)]) == 0
    assert main(["convert", "-n", "-f", "raw", "-O", "qcow2", str(source), name]) == 0
    assert main(["compare", "-f", "raw", "-F", "qcow2", str(source), name]) == 0
    file = f"file.driver=nbd,file.path={secure},file.tls-creds=t,file.tls-hostname=disk.example"
    source.write_bytes(CONTENT[SIZE // 2 :] * 2)
    opts = ["convert", "-n", "--object", creds, "--image-opts", "--target-image-opts"]
    assert main([*opts, f"driver=raw,file.driver=file,file.filename={source}", f"driver=raw,{file}"]) == 0
    with byre.open(name, format="raw") as image:
        assert hashlib.sha256(image.read(0, SIZE)).digest() == hashlib.sha256(source.read_bytes()).digest()


@pytest.mark.oracle
def test_tls_with_peers(tmp_path: Path, keys: Keys) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(CONTENT)
    creds = f"tls-creds-x509,id=t,endpoint=server,dir={keys.server},verify-peer=on"
    with qemu_nbd(tmp_path, disk, "--object", creds, "--tls-creds", "t") as server:
        with byre.open(name_of(server.path, keys.client), format="raw", read_only=False) as image:
            assert image.read(0, SIZE) == CONTENT
            image.write(0, b"secret" * 100_000)
            assert image.read(0, 600_000) == b"secret" * 100_000
        with pytest.raises(AccessDenied):
            byre.open(name_of(server.path, keys.stranger), format="raw")
        with pytest.raises(AccessDenied, match="demands TLS"):
            byre.open(server.uri, format="raw")
    with nbdkit(tmp_path, "--tls=require", f"--tls-certificates={keys.server}", "file", str(disk)) as server:
        with byre.open(name_of(server.path, keys.client), format="raw") as image:
            assert image.read(0, 600_000) == b"secret" * 100_000
        with pytest.raises(AccessDenied):
            byre.open(name_of(server.path, keys.client, **{"tls-hostname": "x.example"}), format="raw")


def test_a_server_that_is_not_what_was_meant(tmp_path: Path, keys: Keys) -> None:
    from support.nbd_servers import scripted

    def after_starttls(sock) -> None:  # type: ignore[no-untyped-def]
        from byre.nbd import handshake
        from support.nbd_servers import take

        sock.sendall(b"NBDMAGICIHAVEOPT\0\3")
        take(sock, 20)
        # Words in the clear behind the acknowledgement are no TLS, and nothing of them counts.
        sock.sendall(
            handshake.encode_option_reply(handshake.OPT_STARTTLS, handshake.REP_ACK) + b"GO ahead, no need for TLS"
        )
        sock.recv(1000)

    with scripted(tmp_path, after_starttls) as server, pytest.raises(ProtocolError, match="TLS"):
        byre.open(name_of(server.path, keys.client), format="raw")
