"""A picture of what every layer of a chain holds, written as PNG with nothing but zlib and numpy."""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["KINDS", "Layer", "draw", "write_png"]

Colour = tuple[int, int, int]

#: What a cluster can be, in the order of byre's extent kinds, and its colour.
KINDS: tuple[tuple[str, Colour], ...] = (
    ("data", (77, 171, 247)),
    ("zero", (250, 200, 90)),
    ("unallocated", (38, 46, 58)),
    ("compressed", (180, 120, 240)),
)
BACKGROUND: Colour = (18, 22, 29)
BRIGHT: Colour = (236, 240, 245)
DIM: Colour = (140, 152, 168)
TICK: Colour = (70, 82, 98)

ROWS = 16
WIDTH = 1280  # pixels, at most, for the cells of a band
MARGIN = 36

# Five columns for each printable ASCII character, the lowest bit on top.
_FONT = bytes.fromhex(
    "0000000000 00005f0000 0007000700 147f147f14 242a7f2a12 2313086462 3649552250 0005030000 001c224100 0041221c00"
    "14083e0814 08083e0808 0050300000 0808080808 0060600000 2010080402 3e5149453e 00427f4000 4261514946 2141454b31"
    "1814127f10 2745454539 3c4a494930 0171090503 3649494936 064949291e 0036360000 0056360000 0814224100 1414141414"
    "0041221408 0201510906 324979413e 7e1111117e 7f49494936 3e41414122 7f4141221c 7f49494941 7f09090901 3e4149497a"
    "7f0808087f 00417f4100 2040413f01 7f08142241 7f40404040 7f020c027f 7f0408107f 3e4141413e 7f09090906 3e4151215e"
    "7f09192946 4649494931 01017f0101 3f4040403f 1f2040201f 3f4038403f 6314081463 0708700807 6151494543 007f414100"
    "0204081020 0041417f00 0402010204 4040404040 0001020400 2054545478 7f48444438 3844444420 384444487f 3854545418"
    "087e090102 18a4a4a47c 7f08040478 00447d4000 4080847d00 7f10284400 00417f4000 7c04180478 7c08040478 3844444438"
    "fc44444438 38444444fc 7c08040408 4854545420 043f444020 3c4040207c 1c2040201c 3c4030403c 4428102844 1ca0a0a07c"
    "4464544c44 0008364100 00007f0000 0041360800 0804081008"
)


class Layer(NamedTuple):
    """One band of the picture.

    :ivar title: what the layer is called
    :ivar note: a few words more, shown at the right
    :ivar kinds: for each cluster from guest offset 0, its index into ``KINDS``
    """

    title: str
    note: str
    kinds: np.ndarray


def draw(heading: str, layers: Sequence[Layer], cluster_size: int) -> np.ndarray:
    """The picture as an array of shape (height, width, 3), dtype uint8.

    Each cluster is a cell; cells run down the columns, so that the same guest offset is at the same place in
    every band and the bands can be compared by looking up and down.
    """
    column_count = -(-max(len(layer.kinds) for layer in layers) // ROWS)
    cell = max(2, WIDTH // column_count)  # one pixel of it is the gap
    width = 2 * MARGIN + column_count * cell
    band = ROWS * cell
    top = 116
    pitch = band + 46
    canvas = np.empty((top + len(layers) * pitch + 50, width, 3), np.uint8)
    canvas[:] = BACKGROUND
    text(canvas, MARGIN, 28, heading, BRIGHT, 3)
    _legend(canvas, MARGIN, 72, cluster_size)
    for index, layer in enumerate(layers):
        y = top + index * pitch
        text(canvas, MARGIN, y, layer.title, BRIGHT, 2)
        text(canvas, width - MARGIN - text_width(layer.note, 2), y, layer.note, DIM, 2)
        _band(canvas, MARGIN, y + 22, layer.kinds, column_count, cell)
    _ruler(canvas, MARGIN, top + len(layers) * pitch - 18, column_count, cell, cluster_size)
    return canvas


def text_width(words: str, scale: int) -> int:
    return len(words) * 6 * scale - scale


def text(canvas: np.ndarray, x: int, y: int, words: str, colour: Colour, scale: int) -> None:
    """Draw ``words`` with its upper left corner at (x, y); what lies outside the canvas is cut off."""
    for character in words:
        index = ord(character) - 32 if " " <= character <= "~" else ord("?") - 32
        glyph = np.frombuffer(_FONT, np.uint8)[index * 5 : index * 5 + 5]
        dots = np.unpackbits(glyph[:, None], axis=1, bitorder="little").T.astype(bool)
        dots = dots.repeat(scale, 0).repeat(scale, 1)
        area = canvas[y : y + dots.shape[0], max(x, 0) : x + dots.shape[1]]
        area[dots[: area.shape[0], : area.shape[1]]] = colour
        x += 6 * scale


def _band(canvas: np.ndarray, x: int, y: int, kinds: np.ndarray, column_count: int, cell: int) -> None:
    palette = np.array([colour for _, colour in KINDS] + [BACKGROUND], np.uint8)
    cells = np.full(column_count * ROWS, len(KINDS))  # the rest of the last column is empty
    cells[: len(kinds)] = kinds
    pixels = palette[cells.reshape(column_count, ROWS).T]
    pixels = pixels.repeat(cell, 0).repeat(cell, 1)
    pixels[cell - 1 :: cell] = BACKGROUND
    pixels[:, cell - 1 :: cell] = BACKGROUND
    canvas[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels


def _legend(canvas: np.ndarray, x: int, y: int, cluster_size: int) -> None:
    for name, colour in KINDS:
        canvas[y : y + 14, x : x + 14] = colour
        text(canvas, x + 22, y, name, BRIGHT, 2)
        x += 22 + text_width(name, 2) + 30
    text(canvas, x, y, f"one cell is a cluster of {cluster_size >> 10} KiB", DIM, 2)


def _ruler(canvas: np.ndarray, x: int, y: int, column_count: int, cell: int, cluster_size: int) -> None:
    """Guest offsets below the last band, every eighth of the disk."""
    end = column_count * ROWS * cluster_size
    for part in range(9):
        at = x + column_count * cell * part // 8
        canvas[y : y + 8, min(at, canvas.shape[1] - 1)] = TICK
        words = f"{(end * part // 8) >> 20} MiB" if part else "0"
        left = min(max(at - text_width(words, 1) // 2, x), x + column_count * cell - text_width(words, 1))
        text(canvas, left, y + 14, words, DIM, 1)


def write_png(path: str, pixels: np.ndarray) -> None:
    """Write an array of shape (height, width, 3), dtype uint8, as an RGB image (PNG specification, section 11)."""
    height, width, _ = pixels.shape
    rows = np.zeros((height, 1 + width * 3), np.uint8)  # each row begins with its filter: 0, none
    rows[:, 1:] = pixels.reshape(height, width * 3)
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        file.write(_chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)))
        file.write(_chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)))
        file.write(_chunk(b"IEND", b""))


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
