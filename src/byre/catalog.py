"""One row per driver. Imports no driver: ``graph/opening.py`` loads the module that is needed."""

from __future__ import annotations

import sys

from .errors import InvalidArgument
from .typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["CATALOG", "Driver", "driver", "formats", "probe"]


class Driver(NamedTuple):
    """One driver.

    :ivar kind: "protocol", "format" or "filter"
    :ivar module: has ``OPTIONS``, ``open_node(request)`` and, where it can create, ``CREATE_OPTIONS``
        and ``create(request)``
    :ivar signatures: alternatives of ``(offset, bytes)`` pairs that must all match the first 2 KiB
    :ivar tails: the same in the last 512 bytes, for formats that may have nothing at the beginning
    :ivar abilities: letters, r read, w write, c create
    :ivar clue: of a format without a signature: ``matches(head)`` of its module is asked if the first 2 KiB hold this
    :ivar prefix: ``prefix:name`` selects this protocol
    :ivar more_prefixes: these do as well
    """

    name: str
    kind: str
    module: str
    summary: str
    signatures: tuple[tuple[tuple[int, bytes], ...], ...] = ()
    abilities: str = "r"
    prefix: str = ""
    tails: tuple[tuple[tuple[int, bytes], ...], ...] = ()
    more_prefixes: tuple[str, ...] = ()
    clue: bytes = b""

    def load(self) -> ModuleType:
        """The driver's module. ``importlib`` is more than start-up needs."""
        __import__(self.module)
        return sys.modules[self.module]


CATALOG: tuple[Driver, ...] = (
    Driver("file", "protocol", "byre.protocols.file", "regular file", abilities="rwc", prefix="file"),
    Driver("host_device", "protocol", "byre.protocols.file", "block device", abilities="rw", prefix="host_device"),
    Driver("host_cdrom", "protocol", "byre.protocols.file", "CD-ROM drive", abilities="rw", prefix="host_cdrom"),
    Driver("memory", "protocol", "byre.protocols.memory", "bytes in memory", abilities="rw"),
    Driver("null-co", "protocol", "byre.protocols.null", "takes everything, holds nothing", abilities="rw",
           prefix="null-co"),
    Driver("null-aio", "protocol", "byre.protocols.null", "takes everything, holds nothing", abilities="rw",
           prefix="null-aio"),
    Driver("nbd", "protocol", "byre.protocols.nbd", "export of an NBD server", abilities="rw", prefix="nbd",
           more_prefixes=("nbds", "nbd+tcp", "nbds+tcp", "nbd+unix", "nbds+unix", "nbd+vsock", "nbds+vsock")),
    Driver("vvfat", "protocol", "byre.protocols.vvfat", "a folder as a disk with FAT", prefix="fat"),
    Driver("raw", "format", "byre.formats.raw", "bytes as they are", abilities="rwc"),
    Driver("qcow2", "format", "byre.formats.qcow2", "QEMU copy-on-write, versions 2 and 3",
           (((0, b"QFI\xfb\0\0\0\2"),), ((0, b"QFI\xfb\0\0\0\3"),)), abilities="rwc"),
    Driver("luks", "format", "byre.formats.luks", "encrypted volume, LUKS version 1 (version 2 read-only)",
           (((0, b"LUKS\xba\xbe\0\1"),), ((0, b"LUKS\xba\xbe\0\2"),)), abilities="rwc"),
    Driver("bochs", "format", "byre.formats.bochs", "growing disks of Bochs, versions 1 and 2",
           (((0, b"Bochs Virtual HD Image\0"), (32, b"Redolog\0"), (48, b"Growing\0"), (64, b"\0\0\1\0")),
            ((0, b"Bochs Virtual HD Image\0"), (32, b"Redolog\0"), (48, b"Growing\0"), (64, b"\0\0\2\0")))),
    Driver("cloop", "format", "byre.formats.cloop", "compressed read-only disks of Knoppix",
           (((0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"),),)),
    Driver("dmg", "format", "byre.formats.dmg", "Apple disk images (UDIF)",
           tails=(((0, b"koly\0\0\0\4\0\0\2\0"),),)),
    Driver("uimage", "format", "byre.formats.uimage", "legacy images of U-Boot", (((0, b"\x27\x05\x19\x56"),),)),
    Driver("asif", "format", "byre.formats.asif", "Apple sparse images", (((0, b"shdw\0\0\0\1"),),)),
    Driver("ewf", "format", "byre.formats.ewf", "forensic images of EnCase and SMART (E01, S01)",
           (((0, b"EVF\x09\x0d\x0a\xff\0\1"),),)),
    Driver("vdi", "format", "byre.formats.vdi", "VirtualBox disk, version 1.1 (differencing ones read-only)",
           (((64, b"\x7f\x10\xda\xbe"),),), abilities="rwc"),
    Driver("vhdx", "format", "byre.formats.vhdx", "Hyper-V disk (differencing ones read-only)",
           (((0, b"vhdxfile"),),), abilities="rwc"),
    Driver("ova", "format", "byre.formats.ova", "appliances in one file", clue=b".ovf\0"),
    Driver("ovf", "format", "byre.formats.ovf", "appliances: a descriptor with disks beside it", clue=b"/ovf/envelope"),
    Driver("vma", "format", "byre.formats.vma", "backup archives of Proxmox", (((0, b"VMA\0\0\0\0\1"),),)),
    Driver("qed", "format", "byre.formats.qed", "QEMU Enhanced Disk", (((0, b"QED\0"),),), abilities="rwc"),
    Driver("vmdk", "format", "byre.formats.vmdk", "VMware disk (ESX sparse and space-efficient ones read-only)",
           (((0, b"KDMV"),), ((0, b"COWD"),), ((0, b"\xbe\xba\xfe\xca\0\0\0\0\1\0\0\0\2\0\0\0"),)), abilities="rwc",
           clue=b"version"),
    Driver("qcow", "format", "byre.formats.qcow", "QEMU copy-on-write, version 1",
           (((0, b"QFI\xfb\0\0\0\1"),),), abilities="rwc"),
    Driver("vpc", "format", "byre.formats.vpc", "Virtual PC and Azure disk, VHD (differencing ones read-only)",
           (((0, b"conectix"),),), abilities="rwc",
           tails=(((0, b"conectix"), (12, b"\0\1\0\0"), (60, b"\0\0\0\2")),)),
    Driver("parallels", "format", "byre.formats.parallels", "disk of Parallels and Virtuozzo (bundles read-only)",
           (((0, b"WithoutFreeSpace\2\0\0\0"),), ((0, b"WithouFreSpacExt\2\0\0\0"),),
            ((0, b"<Parallels_disk_image"),), ((0, b"<?xml "), (39, b"<Parallels_disk_image")),
            ((0, b"<?xml "), (40, b"<Parallels_disk_image"))), abilities="rwc"),
    Driver("blkdebug", "filter", "byre.filters.faults", "fails chosen requests", abilities="rw", prefix="blkdebug"),
    Driver("blkverify", "filter", "byre.filters.verify", "compares two children on every read", abilities="rw",
           prefix="blkverify"),
    Driver("copy-on-read", "filter", "byre.filters.copy_on_read", "keeps what is read from backing files",
           abilities="rw"),
    Driver("quorum", "filter", "byre.filters.quorum", "several copies of a disk, read by vote", abilities="rw"),
    Driver("compress", "filter", "byre.filters.compress", "writes go compressed", abilities="rw"),
    Driver("preallocate", "filter", "byre.filters.preallocate", "grows a file ahead of the writes to it",
           abilities="rw"),
    Driver("throttle", "filter", "byre.filters.throttle", "keeps to limits of bytes and operations per second",
           abilities="rw"),
    Driver("copy-before-write", "filter", "byre.filters.copy_before_write", "keeps what writes replace in another disk",
           abilities="rw"),
    Driver("snapshot-access", "filter", "byre.filters.snapshot_access", "the disk before the writes that were kept"),
    Driver("mirror_top", "filter", "byre.filters.mirror_top", "sees the writes to a disk that is mirrored",
           abilities="rw"),
    Driver("blklog", "filter", "byre.filters.writelog", "records writes and flushes for crash replay", abilities="rw"),
)  # fmt: skip

PROBE_SIZE = 2048
TAIL_SIZE = 512

_BY_NAME = {row.name: row for row in CATALOG}
_BY_PREFIX = {prefix: row for row in CATALOG for prefix in (row.prefix, *row.more_prefixes) if prefix}


def driver(name: str) -> Driver:
    """The row called ``name``.

    :raises InvalidArgument: there is none
    """
    row = _BY_NAME.get(name)
    if row is None:
        raise InvalidArgument(f"unknown driver {name!r}", hint="byre formats lists what there is")
    return row


def by_prefix(prefix: str) -> Driver | None:
    return _BY_PREFIX.get(prefix)


def formats() -> list[Driver]:
    return [row for row in CATALOG if row.kind == "format"]


def probe(head: bytes, tail: bytes = b"") -> Driver:
    """The format of an image that begins with ``head`` (2 KiB, less if it is shorter); raw is the last resort.

    The longest matching signature wins; clues are followed where there is none. What the end says counts only where the
    beginning says nothing.

    :param tail: the last 512 bytes; may be left out if :func:`probe` of ``head`` alone is not raw
    """
    best = _longest_match(head, tail=False)
    if best is None:
        best = next((row for row in CATALOG if row.clue and row.clue in head and row.load().matches(head)), None)
    if best is None and len(tail) == TAIL_SIZE:
        best = _longest_match(tail, tail=True)
    return best or _BY_NAME["raw"]


def _longest_match(data: bytes, *, tail: bool) -> Driver | None:
    best, score = None, 0
    for row in CATALOG:
        for signature in row.tails if tail else row.signatures:
            if all(data[at : at + len(magic)] == magic for at, magic in signature):
                weight = sum(len(magic) for _, magic in signature)
                if weight > score:
                    best, score = row, weight
    return best
