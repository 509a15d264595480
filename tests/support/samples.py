"""A small good image of every kind of every format, and where its metadata lie: what the tests of hostile input spoil.

Made by the forging functions beside the tests of each format, or by byre itself where there are none.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from byre.cli.main import main
from contracts.node import patchwork
from support import forged_vhd, vmdk

__all__ = ["SAMPLES", "Sample"]

KIB, MIB = 1 << 10, 1 << 20
LUKS_SIZE = 512 * KIB

Seal = Callable[[bytearray], None]


class Sample(NamedTuple):
    """An image to be spoilt.

    :ivar format: the driver
    :ivar make: writes it into a folder and returns its path
    :ivar areas: of its metadata: (begin, end); negative numbers count from the end; empty: all of it
    :ivar text: it is text: spoilt by words and lines rather than by bytes and fields
    :ivar order: of its numbers, "<" or ">"
    :ivar seal: puts the checksums right again, so that what was spoilt is looked at
    :ivar options: needed to open it
    """

    name: str
    format: str
    make: Callable[[Path], Path]
    areas: tuple[tuple[int, int], ...] = ()
    text: bool = False
    order: str = "<"
    seal: Seal | None = None
    options: Mapping[str, object] = {}


def _file(name: str, content: Callable[[], bytes]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content())
        return folder / name

    return make


def _byre(*words: str) -> None:
    assert main(list(words)) == 0, words


def _made(format: str, *options: str, size: str = "1M", content: bool = True, base: str = "",
          more: Callable[[str], None] | None = None) -> Callable[[Path], Path]:  # fmt: skip
    """An image that byre creates and writes to."""

    def make(folder: Path) -> Path:
        path = str(folder / f"image.{format}")
        given = [word for option in options for word in ("-o", option)]
        if base:
            (folder / base).write_bytes(patchwork(MIB, seed=3))
            given += ["-b", base, "-F", "raw"]
        _byre("create", "-q", "-f", format, *given, path, size)
        if content:
            _byre("io", "-f", format, "-c", "write -q -P 7 0 70k", "-c", "write -q -P 9 600k 4k", path)
        if more is not None:
            more(path)
        return Path(path)

    return make


# -- qcow2, luks, qed, qcow -----------------------------------------------------------------------


def _qcow2_extras(path: str) -> None:
    _byre("snapshot", "-c", "one", path)
    _byre("bitmap", "--add", "-g", "4k", path, "dirty")
    _byre("io", "-c", "write -q -P 1 8k 4k", "-c", "write -q -z 16k 8k", "-c", "write -q -c -P 4 512k 16k", path)


def _data_file(folder: Path) -> Path:
    path = folder / "image.qcow2"
    _byre("create", "-q", "-f", "qcow2", "-o", f"data_file={folder / 'data'}", str(path), "1M")
    _byre("io", "-c", "write -q -P 7 0 70k", str(path))
    return path


def _luks1() -> bytes:
    from support.encrypted import new_encrypted

    return new_encrypted("luks", LUKS_SIZE, cipher_alg="aes-128", cipher_mode="cbc").to_bytes()


def _luks2() -> bytes:
    """Both headers; the slot's key is rubbish, so it opens only without its key."""
    area = {"type": "raw", "offset": "32768", "size": "131072", "encryption": "aes-xts-plain64", "key_size": 32}
    slot = {
        "type": "luks2", "key_size": 32, "area": area, "af": {"type": "luks1", "stripes": 4000, "hash": "sha256"},
        "kdf": {"type": "pbkdf2", "hash": "sha256", "iterations": 1000, "salt": "AAAA"},
    }  # fmt: skip
    segment = {"type": "crypt", "offset": "262144", "size": "dynamic", "iv_tweak": "0",
               "encryption": "aes-xts-plain64", "sector_size": 512}  # fmt: skip
    digest = {"type": "pbkdf2", "keyslots": ["0"], "segments": ["0"], "hash": "sha256", "iterations": 1000,
              "salt": "AAAA", "digest": "AAAA"}  # fmt: skip
    text = {"keyslots": {"0": slot}, "tokens": {}, "segments": {"0": segment}, "digests": {"0": digest},
            "config": {"json_size": "12288", "keyslots_size": "229376"}}  # fmt: skip
    data = bytearray()
    for magic, at in ((b"LUKS\xba\xbe", 0), (b"SKUL\xba\xbe", 16 * KIB)):
        head = struct.pack(">6sHQQ48s32s64s40s48sQ184s64s", magic, 2, 16 * KIB, 1, b"", b"sha256", b"salt",
                           b"1b4e28ba-2fa1-11d2-883f-0016d3cca427", b"", at, b"", b"")  # fmt: skip
        data += (head.ljust(4096, b"\0") + json.dumps(text).encode()).ljust(16 * KIB, b"\0")
    data += bytes(512 * KIB - len(data))
    _seal_luks2(data)
    return bytes(data)


def _seal_luks2(data: bytearray) -> None:
    for at in (0, 16 * KIB):
        if len(data) >= at + 16 * KIB:
            area = bytearray(data[at : at + 16 * KIB])
            area[448:512] = bytes(64)
            data[at + 448 : at + 512] = hashlib.sha256(area).digest().ljust(64, b"\0")


def _qcow_compressed(folder: Path) -> Path:
    (folder / "source").write_bytes(patchwork(256 * KIB))
    _byre("convert", "-q", "-c", "-f", "raw", "-O", "qcow", str(folder / "source"), str(folder / "image.qcow"))
    return folder / "image.qcow"


# -- vhdx, vpc ------------------------------------------------------------------------------------

_VHDX = forged_vhd.Vhdx(blocks={0: forged_vhd.Block(forged_vhd.FULL, b"x"), 1: forged_vhd.Block(forged_vhd.ZERO),
                                2: forged_vhd.Block(forged_vhd.UNMAPPED)})  # fmt: skip
_VHDX_AREAS = (
    (0, 64), (64 * KIB, 64 * KIB + 128), (128 * KIB, 128 * KIB + 128), (192 * KIB, 192 * KIB + 96),
    (256 * KIB, 256 * KIB + 96), (2 * MIB, 2 * MIB + 128), (3 * MIB, 3 * MIB + 256),
    (3 * MIB + 64 * KIB, 3 * MIB + 64 * KIB + 128),
)  # fmt: skip
_VHDX_LOGGED = (*_VHDX_AREAS, (MIB, MIB + 256), (MIB + 4096, MIB + 4160), (MIB, MIB + 4096))


def _vhdx_logged() -> bytes:
    import uuid

    guid = uuid.UUID(int=77)
    page = struct.pack("<Q", 0).ljust(4096, b"\0")
    entry = forged_vhd.log_entry([(2 * MIB, page), (3 * MIB + 512 * KIB, 4096)], 1, guid)
    return _VHDX._replace(log=entry, log_guid=guid).build()


def _seal_vhdx(data: bytearray) -> None:
    from byre.formats.vhdx.crc32c import crc32c

    def seal(at: int, length: int) -> None:
        if at + length <= len(data):
            data[at + 4 : at + 8] = bytes(4)
            struct.pack_into("<I", data, at + 4, crc32c(bytes(data[at : at + length])))

    for at in (64 * KIB, 128 * KIB):
        seal(at, 4096)
    for at in (192 * KIB, 256 * KIB):
        seal(at, 64 * KIB)
    if data[MIB : MIB + 4] == b"loge":
        length = struct.unpack_from("<I", data, MIB + 8)[0]
        if 4096 <= length <= MIB:
            seal(MIB, length)


def _vhdx_child(folder: Path) -> Path:
    import uuid

    base = uuid.UUID(int=0xBA5E)
    (folder / "base.vhdx").write_bytes(_VHDX._replace(data_guid=base).build())
    sectors = [index % 3 == 0 for index in range(2048)]
    names = {"parent_linkage": "{" + str(base) + "}", "relative_path": "base.vhdx"}
    child = forged_vhd.Vhdx(parent=names, blocks={1: forged_vhd.Block(forged_vhd.PARTIAL, b"y", sectors)})
    (folder / "child.vhdx").write_bytes(child.build())
    return folder / "child.vhdx"


_VHD = forged_vhd.Vhd(blocks={1: (b"x" * 8192, (True,) * 4096), 3: (b"y" * 8192, (True, False) * 2048)})


def _vhd_fixed() -> bytes:
    return patchwork(MIB) + forged_vhd.footer(MIB, 2, data_offset=(1 << 64) - 1)


def _vhd_child(folder: Path) -> Path:
    (folder / "base.vhd").write_bytes(_VHD.build())
    locators = [(b"W2ru", "base.vhd".encode("utf-16-le"))]
    child = forged_vhd.Vhd(kind=4, unique=b"\2" * 16, parent_unique=_VHD.unique, parent_name="base.vhd",
                           locators=locators, blocks={1: (b"z" * 512, (True,) + (False,) * 4095)})  # fmt: skip
    (folder / "child.vhd").write_bytes(child.build())
    return folder / "child.vhd"


def _seal_vhd(data: bytearray) -> None:
    def seal(at: int, length: int, field: int) -> None:
        if at >= 0 and at + length <= len(data):
            data[at + field : at + field + 4] = bytes(4)
            struct.pack_into(">I", data, at + field, ~sum(data[at : at + length]) & 0xFFFFFFFF)

    if data[:8] == b"conectix":
        seal(0, 512, 64)
    seal(len(data) - 512, 512, 64)
    seal(512, 1024, 36)


# -- vmdk -----------------------------------------------------------------------------------------


def _vmdk_split(folder: Path) -> Path:
    path = folder / "split.vmdk"
    _byre("create", "-q", "-f", "vmdk", "-o", "subformat=twoGbMaxExtentSparse", str(path), "3G")
    return path


def _vmdk_flat(folder: Path) -> Path:
    path = folder / "flat.vmdk"
    lines = ['RW 1024 FLAT "flat-flat.vmdk" 0', "RW 512 ZERO", 'RW 512 FLAT "flat-flat.vmdk" 1024']
    path.write_bytes(vmdk.descriptor(lines, "monolithicFlat"))
    (folder / "flat-flat.vmdk").write_bytes(patchwork(MIB))
    return path


def _vmdk_named(name: str, line: str, kind: str, content: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    """A descriptor beside an extent of a kind that has none inside."""

    def make(folder: Path) -> Path:
        (folder / f"{name}.extent").write_bytes(content(patchwork(MIB)))
        path = folder / f"{name}.vmdk"
        path.write_bytes(vmdk.descriptor([line.format(f"{name}.extent")], kind))
        return path

    return make


# -- the others -----------------------------------------------------------------------------------


def _vdi(kind: str) -> Callable[[Path], Path]:
    return _made("vdi", *(["static=on"] if kind == "static" else []), size="3M")


def _vdi_child(folder: Path) -> Path:
    from support.vdi import child_of, small_vdi

    parent = small_vdi(4 * MIB, MIB).to_bytes()
    (folder / "parent.vdi").write_bytes(parent)
    path = folder / "child.vdi"
    path.write_bytes(child_of(parent, 4 * MIB, {0: b"x", 1: None, 2: b"y"}, MIB))
    return path


_BUNDLE = """<?xml version='1.0' encoding='UTF-8'?>
<Parallels_disk_image Version="1.0">
    <Disk_Parameters>
        <Disk_size>2048</Disk_size>
        <Cylinders>2</Cylinders>
        <Heads>16</Heads>
        <Sectors>63</Sectors>
        <Padding>0</Padding>
    </Disk_Parameters>
    <StorageData>
        <Storage>
            <Start>0</Start>
            <End>2048</End>
            <Blocksize>128</Blocksize>
            <Image>
                <GUID>{5fbaabe3-6958-40ff-92a7-860e329aab41}</GUID>
                <Type>Compressed</Type>
                <File>top.hds</File>
            </Image>
            <Image>
                <GUID>{11111111-6958-40ff-92a7-860e329aab41}</GUID>
                <Type>Plain</Type>
                <File>base.raw</File>
            </Image>
        </Storage>
    </StorageData>
    <Snapshots>
        <Shot>
            <GUID>{5fbaabe3-6958-40ff-92a7-860e329aab41}</GUID>
            <ParentGUID>{11111111-6958-40ff-92a7-860e329aab41}</ParentGUID>
        </Shot>
        <Shot>
            <GUID>{11111111-6958-40ff-92a7-860e329aab41}</GUID>
            <ParentGUID>{00000000-0000-0000-0000-000000000000}</ParentGUID>
        </Shot>
    </Snapshots>
</Parallels_disk_image>
"""


def _bundle(folder: Path) -> Path:
    _byre("create", "-q", "-f", "parallels", "-o", "cluster_size=64k", str(folder / "top.hds"), "1M")
    _byre("io", "-c", "write -q -P 7 0 70k", str(folder / "top.hds"))
    (folder / "base.raw").write_bytes(patchwork(MIB))
    (folder / "DiskDescriptor.xml").write_text(_BUNDLE)
    return folder / "DiskDescriptor.xml"


def _parallels_bitmap() -> bytes:
    from formats.test_parallels import with_bitmap

    return with_bitmap().to_bytes()


def _seal_parallels(data: bytearray) -> None:
    at = struct.unpack_from("<Q", data, 56)[0] * 512
    if at > 0 and at + 4096 <= len(data):
        data[at + 8 : at + 24] = hashlib.md5(data[at + 24 : at + 4096]).digest()


def _bochs() -> bytes:
    from formats.test_bochs import forge

    return forge(patchwork(256 * KIB), extent=4096)


def _cloop() -> bytes:
    from formats.test_cloop import forge

    return forge(patchwork(64 * KIB), 4096)


def _dmg(fork: bool) -> Callable[[], bytes]:
    def make() -> bytes:
        from formats.test_dmg import forge

        return forge(patchwork(256 * KIB), fork=fork, tables=2)

    return make


def _uimage(multi: bool) -> Callable[[], bytes]:
    def make() -> bytes:
        from formats import test_uimage

        if multi:
            return test_uimage.multi(b"kernel" * 100, b"initrd!" * 100, b"dtb")
        return test_uimage.forge(zlib.compress(patchwork(64 * KIB), wbits=31), compression=1)

    return make


def _asif(folder: Path) -> Path:
    from formats import test_asif

    test_asif.forge(folder / "image.asif", {0: b"a" * 999, 5: b"b" * 999, 3000: b"c"}, 4000 * 512)
    return folder / "image.asif"


def _ewf(segments: int) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        from formats.ewf import test_ewf

        return test_ewf.forge(folder, patchwork(128 * KIB), segments=segments)

    return make


def _seal_ewf(data: bytearray) -> None:
    """The chain of sections, each with its checksum behind 72 bytes."""
    at, seen = 13, 0
    while at >= 0 and at + 76 <= len(data) and seen < 100:
        kind, following = struct.unpack_from("<16sQ", data, at)
        struct.pack_into("<I", data, at + 72, zlib.adler32(data[at : at + 72]))
        kind = kind.partition(b"\0")[0]
        body = at + 76
        if kind in (b"volume", b"disk", b"data") and body + 1052 <= len(data):
            struct.pack_into("<I", data, body + 1048, zlib.adler32(data[body : body + 1048]))
        elif kind in (b"table", b"table2") and body + 24 <= len(data):
            struct.pack_into("<I", data, body + 20, zlib.adler32(data[body : body + 20]))
        at, seen = following if following > at else -1, seen + 1


def _vma() -> bytes:
    from formats.test_vma import forge

    return forge({"drive-a": patchwork(300 * KIB), "drive-b": patchwork(200 * KIB)}, per_extent=5,
                 configs=(("qemu-server.conf", b"x"),))  # fmt: skip


def _seal_vma(data: bytearray) -> None:
    size = struct.unpack_from(">I", data, 56)[0]
    if 12288 <= size <= len(data):
        data[32:48] = bytes(16)
        data[32:48] = hashlib.md5(data[:size]).digest()
    at = data.find(b"VMAE")
    while at >= 0:
        if at % 512 == 0 and at + 512 <= len(data):
            data[at + 24 : at + 40] = bytes(16)
            data[at + 24 : at + 40] = hashlib.md5(data[at : at + 512]).digest()
        at = data.find(b"VMAE", at + 1)


def _ova() -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        from formats.test_appliance import descriptor, pack

        return pack(folder / "image.ova", ("vm.ovf", descriptor(("d", "disk.img", "raw"))),
                    ("disk.img", patchwork(64 * KIB)))  # fmt: skip

    return make


def _ovf(folder: Path) -> Path:
    from formats.test_appliance import descriptor

    (folder / "disk.img").write_bytes(patchwork(64 * KIB))
    (folder / "image.ovf").write_bytes(descriptor(("d", "disk.img", "raw")))
    return folder / "image.ovf"


SAMPLES: tuple[Sample, ...] = (
    Sample("qcow2", "qcow2", _made("qcow2", "cluster_size=4k", more=_qcow2_extras), order=">"),
    Sample("qcow2-v2", "qcow2", _made("qcow2", "compat=0.10,cluster_size=4k", base="base"), order=">"),
    Sample("qcow2-extended", "qcow2", _made("qcow2", "extended_l2=on,cluster_size=16k,compression_type=zstd",
                                            more=_qcow2_extras), order=">"),
    Sample("qcow2-data-file", "qcow2", _data_file, order=">"),
    Sample("luks", "luks", _file("image.luks", _luks1), ((0, 592),), order=">",
           options={"key-secret": "s"}),
    Sample("luks2", "luks", _file("image.luks2", _luks2), ((0, 512), (4096, 5200), (16 * KIB, 16 * KIB + 512)),
           order=">", seal=_seal_luks2),
    Sample("qed", "qed", _made("qed", "cluster_size=4k,table_size=1"), ((0, 64), (0, 64 * KIB))),
    Sample("qed-backed", "qed", _made("qed", "cluster_size=4k", base="base"), ((0, 128), (4096, 64 * KIB))),
    Sample("qcow", "qcow", _made("qcow"), ((0, 64), (0, 8192)), order=">"),
    Sample("qcow-backed", "qcow", _made("qcow", base="base"), ((0, 64), (0, 8192)), order=">"),
    Sample("qcow-compressed", "qcow", _qcow_compressed, ((0, 64), (0, 8192)), order=">"),
    Sample("vdi", "vdi", _vdi("dynamic"), ((0, 512), (512, 600), (MIB, MIB + 64))),
    Sample("vdi-static", "vdi", _vdi("static"), ((0, 512), (512, 600), (MIB, MIB + 64))),
    Sample("vdi-child", "vdi", _vdi_child, ((0, 512), (512, 600))),
    Sample("vhdx", "vhdx", _file("image.vhdx", _VHDX.build), _VHDX_AREAS, seal=_seal_vhdx),
    Sample("vhdx-logged", "vhdx", _file("image.vhdx", _vhdx_logged), _VHDX_LOGGED, seal=_seal_vhdx),
    Sample("vhdx-child", "vhdx", _vhdx_child, _VHDX_AREAS, seal=_seal_vhdx),
    Sample("vpc", "vpc", _file("image.vhd", _VHD.build), ((0, 128), (512, 600), (512, 2048), (-512, -400)), order=">",
           seal=_seal_vhd),
    Sample("vpc-fixed", "vpc", _file("fixed.vhd", _vhd_fixed), ((-512, -384),), order=">", seal=_seal_vhd),
    Sample("vpc-child", "vpc", _vhd_child, ((0, 128), (512, 1536), (512, 2560)), order=">", seal=_seal_vhd),
    Sample("vmdk", "vmdk", _file("image.vmdk", lambda: vmdk.hosted(patchwork(MIB), grain=16 * KIB, per_table=16)),
           ((0, 80), (0, 1200), (10752, 16384))),
    Sample("vmdk-stream", "vmdk", _file("stream.vmdk", lambda: vmdk.stream(patchwork(MIB), grain=16 * KIB)),
           ((0, 80), (0, 1200), (10752, 13000), (-5000, 0))),
    Sample("vmdk-split", "vmdk", _vmdk_split, text=True),
    Sample("vmdk-flat", "vmdk", _vmdk_flat, text=True),
    Sample("vmdk-cowd", "vmdk", _file("image.cowd", lambda: vmdk.cowd(patchwork(MIB))), ((0, 64), (2048, 2600))),
    Sample("vmdk-sesparse", "vmdk", _file("image.sesparse", lambda: vmdk.sesparse(patchwork(MIB))),
           ((0, 208), (512, 544), (4096, 7000))),
    Sample("vmdk-vmfs", "vmdk", _vmdk_named("vmfs", 'RW 2048 VMFSSPARSE "{}"', "vmfsSparse", vmdk.cowd), text=True),
    Sample("vmdk-se", "vmdk", _vmdk_named("se", 'RW 2048 SESPARSE "{}"', "seSparse", vmdk.sesparse), text=True),
    Sample("parallels", "parallels", _made("parallels", "cluster_size=4k"), ((0, 64), (0, 2048))),
    Sample("parallels-bitmap", "parallels", _file("image.hds", _parallels_bitmap),
           ((0, 64), (0, 1088), (4 * 4096, 4 * 4096 + 128)), seal=_seal_parallels),
    Sample("parallels-bundle", "parallels", _bundle, text=True),
    Sample("bochs", "bochs", _file("image.bochs", _bochs), ((0, 100), (512, 900))),
    Sample("cloop", "cloop", _file("image.cloop", _cloop), ((0, 300),), order=">"),
    Sample("dmg", "dmg", _file("image.dmg", _dmg(False)), ((-512, 0), (-4000, -512)), order=">"),
    Sample("dmg-fork", "dmg", _file("fork.dmg", _dmg(True)), ((-512, 0), (-3000, -512)), order=">"),
    Sample("uimage", "uimage", _file("image.ui", _uimage(False)), ((0, 64), (64, 200)), order=">"),
    Sample("uimage-multi", "uimage", _file("multi.ui", _uimage(True)), ((0, 100),), order=">"),
    Sample("asif", "asif", _asif, ((0, 96), (256 * KIB, 256 * KIB + 64), (256 * KIB + 65536, 256 * KIB + 65600),
                                   (512 * KIB, 512 * KIB + 64)), order=">"),
    Sample("ewf", "ewf", _ewf(1), ((0, 13), (0, 1700), (-2000, 0)), seal=_seal_ewf),
    Sample("ewf-segments", "ewf", _ewf(2), ((0, 13), (0, 1700), (-1500, 0)), seal=_seal_ewf),
    Sample("vma", "vma", _file("image.vma", _vma), ((0, 64), (2044, 2060), (4096, 4200), (12288, 13400)), order=">",
           seal=_seal_vma),
    Sample("ova", "ova", _ova(), ((0, 512), (512, 1400), (1536, 2048))),
    Sample("ovf", "ovf", _ovf, text=True),
)  # fmt: skip
