"""Who may connect, by the distinguished name of a verified certificate: ``authz-simple``, ``authz-list`` and
``authz-list-file`` objects.
"""

from __future__ import annotations

import os
import threading
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final, NamedTuple

from ..errors import ByreError, InvalidArgument, NotSupported, from_oserror, printable
from ..options import flatten
from .tls import object_properties

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["AUTHORIZATION_TYPES", "Authorization"]

_LIST_FILES: Final = ("authz-list-file", "authz-listfile")
AUTHORIZATION_TYPES: Final = ("authz-simple", "authz-list", *_LIST_FILES)
"""The types of ``--object`` that :meth:`Authorization.parse` takes."""

_POLICIES: Final = ("allow", "deny")
_YES: Final = ("on", "yes", "true")
_NO: Final = ("off", "no", "false")
_FILE_LIMIT: Final = 1 << 20
"""Bytes of a file with rules."""


class _Rule(NamedTuple):
    match: str
    allow: bool
    glob: bool


class _Rules(NamedTuple):
    """The first rule that matches decides, else the policy."""

    rules: tuple[_Rule, ...] = ()
    otherwise: bool = False

    def allow(self, name: str) -> bool:
        for rule in self.rules:
            if fnmatchcase(name, rule.match) if rule.glob else name == rule.match:
                return rule.allow
        return self.otherwise


class Authorization:
    """Says whose certificates are welcome.

    :ivar id: how ``--tls-authz`` names it
    :param rules: gives the rules that count now; any thread may call it
    """

    def __init__(self, id: str, rules: Callable[[], _Rules]) -> None:
        self.id = id
        self._rules = rules

    @classmethod
    def parse(cls, text: str) -> Authorization:
        """The object that ``authz-simple,id=ID,identity=NAME``, ``authz-list,id=ID,policy=...,rules.0.match=...`` or
        ``authz-list-file,id=ID,filename=FILE`` (or JSON) defines.

        :raises ByreError: malformed, another type of object, or a file that cannot be used
        """
        properties = object_properties(text)
        kind = properties.pop("qom-type", "")
        identifier = properties.pop("id", "")
        if kind not in AUTHORIZATION_TYPES:
            raise NotSupported(f"objects of type {kind!r} authorize nobody")
        if not identifier:
            raise InvalidArgument(f"object {kind!r} needs an id")
        if kind in _LIST_FILES:
            made = cls(identifier, _file(identifier, properties))
        else:
            rules = _simple(identifier, properties) if kind == "authz-simple" else _list(properties)
            made = cls(identifier, lambda: rules)
        if properties:
            raise InvalidArgument(f"object {kind!r} has no property {next(iter(properties))!r}")
        return made

    def allows(self, name: str) -> bool:
        """Whether the holder of a certificate for this distinguished name may connect."""
        return self._rules().allow(name)


def _needed(identifier: str, properties: dict[str, str], name: str) -> str:
    value = properties.pop(name, "")
    if not value:
        raise InvalidArgument(f"object {identifier!r} needs {'an' if name[0] in 'aeio' else 'a'} {name}")
    return value


def _simple(identifier: str, properties: dict[str, str]) -> _Rules:
    return _Rules((_Rule(_needed(identifier, properties, "identity"), True, False),))


def _list(properties: dict[str, str]) -> _Rules:
    otherwise = _word(properties.pop("policy", "deny"), _POLICIES, "policy") == "allow"
    return _Rules(_rules(properties), otherwise)


def _file(identifier: str, properties: dict[str, str]) -> Callable[[], _Rules]:
    filename = _needed(identifier, properties, "filename")
    source = _File(filename)
    rules = source.current()
    if _word(properties.pop("refresh", "on"), (*_YES, *_NO), "refresh") in _YES:
        return source.current_or_none
    return lambda: rules


class _File:
    """Rules in a file, read again when it has changed. Guarded by ``_lock``: what was read, and of which state."""

    def __init__(self, filename: str) -> None:
        self._filename = filename
        self._lock = threading.Lock()
        self._state: tuple[int, ...] = ()
        self._rules = _Rules()

    def current(self) -> _Rules:
        """:raises ByreError: the file cannot be read, or holds something else"""
        with self._lock:
            try:
                with open(self._filename, "rb") as file:
                    found = os.fstat(file.fileno())
                    state = found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
                    if state != self._state:
                        self._state = ()
                        self._rules = _parsed(file.read(_FILE_LIMIT + 1), self._filename)
                        self._state = state
            except OSError as error:
                raise from_oserror(error, "cannot read who is authorized", printable(self._filename)) from None
            return self._rules

    def current_or_none(self) -> _Rules:
        """Nobody is welcome as long as nobody can tell who is."""
        try:
            return self.current()
        except ByreError:
            return _Rules()


def _parsed(data: bytes, filename: str) -> _Rules:
    import json

    where = printable(filename)
    if len(data) > _FILE_LIMIT:
        raise InvalidArgument(f"a list of who is authorized has {_FILE_LIMIT} bytes at most", where=where)
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"no JSON: {printable(str(error))}", where=where) from None
    if not isinstance(values, dict):
        raise InvalidArgument("expected a JSON object with policy and rules", where=where)
    properties = {key: str(value) for key, value in flatten(values).items()}
    try:
        rules = _list(properties)
    except InvalidArgument as error:
        raise InvalidArgument(error.message, where=where) from None
    if properties:
        raise InvalidArgument(f"{printable(next(iter(properties)))!r} is no property of a list", where=where)
    return rules


def _rules(properties: dict[str, str]) -> tuple[_Rule, ...]:
    """Takes ``rules.N.match``, ``.policy`` and ``.format`` out of ``properties``."""
    found: list[_Rule] = []
    while f"rules.{len(found)}.match" in properties:
        prefix = f"rules.{len(found)}."
        policy = _word(properties.pop(prefix + "policy", ""), _POLICIES, prefix + "policy")
        form = _word(properties.pop(prefix + "format", "exact"), ("exact", "glob"), prefix + "format")
        found.append(_Rule(properties.pop(prefix + "match"), policy == "allow", form == "glob"))
    return tuple(found)


def _word(value: str, allowed: tuple[str, ...], what: str) -> str:
    if value not in allowed:
        raise InvalidArgument(f"{what} is {value!r}: expected {' or '.join(allowed)}")
    return value
