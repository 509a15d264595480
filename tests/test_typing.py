"""byre.typing's named tuples behave as those of the standard library."""

from __future__ import annotations

import copy
import pickle
import typing

import pytest

from byre.typing import NamedTuple, Protocol, cast, runtime_checkable


class Ours(NamedTuple):
    """What is under test."""

    offset: int
    length: int
    name: str = "none"
    parts: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        return self.offset + self.length


class Theirs(typing.NamedTuple):
    """The same from the standard library."""

    offset: int
    length: int
    name: str = "none"
    parts: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        return self.offset + self.length


@runtime_checkable
class Sized(Protocol):
    size: int

    def shrink(self) -> None: ...


@pytest.mark.parametrize("values", [(1, 2), (1, 2, "x"), (1, 2, "x", (3,))])
def test_values_fields_and_repr(values: tuple[object, ...]) -> None:
    ours, theirs = Ours(*values), Theirs(*values)  # type: ignore[arg-type]
    assert tuple(ours) == tuple(theirs)
    assert (ours.offset, ours.length, ours.name, ours.parts, ours.end) == (*theirs, theirs.end)
    assert ours._asdict() == theirs._asdict()
    assert repr(ours) == repr(theirs).replace("Theirs", "Ours")
    assert (Ours._fields, Ours._field_defaults) == (Theirs._fields, Theirs._field_defaults)
    assert hash(ours) == hash(theirs)
    assert isinstance(ours, tuple)
    assert Ours.__doc__ == "What is under test."


def test_named_arguments_replace_and_make() -> None:
    one = Ours(length=2, offset=1)
    assert one == Ours(1, 2)
    assert one._replace(name="y") == Ours(1, 2, "y")
    assert type(one._replace(name="y")) is Ours
    assert Ours._make([1, 2, "z"]) == Ours(1, 2, "z")


def test_wrong_arguments_are_refused() -> None:
    for type_ in (Ours, Theirs):
        with pytest.raises(TypeError):
            type_(1)  # type: ignore[call-arg]
        with pytest.raises(TypeError):
            type_(1, 2, "x", (), 5)  # type: ignore[call-arg]
        with pytest.raises((TypeError, ValueError)):
            type_(1, 2)._replace(width=3)  # type: ignore[call-arg]


def test_records_cannot_be_changed() -> None:
    one = Ours(1, 2)
    with pytest.raises(AttributeError):
        one.offset = 5  # type: ignore[misc]
    with pytest.raises(AttributeError):
        one.other = 5  # type: ignore[attr-defined]


def test_copies_and_patterns() -> None:
    one = Ours(1, 2, "x")
    assert pickle.loads(pickle.dumps(one)) == one
    assert copy.deepcopy(one) == one
    match one:
        case Ours(offset, 2, name=name):
            assert (offset, name) == (1, "x")
        case _:
            pytest.fail("a record is no pattern of itself")


def test_a_field_without_default_after_one_with_default_is_refused() -> None:
    with pytest.raises(TypeError, match="without a default"):
        type(Ours)("Bad", (NamedTuple,), {"__annotations__": {"a": "int", "b": "int"}, "a": 1})


def test_the_first_use_in_a_subclass() -> None:
    class Fresh(NamedTuple):
        number: int

    class Derived(Fresh):
        pass

    assert Derived(3).number == 3
    assert type(Derived(3)) is Derived
    assert type(Fresh(3)) is Fresh


def test_protocols_ask_for_every_name() -> None:
    class Whole:
        size = 1

        def shrink(self) -> None: ...

    class Half:
        size = 1

    class Heir(Sized):
        pass

    assert isinstance(Whole(), Sized)
    assert not isinstance(Half(), Sized)
    assert not isinstance(Whole(), Heir)
    assert isinstance(Heir(), Heir)


def test_cast_changes_nothing() -> None:
    value = [1]
    assert cast("list[int]", value) is value
