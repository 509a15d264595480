"""Copy offload: the system copies from file to file (copy_file_range), or lets both share blocks (reflinks)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from ..errors import ByreError
from ..graph import chain
from ..io.extent import DATA

if TYPE_CHECKING:
    from ..image import Image
    from .blockcopy import SourceDisk

__all__ = ["Offload"]


@runtime_checkable
class _CopyingFile(Protocol):
    """What ``protocols/file.py`` can do and other protocols cannot."""

    def copy_range(self, source_offset: int, target: _CopyingFile, target_offset: int, length: int) -> int: ...


class Offload:
    """Copies within the kernel from the file under the source to the file under the target.

    Only to a raw target, whose bytes lie in its file where they lie on the disk. The first refusal of the
    system ends it: copying goes on through memory.
    """

    def __init__(self, source: SourceDisk, target: Image) -> None:
        self._source = source
        self._target, self._base = _plain_file(target)

    def copy(self, offset: int, length: int) -> bool:
        """Whether the range was copied; False to do it through memory."""
        target = self._target
        if target is None:
            return False
        plan = [step for part in self._source.parts(offset, length) for step in self._locate(*part)]
        if sum(size for *_, size in plan) != length:
            return False
        try:
            for file, host, size in plan:
                done = 0
                while done < size:
                    step = file.copy_range(host + done, target, self._base + offset + done, size - done)
                    if not step:
                        return False
                    done += step
                offset += size
        except ByreError:
            self._target = None
            return False
        return True

    def _locate(self, index: int, offset: int, length: int) -> list[tuple[_CopyingFile, int, int]]:
        """``(file node, host offset, length)`` of plain data that makes up the range, as far as it is that."""
        image = self._source.images[index]
        length = min(length, image.size - offset)
        found = chain.extents(image.node, offset, length)
        if not (found.kind == DATA).all() or (found.host < 0).any():
            return []
        layers = chain.layers(image.node)
        steps: list[tuple[_CopyingFile, int, int]] = []
        for extent, depth in zip(found, found.depth.tolist(), strict=True):
            layer = layers[depth]
            file = layer.sources[extent.source].node
            if getattr(layer, "cipher", None) is not None or not isinstance(file, _CopyingFile):
                return []
            steps.append((file, extent.host, extent.length))
        return steps


def _plain_file(image: Image) -> tuple[_CopyingFile | None, int]:
    """(the file node under a raw image, where the disk begins in it); ``None`` for other formats."""
    node = image.node
    edge = node.children.get("file")
    file = edge.node if edge else None
    if node.driver != "raw" or not isinstance(file, _CopyingFile):
        return None, 0
    return file, getattr(node, "base", 0)
