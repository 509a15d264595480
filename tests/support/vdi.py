"""VDI images in memory with blocks of any size, which creation does not offer, and differencing ones."""

from __future__ import annotations

import struct

from byre.formats import vdi
from byre.protocols.memory import MemoryNode


def small_vdi(size: int, block: int = 4096, *, uuid: bytes = b"\1" * 16, **fields: object) -> MemoryNode:
    """An empty dynamic image; the map has room for four times as many blocks."""
    count = -(-size // block)
    start = -(-(512 + 16 * count) // 512) * 512
    header = vdi.Header(data_offset=start, disk_size=size, block_size=block, block_count=count, uuid=uuid,
                        modification_uuid=b"\2" * 16)._replace(**fields)  # type: ignore[arg-type]  # fmt: skip
    return MemoryNode((vdi.encode_header(header) + b"\xff" * (4 * count)).ljust(start, b"\0"))


def child_of(parent: bytes, size: int, blocks: dict[int, bytes | None], block: int = 4096) -> bytes:
    """A differencing image over ``parent``: block contents by index, ``None`` for a discarded one."""
    above = vdi.decode_header(parent)
    fields = {"image_type": vdi.DIFFERENCING, "parent_uuid": above.uuid,
              "parent_modification_uuid": above.modification_uuid}  # fmt: skip
    data = bytearray(small_vdi(size, block, uuid=b"\3" * 16, **fields).to_bytes())
    for index, content in blocks.items():
        entry = vdi.DISCARDED
        if content is not None:
            entry = (len(data) - vdi.decode_header(data).data_offset) // block
            data += content.ljust(block, b"\0")
        struct.pack_into("<I", data, 512 + 4 * index, entry)
    struct.pack_into("<I", data, 388, (len(data) - vdi.decode_header(data).data_offset) // block)
    return bytes(data)
