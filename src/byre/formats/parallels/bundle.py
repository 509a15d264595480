"""A bundle of Parallels images as one disk, read-only: the files that its descriptor names, side by side.

What is named passes the policy, and is not opened where only metadata is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import ImageError, InvalidArgument, ReadOnly
from ...graph import chain
from ...graph.node import PERM_ALL, PERM_READ, Node
from ...graph.opening import has_protocol, resolve_backing
from ...io.extent import UNALLOCATED, Extent
from ..opening import check_size, fit_flags, read_exactly, read_head
from .descriptor import MAX_TEXT, decode_descriptor
from .layout import HEADER_SIZE, is_descriptor

if TYPE_CHECKING:
    from ...graph.child import Child
    from ...graph.opening import OpenFlags, OpenRequest
    from ...io.extentmap import ExtentMap
    from ...options import OptionValues
    from .descriptor import BundleImage, Descriptor, Storage

__all__ = ["BundleNode", "open_bundle"]


def open_bundle(request: OpenRequest, file: Node) -> BundleNode:
    """The node of the disk that the descriptor in ``file`` describes.

    :raises ImageError: it breaks the format
    :raises AccessDenied: the policy forbids a file it names
    """
    flags = fit_flags(request, file, "bundles of Parallels images can only be read")
    try:
        if file.size > MAX_TEXT:
            raise ImageError(f"the descriptor has {file.size} bytes, allowed are {MAX_TEXT}")
        descriptor = decode_descriptor(read_exactly(file, 0, file.size, "descriptor"))
        check_size(request, descriptor.size)
    except ImageError as error:
        error.where = error.where or file.filename
        raise
    node = BundleNode(file, descriptor, flags, name=request.name)
    request.opener.adopt(node)
    graph = request.opener.graph
    graph.attach(node, "file", file, "metadata")
    if not flags.no_io:
        for index, storage in enumerate(descriptor.storages):
            graph.attach(node, f"storage.{index}", _open_storage(request, node, storage), "data")
        node.find_sources()
    return node


def _open_storage(request: OpenRequest, node: BundleNode, storage: Storage) -> Node:
    """The active image of a range, over those below it."""
    opener, flags = request.opener, node.open_flags.for_file()._replace(read_only=True)
    below: Node | None = None
    for image in reversed(storage.chain):
        path = _vetted(request, node, image)
        file = opener.open({"driver": "file", "filename": path}, flags, protocol=True, implicit=True)
        if not image.plain and is_descriptor(read_head(file, HEADER_SIZE)):
            raise ImageError(f"image {image.file!r} of the bundle is a descriptor itself", where=node.filename)
        spec: dict[str, object] = {"driver": "raw" if image.plain else "parallels", "file": file.name}
        layer = opener.open(spec if image.plain else {**spec, "backing": None}, flags, implicit=True)
        if below is not None:
            opener.graph.attach(layer, "backing", below, "backing")
        below = layer
    assert below is not None
    return below


def _vetted(request: OpenRequest, node: BundleNode, image: BundleImage) -> str:
    """The path of an image's file, if the bundle may name it."""
    path = resolve_backing(node.filename, image.file)
    plain = None if has_protocol(image.file) else path
    request.opener.policy.check(image.file, plain, "disk image of the bundle", node.filename)
    return path


class BundleNode(Node):
    """The disk. Guarded by: nothing; it has no state that requests change.

    :ivar active: the active image of each storage; empty where only metadata was asked for
    :ivar sources: the files of all layers of all storages
    """

    kind = "format"
    driver = "parallels"

    def __init__(self, file: Node, descriptor: Descriptor, flags: OpenFlags, *, name: str = "") -> None:
        super().__init__(name=name, filename=file.filename, read_only=True)
        self.descriptor = descriptor
        self.open_flags = flags
        self.force_share = flags.force_share
        self.active: tuple[Node, ...] = ()
        self.sources: tuple[Child, ...] = ()
        self._first_source: tuple[int, ...] = ()

    def find_sources(self) -> None:
        """Called once, when every storage is attached."""
        self.active = tuple(edge.node for name, edge in self.children.items() if name != "file")
        sources: list[Child] = []
        first: list[int] = []
        for node in self.active:
            first.append(len(sources))
            sources += [layer.children["file"] for layer in chain.layers(node)]
        self.sources, self._first_source = tuple(sources), tuple(first)

    def child_moved(self, child: Child, before: Node) -> None:
        if self.active:
            self.find_sources()

    @property
    def size(self) -> int:
        return self.descriptor.size

    def _parts(self, offset: int, length: int) -> list[tuple[int, int, int, int]]:
        """(number, offset in its active image, offset on the disk, length) of the storages a range lies in."""
        if not self.active:
            raise InvalidArgument("the images of the bundle are not open", where=self.filename)
        parts = []
        for number, storage in enumerate(self.descriptor.storages):
            start, end = max(offset, storage.start), min(offset + length, storage.end)
            if start < end:
                parts.append((number, start - storage.start, start, end - start))
        return parts

    def read_into(self, offset: int, buffer: memoryview) -> None:
        done = 0
        for number, within, start, length in self._parts(offset, len(buffer)):
            self.active[number].read_into(within, buffer[start - offset : start - offset + length])
            done = start - offset + length
        if done < len(buffer):
            buffer[done:] = bytes(len(buffer) - done)

    def write_from(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
        raise ReadOnly("cannot write: the image is open read-only", where=self.filename)

    def block_status(self, offset: int, length: int) -> Extent:
        if offset >= self.size:
            return Extent(offset, length, UNALLOCATED)
        return next(iter(self.extents(offset, min(length, self.size - offset, chain.WINDOW))))

    def extents(self, offset: int, length: int) -> ExtentMap:
        """What the chains below say."""
        import numpy as np

        from ...io.extentmap import ExtentMap

        parts = []
        for number, within, start, count in self._parts(offset, length):
            found = chain.extents(self.active[number], within, count)
            source = (found.depth + self._first_source[number]).astype(np.int16)
            parts.append(ExtentMap(found.offset - within + start, found.length, found.kind, found.host, source))
        return ExtentMap.concatenate(parts).coalesced()

    def format_info(self) -> dict[str, object]:
        """The files the bundle consists of."""
        images = [image for storage in self.descriptor.storages for image in storage.chain]
        return {"images": [{"guid": image.guid, "type": "plain" if image.plain else "expandable", "file": image.file}
                           for image in images]}  # fmt: skip

    def child_permissions(self, child: Child, used: int, shared: int) -> tuple[int, int]:
        return PERM_READ, PERM_ALL if self.force_share else shared

    def reopen_prepare(self, flags: OpenFlags, options: OptionValues) -> object:
        if not flags.read_only:
            raise ReadOnly("bundles of Parallels images can only be read", where=self.filename)
        return flags
