"""XML out of images, read without what makes XML dangerous: no document types, no entities, bounded depth."""

from __future__ import annotations

from ..errors import ImageError
from ..typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

__all__ = ["MAX_XML", "parse_xml"]

MAX_XML: Final = 4 << 20
"""Bytes of a document."""
_MAX_DEPTH: Final = 64
_MAX_TAGS: Final = 1 << 17


def parse_xml(data: bytes | bytearray | memoryview, what: str) -> Element:
    """The root element; names are "namespace}name", as :mod:`xml.etree` has them with a brace in front.

    :param what: named in errors
    :raises ImageError: it is no XML, too large or too deep, or declares a document type
    """
    from xml.etree.ElementTree import TreeBuilder
    from xml.parsers import expat

    if len(data) > MAX_XML:
        raise ImageError(f"{what} has {len(data)} bytes, allowed are {MAX_XML}")
    text = bytes(data)
    if text.count(b"<") > _MAX_TAGS:
        raise ImageError(f"{what} has more than {_MAX_TAGS} tags")
    builder = TreeBuilder()
    parser = expat.ParserCreate(namespace_separator="}")
    depth = 0

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > _MAX_DEPTH:
            raise ImageError(f"{what} is nested more than {_MAX_DEPTH} deep")
        builder.start(name, attributes)

    def end(name: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(name)

    def refuse(*_: object) -> None:
        raise ImageError(f"{what} declares a document type, which is not accepted")

    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    try:
        parser.Parse(text, True)
    except expat.ExpatError as error:
        raise ImageError(f"{what} is no XML: {error}") from None
    root: Element = builder.close()
    return root
