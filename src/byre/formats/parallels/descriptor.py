"""``DiskDescriptor.xml``: what a bundle of Parallels images consists of (specification: QEMU, docs/interop/prl-xml).

The text comes from anywhere, so it is read by expat with limits: size, depth, and no document type, hence no entities.
No I/O.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from ...errors import ImageError
from ...units import SECTOR

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["MAX_TEXT", "BundleImage", "Descriptor", "Storage", "decode_descriptor"]

MAX_TEXT: Final = 1 << 20
MAX_DEPTH: Final = 16
MAX_IMAGES: Final = 4096
MAX_CHAIN: Final = 200
ROOT: Final = "Parallels_disk_image"
TOP: Final = "{5fbaabe3-6958-40ff-92a7-860e329aab41}"
"""The top snapshot, where none is named."""
NOBODY: Final = "{00000000-0000-0000-0000-000000000000}"


class BundleImage(NamedTuple):
    """One file.

    :ivar guid: which snapshot it holds
    :ivar plain: raw bytes rather than an expandable image
    """

    guid: str
    plain: bool
    file: str


class Storage(NamedTuple):
    """A range of the disk.

    :ivar start: bytes
    :ivar end: bytes
    :ivar chain: the images that hold it, the active one first, the root last
    """

    start: int
    end: int
    chain: tuple[BundleImage, ...]


class Descriptor(NamedTuple):
    """:ivar size: of the disk, bytes
    :ivar storages: side by side, from 0 to ``size``
    """

    size: int
    storages: tuple[Storage, ...]


class Element:
    """One element of the document."""

    def __init__(self, tag: str) -> None:
        self.tag = tag
        self.text = ""
        self.children: list[Element] = []

    def all(self, tag: str) -> Iterator[Element]:
        return (child for child in self.children if child.tag == tag)

    def one(self, tag: str) -> Element:
        found = list(self.all(tag))
        if len(found) != 1:
            raise ImageError(f"the descriptor has {len(found)} elements <{tag}> in <{self.tag}>, expected one")
        return found[0]

    def word(self, tag: str) -> str:
        return self.one(tag).text.strip()

    def number(self, tag: str) -> int:
        text = self.word(tag)
        if not (text.isascii() and text.isdigit() and len(text) <= 19):
            raise ImageError(f"the descriptor's <{tag}> is {text[:40]!r}: expected a number")
        return int(text)


def decode_descriptor(data: bytes | bytearray | memoryview) -> Descriptor:
    """What the descriptor says of the top snapshot.

    :raises ImageError: it is no such document, beyond a limit, or contradicts itself
    """
    root = _parse(bytes(data))
    if root.tag != ROOT:
        raise ImageError(f"the document is <{root.tag[:40]}>, expected <{ROOT}>")
    parameters = root.one("Disk_Parameters")
    if any(element.text.strip() not in ("", "0") for element in parameters.all("Padding")):
        raise ImageError("the disk has padding, which is not specified")
    size = parameters.number("Disk_size") * SECTOR
    if size >= 1 << 63:
        raise ImageError(f"the disk size is {size} bytes")
    parents, top = _snapshots(root)
    storages = [_storage(element, parents, top) for element in root.one("StorageData").all("Storage")]
    storages.sort()
    at = 0
    for storage in storages:
        if storage.start != at or storage.end <= at:
            raise ImageError(f"a storage reaches from {storage.start} to {storage.end}, expected one from {at} on")
        at = storage.end
    if at != size:
        raise ImageError(f"the storages end at {at}, the disk at {size} bytes")
    return Descriptor(size, tuple(storages))


def _parse(data: bytes) -> Element:
    """The root element."""
    from xml.parsers import expat

    if len(data) > MAX_TEXT:
        raise ImageError(f"the descriptor has {len(data)} bytes, allowed are {MAX_TEXT}")
    document = Element("")
    open_elements = [document]

    def begin(tag: str, _attributes: dict[str, str]) -> None:
        if len(open_elements) > MAX_DEPTH:
            raise ImageError(f"the descriptor is nested deeper than {MAX_DEPTH} elements")
        element = Element(tag)
        open_elements[-1].children.append(element)
        open_elements.append(element)

    def finish(_tag: str) -> None:
        open_elements.pop()

    def text(part: str) -> None:
        open_elements[-1].text += part

    def refuse(*_: object) -> None:
        raise ImageError("the descriptor has a document type, which could define entities")

    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler = begin
    parser.EndElementHandler = finish
    parser.CharacterDataHandler = text
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(data, True)
    except (expat.ExpatError, ValueError, LookupError) as error:
        raise ImageError(f"the descriptor cannot be parsed: {error}") from None
    return document.children[0]


def _snapshots(root: Element) -> tuple[dict[str, str], str]:
    """(parent of each snapshot, the one the disk shows; "" if that is not said)."""
    parents: dict[str, str] = {}
    top = ""
    for snapshots in root.all("Snapshots"):
        for element in snapshots.all("TopGUID"):
            top = element.text.strip().lower()
        for shot in snapshots.all("Shot"):
            parents[shot.word("GUID").lower()] = shot.word("ParentGUID").lower()
    if len(parents) > MAX_IMAGES:
        raise ImageError(f"the descriptor has {len(parents)} snapshots, allowed are {MAX_IMAGES}")
    return parents, top


def _storage(element: Element, parents: dict[str, str], top: str) -> Storage:
    images: dict[str, BundleImage] = {}
    for image in element.all("Image"):
        guid, kind = image.word("GUID").lower(), image.word("Type")
        if kind not in ("Plain", "Compressed"):
            raise ImageError(f"an image of the bundle is of type {kind[:40]!r}: expected 'Plain' or 'Compressed'")
        name = image.word("File")
        if guid in images or not name or "\0" in name:
            raise ImageError(f"image {guid[:40]!r} of the bundle has no file, or is there twice")
        images[guid] = BundleImage(guid, kind == "Plain", name)
    if not images or len(images) > MAX_IMAGES:
        raise ImageError(f"a storage has {len(images)} images, allowed are 1 to {MAX_IMAGES}")
    if not top:
        top = TOP if TOP in images else next(iter(images)) if len(images) == 1 else ""
    chain: list[BundleImage] = []
    guid = top
    while guid != NOBODY:
        if guid not in images:
            raise ImageError(f"snapshot {guid[:40]!r} of the bundle has no image")
        if len(chain) == MAX_CHAIN or any(image.guid == guid for image in chain):
            raise ImageError(f"the snapshots of the bundle go in a circle, or are more than {MAX_CHAIN}")
        chain.append(images[guid])
        guid = parents.get(guid, NOBODY)
    if any(image.plain for image in chain[:-1]):
        raise ImageError("a snapshot that lies over another is a plain file, which cannot be")
    return Storage(element.number("Start") * SECTOR, element.number("End") * SECTOR, tuple(chain))
