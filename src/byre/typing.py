"""The words of :mod:`typing` that modules loaded at start-up use, without loading it.

``typing`` brings ``re``, ``enum``, ``contextlib`` and more with it: as much time as a bare interpreter takes, in
each of the programs a script starts. Type checkers see the real thing. At run time annotations are text that
nobody reads, so most words need no meaning; a :class:`NamedTuple` and ``isinstance`` with a :class:`Protocol` do.

Modules that start-up does not load may import ``typing`` itself. A module that defines a NamedTuple here has
``from __future__ import annotations``, as all have: annotations are not evaluated.
"""

from __future__ import annotations

TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any, Final, NamedTuple, Protocol, cast, runtime_checkable
else:
    try:
        from _collections import _tuplegetter
    except ImportError:  # an interpreter of another make

        def _tuplegetter(index, doc):
            return property(lambda record: record[index], doc=doc)

    Any = Final = None

    def cast(_kind, value):
        return value

    class _Shape(type):
        """``isinstance`` with a protocol marked runtime_checkable asks whether everything it names is there."""

        def __instancecheck__(cls, instance):
            members = vars(cls).get("_members")
            if members is None:
                return super().__instancecheck__(instance)
            return all(hasattr(instance, member) for member in members)

    class Protocol(metaclass=_Shape):
        __slots__ = ()

    def runtime_checkable(protocol):
        named = {**vars(protocol), **vars(protocol).get("__annotations__", {})}
        protocol._members = tuple(name for name in named if not name.startswith("_"))
        return protocol

    class _Fields(type):
        """Turns the annotated names of a class body into the fields of a tuple."""

        def __new__(cls, name, bases, body):
            fields = tuple(body.get("__annotations__", ()))
            if not bases or not fields:
                return super().__new__(cls, name, bases, body)
            defaults = {field: body[field] for field in fields if field in body}
            if tuple(defaults) != fields[len(fields) - len(defaults) :]:
                raise TypeError(f"{name}: a field without a default follows one that has a default")
            body.update((field, _tuplegetter(index, field)) for index, field in enumerate(fields))
            body.update(__slots__=(), __match_args__=fields, _fields=fields, _field_defaults=defaults)
            return super().__new__(cls, name, bases, body)

        def compile_new(cls):
            """Give the class its own ``__new__``, which is as fast as one written out."""
            arguments = ", ".join(cls._fields)
            new = eval(f"lambda _cls, {arguments}: _make(_cls, ({arguments},))", {"_make": tuple.__new__})
            new.__defaults__ = tuple(cls._field_defaults.values())
            cls.__new__ = new

    class NamedTuple(tuple, metaclass=_Fields):
        __slots__ = ()

        def __new__(cls, *values, **named):
            """The first time only: most records of a short command are never made."""
            cls.compile_new()
            return cls(*values, **named)

        def __repr__(self):
            values = ", ".join(f"{field}={value!r}" for field, value in zip(self._fields, self, strict=True))
            return f"{type(self).__name__}({values})"

        def __getnewargs__(self):
            return tuple(self)

        @classmethod
        def _make(cls, values):
            return cls(*values)

        def _asdict(self):
            return dict(zip(self._fields, self, strict=True))

        def _replace(self, /, **changes):
            replaced = tuple.__new__(type(self), map(changes.pop, self._fields, self))
            if changes:
                raise TypeError(f"{type(self).__name__} has no field {', '.join(map(repr, changes))}")
            return replaced


__all__ = ["TYPE_CHECKING", "Any", "Final", "NamedTuple", "Protocol", "cast", "runtime_checkable"]
