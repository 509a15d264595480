"""``byre serve`` and the program name ``qemu-nbd``: options, messages, how it starts and how it ends."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import byre
from byre.formats.abilities import HasBitmaps, HasSnapshots
from byre.graph.creating import create
from byre.nbd import wire
from conftest import Run
from support.certificates import issue, make_authority
from support.nbd_talk import Talk, listens, wait_until

SIZE = 1 << 20
BYRE = [sys.executable, "-m", "byre"]


@pytest.fixture
def sock(tmp_path: Path) -> Path:
    return tmp_path / "nbd.sock"


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"r" * SIZE)
    return path


@pytest.fixture
def qcow2(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    create(str(path), "qcow2", SIZE)
    with byre.open(path, read_only=False) as image:
        image.write(0, b"q" * SIZE)
    return path


@contextmanager
def serving(sock: Path, *arguments: object, program: list[str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """``byre serve`` on ``sock``, until the end of the block at the latest."""
    command = [*(program or [*BYRE, "serve"]), "-k", str(sock), *map(str, arguments)]
    sock.unlink(missing_ok=True)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: listens(sock) or process.poll() is not None, 20)
            if process.poll() is not None:
                raise AssertionError(f"it ended with {process.returncode}: {process.communicate()}")
            yield process
        finally:
            process.kill()


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """(exit code, stderr), within the time a server has to end."""
    err = process.communicate(timeout=6)[1]
    return process.returncode, err


def run(*arguments: object, program: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*(program or [*BYRE, "serve"]), *map(str, arguments)], capture_output=True, text=True, timeout=30,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.fixture
def as_peer(tmp_path: Path) -> list[str]:
    folder = tmp_path / "bin"
    subprocess.run([*BYRE, "links", "-q", str(folder)], check=True)
    return [str(folder / "qemu-nbd")]


class TestLife:
    def test_it_ends_when_the_last_client_has_left(self, raw: Path, sock: Path) -> None:
        with serving(sock, "-f", "raw", "-e", "2", raw) as process:
            assert stat.S_IMODE(sock.stat().st_mode) == 0o600
            with Talk(sock):
                pass  # left before it had begun: that does not count
            with Talk(sock) as first, Talk(sock) as second:
                first.start()
                second.start()
                first.request(wire.CMD_DISC)
                assert second.read(0, 4) == b"rrrr"
            assert ended(process) == (0, "")
        assert not sock.exists()

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    def test_signals_end_it_cleanly(self, qcow2: Path, sock: Path, number: int) -> None:
        with (
            serving(sock, "-t", "-e", "3", qcow2) as process,
            Talk(sock) as talk,
            Talk(sock) as mute,
        ):
            mute.greet()
            talk.start()
            assert talk.write(0, b"new " * 1024) == 0
            process.send_signal(number)
            assert ended(process) == (0, "")
        assert not sock.exists()
        with byre.open(qcow2) as image:
            assert image.read(0, 4096) == b"new " * 1024
            assert not getattr(image.node, "dirty", False)

    def test_fork_returns_when_clients_can_connect(self, raw: Path, sock: Path, tmp_path: Path) -> None:
        pid_file = tmp_path / "pid"
        done = run("--fork", "--pid-file", pid_file, "-t", "-f", "raw", "-k", sock, raw)
        pid = int(pid_file.read_text())
        try:
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
            with Talk(sock) as talk:
                assert talk.start().read(0, 4) == b"rrrr"
            assert "another server does so already" in run("--fork", "-k", sock, raw).stderr
            assert run("--fork", "-k", tmp_path / "other", "--pid-file", pid_file, raw).returncode == 1
        finally:
            os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not Path(f"/proc/{pid}").exists())
        assert not pid_file.exists()
        assert not sock.exists()

    def test_a_warning_is_no_failure_of_fork(self, tmp_path: Path, sock: Path) -> None:
        base, top = tmp_path / "base.raw", tmp_path / "top.qcow2"
        base.write_bytes(b"b" * SIZE)
        create(str(top), "qcow2", SIZE, options={"backing_file": str(base), "backing_fmt": "raw"})
        subprocess.run(["qemu-img", "rebase", "-u", "-b", str(base), "-F", "", str(top)], capture_output=True)
        pid_file = tmp_path / "pid"
        done = run("--fork", "--pid-file", pid_file, "-t", "-k", sock, top)
        try:
            assert done.returncode == 0, done.stderr
        finally:
            os.kill(int(pid_file.read_text()), signal.SIGTERM)

    def test_a_second_signal_does_not_cut_the_end_short(self, qcow2: Path, sock: Path) -> None:
        with serving(sock, "-t", qcow2) as process:
            with Talk(sock) as talk:
                talk.start()
                assert talk.write(0, b"last" * 16384) == 0
                for _ in range(20):
                    process.send_signal(signal.SIGTERM)
                    time.sleep(0.005)
            assert ended(process) == (0, "")
        with byre.open(qcow2) as image:
            assert image.read(0, 65536) == b"last" * 16384

    def test_a_failure_behind_fork_reaches_the_caller(self, tmp_path: Path, sock: Path) -> None:
        done = run("--fork", "-k", sock, tmp_path / "none")
        assert done.returncode == 1
        assert "No such file" in done.stderr

    def test_socket_activation(self, raw: Path, tmp_path: Path) -> None:
        path = tmp_path / "activated"
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(path))
        listening.listen()
        script = (
            "import os, sys; os.dup2(int(sys.argv[1]), 3); "
            "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1'); os.execv(sys.argv[2], sys.argv[2:])"
        )
        command = [sys.executable, "-c", script, str(listening.fileno()), *BYRE, "serve", "-f", "raw"]
        with subprocess.Popen(
            [*command, str(raw)], pass_fds=[listening.fileno()], stderr=subprocess.PIPE, text=True
        ) as process:
            with Talk(path) as talk:
                assert talk.start().read(0, 4) == b"rrrr"
            assert ended(process)[0] == 0
        done = subprocess.run(
            [*command, "-k", "/x", str(raw)], pass_fds=[listening.fileno()], capture_output=True, text=True
        )
        assert "Unix socket can't be set when using socket activation" in done.stderr
        listening.close()

    def test_tcp_is_local_unless_asked(self, raw: Path, tmp_path: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [*BYRE, "serve", "-f", "raw", "-p", str(port), str(raw)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            try:
                wait_until(lambda: f"0100007F:{port:04X} 00000000:0000 0A" in Path("/proc/net/tcp").read_text(), 20)
                with socket.create_connection(("127.0.0.1", port)) as client:
                    assert client.recv(8) == b"NBDMAGIC"
            finally:
                process.kill()


class TestWhatIsServed:
    def test_read_only(self, raw: Path, sock: Path) -> None:
        with serving(sock, "-r", "-f", "raw", raw), Talk(sock) as talk:
            talk.start()
            assert talk.flags & wire.TRANSMISSION_READ_ONLY
            assert talk.write(0, b"x") == 1

    @pytest.mark.parametrize("format", ["raw", "qcow2"])
    def test_snapshot_keeps_the_image_as_it_is(
        self, request: pytest.FixtureRequest, sock: Path, tmp_path: Path, format: str
    ) -> None:
        path = request.getfixturevalue(format)
        before = path.read_bytes()
        environment_folder = tmp_path / "tmp"
        environment_folder.mkdir()
        program = ["env", f"TMPDIR={environment_folder}", *BYRE, "serve"]
        with serving(sock, "-s", "-f", format, path, program=program), Talk(sock) as talk:
            talk.start()
            assert talk.write(100, b"changed") == 0
            assert talk.read(98, 11)[2:9] == b"changed"
            assert list(environment_folder.iterdir()) == []
        assert path.read_bytes() == before

    def test_internal_snapshot(self, qcow2: Path, sock: Path) -> None:
        with byre.open(qcow2, read_only=False) as image:
            assert isinstance(image.node, HasSnapshots)
            image.create_snapshot("then")
            image.write(0, b"now!")
        for parameter in ("then", "snapshot.name=then"):
            with serving(sock, "-l", parameter, qcow2) as process:
                with Talk(sock) as talk:
                    assert talk.start().read(0, 4) == b"qqqq"
                    assert talk.flags & wire.TRANSMISSION_READ_ONLY
                assert ended(process)[0] == 0
        assert "Failed to load snapshot" in run("-k", sock, "-l", "never", qcow2).stderr

    @pytest.mark.parametrize("format", ["raw", "qcow2"])
    def test_offset(self, request: pytest.FixtureRequest, sock: Path, format: str) -> None:
        path = request.getfixturevalue(format)
        with byre.open(path, format=format, read_only=False) as image:
            image.write(4096, b"here")
        with serving(sock, "-o", "4096", "-f", format, path), Talk(sock) as talk:
            talk.start()
            assert talk.size == SIZE - 4096
            assert talk.read(0, 4) == b"here"
            assert talk.write(0, b"HERE") == 0

    def test_name_description_depth_and_bitmap(self, qcow2: Path, sock: Path) -> None:
        with byre.open(qcow2, read_only=False) as image:
            assert isinstance(image.node, HasBitmaps)
            image.node.bitmap_store().add("b0")
            image.write(65536, b"x")
        arguments = ("-x", "disk", "-D", "my disk", "-A", "-B", "b0", "-f", "qcow2", qcow2)
        with serving(sock, "-t", *arguments) as process:
            done = run("-L", "-k", sock)
            assert done.stdout == (
                "exports available: 1\n export: 'disk'\n  description: my disk\n  size:  1048576\n"
                "  flags: 0x1ced ( flush fua trim zeroes df cache fast-zero block-status-payload )\n"
                "  min block: 1\n  opt block: 4096\n  max block: 33554432\n  transaction size: 64-bit\n"
                "  available meta contexts: 3\n   base:allocation\n   qemu:allocation-depth\n   qemu:dirty-bitmap:b0\n"
            )
            with Talk(sock) as talk:
                talk.start("structured", "disk", ("qemu:dirty-bitmap:b0",))
                assert talk.status(0, SIZE) == {2: [(65536, 0), (65536, 1), (SIZE - 131072, 0)]}
            process.send_signal(signal.SIGTERM)
            assert ended(process)[0] == 0
        assert "Bitmap 'none' is not found" in run("-k", sock, "-B", "none", qcow2).stderr

    def test_image_opts_and_detect_zeroes(self, qcow2: Path, sock: Path) -> None:
        options = f"driver=qcow2,file.driver=file,file.filename={qcow2}"
        more = ("--discard", "unmap", "--detect-zeroes", "unmap", "--cache", "writethrough", "--aio", "io_uring")
        with serving(sock, *more, "--image-opts", options), Talk(sock) as talk:
            talk.start("structured", contexts=("base:allocation",))
            assert talk.write(0, bytes(65536)) == 0
            assert talk.status(0, 131072) == {0: [(65536, 3), (65536, 0)]}

    def test_discards_are_ignored_unless_asked_for(self, qcow2: Path, sock: Path) -> None:
        with serving(sock, "-f", "qcow2", qcow2), Talk(sock) as talk:
            talk.start()
            assert talk.ask(wire.CMD_TRIM, 0, 65536).error == 0
            assert talk.read(0, 4) == b"qqqq"

    def test_tls(self, raw: Path, sock: Path, tmp_path: Path, qemu_img: Run) -> None:
        authority = make_authority(tmp_path / "ca")
        server = issue(authority, tmp_path / "server", "server", "localhost")
        client = issue(authority, tmp_path / "client", "client", "laptop")
        own = ("--object", f"tls-creds-x509,id=t,endpoint=server,dir={server}", "--tls-creds", "t")
        theirs = ["--object", f"tls-creds-x509,id=t,endpoint=client,dir={client}", "--image-opts",
                  f"driver=nbd,path={sock},tls-creds=t,tls-hostname=localhost"]  # fmt: skip
        with serving(sock, "-t", *own, "-f", "raw", raw):
            assert "1 MiB" in qemu_img("info", *theirs).stdout
            assert qemu_img("info", f"nbd+unix:///?socket={sock}", check=False).returncode
            listing = run("-L", "-k", sock, *theirs[:2], "--tls-creds", "t", "--tls-hostname", "localhost")
            assert "exports available: 1" in listing.stdout, listing.stderr
        for identity, code in (("O=Tests,,CN=laptop", 0), ("O=Tests,,CN=other", 1)):
            authz = ("--object", f"authz-simple,id=z,identity={identity}", "--tls-authz", "z")
            with serving(sock, "-t", *own, *authz, "-f", "raw", raw):
                assert qemu_img("info", *theirs, check=False).returncode == code


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ((), "Invalid number of arguments"),
            (("a", "b"), "Invalid number of arguments"),
            (("--cache", "soon", "x"), "Invalid cache mode `soon'"),
            (("-n", "--cache", "none", "x"), "-n and --cache can only be specified once"),
            (("--aio", "sometimes", "x"), "Invalid aio mode 'sometimes'"),
            (("--discard", "maybe", "x"), "Invalid discard mode `maybe'"),
            (("--detect-zeroes", "unmap", "x"), "setting detect-zeroes to unmap is not allowed"),
            (("-e", "-1", "x"), "Invalid shared device number '-1'"),
            (("-e", "many", "x"), "Invalid shared device number 'many'"),
            (("-o", "far", "x"), "Invalid offset 'far'"),
            (("--handshake-limit", "x", "x"), "Invalid handshake limit 'x'"),
            (("--poll-max-ns", "soon", "x"), "Invalid polling time 'soon'"),
            (("-x", "n" * 4097, "x"), "too long"),
            (("-L", "x"), "List mode is incompatible with a file name"),
            (("-L", "-o", "1"), "List mode is incompatible with per-device settings"),
            (("-L", "--fork"), "List mode is incompatible with forking"),
            (("--tls-authz", "z", "x"), "--tls-authz is not permitted without --tls-creds"),
            (("--tls-hostname", "h", "x"), "--tls-hostname is not permitted without --tls-creds"),
            (("--tls-creds", "t", "x"), "No TLS credentials with id 't'"),
            (("--object", "secret,id=t,file=/dev/null", "--tls-creds", "t", "x"), "'t' is not TLS credentials"),
            (("--image-opts", "-f", "raw", "x"), "--image-opts and -f are mutually exclusive"),
            (("--selinux-label", "l", "x"), "SELinux support not enabled"),
            (("-c", "/dev/sda", "x"), "/dev/nbdN"),
            (("-d", "/dev/sda"), "/dev/nbdN"),
            (("--nonsense", "x"), "unrecognized option"),
        ],
    )  # fmt: skip
    def test_command_lines(self, arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
        from byre.cli.main import main

        assert main(["serve", "-p", "1", *arguments] if "-d" not in arguments else ["serve", *arguments]) == 1
        assert words in capsys.readouterr().err

    def test_an_image_that_is_not_there(self, tmp_path: Path, sock: Path, as_peer: list[str]) -> None:
        done = run("-k", sock, tmp_path / "none")
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        done = run("-k", sock, tmp_path / "none", program=as_peer)
        assert done.returncode == 1
        assert done.stderr.startswith(f"qemu-nbd: Failed to blk_new_open '{tmp_path}/none': ")
        assert not sock.exists()

    def test_a_port_that_is_taken(self, raw: Path) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            done = run("-f", "raw", "-p", taken.getsockname()[1], raw)
        assert done.returncode == 1
        assert "Address already in use" in done.stderr

    @pytest.mark.parametrize(
        ("place", "why"),
        [(("-p", "99999"), "a port is a number below 65536"), (("-p", "65536"), "below 65536"),
         (("-p", "abc"), "Servname not supported"), (("-b", "no.such.host.invalid"), "address resolution failed: ")],
    )  # fmt: skip
    def test_places_that_are_none(
        self, raw: Path, place: tuple[str, ...], why: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """One line; and never a port that nobody asked for, because the system takes its lower bits only."""
        from byre.cli.main import main

        assert main(["serve", "-f", "raw", *place, str(raw)]) == 1
        err = capsys.readouterr().err
        assert why in err
        assert err.count("\n") == 1
        assert "Errno" not in err

    def test_a_list_through_tls_needs_a_name_to_check(self, raw: Path, sock: Path, tmp_path: Path) -> None:
        """A certificate for 127.0.0.1 says nothing about who listens on a unix socket."""
        keys = issue(make_authority(tmp_path / "ca"), tmp_path / "keys", "server", "127.0.0.1")
        server = ("--object", f"tls-creds-x509,id=t,endpoint=server,dir={keys},verify-peer=off", "--tls-creds=t")
        client = ("--object", f"tls-creds-x509,id=t,endpoint=client,dir={keys}", "--tls-creds=t")
        with serving(sock, "-t", "-f", "raw", *server, raw):
            done = run("-L", "-k", sock, *client)
            assert done.returncode == 1
            assert "No hostname for certificate validation" in done.stderr
            assert "exports available: 1" in run("-L", "-k", sock, *client, "--tls-hostname=127.0.0.1").stdout

    def test_devices_where_the_kernel_has_none(self) -> None:
        if Path("/sys/module/nbd").exists():
            pytest.skip("this kernel has NBD")
        done = run("-d", "/dev/nbd0")
        assert done.returncode == 1
        assert "modprobe nbd" in done.stderr

    @pytest.mark.parametrize("nanoseconds", ["0", "1000", "50000"])
    def test_requests_one_at_a_time_with_and_without_polling(self, raw: Path, sock: Path, nanoseconds: str) -> None:
        with serving(sock, "-t", "-f", "raw", "--poll-max-ns", nanoseconds, raw), Talk(sock) as talk:
            talk.start()
            assert {talk.read(offset, 4) for offset in range(0, 400, 4)} == {b"rrrr"}

    def test_what_clients_do_wrong_is_said(self, raw: Path, sock: Path) -> None:
        with serving(sock, "-t", "-f", "raw", "--handshake-limit", "1", raw) as process:
            with Talk(sock) as talk:
                talk.send(b"\xff" * 100)
                assert talk.ended()
            with Talk(sock) as talk:
                before = time.monotonic()
                assert talk.ended()
                assert time.monotonic() - before < 2
            time.sleep(0.2)  # it says so once the connection is closed
            process.send_signal(signal.SIGTERM)
            code, err = ended(process)
        assert code == 0
        assert err.count("option negotiation failed: ") == 2


class TestAsPeer:
    def test_help_and_version(self, as_peer: list[str]) -> None:
        assert run("--help", program=as_peer).stdout.startswith("usage: qemu-nbd [OPTIONS] FILENAME\n")
        assert run("--version", program=as_peer).stdout.startswith("qemu-nbd 10.0.0 ")
        assert "byre serve" in run("--help").stdout

    def test_it_serves(self, as_peer: list[str], raw: Path, sock: Path, qemu_img: Run) -> None:
        with serving(sock, "-f", "raw", raw, program=as_peer) as process:
            assert "file format: raw" in qemu_img("info", "-f", "raw", f"nbd+unix:///?socket={sock}").stdout
            assert ended(process) == (0, "")

    def test_socket_paths_are_absolute(self, as_peer: list[str], raw: Path) -> None:
        assert "socket path must be absolute" in run("-k", "here", raw, program=as_peer).stderr

    def test_a_guess_is_said(self, as_peer: list[str], raw: Path, sock: Path) -> None:
        """Whose format nobody gave, and who may be written to, comes with the peer's warning."""
        with serving(sock, "-t", raw, program=as_peer) as process:
            with Talk(sock) as talk:
                talk.start()  # it is ready
            process.terminate()
            code, err = ended(process)
        assert code == 0
        assert err.startswith(f"WARNING: Image format was not specified for '{raw}' and probing guessed raw.\n")
        assert len(err.splitlines()) == 3
        for more in (("-r",), ("-f", "raw")):
            with serving(sock, "-t", *more, raw, program=as_peer) as process:
                with Talk(sock) as talk:
                    talk.start()
                process.terminate()
                assert ended(process) == (0, "")

    def test_what_clients_do_wrong_is_said_under_the_peer_s_name(
        self, as_peer: list[str], raw: Path, sock: Path
    ) -> None:
        with serving(sock, "-t", "-f", "raw", raw, program=as_peer) as process:
            with Talk(sock) as talk:
                talk.send(b"\xff" * 100)
                assert talk.ended()
            time.sleep(0.2)
            process.terminate()
            assert ended(process)[1].startswith("qemu-nbd: option negotiation failed: ")

    @pytest.mark.oracle
    def test_the_list_is_the_peer_s(self, as_peer: list[str], raw: Path, sock: Path, qemu_nbd: Run) -> None:
        """But for the line that newer releases have."""
        with serving(sock, "-t", "-f", "raw", "-x", "name", "-D", "words", "-A", raw):
            ours = run("-L", "-k", sock, program=as_peer).stdout
            theirs = qemu_nbd("-L", "-k", sock).stdout
        ours = (
            ours.replace("  transaction size: 64-bit\n", "")
            .replace(" block-status-payload", "")
            .replace("0x1ced", "0xced")
        )
        assert ours == theirs
