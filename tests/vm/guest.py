"""A small Linux for a virtual machine, made of Debian's own packages: kernel, virtio modules and busybox.

``python3 tests/vm/guest.py FOLDER`` makes ``vmlinuz`` and ``initramfs`` there, once; ``make vm-guest`` does it in
build/vm. Nothing needs root. The initramfs loads the drivers and hands over to ``/sbin/init`` of the file system on
the first disk, which :func:`make_disk` fills: what a test wants done is a shell script there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["Guest", "find", "make", "make_disk"]

KERNEL_PACKAGE = "linux-image-cloud-amd64"
MODULES = ("virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk")
"""In the order in which they are loaded; all else is built into that kernel."""

_FIRST = """\
#!/bin/busybox sh
busybox=/bin/busybox
$busybox mount -t proc proc /proc
$busybox mount -t sysfs sys /sys
$busybox mount -t devtmpfs dev /dev
for module in {modules}; do $busybox insmod /$module.ko; done
tries=0
while [ ! -b /dev/vda ] && [ $tries -lt 300 ]; do $busybox usleep 100000; tries=$((tries + 1)); done
$busybox mount -t ext4 /dev/vda /root || $busybox poweroff -f
for folder in proc sys dev; do $busybox mount -o move /$folder /root/$folder; done
exec $busybox switch_root /root /sbin/init
"""

_INIT = """\
#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
exec </dev/console >/dev/console 2>&1
echo guest: running
sh -e /task && echo guest: done || echo guest: failed
sync
mount -o remount,ro /
poweroff -f
"""


class Guest(NamedTuple):
    """What the emulator boots, and the program that file systems for it are made of."""

    kernel: Path
    initramfs: Path
    busybox: Path


def find(folder: Path) -> Guest | None:
    """What :func:`make` has made; ``None`` if it has not."""
    found = Guest(folder / "vmlinuz", folder / "initramfs", folder / "busybox")
    return found if all(path.exists() for path in found) else None


def make(folder: Path) -> None:
    """Fetch the packages and make the guest in ``folder``.

    :raises subprocess.CalledProcessError: no package of these names is known to apt
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        unpacked = Path(name)
        for package in (_kernel_package(), "busybox-static"):
            _run("apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", package, folder=unpacked)
        for path in unpacked.glob("*.deb"):
            _run("dpkg-deb", "-x", str(path), str(unpacked))
        modules = {path.stem: path.read_bytes() for path in unpacked.glob("lib/modules/*/kernel/drivers/*/*.ko")}
        busybox = unpacked / "bin" / "busybox"
        shutil.copy(busybox, folder / "busybox")
        shutil.copy(next(unpacked.glob("boot/vmlinuz-*")), folder / "vmlinuz")
        (folder / "initramfs").write_bytes(_initramfs(busybox.read_bytes(), {name: modules[name] for name in MODULES}))


def make_disk(path: Path, guest: Guest, task: str, *, megabytes: int = 64, options: str = "") -> None:
    """An ext4 file system that the guest runs from, sparse; at boot it runs the script ``task`` and powers off.

    :param options: for mke2fs -E
    """
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for folder in ("bin", "sbin", "dev", "proc", "sys", "mnt"):
            (root / folder).mkdir()
        shutil.copy(guest.busybox, root / "bin" / "busybox")
        (root / "task").write_text(task)
        (root / "sbin" / "init").write_text(_INIT)
        (root / "sbin" / "init").chmod(0o755)
        path.unlink(missing_ok=True)
        more = ("-E", options) if options else ()
        _run("mke2fs", "-q", "-t", "ext4", *more, "-d", str(root), str(path), f"{megabytes}M")


def _kernel_package() -> str:
    """The package that the name without a version depends on."""
    known = _run("apt-cache", "depends", KERNEL_PACKAGE)
    found = re.search(r"Depends: (linux-image-\d\S*)", known)
    if found is None:
        raise SystemExit(f"{KERNEL_PACKAGE} is not known to apt: run apt-get update on Debian")
    return found[1]


def _run(*command: str, folder: Path | None = None) -> str:
    environment = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin", "LC_ALL": "C"}
    return subprocess.run(command, cwd=folder, env=environment, check=True, text=True, stdout=subprocess.PIPE).stdout


def _initramfs(busybox: bytes, modules: dict[str, bytes]) -> bytes:
    script = _FIRST.format(modules=" ".join(modules)).encode()
    files = [(name, 0o40755, b"") for name in ("bin", "dev", "proc", "sys", "root")]
    files += [("bin/busybox", 0o100755, busybox), ("init", 0o100755, script)]
    files += [(f"{name}.ko", 0o100644, data) for name, data in modules.items()]
    return b"".join(_archive([*files, ("TRAILER!!!", 0, b"")]))


def _archive(files: list[tuple[str, int, bytes]]) -> Iterator[bytes]:
    """An archive in the "new ASCII" format of cpio(5), with /dev/console in front, which the first process needs."""
    yield _entry(1, "dev", 0o40755, b"")
    yield _entry(2, "dev/console", 0o20600, b"", device=(5, 1))
    for number, (name, mode, data) in enumerate(files, 3):
        yield _entry(number, name, mode, data)


def _entry(number: int, name: str, mode: int, data: bytes, device: tuple[int, int] = (0, 0)) -> bytes:
    raw = name.encode() + b"\0"
    fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(raw), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + raw
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    if find(target) is None:
        make(target)
