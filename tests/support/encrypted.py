"""Encrypted images in memory, with key derivation that takes no time."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from byre.catalog import driver
from byre.crypto.luks import Volume, new_volume, new_volume_spec, read_volume
from byre.graph.creating import CreateRequest
from byre.graph.graph import Graph
from byre.graph.node import PERM_ALL, PERM_READ, PERM_RESIZE, PERM_WRITE
from byre.image import Image
from byre.protocols.memory import MemoryNode
from support.images import detached, open_image

SECRETS = {"s": "correct horse"}


def new_encrypted(driver_name: str, size: int, /, **options: object) -> MemoryNode:
    """An image made in memory; options of encryption without their prefix and with underscores ("cipher_mode")."""
    module: Any = import_module(driver(driver_name).module)
    prefix = "encrypt." if driver_name == "qcow2" else ""
    given: dict[str, object] = {"size": size, f"{prefix}key-secret": "s"}
    own = ("cipher_alg", "cipher_mode", "ivgen_alg", "ivgen_hash_alg", "hash_alg", "format", "detached_header")
    for name, value in options.items():
        given[prefix + name.replace("_", "-") if name in own else name] = value
    if given.get("encrypt.format") != "aes":
        given[f"{prefix}iter-time"] = 0
    values = module.CREATE_OPTIONS.parse(given, what=driver_name)
    module.check_create(values)
    graph, memory = Graph(), MemoryNode()
    graph.add(memory)
    graph.attach_image(memory, "creation", PERM_READ | PERM_WRITE | PERM_RESIZE, PERM_ALL)

    def create_file(name: str, file_options: object) -> MemoryNode:
        raise AssertionError("no data file is expected")

    module.create(CreateRequest("memory", values, memory, graph, create_file, SECRETS))
    return detached(memory)


def open_encrypted(memory: MemoryNode, format: str, **more: Any) -> Image:
    key = "encrypt.key-secret" if format == "qcow2" else "key-secret"
    options = {key: "s", **more.pop("options", {})}
    return open_image(memory, format, options=options, secrets=SECRETS, **more)


class MemoryArea:
    """A header area that records its writes; "|" stands for a flush."""

    def __init__(self, data: bytes = b"") -> None:
        self.data = bytearray(data)
        self.log: list[tuple[int, bytes] | str] = []

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.data[offset : offset + length]).ljust(length, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        self.log.append((offset, bytes(data)))
        self.apply(offset, data)

    def apply(self, offset: int, data: bytes) -> None:
        if len(self.data) < offset + len(data):
            self.data.extend(bytes(offset + len(data) - len(self.data)))
        self.data[offset : offset + len(data)] = data

    def flush(self) -> None:
        self.log.append("|")


def small_volume(passphrase: bytes = b"one", **options: Any) -> tuple[MemoryArea, Volume]:
    """A LUKS1 header in memory; aes-128 without anything the test does not ask for."""
    words = {"cipher": "aes-128", "mode": "cbc", **{k: v for k, v in options.items() if k not in ("hash_name",)}}
    made = new_volume(new_volume_spec(**words), passphrase, iter_time=0, hash_name=options.get("hash_name", "sha256"))
    area = MemoryArea(bytes(made.length))
    for offset, data in made.parts:
        area.apply(offset, data)
    return area, read_volume(area)
