"""Images in memory: made, wrapped in filters and opened without touching a file system."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import byre
from byre.catalog import driver
from byre.filters.base import FilterNode
from byre.filters.writelog import LogNode
from byre.graph.creating import CreateRequest
from byre.graph.graph import Graph
from byre.graph.node import PERM_ALL, PERM_READ, PERM_RESIZE, PERM_WRITE, Node
from byre.image import Image
from byre.protocols.memory import MemoryNode


def detached(node: MemoryNode) -> MemoryNode:
    """``node`` ready to be added to another graph, after the one it was in let it go."""
    node.closed = False
    node.parents.clear()
    node.name = ""
    return node


def new_image(
    format: str, size: int, data_node: MemoryNode | None = None, file: Node | None = None, **options: object
) -> MemoryNode:
    """An image of ``format`` made in memory (or in ``file``, a node on top of a memory node)."""
    module: Any = import_module(driver(format).module)
    values = module.CREATE_OPTIONS.parse({"size": size, **options}, what=format)
    if hasattr(module, "check_create"):
        module.check_create(values)
    graph = Graph()
    memory = file if file is not None else MemoryNode()
    graph.add(memory)
    graph.attach_image(memory, "creation", PERM_READ | PERM_WRITE | PERM_RESIZE, PERM_ALL)

    def create_file(name: str, file_options: Mapping[str, object]) -> Node:
        assert data_node is not None, "this image needs a data file"
        graph.add(data_node)
        data_node.resize(int(str(file_options["size"])))
        return data_node

    module.create(CreateRequest("memory", values, memory, graph, create_file))
    for node in (memory, data_node):
        if isinstance(node, MemoryNode):
            detached(node)
    return memory  # type: ignore[return-value]


def stack(graph: Graph, bottom: Node, filters: Sequence[FilterNode] = ()) -> Node:
    """``filters`` (the lowest first) on top of ``bottom``, all in ``graph``; the top node."""
    top = bottom
    graph.add(bottom)
    for node in filters:
        graph.add(node)
        graph.attach(node, "file", top, "filtered")
        node.limits = top.limits
        if isinstance(node, LogNode):
            node.start()
        top = node
    return top


def open_image(
    file: MemoryNode,
    format: str = "qcow2",
    *,
    filters: Sequence[FilterNode] = (),
    backing: Mapping[str, object] | None = None,
    data_file: MemoryNode | None = None,
    data_filters: Sequence[FilterNode] = (),
    graph: Graph | None = None,
    read_only: bool = False,
    options: Mapping[str, object] | None = None,
    **more: Any,
) -> Image:
    """An Image over ``file``, with ``filters`` between the format and the memory.

    :param backing: options of the backing node, see :func:`layer`
    """
    graph = graph or Graph()
    spec: dict[str, object] = {"driver": format, "file": stack(graph, detached(file), filters).name, **(options or {})}
    if data_file is not None:
        spec["data-file"] = stack(graph, detached(data_file), data_filters).name
    if backing is not None:
        spec["backing"] = dict(backing)
    return byre.open(spec, read_only=read_only, graph=graph, **more)


def layer(
    graph: Graph, file: MemoryNode, format: str, backing: Mapping[str, object] | None = None
) -> dict[str, object]:
    """Options for a read-only layer over ``file``, for ``backing`` of :func:`open_image`."""
    graph.add(detached(file))
    spec: dict[str, object] = {"driver": format, "file": file.name}
    if backing is not None:
        spec["backing"] = dict(backing)
    return spec
