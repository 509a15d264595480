"""rebase as a user types it, beside the peer."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

import byre
from byre.cli.main import main
from support.chains import K, Layer, make_chain, make_layer

Run = Callable[..., "CompletedProcess[str]"]
Output = pytest.CaptureFixture[str]
M = K * K


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make(name: str, *backing: str, size: str = "1M") -> None:
    options = ["-b", backing[0], "-F", backing[1]] if backing else []
    assert main(["create", "-q", "-f", "qcow2", *options, name, size]) == 0


def write(name: str, offset: int, data: bytes) -> None:
    with byre.open(name, format="qcow2", read_only=False) as image:
        image.write(offset, data)


def backing_of(qemu_img: Run, name: str) -> tuple[str, str]:
    info = json.loads(qemu_img("info", "-U", "-f", "qcow2", "--output=json", name).stdout)
    return info.get("backing-filename", ""), info.get("backing-filename-format", "")


def own(qemu_img: Run, name: str) -> list[list[int]]:
    """[start, end] of what the top layer holds, as the peer sees it."""
    found: list[list[int]] = []
    for row in json.loads(qemu_img("map", "--output=json", "-f", "qcow2", name).stdout):
        if row["depth"] == 0 and row["present"]:
            end = row["start"] + row["length"]
            if found and found[-1][1] == row["start"]:
                found[-1][1] = end
            else:
                found.append([row["start"], end])
    return found


@pytest.mark.oracle
@pytest.mark.parametrize("seed", range(100, 116))
def test_random_chains_beside_the_peer(seed: int, qemu_img: Run) -> None:
    chooser = random.Random(seed)
    old = make_chain(chooser, "old", chooser.randint(1, 2))
    make_layer(chooser, "top", chooser.choice((old[-1], old[-1], old[0])))
    new: Layer | None = chooser.choice((None, chooser.choice(old), Layer("", "")))
    if new is not None and not new.name:
        new = make_chain(chooser, "new", 1, chooser.choice((None, *old)))[-1]
    words = ["rebase", "-f", "qcow2", "-b", *((new.name, "-F", new.format) if new else ("",)), "top"]
    qemu_img("convert", "-f", "qcow2", "-O", "raw", "top", "before")
    shutil.copy("top", "keep")
    assert qemu_img(*words).returncode == 0
    expected = own(qemu_img, "top"), backing_of(qemu_img, "top")
    shutil.copy("keep", "top")
    assert main(words) == 0
    qemu_img("compare", "-f", "qcow2", "-F", "raw", "top", "before")
    qemu_img("check", "-f", "qcow2", "top")
    assert (own(qemu_img, "top"), backing_of(qemu_img, "top")) == expected


@pytest.mark.oracle
def test_the_peer_reads_compressed_rebases(qemu_img: Run) -> None:
    make("base", size="4M")
    write("base", 0, b"b" * 2 * M)
    make("mid", "base", "qcow2", size="4M")
    write("mid", M, b"m" * 2 * M)
    make("top", "mid", "qcow2", size="4M")
    write("top", 100, b"t" * 100)
    qemu_img("convert", "-O", "raw", "top", "before")
    assert main(["rebase", "-c", "-b", "base", "-F", "qcow2", "top"]) == 0
    qemu_img("compare", "-F", "raw", "top", "before")
    found = json.loads(qemu_img("check", "--output=json", "top").stdout)
    assert (found["allocated-clusters"], found["compressed-clusters"]) == (33, 32)
    assert main(["rebase", "-c", "-b", "", "top"]) == 0
    qemu_img("compare", "-F", "raw", "top", "before")


@pytest.mark.oracle
def test_unsafe_as_the_peer(qemu_img: Run) -> None:
    make("base")
    for words in (
        ["-b", "moved/base", "-F", "qcow2"],
        ["-b", "/some/where", "-F", "host_device"],
        ["-b", ""],
        [],
        ["-b", "base", "-F", "raw"],
        ["-b", "json:{'driver':'null-co'}", "-F", "raw"],
    ):
        found = []
        for program in (qemu_img, main):
            make("top", "base", "qcow2")
            if program is main:
                assert main(["rebase", "-u", *words, "top"]) == 0
            else:
                qemu_img("rebase", "-u", *words, "top")
            found.append(backing_of(qemu_img, "top"))
        assert found[0] == found[1], words


def test_names_are_relative_to_the_image() -> None:
    os.mkdir("sub")
    for name in ("old", "new"):
        make(f"sub/{name}")
        write(f"sub/{name}", 0, name.encode())
    make("sub/top", "old", "qcow2")
    assert main(["rebase", "-b", "new", "-F", "qcow2", "sub/top"]) == 0
    with byre.open("sub/top") as image:
        assert image.read(0, 3) == b"old"
    assert main(["rebase", "-b", "sub/new", "-F", "qcow2", "sub/top"]) == 1


def refused(capsys: Output, *words: str) -> str:
    capsys.readouterr()
    assert main(["rebase", *words]) == 1
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.count("\n") == 1
    return found.err


def test_refusals_change_nothing(capsys: Output) -> None:
    make("base")
    write("base", 0, b"b" * M)
    make("other")
    make("top", "base", "qcow2")
    before = Path("top").read_bytes()
    assert "could not open new backing file 'missing'" in refused(capsys, "-b", "missing", "-F", "qcow2", "top")
    assert "backing format must be specified" in refused(capsys, "-b", "other", "top")
    assert "backing format must be specified" in refused(capsys, "-u", "-b", "other", "top")
    assert "invalid format name: 'odd'" in refused(capsys, "-b", "other", "-F", "odd", "top")
    assert "must specify backing file" in refused(capsys, "top")
    assert "unknown cache mode" in refused(capsys, "-t", "odd", "-b", "", "top")
    assert "unknown cache mode" in refused(capsys, "-T", "odd", "-b", "", "top")
    assert "one image file name" in refused(capsys, "-b", "")
    assert "the image itself" in refused(capsys, "-b", "top", "-F", "qcow2", "top")
    long = "/".join(["x" * 100] * 11)
    assert "could not change the backing file" in refused(capsys, "-u", "-b", long, "-F", "qcow2", "top")
    assert "could not change the backing file" in refused(capsys, "-b", long, "-F", "qcow2", "top")
    assert Path("top").read_bytes() == before
    assert main(["create", "-q", "-f", "raw", "raw", "1M"]) == 0
    assert "compression is not supported" in refused(capsys, "-c", "-f", "raw", "-b", "", "raw")
    assert "could not change the backing file" in refused(capsys, "-f", "raw", "-b", "", "raw")
    # The old backing file is gone: only -u helps.
    os.unlink("base")
    assert "base" in refused(capsys, "-b", "", "top")
    assert main(["rebase", "-u", "-b", "other", "-F", "qcow2", "top"]) == 0


def test_options(capsys: Output) -> None:
    make("base")
    write("base", 0, b"b" * M)
    make("top", "base", "qcow2")
    words = ["--image-opts", "driver=qcow2,file.driver=file,file.filename=top"]
    assert main(["rebase", "-p", "-t", "none", "-T", "writethrough", "-b", "", *words]) == 0
    out = capsys.readouterr().out
    assert out.startswith("    (0.00/100%)\r")
    assert "(100.00/100%)" in out
    assert main(["rebase", "-q", "-p", "-b", "base", "-F", "qcow2", *words]) == 0
    assert capsys.readouterr().out == ""
    with byre.open("base", read_only=False):
        assert main(["rebase", "-b", "base", "-F", "qcow2", "top"]) == 1
        assert main(["rebase", "-u", "-b", "", "top"]) == 0
        assert main(["rebase", "-U", "-b", "base", "-F", "qcow2", "top"]) == 0


def test_untrusted_images_name_nothing(capsys: Output) -> None:
    make("base")
    make("top", "base", "qcow2")
    assert "not opened for an untrusted image" in refused(capsys, "--untrusted", "-b", "", "top")
    assert main(["rebase", "--untrusted", "-u", "-b", "", "top"]) == 0
