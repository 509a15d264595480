"""Who may connect, by the distinguished name of a verified certificate: ``authz-simple`` and ``authz-list`` objects."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Final, NamedTuple

from ..errors import InvalidArgument, NotSupported
from .tls import object_properties

__all__ = ["AUTHORIZATION_TYPES", "Authorization"]

AUTHORIZATION_TYPES: Final = ("authz-simple", "authz-list")
"""The types of ``--object`` that :meth:`Authorization.parse` takes."""

_POLICIES: Final = ("allow", "deny")


class _Rule(NamedTuple):
    match: str
    allow: bool
    glob: bool


class Authorization:
    """The first rule that matches decides, else the policy.

    :ivar id: how ``--tls-authz`` names it
    """

    def __init__(self, id: str, rules: tuple[_Rule, ...], *, otherwise: bool = False) -> None:
        self.id = id
        self._rules = rules
        self._otherwise = otherwise

    @classmethod
    def parse(cls, text: str) -> Authorization:
        """The object that ``authz-simple,id=ID,identity=NAME`` or ``authz-list,id=ID,policy=...,rules.0.match=...``
        (or JSON) defines.

        :raises ByreError: malformed, or another type of object
        """
        properties = object_properties(text)
        kind = properties.pop("qom-type", "")
        identifier = properties.pop("id", "")
        if kind not in AUTHORIZATION_TYPES:
            raise NotSupported(f"objects of type {kind!r} authorize nobody")
        if not identifier:
            raise InvalidArgument(f"object {kind!r} needs an id")
        if kind == "authz-simple":
            identity = properties.pop("identity", "")
            if not identity:
                raise InvalidArgument(f"object {identifier!r} needs an identity")
            rules: tuple[_Rule, ...] = (_Rule(identity, True, False),)
            otherwise = False
        else:
            otherwise = _word(properties.pop("policy", "deny"), _POLICIES, "policy") == "allow"
            rules = _rules(properties)
        if properties:
            raise InvalidArgument(f"object {kind!r} has no property {next(iter(properties))!r}")
        return cls(identifier, rules, otherwise=otherwise)

    def allows(self, name: str) -> bool:
        """Whether the holder of a certificate for this distinguished name may connect."""
        for rule in self._rules:
            if fnmatchcase(name, rule.match) if rule.glob else name == rule.match:
                return rule.allow
        return self._otherwise


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
