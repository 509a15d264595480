"""JSON and structured text."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from byre.cli.output import human_size, json_string, ordered, print_structure, to_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(VALUES)
def test_json_is_valid_whatever_it_holds(value: object) -> None:
    text = to_json(value)
    assert text.isascii()
    assert json.loads(text) == value


def test_layout() -> None:
    assert to_json({"a": [1, {"b": True}], "c": [], "d": {}}) == (
        '{\n    "a": [\n        1,\n        {\n            "b": true\n        }\n    ],\n'
        '    "c": [\n    ],\n    "d": {\n    }\n}'
    )


def test_what_is_no_text_becomes_a_replacement_character() -> None:
    assert json_string('a"\\\x01\x7fé\U0001f600\udcff') == '"a\\"\\\\\\u0001\\u007F\\u00E9\\uD83D\\uDE00\\uFFFD"'


def test_keys_in_order_without_missing_ones() -> None:
    assert list(ordered({"b": 0, "a": None, "c": False}, ("c", "a", "b"))) == ["c", "b"]


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (512, "512 B"), (1000, "0.977 KiB"), (200704, "196 KiB"),
                                            (64 << 20, "64 MiB"), (1 << 40, "1 TiB"), (1 << 62, "4 EiB")])  # fmt: skip
def test_human_sizes(size: int, text: str) -> None:
    assert human_size(size) == text


def test_structures_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    print_structure({"a-b": True, "list": [{"c": 1}, "x\x1b"], "empty": []}, 1)
    assert capsys.readouterr().out == (
        "    a b: true\n    list:\n        [0]:\n            c: 1\n        [1]: x\\x1b\n    empty:\n"
    )
