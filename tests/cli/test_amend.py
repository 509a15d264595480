"""``amend``: options, help, progress, refusals; what each option does is in tests/formats/qcow2/test_amend.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import byre
from byre.cli.main import main
from conftest import Run

Output = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make(*options: str, size: str = "64M") -> None:
    assert main(["create", "-q", "-f", "qcow2", *(["-o", ",".join(options)] if options else []), "x", size]) == 0


def header() -> Any:
    with byre.open("x") as image:
        return image.node.header  # type: ignore[attr-defined]


def test_options_of_several_switches(capsys: Output) -> None:
    make()
    assert main(["amend", "-o", "compat=0.10", "-o", "size=128M", "x"]) == 0
    assert (header().version, header().size) == (2, 128 << 20)
    assert main(["amend", "-f", "qcow2", "-q", "-t", "none", "-o", "compat=1.1,refcount_bits=32", "x"]) == 0
    assert (header().version, header().refcount_order) == (3, 5)
    assert main(["amend", "--image-opts", "-o", "lazy_refcounts=on", "driver=qcow2,file.filename=x"]) == 0
    assert header().lazy_refcounts
    assert capsys.readouterr() == ("", "")


@pytest.mark.oracle
@pytest.mark.parametrize("arguments", [["-f", "qcow2", "-o", "help"], ["-o", "help", "x"], ["-f", "luks", "-o", "?"]])
def test_help_is_that_of_the_peer(capsys: Output, qemu_img: Run, arguments: list[str]) -> None:
    make()
    assert main(["amend", *arguments], "qemu-img") == 0
    mine = capsys.readouterr().out
    theirs = qemu_img("amend", *arguments).stdout
    # The luks options of an old release begin with "encrypt." no more than ours.
    assert mine == theirs


def test_progress_comes_step_by_step(capsys: Output) -> None:
    make(size="4G")
    assert main(["amend", "-p", "-o", "compat=0.10", "x"], "qemu-img") == 0
    steps = capsys.readouterr().out.split("\r")
    percents = [f"    ({number * 12.5:.2f}/100%)" for number in range(9)]
    assert steps == [*percents, percents[-1], "\n"]
    assert main(["amend", "-p", "-q", "-o", "compat=1.1", "x"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["amend", "--progress=json", "-o", "refcount_bits=64", "x"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["job"], last["offset"]) == ("amend", last["total"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["x"], "-o"),
        (["-o", "size=1M"], "one image file name"),
        (["-o", "size=1M", "x", "y"], "one image file name"),
        (["-o", "size=1M", "-t", "never", "x"], "cache"),
        (["-o", ",", "x"], "invalid option list"),
        (["-o", "foo=bar", "x"], "Invalid parameter 'foo'"),
        (["-o", "compat=0.42", "x"], "0.42"),
        (["-o", "lazy_refcounts=42", "x"], "lazy_refcounts"),
        (["-o", "refcount_bits=7", "x"], "refcount_bits"),
        (["-o", "encrypt.state=active", "x"], "not encrypted"),
        (["-o", "size=1M", "none"], "none"),
        (["--progress=loud", "-o", "size=1M", "x"], "--progress"),
    ],
)
def test_refusals(capsys: Output, arguments: list[str], words: str) -> None:
    make()
    before = Path("x").read_bytes()
    assert main(["amend", *arguments]) == 1
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert words in err
    assert Path("x").read_bytes() == before


def test_options_for_creation_only_are_named_as_such(capsys: Output) -> None:
    make()
    for option in ("cluster_size=1k", "encryption=on", "preallocation=on"):
        assert main(["amend", "-o", option, "x"], "qemu-img") == 1
        name = option.partition("=")[0]
        assert capsys.readouterr().err == (
            f"qemu-img: Invalid parameter '{name}'\nThis option is only supported for image creation\n"
        )


def test_bitmaps_that_go_are_named(capsys: Output) -> None:
    make()
    for number in range(7):
        assert main(["bitmap", "--add", "x", f"b{number}"]) == 0
    assert main(["amend", "-o", "compat=0.10", "x"]) == 0
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert "7 dirty bitmaps were removed" in err
    assert "'b0', 'b1', 'b2', 'b3', 'b4', ..." in err
    assert main(["check", "-q", "x"]) == 0


def test_another_backing_file_is_for_rebase(capsys: Output) -> None:
    make()
    assert main(["amend", "-o", "backing_file=y", "x"], "qemu-img") == 1
    first, second = capsys.readouterr().err.splitlines()
    assert "cannot amend the backing file" in first
    assert second == "You can use 'qemu-img rebase' instead."


@pytest.mark.parametrize("format", ["raw"])
def test_formats_without_options(capsys: Output, format: str) -> None:
    assert main(["create", "-q", "-f", format, "x", "1M"]) == 0
    for arguments in (["-f", format, "-o", "help"], ["-f", format, "-o", "size=2M", "x"]):
        assert main(["amend", *arguments]) == 1
        assert f"Format driver '{format}' does not support option amendment" in capsys.readouterr().err


# -- key slots ------------------------------------------------------------------------------------

SECRETS = ["--object", "secret,id=a,data=first", "--object", "secret,id=b,data=second"]


@pytest.mark.parametrize("format", ["qcow2", "luks"])
def test_key_slots(capsys: Output, monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    pytest.importorskip("cryptography", reason="ciphers")
    prefix = "encrypt." if format == "qcow2" else ""
    create = [f"{prefix}key-secret=a", f"{prefix}iter-time=10"] + ([f"{prefix}format=luks"] if prefix else [])
    assert main(["create", *SECRETS, "-q", "-f", format, "-o", ",".join(create), "x", "1M"]) == 0

    def amend(options: dict[str, str], key: str = "a", *more: str) -> int:
        target = f"driver={format},{prefix}key-secret={key},file.filename=x"
        text = ",".join(f"{prefix}{name}={value}" for name, value in options.items())
        return main(["amend", *SECRETS, *more, "--image-opts", "-o", text, target])

    def opens(key: str) -> bool:
        target = f"driver={format},{prefix}key-secret={key},file.filename=x"
        return main(["convert", *SECRETS, "--image-opts", "-O", "raw", target, "out"]) == 0

    assert amend({"state": "active", "new-secret": "b", "iter-time": "10", "keyslot": "3"}) == 0
    assert opens("a")
    assert opens("b")
    assert amend({"state": "inactive", "old-secret": "a"}, "b") == 0
    assert not opens("a")
    assert opens("b")
    assert amend({"state": "inactive", "old-secret": "b"}, "b") == 1
    assert "--force" in capsys.readouterr().err
    assert opens("b")
    for wrong in ({"new-secret": "a"}, {"state": "half"}, {"state": "active"}, {"state": "active", "new-secret": "c"}):
        assert amend(wrong, "b") == 1
    assert amend({"state": "inactive", "keyslot": "3"}, "b", "--force") == 0
    assert not opens("b")
