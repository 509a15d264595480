"""Fault rules: when a request fails, when the state changes, and how both are written down.

The rules of ``blkdebug``: an event activates rules, an active rule fails requests it fits. Owns the
rule engine (no locks, no I/O) and the reading of options and of configuration files; ``faults.py``
applies it to requests.
"""

from __future__ import annotations

import errno as _errno
from typing import TYPE_CHECKING, Final, NamedTuple

from ..errors import InvalidArgument, from_oserror
from ..graph.node import PERM_READ, PERM_RESIZE, PERM_WRITE, PERM_WRITE_UNCHANGED
from ..options import Option, OptionSet, OptionValues, flatten

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["EVENTS", "IO_TYPES", "ErrorRule", "FaultOptions", "RuleEngine", "StateRule", "read_config", "rules_of"]

_EVENT_NAMES: Final = """
l1_update l1_grow_alloc_table l1_grow_write_table l1_grow_activate_table l2_load l2_update l2_update_compressed
l2_alloc_cow_read l2_alloc_write read_aio read_backing_aio read_compressed write_aio write_compressed vmstate_load
vmstate_save cow_read cow_write reftable_load reftable_grow reftable_update refblock_load refblock_update
refblock_update_part refblock_alloc refblock_alloc_hookup refblock_alloc_write refblock_alloc_write_blocks
refblock_alloc_write_table refblock_alloc_switch_table cluster_alloc cluster_alloc_bytes cluster_free flush_to_os
flush_to_disk pwritev_rmw_head pwritev_rmw_after_head pwritev_rmw_tail pwritev_rmw_after_tail pwritev pwritev_zero
pwritev_done empty_image_prepare l1_shrink_write_table l1_shrink_free_l2_clusters cor_write cluster_alloc_space none
"""
EVENTS: Final = frozenset(_EVENT_NAMES.split())
IO_TYPES: Final = ("read", "write", "write-zeroes", "discard", "flush", "block-status")
_DEFAULT_IO_TYPES: Final = frozenset(IO_TYPES[:5])

_PERMISSIONS: Final = {"consistent-read": PERM_READ, "write": PERM_WRITE, "write-unchanged": PERM_WRITE_UNCHANGED,
                       "resize": PERM_RESIZE, "graph-mod": 0}  # fmt: skip

_RULE_OPTIONS: Final = {
    "inject-error": OptionSet(
        Option("event", "str", "event that activates the rule"),
        Option("state", "int", "state in which it does; 0 for any", 0),
        Option("iotype", "enum", "kind of request to fail", None, IO_TYPES),
        Option("errno", "int", "error number", _errno.EIO),
        Option("sector", "int", "sector the request must touch"),
        Option("once", "bool", "fail one request only", False),
        Option("immediately", "bool", "fail without a detour through the event loop", False),
    ),
    "set-state": OptionSet(
        Option("event", "str", "event that changes the state"),
        Option("state", "int", "state in which it does; 0 for any", 0),
        Option("new_state", "int", "state to change to", 0),
    ),
}


class ErrorRule(NamedTuple):
    """Once ``event`` happened in ``state``, requests of ``iotypes`` that touch byte ``offset`` fail.

    0 is any state, -1 any offset.
    """

    event: str
    state: int
    iotypes: frozenset[str]
    errno: int
    offset: int
    once: bool


class StateRule(NamedTuple):
    """``event`` in ``state`` (0: any) changes the state to ``new_state``."""

    event: str
    state: int
    new_state: int


class RuleEngine:
    """The rules, the state (1 at first), and what is active.

    Guarded by: the caller's lock.
    """

    def __init__(self, rules: Iterable[ErrorRule | StateRule]) -> None:
        self.state = 1
        self._by_event: dict[str, list[ErrorRule | StateRule]] = {}
        self._active: list[ErrorRule] = []
        for rule in rules:
            self._by_event.setdefault(rule.event, []).append(rule)

    def happened(self, event: str) -> None:
        """``event`` occurred. The error rules it activates replace those active before; without any, those stay."""
        fitting = [rule for rule in self._by_event.get(event, ()) if rule.state in (0, self.state)]
        if not fitting:
            return
        errors = [rule for rule in fitting if isinstance(rule, ErrorRule)]
        if errors:
            self._active = errors
        for rule in fitting:
            if isinstance(rule, StateRule):
                self.state = rule.new_state
                break

    def error_for(self, iotype: str, offset: int, length: int) -> int:
        """The error number a request gets, 0 for none; a ``once`` rule is used up by it."""
        for rule in self._active:
            if iotype in rule.iotypes and (rule.offset < 0 or offset <= rule.offset < offset + length):
                if rule.once and rule.errno:
                    self._active.remove(rule)
                    self._by_event[rule.event].remove(rule)
                return rule.errno
        return 0


# -- how rules are written ------------------------------------------------------------------------


class FaultOptions(OptionSet):
    """The options of ``blkdebug``: a fixed set, and the open-ended rule and permission lists.

    The lists end up in ``OptionValues.given`` as lists of typed dicts (rules) and as bit masks (permissions).
    """

    def parse(self, given: Mapping[str, object], *, what: str) -> OptionValues:
        plain: dict[str, object] = {}
        groups: dict[str, dict[str, object]] = {}
        for key, value in flatten(given).items():
            group, _, rest = key.partition(".")
            if group in (*_RULE_OPTIONS, "take-child-perms", "unshare-child-perms"):
                groups.setdefault(group, {})[rest] = value
            else:
                plain[key] = value
        values = super().parse(plain, what=what)
        for group, entries in groups.items():
            if group in _RULE_OPTIONS:
                values.given[group] = _rule_list(group, entries)
            else:
                values.given[group] = _permission_mask(group, entries)
        return values


def _rule_list(group: str, entries: Mapping[str, object]) -> list[OptionValues]:
    """Rules from ``{"0.event": ...}``, or one rule from ``{"event": ...}``."""
    rules: dict[str, dict[str, object]] = {}
    for key, value in entries.items():
        index, dot, name = key.partition(".")
        if not dot:
            index, name = "", key
        elif not index.isdigit():
            raise InvalidArgument(f"option '{group}.{key}': expected '{group}.N.name', with a number N")
        rules.setdefault(index, {})[name] = value
    order = sorted(rules, key=lambda index: int(index or "0"))
    return [_RULE_OPTIONS[group].parse(rules[index], what=f"a rule of {group!r}") for index in order]


def _permission_mask(group: str, entries: Mapping[str, object]) -> int:
    mask = 0
    for value in entries.values():
        if value not in _PERMISSIONS:
            raise InvalidArgument(f"option {group!r} holds {value!r}: expected one of {', '.join(_PERMISSIONS)}")
        mask |= _PERMISSIONS[str(value)]
    return mask


def rules_of(values: OptionValues) -> list[ErrorRule | StateRule]:
    """The rules of parsed ``blkdebug`` options: those of the ``config`` file, then those of the options.

    :raises InvalidArgument: a rule without an event or with an unknown one
    """
    groups: dict[str, list[OptionValues]] = {name: [] for name in _RULE_OPTIONS}
    config = values.text("config")
    if config:
        for group, entries in read_config(config):
            groups[group].append(entries)
    for group in groups:
        given = values.given.get(group)
        if isinstance(given, list):
            groups[group] += given
    return [_error_rule(rule) for rule in groups["inject-error"]] + [_state_rule(r) for r in groups["set-state"]]


def _error_rule(rule: OptionValues) -> ErrorRule:
    kind = rule.text("iotype")
    sector = rule.optional_number("sector")
    return ErrorRule(
        _event_of(rule),
        rule.number("state"),
        frozenset((kind,)) if kind else _DEFAULT_IO_TYPES,
        rule.number("errno"),
        -1 if sector is None else sector * 512,
        rule.flag("once"),
    )


def _state_rule(rule: OptionValues) -> StateRule:
    return StateRule(_event_of(rule), rule.number("state"), rule.number("new_state"))


def _event_of(rule: OptionValues) -> str:
    event = rule.text("event")
    if event is None:
        raise InvalidArgument("a fault rule names no event")
    return check_event(event)


def check_event(event: str) -> str:
    """:raises InvalidArgument: no such event"""
    if event not in EVENTS:
        raise InvalidArgument(f"unknown event {event!r}", hint=f"known are {', '.join(sorted(EVENTS))}")
    return event


def read_config(path: str) -> list[tuple[str, OptionValues]]:
    """``[(group, values)]`` from a file of ``[inject-error]`` and ``[set-state]`` sections, ``key = "value"`` lines
    and ``#`` comments.

    :raises InvalidArgument: a line that is none of these
    """
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.read(1 << 20).splitlines()
    except OSError as error:
        raise from_oserror(error, "cannot read fault rules", path) from None
    sections: list[tuple[str, dict[str, object]]] = []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        where = f"{path}:{number}"
        if not text or text.startswith("#"):
            continue
        if text.startswith("["):
            sections.append((_section_name(text, where), {}))
            continue
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals or len(value) < 2 or value[0] != '"' or value[-1] != '"':
            raise InvalidArgument(f'expected key = "value", found {text!r}', where=where)
        if not sections:
            raise InvalidArgument(f"{key!r} stands before any section", where=where)
        sections[-1][1][key] = value[1:-1]
    return [(name, _RULE_OPTIONS[name].parse(values, what=f"section [{name}] of {path}")) for name, values in sections]


def _section_name(text: str, where: str) -> str:
    name = text[1:-1].split(None, 1)[0] if text.endswith("]") and text[1:-1].split() else ""
    if name not in _RULE_OPTIONS:
        raise InvalidArgument(f"unknown section {text!r}: expected [inject-error] or [set-state]", where=where)
    return name


def size_option(values: OptionValues, name: str, unit: int) -> int:
    """A limit that must be a multiple of ``unit`` and below 2 GiB; 0 if it was not given."""
    size = values.number(name)
    if size and (size >= 1 << 31 or size % unit):
        raise InvalidArgument(f"option {name!r} is {size}: expected a multiple of {unit} below 2 GiB")
    return size
