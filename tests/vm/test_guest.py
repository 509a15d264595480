"""A virtual machine as a client: it boots from a disk that byre serves, works on it, and powers off.

The emulator (qemu-system-x86_64, without hardware support) is the NBD client; the guest's own file system, its flushes,
discards and zeroes are the requests. ``make vm-guest`` gets the guest ready.
"""

from __future__ import annotations

import hashlib
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import byre
from byre.exports.nbd import NbdExport
from byre.graph.node import Stats
from conftest import Run, peer_program
from support.nbd_talk import listens, serving, wait_until
from vm.guest import Guest, find, make_disk

pytestmark = pytest.mark.oracle

BOOT_SECONDS = 240
"""It takes about ten on an idle machine."""
MB = 1 << 20


@pytest.fixture(scope="module")
def guest() -> Guest:
    if platform.machine() != "x86_64":
        pytest.skip("the guest's packages are for x86_64")
    folder = Path(os.environ.get("BYRE_VM") or Path(__file__).parents[2] / "build" / "vm")
    found = find(folder)
    if found is None:
        message = f"there is no guest in {folder}: run make vm-guest"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return found


@pytest.fixture(autouse=True)
def _tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that look into file systems (Debian package e2fsprogs) are not on every user's path."""
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin:/sbin")


def file_in(disk: Path, name: str, copy: Path) -> bytes:
    """The content of a file of the guest's, out of a file system that is sound."""
    for command in (["e2fsck", "-fn", disk], ["debugfs", "-R", f"dump {name} {copy}", disk]):
        done = subprocess.run([peer_program(str(command[0])), *map(str, command[1:])], capture_output=True)
        assert done.returncode == 0, done
    return copy.read_bytes()


def boot(guest: Guest, *disks: str) -> str:
    """Run the guest with these disks (URIs) until it powers off; what it said."""
    drives = [("-drive", f"file={uri},format=raw,if=virtio,discard=unmap") for uri in disks]
    command = [
        peer_program("qemu-system-x86_64"), "-accel", "tcg", "-m", "192", "-nodefaults", "-no-user-config",
        "-display", "none", "-serial", "stdio", "-no-reboot", "-kernel", guest.kernel, "-initrd", guest.initramfs,
        "-append", "console=ttyS0 panic=-1 quiet", *(word for drive in drives for word in drive),
    ]  # fmt: skip
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
                          timeout=BOOT_SECONDS)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "guest: done" in done.stdout, done.stdout
    assert "I/O error" not in done.stdout, done.stdout
    return done.stdout


@contextmanager
def serve(sock: Path, *arguments: object) -> Iterator[str]:
    """``byre serve``: its URI; it must end by itself when the guest has let go."""
    process = subprocess.Popen([sys.executable, "-m", "byre", "serve", "-k", str(sock), *map(str, arguments)])
    try:
        wait_until(lambda: listens(sock), 20)
        yield f"nbd+unix:///?socket={sock}"
        assert process.wait(20) == 0
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()


def byre_raw(image: Path, format: str, target: Path) -> Path:
    subprocess.run([sys.executable, "-m", "byre", "convert", "-f", format, "-O", "raw", image, target], check=True)
    return target


WRITE_A_FILE = """\
dd if=/dev/urandom of=/data bs=64k count=96 2>/dev/null
sha256sum /data >/sum
echo "sum: $(cut -d' ' -f1 /sum)"
sync
rm -f /bin/vi /task
fstrim -v /
"""


def test_it_boots_from_an_overlay(guest: Guest, qemu_img: Run, tmp_path: Path) -> None:
    """The root disk is an overlay: what the guest wrote is in it, the file below is as before, both check clean."""
    base, overlay = tmp_path / "base.raw", tmp_path / "overlay.qcow2"
    make_disk(base, guest, WRITE_A_FILE)
    before = hashlib.sha256(base.read_bytes()).digest()
    subprocess.run([sys.executable, "-m", "byre", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, overlay],
                   check=True)  # fmt: skip
    with serve(tmp_path / "s", "--discard=unmap", "-f", "qcow2", overlay) as uri:
        said = boot(guest, uri)
    (digest,) = (line.split()[-1] for line in said.splitlines() if line.startswith("sum: "))

    assert subprocess.run([sys.executable, "-m", "byre", "check", overlay], capture_output=True).returncode == 0
    qemu_img("check", overlay)
    assert hashlib.sha256(base.read_bytes()).digest() == before
    disk = byre_raw(overlay, "qcow2", tmp_path / "disk.raw")
    assert hashlib.sha256(file_in(disk, "/data", tmp_path / "data")).hexdigest() == digest


WORK_ON_ANOTHER = """\
mount -t ext4 -o discard,init_itable=0 /dev/vdb /mnt
dd if=/dev/urandom of=/mnt/data bs=64k count=64 2>/dev/null
dd if=/dev/urandom of=/mnt/gone bs=1M count=8 2>/dev/null
sync
echo "sum: $(sha256sum /mnt/data | cut -d' ' -f1)"
rm /mnt/gone
sync
fstrim -v /mnt
sleep 3
umount /mnt
dd if=/dev/vdb bs=1M count=1 2>/dev/null | sha256sum >/dev/null
"""


def test_two_disks(guest: Guest, tmp_path: Path) -> None:
    """A raw root disk and a qcow2 disk, two exports of one server; writes, flushes, discards and zeroes arrive."""
    root, plain, other = tmp_path / "root.raw", tmp_path / "plain.raw", tmp_path / "other.qcow2"
    make_disk(root, guest, WORK_ON_ANOTHER)
    make_disk(plain, guest, "", megabytes=96, options="lazy_itable_init=1")
    subprocess.run([sys.executable, "-m", "byre", "convert", "-f", "raw", "-O", "qcow2", plain, other], check=True)
    with (
        byre.open(root, format="raw", read_only=False) as first,
        byre.open(other, format="qcow2", read_only=False) as second,
        serving(tmp_path / "s", NbdExport(first, "root", writable=True), NbdExport(second, "other", writable=True)),
    ):
        said = boot(guest, *(f"nbd+unix:///{name}?socket={tmp_path / 's'}" for name in ("root", "other")))
        counts = second.stats.operation_count
        assert counts[Stats.WRITE] > 0
        assert counts[Stats.FLUSH] > 0
        assert counts[Stats.DISCARD] > 0
        assert counts[Stats.ZEROES] > 0
    (digest,) = (line.split()[-1] for line in said.splitlines() if line.startswith("sum: "))
    assert subprocess.run([sys.executable, "-m", "byre", "check", other], capture_output=True).returncode == 0
    assert file_in(root, "/task", tmp_path / "task") == WORK_ON_ANOTHER.encode()
    disk = byre_raw(other, "qcow2", tmp_path / "disk.raw")
    assert hashlib.sha256(file_in(disk, "/data", tmp_path / "data")).hexdigest() == digest
