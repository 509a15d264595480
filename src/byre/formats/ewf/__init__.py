"""ewf: forensic images of EnCase, FTK Imager and SMART (E01, S01), read-only.

Description: libewf, "Expert Witness Compression Format (EWF)". An image is one segment file or several, each a series
of sections; tables say where the chunks of the disk lie, most of them zlib streams. All numbers are little-endian.
Not supported: logical evidence (L01) and the second version of the format (Ex01); they are told apart and refused.
"""

from __future__ import annotations

from ...options import OptionSet
from ...typing import TYPE_CHECKING, Final
from ..readonly import open_read_only

if TYPE_CHECKING:
    from ...graph.node import Node
    from ...graph.opening import OpenRequest

__all__ = ["CHILDREN", "OPTIONS", "open_node"]

CHILDREN: Final = ("file",)
OPTIONS: Final = OptionSet()


def open_node(request: OpenRequest) -> Node:
    """The node of an existing image, given by its first segment; the others lie beside it.

    :raises ImageError: a segment breaks the format
    :raises NotSupported: it is to be written
    """
    from .image import EwfNode, open_segments

    node = open_read_only(request, EwfNode)
    assert isinstance(node, EwfNode)
    open_segments(node, request)
    return node
