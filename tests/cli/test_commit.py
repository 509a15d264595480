"""commit as a user types it, beside the peer."""

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
from support.chains import K, Layer, content, make_chain, make_layer

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


def chunks(qemu_img: Run, layer: Layer, size: int) -> set[int]:
    """Numbers of the pieces of ``size`` bytes of which the layer holds something, as the peer sees it."""
    found = set()
    for row in json.loads(qemu_img("map", "--output=json", "-f", layer.format, layer.name).stdout):
        if row["depth"] == 0 and (row["present"] if layer.format == "qcow2" else row["data"]):
            found |= set(range(row["start"] // size, -(-(row["start"] + row["length"]) // size)))
    return found


@pytest.mark.oracle
@pytest.mark.parametrize("seed", range(200, 216))
def test_random_chains_beside_the_peer(seed: int, qemu_img: Run, capsys: Output) -> None:
    chooser = random.Random(seed)
    old = make_chain(chooser, "old", chooser.randint(1, 2))
    top = make_layer(chooser, "top", old[-1])
    base = chooser.choice(old)
    options = ["-b", base.name] if base is not old[-1] or chooser.random() < 0.3 else chooser.choice(([], ["-d"]))
    words = ["commit", "-f", "qcow2", *options, "top"]
    os.mkdir("keep")
    for layer in (top, *old):
        qemu_img("convert", "-f", layer.format, "-O", "raw", layer.name, f"keep/{layer.name}.raw")
        shutil.copy2(layer.name, "keep")
    expected = qemu_img(*words, check=False)
    if expected.returncode == 0:
        theirs = chunks(qemu_img, top, 64 * K), chunks(qemu_img, base, 256 * K), content(base)
    for layer in (top, *old):
        shutil.copy2(f"keep/{layer.name}", layer.name)
    capsys.readouterr()
    assert main(words) == 0
    assert capsys.readouterr().out == "Image committed.\n"
    qemu_img("compare", "-f", "qcow2", "-F", "raw", "top", "keep/top.raw")
    for layer in (top, *old):
        if layer.format == "qcow2":
            qemu_img("check", "-f", "qcow2", layer.name)
    if expected.returncode == 0:  # some raw bases are too much for it
        assert expected.stdout == "Image committed.\n"
        assert content(base) == theirs[2]
        assert chunks(qemu_img, top, 64 * K) == theirs[0]
        if base.format == "qcow2":
            # The peer copies in pieces of 64 KiB; here nothing more than the layers hold is written.
            assert chunks(qemu_img, base, 256 * K) <= theirs[1]


def test_names_are_relative_to_the_image(capsys: Output) -> None:
    os.mkdir("sub")
    make("sub/base")
    make("sub/mid", "base", "qcow2")
    make("sub/top", "mid", "qcow2")
    assert main(["commit", "-b", "mid", "sub/top"]) == 0
    capsys.readouterr()
    assert main(["commit", "-b", "sub/mid", "sub/top"]) == 1
    assert "did not find 'sub/mid' in the backing chain" in capsys.readouterr().err
    assert main(["commit", "-b", str(Path("sub/base").absolute()), "sub/top"]) == 0


def test_what_is_emptied() -> None:
    def top_holds() -> bool:
        with byre.open("top", backing=False) as image:
            return any(extent.kind != 2 for extent in image.extents())

    make("base")
    for options, left in (([], False), (["-d"], True), (["-b", "base"], True)):
        make("top", "base", "qcow2")
        write("top", 0, b"t" * 100 * K)
        assert main(["commit", "-q", *options, "top"]) == 0
        assert top_holds() is left
        assert content(Layer("base", "qcow2"))[: 100 * K] == b"t" * 100 * K
        assert os.path.getsize("top") < 400 * K or left


def test_refusals(capsys: Output) -> None:
    def refused(*words: str) -> str:
        capsys.readouterr()
        assert main(["commit", *words]) == 1
        found = capsys.readouterr()
        assert found.out == ""
        assert found.err.count("\n") == 1
        return found.err

    make("base")
    assert "does not have a backing file" in refused("base")
    make("top", "base", "qcow2")
    write("top", 0, b"t")
    before = Path("top").read_bytes(), Path("base").read_bytes()
    assert "one image file name" in refused()
    assert "unknown cache mode" in refused("-t", "odd", "top")
    assert "rate limit" in refused("-r", "odd", "top")
    assert "did not find 'other'" in refused("-b", "other", "top")
    assert "untrusted" in refused("--untrusted", "top")
    with byre.open("base"):
        assert "for writing" in refused("top")
    assert (Path("top").read_bytes(), Path("base").read_bytes()) == before


@pytest.mark.oracle
def test_a_base_whose_format_is_not_recorded(qemu_img: Run, qemu_io: Run, capsys: Output) -> None:
    make("base")
    make("top", "base", "qcow2")
    # Programs before release 6.1 left the format out: its extension is the first one.
    data = bytearray(Path("top").read_bytes())
    at = data.index(bytes.fromhex("e2792aca"))
    data[at : at + 4] = bytes.fromhex("12345678")
    Path("top").write_bytes(data)
    before = Path("base").read_bytes()
    capsys.readouterr()
    assert main(["commit", "top"]) == 1
    assert "not recorded" in capsys.readouterr().err
    assert Path("base").read_bytes() == before
    assert main(["rebase", "-u", "-b", "base", "-F", "qcow2", "top"]) == 0
    assert main(["commit", "top"]) == 0


def test_progress_and_options(capsys: Output) -> None:
    make("base")
    make("top", "base", "qcow2")
    write("top", 0, b"t" * M)
    words = ["--image-opts", "driver=qcow2,file.driver=file,file.filename=top"]
    assert main(["commit", "-d", "-p", "-r", "100M", "-t", "none", *words]) == 0
    out = capsys.readouterr().out
    assert out.startswith("    (0.00/100%)\r")
    assert out.endswith("(100.00/100%)\r\nImage committed.\n")
    assert main(["commit", "-q", "-p", *words]) == 0
    assert capsys.readouterr().out == ""
    assert main(["commit", "--progress=json", "top"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-2])["job"] == "commit"
