"""Passphrases and keys, and where they come from. No message, ``repr`` or log ever shows one.

A provider is what a caller hands to ``byre.open`` and ``byre.graph.creating.create``: a mapping from ids to
secrets, or a function that is given an id. Values may be :class:`Secret`, text or bytes.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from ..errors import AccessDenied, InvalidArgument, NotFound, NotSupported, from_oserror, printable
from ..options import parse_keyval

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import TypeAlias

    Value: TypeAlias = "Secret | bytes | bytearray | str"
    SecretProvider: TypeAlias = Mapping[str, Value] | Callable[[str], Value]

__all__ = ["Secret", "find_secret", "find_text_secret", "hide_arguments", "protect_memory"]

_MAX_FILE: Final = 1 << 20
_MAX_DEPTH: Final = 8
_PROPERTIES: Final = ("id", "data", "file", "format", "keyid", "iv")


class Secret:
    """A ``--object secret,...`` definition: data, or the file or environment variable that holds it.

    ``file=`` may be ``env:NAME`` (a variable) or ``fd:N`` (an open descriptor); ``./env:x`` is a file of that name.
    """

    __slots__ = ("id", "properties")

    def __init__(self, properties: dict[str, str]) -> None:
        self.id = properties["id"]
        self.properties = properties

    def __repr__(self) -> str:
        return "Secret(...)"

    def __reduce__(self) -> str:
        raise TypeError("a secret cannot be pickled")

    @classmethod
    def parse(cls, text: str) -> Secret:
        """:raises ByreError: malformed, or another type of object; the message never shows a value"""
        if text.startswith("{"):
            from ..options import flatten, parse_json

            properties = {key: str(value) for key, value in flatten(parse_json(text, "object")).items()}
        else:
            properties = parse_keyval(text, implied="qom-type")
        kind = properties.pop("qom-type", "")
        if kind != "secret":
            raise NotSupported(f"objects of type {kind!r} are not supported; 'secret' and 'throttle-group' are")
        if not properties.get("id"):
            raise InvalidArgument("a secret needs an id")
        for key in properties:
            if key not in _PROPERTIES:
                raise InvalidArgument(f"a secret has no property {key!r}")
        shown = properties["id"]
        if ("data" in properties) == ("file" in properties):
            raise InvalidArgument(f"secret {shown!r} needs either 'data' or 'file'")
        if properties.get("format", "raw") not in ("raw", "base64"):
            raise InvalidArgument(f"secret {shown!r}: format must be 'raw' or 'base64'")
        if ("keyid" in properties) != ("iv" in properties):
            raise InvalidArgument(f"secret {shown!r} needs both 'keyid' and 'iv', or neither")
        return cls(properties)

    @property
    def exposed(self) -> bool:
        """Whether the definition itself holds the secret."""
        return "data" in self.properties

    def load(self, provider: SecretProvider | None = None, depth: int = 0) -> bytes:
        """The bytes.

        :param provider: where the key of an encrypted secret (``keyid``) is looked for
        :param depth: how many secrets are waiting for this one
        :raises ByreError: a file that cannot be read, data that is not base64, a wrong key
        """
        data = self._stored()
        if "keyid" in self.properties:
            key = find_secret(provider, self.properties["keyid"], _depth=depth + 1)
            return _decrypt(data, key, self.properties["iv"], self._name, self._encoded)
        return _base64(data, self._name) if self._encoded else data

    @property
    def _encoded(self) -> bool:
        return self.properties.get("format", "raw") == "base64"

    @property
    def _name(self) -> str:
        return f"secret {self.id!r}"

    def _stored(self) -> bytes:
        if "data" in self.properties:
            return self.properties["data"].encode("utf-8", "surrogateescape")
        place = self.properties["file"]
        if place.startswith("env:"):
            value = os.environb.get(os.fsencode(place[4:]))
            if value is None:
                raise NotFound(f"{self._name}: the environment has no variable {place[4:]!r}")
            return value
        return _read(place, self._name)


def _read(place: str, name: str) -> bytes:
    """A file's content; "fd:N" reads an open descriptor from its beginning."""
    try:
        if place.startswith("fd:") and place[3:].isdecimal():
            return _limited(os.dup(int(place[3:])), name)
        return _limited(os.open(place, os.O_RDONLY | os.O_CLOEXEC), name)
    except OSError as error:
        raise from_oserror(error, f"cannot read {name}", printable(place)) from None


def _limited(descriptor: int, name: str) -> bytes:
    with open(descriptor, "rb") as file:
        data = file.read(_MAX_FILE + 1)
    if len(data) > _MAX_FILE:
        raise InvalidArgument(f"{name} is longer than {_MAX_FILE} bytes")
    return data


def _base64(data: bytes, name: str) -> bytes:
    import base64
    import binascii

    try:
        return base64.b64decode(b"".join(data.split()), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidArgument(f"{name} is not valid base64") from None


def _decrypt(data: bytes, key: bytes, vector: str, name: str, encoded: bool) -> bytes:
    """AES-256-CBC with padding, as QEMU's secrets are encrypted: key and vector in base64, data raw or base64."""
    from .primitives import cipher_primitives

    iv = _base64(vector.encode(), f"the iv of {name}")
    if len(iv) != 16:
        raise InvalidArgument(f"{name}: iv has {len(iv)} bytes, 16 are needed")
    if len(key) != 32:
        raise InvalidArgument(f"{name}: the key it is encrypted with has {len(key)} bytes, 32 are needed")
    stored = _base64(data, name) if encoded else data
    if not stored or len(stored) % 16:
        raise InvalidArgument(f"{name}: encrypted data of {len(stored)} bytes is not a multiple of 16")
    ciphers, algorithms = cipher_primitives()
    context = ciphers.Cipher(algorithms.AES(key), ciphers.modes.CBC(iv)).decryptor()
    plain = bytes(context.update(stored) + context.finalize())
    padding = plain[-1]
    if not 1 <= padding <= 16 or plain[-padding:] != bytes((padding,)) * padding:
        raise AccessDenied(f"{name} does not open with the key it names")
    return plain[:-padding]


# -- providers ------------------------------------------------------------------------------------


def find_secret(provider: SecretProvider | None, identity: str, *, _depth: int = 0) -> bytes:
    """The secret called ``identity``.

    :raises NotFound: there is none
    """
    if _depth > _MAX_DEPTH:
        raise InvalidArgument(f"secret {identity!r} is the key of its own key")
    value: object = None
    if callable(provider):
        value = provider(identity)
    elif provider is not None:
        value = provider.get(identity)
    if value is None:
        raise NotFound(f"no secret with id {identity!r}")
    protect_memory()
    if isinstance(value, Secret):
        return value.load(provider, _depth)
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    raise InvalidArgument(f"secret {identity!r} is neither bytes nor text")


def find_text_secret(provider: SecretProvider | None, identity: str) -> bytes:
    """The secret as a passphrase that every program can be given: valid UTF-8.

    :raises InvalidArgument: it is not
    """
    secret = find_secret(provider, identity)
    try:
        secret.decode()
    except UnicodeDecodeError:
        raise InvalidArgument(f"data from secret {identity!r} is not valid UTF-8") from None
    return secret


# -- the process ----------------------------------------------------------------------------------


def protect_memory() -> None:
    """Keep what this process holds out of core dumps and other processes' reach, from now on. Best effort."""
    import resource

    try:
        _, hard = resource.getrlimit(resource.RLIMIT_CORE)
        resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
    except (OSError, ValueError):
        pass
    try:
        import ctypes

        pr_set_dumpable = 4
        ctypes.CDLL(None).prctl(pr_set_dumpable, 0, 0, 0, 0)
    except (OSError, AttributeError, ImportError):
        pass


def hide_arguments(words: list[str]) -> bool:
    """Overwrite ``words`` where the system shows this process's command line; whether all were found. Best effort.

    Linux shows the memory in which the arguments were handed over, so it is that memory which is written.
    """
    try:
        with open("/proc/self/stat", "rb") as file:
            fields = file.read().rpartition(b") ")[2].split()
        start, end = int(fields[45]), int(fields[46])  # arg_start, arg_end: fields 48 and 49 of proc(5)
        descriptor = os.open("/proc/self/mem", os.O_RDWR | os.O_CLOEXEC)
    except (OSError, ValueError, IndexError):
        return False
    try:
        return _overwrite(descriptor, start, end, [os.fsencode(word) for word in words if word])
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _overwrite(descriptor: int, start: int, end: int, words: list[bytes]) -> bool:
    shown = os.pread(descriptor, end - start, start)
    hidden = shown
    for word in words:
        hidden = hidden.replace(word, b"*" * len(word))
    if hidden == shown:
        return not words
    os.pwrite(descriptor, hidden, start)
    return all(word not in hidden for word in words)
