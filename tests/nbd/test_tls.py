"""TLS of the NBD server: credentials, who gets in, nothing in the clear, and peers as clients."""

from __future__ import annotations

import os
import random
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from byre.errors import AccessDenied, ByreError, InvalidArgument, NotSupported, ProtocolError
from byre.exports.nbd import NbdExport
from byre.nbd import handshake, wire
from byre.nbd.authorization import Authorization
from byre.nbd.connection import Settings
from byre.nbd.tls import Credentials, TlsStream, client_context, distinguished_name, server_context
from byre.protocols.memory import MemoryNode
from conftest import Run, peer_program
from support.certificates import issue, make_authority
from support.nbd_talk import GREETING, Served, Talk, image_of, in_thread, named, serving, wait_until

CONTENT = random.Random(8).randbytes(1 << 20)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Credentials by name: server, client, and a stranger's whose certificate another authority signed."""
    top = tmp_path_factory.mktemp("tls")
    authority, other = make_authority(top / "ca"), make_authority(top / "other-ca", "Other CA")
    return {
        "ca": authority,
        "server": issue(authority, top / "server", "server", "localhost"),
        "client": issue(authority, top / "client", "client", "laptop.example.com"),
        "stranger": issue(other, top / "stranger", "client", "laptop.example.com"),
    }


def server_credentials(folder: Path, *, verify: bool = True) -> Credentials:
    return Credentials("tls0", "x509", "server", str(folder), verify)


def client_side(folder: Path) -> ssl.SSLContext:
    return client_context(Credentials("tls0", "x509", "client", str(folder)))


@pytest.fixture
def exports() -> Iterator[NbdExport]:
    with image_of(MemoryNode(CONTENT)) as image:
        yield NbdExport(image, writable=True)


def settings(folders: dict[str, Path], **more: object) -> Settings:
    return Settings(server_context(server_credentials(folders["server"])), handshake_seconds=2.0, **more)  # type: ignore[arg-type]


@pytest.fixture
def served(folders: dict[str, Path], exports: NbdExport, tmp_path: Path) -> Iterator[Served]:
    with serving(tmp_path / "s", exports, settings=settings(folders)) as server:
        yield server


class Secure(Talk):
    """A :class:`Talk` that goes through TLS."""

    def __init__(self, path: Path, context: ssl.SSLContext, name: str = "localhost") -> None:
        super().__init__(path)
        super().greet()
        assert self.option(handshake.OPT_STARTTLS) == [(handshake.REP_ACK, b"")]
        self.stream = TlsStream(self.socket, context, server_side=False, server_hostname=name)
        self.stream.handshake()
        self._secure = True

    _secure = False

    def greet(self) -> None:
        pass

    def send(self, data: bytes) -> None:
        if self._secure:
            self.stream.send_all((data,))
        else:
            super().send(data)

    def receive(self, length: int) -> bytes:
        if not self._secure:
            return super().receive(length)
        buffer = bytearray(length)
        view = memoryview(buffer)
        while view:
            count = self.stream.recv_into(view)
            if not count:
                raise EOFError
            view = view[count:]
        return bytes(buffer)


class TestServing:
    @pytest.mark.parametrize("mode", ["simple", "structured", "extended"])
    def test_reads_and_writes(self, served: Served, folders: dict[str, Path], mode: str) -> None:
        with Secure(served.path, client_side(folders["client"])) as talk:
            talk.start(mode)
            for offset, length in ((0, 512), (5, 70000), (0, 300_000), (0, 1 << 20)):
                assert talk.read(offset, length) == CONTENT[offset : offset + length]
            for length in (512, 70_000, 400_000):
                assert talk.write(100, CONTENT[:length]) == 0
                assert talk.read(100, length) == CONTENT[:length]
            assert talk.ask(wire.CMD_FLUSH).error == 0

    def test_answers_while_others_are_sent(self, served: Served, folders: dict[str, Path]) -> None:
        """One thread receives while others send: the session must not mind."""
        with Secure(served.path, client_side(folders["client"])) as talk:
            talk.start("structured")

            def ask() -> None:
                for _ in range(200):
                    talk.request(wire.CMD_READ, 4096, 20_000)
                    talk.request(wire.CMD_FLUSH)

            thread = in_thread(ask)
            lengths = [sum(len(data) for _, data in talk.reply()[1].chunks) for _ in range(400)]
            thread.join()
            assert sorted(set(lengths)) == [0, 20_008]

    def test_nothing_in_the_clear(self, served: Served) -> None:
        with Talk(served.path) as talk:
            talk.greet()
            for option in (handshake.OPT_LIST, handshake.OPT_GO, handshake.OPT_INFO, handshake.OPT_STRUCTURED_REPLY):
                assert talk.option(option, named(""))[-1][0] == handshake.REP_ERR_TLS_REQD
            talk.send(handshake.encode_option(handshake.OPT_EXPORT_NAME))
            assert talk.ended()

    def test_optional_tls(self, folders: dict[str, Path], exports: NbdExport, tmp_path: Path) -> None:
        with serving(tmp_path / "s", exports, settings=settings(folders, tls_required=False)) as served:
            with Talk(served.path) as talk:
                assert talk.start().read(0, 512) == CONTENT[:512]
            with Secure(served.path, client_side(folders["client"])) as talk:
                assert talk.start().read(0, 512) == CONTENT[:512]

    def test_what_is_injected_before_tls_does_not_count(self, served: Served, folders: dict[str, Path]) -> None:
        """An option that somebody slipped in behind STARTTLS is dropped, or breaks the TLS handshake."""
        with Talk(served.path) as talk:
            talk.receive(18)
            talk.send(
                GREETING + handshake.encode_option(handshake.OPT_STARTTLS) + handshake.encode_option(handshake.OPT_LIST)
            )
            assert talk.option_replies() == [(handshake.REP_ACK, b"")]
            stream = TlsStream(
                talk.socket, client_side(folders["client"]), server_side=False, server_hostname="localhost"
            )
            stream.handshake()
            stream.send_all((handshake.encode_option(handshake.OPT_ABORT),))
            view = memoryview(bytearray(100))
            count = stream.recv_into(view)
            assert handshake.decode_option_reply(bytes(view[:20])).option == handshake.OPT_ABORT
            assert count == 20

    def test_strangers_are_refused(self, served: Served, folders: dict[str, Path]) -> None:
        context = client_side(folders["stranger"])
        context.load_verify_locations(folders["ca"] / "ca-cert.pem")
        with pytest.raises((ByreError, EOFError, OSError)), Secure(served.path, context) as talk:
            talk.start()
        wait_until(lambda: any("certificate" in line for line in served.reports))

    def test_clients_without_a_certificate_are_refused_unless_verify_peer_is_off(
        self, served: Served, folders: dict[str, Path], exports: NbdExport, tmp_path: Path
    ) -> None:
        bare = tmp_path / "bare"
        bare.mkdir()
        shutil.copy(folders["ca"] / "ca-cert.pem", bare)
        with pytest.raises((ByreError, EOFError, OSError)), Secure(served.path, client_side(bare)) as talk:
            talk.start()
        open_to_all = Settings(server_context(server_credentials(folders["server"], verify=False)))
        with (
            image_of(MemoryNode(CONTENT)) as image,
            serving(tmp_path / "s2", NbdExport(image), settings=open_to_all) as other,
            Secure(other.path, client_side(bare)) as talk,
        ):
            assert talk.start().read(0, 512) == CONTENT[:512]

    def test_the_server_s_name_is_checked(self, served: Served, folders: dict[str, Path]) -> None:
        with pytest.raises(AccessDenied), Secure(served.path, client_side(folders["client"]), "elsewhere"):
            pass

    @pytest.mark.parametrize(
        ("rule", "welcome"), [("O=Tests,CN=laptop.example.com", True), ("O=Tests,CN=other", False)]
    )
    def test_authorization(
        self, folders: dict[str, Path], exports: NbdExport, tmp_path: Path, rule: str, welcome: bool
    ) -> None:
        authorization = Authorization.parse(f"authz-simple,id=a,identity={rule.replace(',', ',,')}")
        with serving(tmp_path / "s", exports, settings=settings(folders, authorize=authorization.allows)) as served:
            try:
                with Secure(served.path, client_side(folders["client"])) as talk:
                    assert talk.start().read(0, 1) == CONTENT[:1]
                    assert welcome
            except (ByreError, EOFError, OSError):
                assert not welcome
                words = "authz check for O=Tests,CN=laptop.example.com is denied"
                wait_until(lambda: any(words in line for line in served.reports))

    def test_a_handshake_that_stalls_ends(self, served: Served) -> None:
        with Talk(served.path) as talk:
            talk.greet()
            talk.option(handshake.OPT_STARTTLS)
            talk.send(b"\x16\x03\x01")
            assert talk.ended()

    def test_garbage_instead_of_tls(self, served: Served) -> None:
        with Talk(served.path) as talk:
            talk.greet()
            talk.option(handshake.OPT_STARTTLS)
            talk.send(os.urandom(2000))
            assert talk.ended()

    def test_tls_1_1_is_refused(self, served: Served, folders: dict[str, Path]) -> None:
        assert server_context(server_credentials(folders["server"])).minimum_version >= ssl.TLSVersion.TLSv1_2
        assert client_side(folders["client"]).minimum_version >= ssl.TLSVersion.TLSv1_2


class TestCredentials:
    def test_parse(self) -> None:
        found = Credentials.parse("tls-creds-x509,id=tls0,endpoint=server,dir=/x,verify-peer=off,passwordid=p")
        assert found == Credentials("tls0", "x509", "server", "/x", False, password_id="p")
        as_json = '{"qom-type": "tls-creds-x509", "id": "t", "dir": "/y", "verify-peer": false}'
        assert Credentials.parse(as_json) == Credentials("t", "x509", "client", "/y", False)
        assert Credentials.parse("tls-creds-psk,id=t,dir=/y,username=me").username == "me"

    @pytest.mark.parametrize(
        "text",
        ["tls-creds-x509", "tls-creds-x509,id=a", "tls-creds-x509,id=a,dir=/x,endpoint=both",
         "tls-creds-x509,id=a,dir=/x,y=z",
         "tls-creds-anon,id=a", "secret,id=a,data=x", "tls-creds-x509,id=a,dir=/x,priority=SECURE256"],
    )  # fmt: skip
    def test_refused(self, text: str) -> None:
        with pytest.raises(ByreError):
            Credentials.parse(text)

    def test_files_that_are_missing_or_do_not_fit(self, folders: dict[str, Path], tmp_path: Path) -> None:
        with pytest.raises(ByreError, match=r"ca-cert\.pem"):
            server_context(server_credentials(tmp_path))
        with pytest.raises(InvalidArgument, match="server endpoint"):
            server_context(Credentials("t", "x509", "client", str(folders["client"])))
        mixed = tmp_path / "mixed"
        shutil.copytree(folders["server"], mixed)
        shutil.copy(folders["client"] / "client-key.pem", mixed / "server-key.pem")
        with pytest.raises(ByreError, match="certificate"):
            server_context(server_credentials(mixed))
        (mixed / "server-cert.pem").write_text("no certificate")
        with pytest.raises(ByreError, match=r"server-cert\.pem"):
            server_context(server_credentials(mixed))

    def test_an_encrypted_key(self, folders: dict[str, Path], tmp_path: Path) -> None:
        locked = tmp_path / "locked"
        shutil.copytree(folders["server"], locked)
        command = ["openssl", "pkcs8", "-topk8", "-in", folders["server"] / "server-key.pem",
                   "-out", locked / "server-key.pem", "-passout", "pass:open sesame"]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)
        credentials = Credentials("t", "x509", "server", str(locked), password_id="key")
        server_context(credentials, {"key": b"open sesame"})
        with pytest.raises(ByreError):
            server_context(credentials, {"key": b"wrong"})
        with pytest.raises(ByreError, match="passwordid"):
            server_context(credentials._replace(password_id=""))

    def test_keys(self, tmp_path: Path) -> None:
        (tmp_path / "keys.psk").write_text("# comment\nqemu:00ff11\nother:zz\n")
        credentials = Credentials("t", "psk", "server", str(tmp_path))
        if sys.version_info >= (3, 13):
            with pytest.raises(InvalidArgument, match="line 3"):
                server_context(credentials)
        else:
            with pytest.raises(NotSupported, match=r"3\.13"):
                server_context(credentials)

    def test_names(self) -> None:
        subject = ((("countryName", "GB"),), (("organizationName", "A, B"),), (("commonName", "#x "),))
        assert distinguished_name({"subject": subject}) == "C=GB,O=A\\, B,CN=\\#x\\ "
        assert distinguished_name(None) == ""


class TestAuthorization:
    def test_list(self) -> None:
        found = Authorization.parse(
            "authz-list,id=a,policy=deny,rules.0.match=CN=bad*,rules.0.policy=deny,rules.0.format=glob,"
            "rules.1.match=CN=*,rules.1.policy=allow,rules.1.format=glob,rules.2.match=O=x,rules.2.policy=allow"
        )
        assert [found.allows(name) for name in ("CN=bad1", "CN=good", "O=x", "O=y", "")] == [
            False,
            True,
            True,
            False,
            False,
        ]
        assert Authorization.parse('{"qom-type": "authz-list", "id": "a", "policy": "allow"}').allows("anybody")

    @pytest.mark.parametrize(
        "text",
        ["authz-simple,id=a", "authz-simple,identity=x", "authz-list,id=a,policy=maybe", "authz-pam,id=a",
         "authz-list-file,id=a", "authz-list-file,id=a,filename=/nowhere/list",
         "authz-list,id=a,rules.0.match=x", "authz-list,id=a,rules.1.match=x,rules.1.policy=allow"],
    )  # fmt: skip
    def test_refused(self, text: str) -> None:
        with pytest.raises(ByreError):
            Authorization.parse(text)

    @pytest.mark.parametrize("kind", ["authz-list-file", "authz-listfile"])
    def test_list_in_a_file(self, tmp_path: Path, kind: str) -> None:
        path = tmp_path / "list"
        path.write_text('{"rules": [{"match": "CN=a*", "policy": "allow", "format": "glob"}], "policy": "deny"}')
        fresh = Authorization.parse(f"{kind},id=a,filename={path}")
        fixed = Authorization.parse(f'{{"qom-type": "{kind}", "id": "a", "filename": "{path}", "refresh": false}}')
        assert [(fresh.allows(name), fixed.allows(name)) for name in ("CN=alice", "CN=bob")] == [
            (True, True), (False, False),
        ]  # fmt: skip
        path.write_text('{"rules": [{"match": "CN=bob", "policy": "allow"}]}')
        assert (fresh.allows("CN=alice"), fresh.allows("CN=bob")) == (False, True)
        assert (fixed.allows("CN=alice"), fixed.allows("CN=bob")) == (True, False)
        for nonsense in ("{", "[]", '{"policy": "maybe"}', '{"x": 1, "policy": "allow"}', " " * (1 << 20) + "{}"):
            path.write_text(nonsense)
            assert not fresh.allows("CN=bob")  # nobody can tell
            with pytest.raises(ByreError, match=str(path)):
                Authorization.parse(f"{kind},id=a,filename={path}")
        path.write_text('{"policy": "allow"}')
        assert fresh.allows("CN=bob")


class TestStream:
    def test_many_threads_send_at_once(self, folders: dict[str, Path]) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            server = TlsStream(ours, server_context(server_credentials(folders["server"])), server_side=True)
            client = TlsStream(theirs, client_side(folders["client"]), server_side=False, server_hostname="localhost")
            thread = threading.Thread(target=server.handshake)
            thread.start()
            client.handshake()
            thread.join()
            assert server.peer_name == "O=Tests,CN=laptop.example.com"
            assert server.version in ("TLSv1.2", "TLSv1.3")

            def send(number: int) -> None:
                for _ in range(50):
                    server.send_all((struct.pack(">II", number, 30_000), bytes([number]) * 30_000))

            threads = [threading.Thread(target=send, args=(number,)) for number in range(1, 5)]
            for thread in threads:
                thread.start()
            buffer = memoryview(bytearray(30_008))
            for _ in range(200):
                view = buffer
                while view:
                    view = view[client.recv_into(view) :]
                number, length = struct.unpack_from(">II", buffer)
                assert buffer[8:] == bytes([number]) * length
            for thread in threads:
                thread.join()

    def test_broken_records(self, folders: dict[str, Path]) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            server = TlsStream(ours, server_context(server_credentials(folders["server"])), server_side=True)
            theirs.sendall(b"no TLS at all, but long enough to be looked at")
            with pytest.raises(ProtocolError):
                server.handshake()


@pytest.mark.oracle
class TestPeers:
    def options(self, folders: dict[str, Path], served: Served, **more: str) -> list[str]:
        folder = more.pop("folder", str(folders["client"]))
        name = more.pop("name", "localhost")
        return ["--object", f"tls-creds-x509,id=t,endpoint=client,dir={folder}", "--image-opts",
                f"driver=nbd,path={served.path},tls-creds=t,tls-hostname={name}"]  # fmt: skip

    def test_qemu_img_and_qemu_io(self, served: Served, folders: dict[str, Path], qemu_img: Run, qemu_io: Run) -> None:
        assert "1 MiB" in qemu_img("info", *self.options(folders, served)).stdout
        commands = ["-c", "write -P 7 4k 300k", "-c", "read -P 7 4k 300k", "-c", "flush"]
        assert "failed" not in qemu_io(*commands, *self.options(folders, served)).stdout
        assert qemu_img("info", *self.options(folders, served, name="elsewhere"), check=False).returncode
        refused = qemu_img("info", *self.options(folders, served, folder=str(folders["stranger"])), check=False)
        assert refused.returncode

    def test_nbdcopy(self, served: Served, folders: dict[str, Path], tmp_path: Path) -> None:
        uri = f"nbds+unix://localhost/?socket={served.path}&tls-certificates={folders['client']}&tls-hostname=localhost"
        out = tmp_path / "out"
        done = subprocess.run([peer_program("nbdcopy"), uri, out], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert out.read_bytes() == CONTENT
