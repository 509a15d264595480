"""bench: its lines, its refusals, and that it really sends the requests it counts."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

import byre
from byre.cli.bench import _Bench, _Plan
from byre.cli.main import main


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").write_bytes(bytes(1 << 20))
    return tmp_path


def test_lines(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "-f", "raw", "-c", "100", "a"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == (
        "Sending 100 read requests, 4096 bytes each, 64 in parallel (starting at offset 0, step size 4096)"
    )
    assert re.fullmatch(r"Run completed in \d+\.\d{3} seconds\.", second)
    words = ["-w", "-c", "64", "-d", "4", "-s", "8k", "-S", "16k", "-o", "4k", "--flush-interval", "8"]
    assert main(["bench", "-f", "raw", *words, "a"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0]
        == "Sending 64 write requests, 8192 bytes each, 4 in parallel (starting at offset 4096, step size 16384)"
    )
    assert lines[1] == "Sending flush every 8 requests"


def test_writes_reach_the_image(here: Path) -> None:
    assert main(["bench", "-f", "raw", "-w", "--pattern", "0x5a", "-c", "16", "-s", "4k", "-S", "8k", "a"]) == 0
    assert (here / "a").read_bytes() == (b"\x5a" * 4096 + bytes(4096)) * 16 + bytes((1 << 20) - (128 << 10))


@pytest.mark.parametrize("threads", [1, 3])
def test_every_request_is_sent_once_and_wraps_around(here: Path, threads: int) -> None:
    plan = _Plan(requests=1000, depth=4, offset=512, size=512, step=4096, write=True, flush_interval=300, pattern=1)
    with byre.open("a", format="raw", read_only=False) as image:
        _Bench(image, plan, threads).run()
        stats = image.stats.as_dict()
        assert stats["write"]["operations"] == 1000
        assert stats["flush"]["operations"] == 4
        assert image.read(512 + 255 * 4096, 512) == b"\1" * 512


def test_direct(here: Path) -> None:
    (here / "a").write_bytes(os.urandom(1 << 20))
    assert main(["bench", "-f", "raw", "-t", "none", "-d", "8", "-c", "200", "a"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-c", "x", "a"], "invalid request count"),
        (["-d", "-1", "a"], "invalid queue depth"),
        (["--pattern", "256", "-w", "a"], "invalid pattern byte"),
        (["--flush-interval", "100", "a"], "only available in write tests"),
        (["-w", "--flush-interval", "3", "a"], "flush interval cannot be smaller"),
        (["-t", "odd", "a"], "invalid cache mode"),
        (["-i", "odd", "a"], "invalid aio option"),
        (["-n", "a"], "native AIO"),
        ([], "expecting one image file name"),
        (["missing"], "missing"),
        (["-o", "2M", "-c", "1", "a"], "image ends at"),
    ],
)
def test_refusals(here: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert main(["bench", *words]) == 1
    assert message in capsys.readouterr().err
