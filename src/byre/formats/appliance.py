"""ovf, ova: what is in an appliance of a virtual machine, and the node that shows one of its disks.

Specification: DMTF DSP0243, "Open Virtualization Format". An XML descriptor lists files and disks; an OVA is a tar
archive whose first member is the descriptor. Not supported: files in chunks, and compressed files.
"""

from __future__ import annotations

from ..catalog import driver
from ..errors import ImageError, NotFound, NotSupported, printable
from ..io.extent import DATA, Extent
from ..options import Option, OptionSet
from ..typing import TYPE_CHECKING, Final, NamedTuple
from .readonly import ReadOnlyFormat, open_read_only
from .xmltree import parse_xml

if TYPE_CHECKING:
    from collections.abc import Callable
    from xml.etree.ElementTree import Element

    from ..graph.node import Node
    from ..graph.opening import OpenFlags, OpenRequest

__all__ = ["OPTIONS", "Disk", "PackageNode", "decode_descriptor", "open_image_in", "open_package"]

OPTIONS: Final = OptionSet(Option("disk", "str", "Id or file name of the disk that is shown"))

MAX_DISKS: Final = 1024
_UNITS: Final = {"byte": 1, "kilobyte": 1 << 10, "megabyte": 1 << 20, "gigabyte": 1 << 30, "terabyte": 1 << 40}


class Disk(NamedTuple):
    """One disk of the descriptor.

    :ivar file: the name it has in the package, "" for a disk that is empty
    :ivar capacity: bytes, 0 if the descriptor does not say, or says more than a disk can have
    :ivar format: a driver, "" where the descriptor names none that byre knows
    """

    id: str
    file: str
    capacity: int
    format: str


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _attributes(element: Element) -> dict[str, str]:
    return {_local(key): value for key, value in element.attrib.items()}


def decode_descriptor(data: bytes | bytearray | memoryview) -> tuple[Disk, ...]:
    """The disks of an OVF descriptor, in its order.

    :raises ImageError: it is no descriptor
    """
    root = parse_xml(data, "the OVF descriptor")
    if _local(root.tag) != "Envelope":
        raise ImageError(f"the OVF descriptor holds {_local(root.tag)[:40]!r} rather than an envelope")
    files: dict[str, dict[str, str]] = {}
    disks = []
    for element in root.iter():
        about = _attributes(element)
        if _local(element.tag) == "File" and "id" in about:
            files[about["id"]] = about
        elif _local(element.tag) == "Disk" and "diskId" in about:
            disks.append(about)
    if len(disks) > MAX_DISKS:
        raise ImageError(f"the OVF descriptor lists {len(disks)} disks, allowed are {MAX_DISKS}")
    return tuple(_disk(about, files) for about in disks)


def _disk(about: dict[str, str], files: dict[str, dict[str, str]]) -> Disk:
    file = files.get(about.get("fileRef", ""), {})
    if about.get("fileRef") and not file:
        raise ImageError(f"disk {about['diskId']!r} refers to the file {about['fileRef']!r}, which is not listed")
    if "chunkSize" in file or file.get("compression", "identity") not in ("", "identity"):
        raise ImageError(f"the file {file.get('href')!r} is in chunks or compressed, which is not supported")
    words = about.get("format", "").lower()
    known = (("vmdk", "vmdk"), ("vhdx", "vhdx"), ("vhd", "vpc"), ("qcow2", "qcow2"), ("raw", "raw"))
    found = next((driver for word, driver in known if word in words), "")
    return Disk(about["diskId"], file.get("href", ""), _capacity(about), found)


def _capacity(about: dict[str, str]) -> int:
    """DSP0243 5.6: a number, times units such as "byte * 2^30" or, in older descriptors, "GigaBytes"."""
    text, units = about.get("capacity", ""), about.get("capacityAllocationUnits", "byte").lower().replace(" ", "")
    if not text.isascii() or not text.isdigit() or len(text) > 20:
        return 0
    word, _, power = units.partition("*")
    factor = _UNITS.get(word.rstrip("s"), 1)
    if power.startswith("2^") and power[2:].isdigit() and int(power[2:]) <= 62:
        factor *= 1 << int(power[2:])
    value = int(text) * factor
    return 0 if value >> 63 else value


def open_package(request: OpenRequest, descriptor: Callable[[Node], bytearray],
                 open_disk: Callable[[PackageNode, Disk], Node | None]) -> Node:  # fmt: skip
    """The node of a package and of the disk in it that the options choose.

    :param descriptor: reads the OVF descriptor out of the file
    :param open_disk: opens a disk of the package; ``None`` where it may not be looked at: its size is what the
        descriptor says then
    :raises ByreError: the descriptor breaks the format, lists no such disk, or the disk cannot be opened
    """
    node = open_read_only(request, lambda file, flags: PackageNode(file, flags, descriptor, request.row.name))
    assert isinstance(node, PackageNode)
    node.disk = disk = _choose(node, request.options.text("disk"))
    below = open_disk(node, disk)
    if below is None:
        node.set_size(disk.capacity)
        return node
    node.sources = (request.opener.graph.attach(node, "disk", below, "data"),)
    node.set_size(below.size)
    return node


def open_image_in(request: OpenRequest, node: PackageNode, disk: Disk, file: Node) -> Node:
    """The disk whose image lies in ``file``; its format is looked for if the descriptor does not say it.

    :raises NotSupported: it is an appliance itself, perhaps this one
    """
    if disk.format:
        row = driver(disk.format)
    else:
        row = request.opener.probe(file)
        request.opener.graph.warnings.append(
            f"{printable(node.filename)}: the format of disk {disk.id!r} is not known; probing it"
        )
    if row.name in ("ova", "ovf"):
        raise NotSupported(f"the file {disk.file!r} of disk {disk.id!r} is an appliance itself", where=node.filename)
    return request.opener.open({"driver": row.name, "file": file.name}, node.open_flags)


def _choose(node: PackageNode, wanted: str | None) -> Disk:
    found = [disk for disk in node.disks if wanted in (disk.id, disk.file) or (wanted is None and disk.file)]
    if not found:
        names = ", ".join(disk.id for disk in node.disks) or "none"
        raise NotFound(f"the appliance has no disk {wanted!r}; there are: {names}" if wanted
                       else "the appliance has no disk with a file", where=node.filename)  # fmt: skip
    if not found[0].file:
        raise NotSupported(f"disk {found[0].id!r} is empty: the appliance has no file for it", where=node.filename)
    return found[0]


class PackageNode(ReadOnlyFormat):
    """An open appliance.

    :ivar disks: all that the descriptor lists
    :ivar disk: the one that is shown
    """

    disk: Disk

    def __init__(self, file: Node, flags: OpenFlags, descriptor: Callable[[Node], bytearray], driver: str) -> None:
        super().__init__(file, flags)
        self.driver = driver
        self.disks = decode_descriptor(descriptor(file))
        self.cluster_size = self.zero_unit = 512

    def set_size(self, size: int) -> None:
        """:param size: of the disk, bytes"""
        self._size = size

    def lookup(self, offset: int, length: int) -> list[Extent]:
        return [Extent(offset, length, DATA, offset)]

    def has_holes(self) -> bool:
        return True

    def format_info(self) -> dict[str, object]:
        """The disks of the appliance."""
        rows = [
            {"id": disk.id, "file": disk.file, "capacity": disk.capacity, "format": disk.format or "unknown"}
            for disk in self.disks
        ]
        return {"disk": self.disk.id, "disks": rows}
