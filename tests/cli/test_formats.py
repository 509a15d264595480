"""``formats``: the catalog, three ways."""

from __future__ import annotations

import json

import pytest

from byre.catalog import CATALOG
from byre.cli.main import main

Output = pytest.CaptureFixture[str]


def test_json(capsys: Output) -> None:
    assert main(["formats", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == [row.name for row in CATALOG]
    assert {"name": "raw", "kind": "format", "abilities": ["read", "write", "create"],
            "summary": "bytes as they are"} in rows  # fmt: skip


def test_markdown(capsys: Output) -> None:
    assert main(["formats", "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["| name | kind | can | summary |", "| --- | --- | --- | --- |"]
    assert "| `raw` | format | read, write, create | bytes as they are |" in lines


def test_plain(capsys: Output) -> None:
    assert main(["formats"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(CATALOG)
    at = lines[0].index("summary")
    assert all(line[at - 2 : at] == "  " and line[at] != " " for line in lines)


def test_arguments_are_refused(capsys: Output) -> None:
    assert main(["formats", "raw"]) == 1
    assert "unexpected argument: raw" in capsys.readouterr().err
