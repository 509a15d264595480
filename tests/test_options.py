"""Typed options, key=value texts and json: names, within their limits."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from byre.errors import InvalidArgument
from byre.options import (
    Option,
    OptionSet,
    flatten,
    parse_json,
    parse_keyval,
    split_keyval,
    unflatten,
)

SET = OptionSet(
    Option("name", "str", "a text"),
    Option("flag", "bool", "a switch", False),
    Option("size", "size", "bytes", 512),
    Option("count", "int", "a number"),
    Option("mode", "enum", "a word", "slow", ("slow", "fast")),
)


def test_defaults_and_what_was_given() -> None:
    values = SET.parse({"size": "64k"}, what="test")
    assert (values.number("size"), values.flag("flag"), values.word("mode")) == (65536, False, "slow")
    assert values.text("name") is None
    assert values.optional_number("count") is None
    assert "size" in values
    assert "mode" not in values
    assert [option.name for option in SET] == ["name", "flag", "size", "count", "mode"]


@pytest.mark.parametrize(
    ("name", "value", "typed"),
    [
        ("flag", "on", True),
        ("flag", "yes", True),
        ("flag", "off", False),
        ("flag", "false", False),
        ("flag", True, True),
        ("size", 7, 7),
        ("size", "1.5k", 1536),
        ("count", "12", 12),
        ("count", "0x1f", 31),
        ("count", 3, 3),
        ("mode", "fast", "fast"),
        ("name", "", ""),
    ],
)
def test_conversion(name: str, value: object, typed: object) -> None:
    assert SET.parse({name: value}, what="test").given[name] == typed


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("flag", "ON"),
        ("flag", "1"),
        ("flag", 1),
        ("flag", None),
        ("size", True),
        ("size", -1),
        ("size", "-1"),
        ("size", 1.5),
        ("size", [1]),
        ("size", "1Q"),
        ("count", "-3"),
        ("count", "1k"),
        ("count", ""),
        ("count", False),
        ("count", "1" * 6000),
        ("count", "1_0"),
        ("count", " 1"),
        ("count", 1 << 64),
        ("count", str(1 << 64)),
        ("size", 1 << 64),
        ("mode", "quick"),
        ("mode", 1),
        ("name", 5),
        ("name", None),
        ("name", {}),
        ("nmae", "x"),
    ],
)
def test_a_wrong_value_names_its_option(name: str, value: object) -> None:
    with pytest.raises(InvalidArgument) as caught:
        SET.parse({name: value}, what="test")
    assert repr(name) in str(caught.value)
    assert len(str(caught.value)) < 400


def test_keyval() -> None:
    assert parse_keyval("") == {}
    assert parse_keyval("a=1,b=x=y") == {"a": "1", "b": "x=y"}
    assert parse_keyval("flag,a=1") == {"flag": "on", "a": "1"}
    assert parse_keyval("qcow2,a=1", implied="driver") == {"driver": "qcow2", "a": "1"}
    assert parse_keyval("file.filename=a,,b,c=d,,") == {"file.filename": "a,b", "c": "d,"}
    assert parse_keyval("a=1,a=2") == {"a": "2"}
    assert parse_keyval("a=1,") == {"a": "1"}
    assert split_keyval("a,,,b") == ["a,", "b"]
    with pytest.raises(InvalidArgument, match="expected key=value"):
        parse_keyval("a=1,=2")


def test_nesting() -> None:
    assert unflatten({"driver": "qcow2", "file.driver": "file", "file.a.b": 1}) == {
        "driver": "qcow2",
        "file": {"driver": "file", "a": {"b": 1}},
    }
    assert unflatten({"file": {"a.b": 1}, "file.a.c": 2}) == {"file": {"a": {"b": 1, "c": 2}}}
    assert unflatten({"file.a.c": 2, "file": {"a": {"b": 1}}}) == {"file": {"a": {"b": 1, "c": 2}}}


@pytest.mark.parametrize(
    "flat", [{"a": 1, "a.b": 2}, {"a.b": 2, "a": 1}, {"a.b": 1, "a.b.c": 2}, {"a.b.c": 2, "a.b": 1}]
)
def test_a_value_is_no_group(flat: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument):
        unflatten(flat)


def test_groups_nest_to_a_limit() -> None:
    """Two such keys in a json: name of 4 KiB would exhaust the stack otherwise."""
    deep = ".".join("a" * 31)
    assert unflatten({deep + ".b": 2})
    with pytest.raises(InvalidArgument, match="nested too deep"):
        unflatten({".".join("a" * 1000): 1, ".".join("a" * 999) + ".b": 2})
    nested: dict[str, object] = {}
    for _ in range(500):
        nested = {"file": nested}
    with pytest.raises(InvalidArgument, match="nested too deep"):
        unflatten(nested)


KEYS = st.text("abc", min_size=1, max_size=3)
TREES = st.recursive(
    st.integers(0, 9), lambda below: st.dictionaries(KEYS, below, min_size=1, max_size=3), max_leaves=8
)


@given(st.dictionaries(KEYS, TREES, max_size=3))
def test_flattening_and_back(tree: dict[str, Any]) -> None:
    assert unflatten(flatten(tree)) == tree


def test_lists_flatten_to_numbers() -> None:
    assert flatten({"a": [{"b": 1}, 2]}) == {"a.0.b": 1, "a.1": 2}


# -- json: ------------------------------------------------------------------------------------------


def test_json() -> None:
    assert parse_json('{"driver": "qcow2", "file": {"filename": "a"}, "n": [1, true, null, -5]}') == {
        "driver": "qcow2",
        "file": {"filename": "a"},
        "n": [1, True, None, -5],
    }
    assert parse_json('{"file.filename": "a"}') == {"file": {"filename": "a"}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{'a': 'b'}", "b"),
        ("""{'a': "it's"}""", "it's"),
        ("""{'a': 'it\\'s'}""", "it's"),
        ("""{'a': 'say "x"'}""", 'say "x"'),
        ("""{"a": "x\\"y"}""", 'x"y'),
        ("""{'a': 'x\\"y'}""", 'x"y'),
        ("""{'a': '\\\\'}""", "\\"),
        ("""{'a': '\\u00e9\\n'}""", "é\n"),
        ("""{'a': '[[[[[[[[[[['}""", "[[[[[[[[[[["),
        ("""{"a": "it\\u0027s"}""", "it's"),
    ],
)
def test_json_with_single_quotes(text: str, value: str) -> None:
    assert parse_json(text) == {"a": value}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "1",
        "{'a': }",
        "{'a': 'b}",
        "{'a': b}",
        '{"a": "b\\"}',
        "{'a': '\\x'}",
        '{"a": "\n"}',
        "{'a': 18446744073709551616}",
        "{'a': -9223372036854775809}",
        "{'a': " + "9" * 4000 + "}",
        "{'a': 1e999}",
        "{'a': NaN}",
        "{'a': Infinity}",
        "{'a': -Infinity}",
    ],
)
def test_bad_json_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_json(text, "backing file")
    assert "JSON backing file" in str(caught.value)
    assert len(str(caught.value)) < 300


def test_json_limits() -> None:
    def nested(depth: int) -> str:
        return "{'a': " + "[" * (depth - 1) + "]" * (depth - 1) + "}"

    assert parse_json(nested(8))
    with pytest.raises(InvalidArgument, match="nested 9 deep, allowed are 8"):
        parse_json(nested(9))
    with pytest.raises(InvalidArgument, match="allowed are 8"):
        parse_json("{'a': " + "[" * 2000 + "]" * 2000 + "}")
    filler = 4096 - len("{'a': ''}")
    assert parse_json("{'a': '" + "x" * filler + "'}")
    with pytest.raises(InvalidArgument, match="4097 characters, allowed are 4096"):
        parse_json("{'a': '" + "x" * (filler + 1) + "'}")
    assert parse_json("{'a': 18446744073709551615, 'b': -9223372036854775808}")


@given(st.text(st.characters(blacklist_categories=()), max_size=60))
def test_any_text_gives_an_object_or_a_refusal(text: str) -> None:
    try:
        assert isinstance(parse_json(text), dict)
    except InvalidArgument:
        pass


@given(st.dictionaries(st.text("ab\"'\\\n", min_size=1, max_size=6), st.text(max_size=8), max_size=3))
def test_what_json_writes_is_read_back(value: dict[str, str]) -> None:
    assert parse_json(json.dumps(value)) == value
