"""``lint`` and ``convert --for``: what a place takes, and why it would refuse."""

from __future__ import annotations

import json
import os
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from byre.cli.main import main
from byre.profiles import PROFILES

EXTENSION = {"azure": "vhd", "hyperv": "vhdx", "esxi": "vmdk", "virtualbox": "vdi", "aws": "vmdk", "gcp": "tar.gz",
             "proxmox": "qcow2"}  # fmt: skip
DRIVER = {"vhd": "vpc"}


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def source(tmp_path: Path) -> bytes:
    """A raw disk of an awkward size."""
    content = random.Random(1).randbytes(300_000) + bytes(3_000_000) + b"end".ljust(512, b"\0")
    content = content[: len(content) // 512 * 512]
    (tmp_path / "source.img").write_bytes(content)
    return content


def lint(capsys: pytest.CaptureFixture[str], name: str, *arguments: str) -> tuple[int, Any]:
    capsys.readouterr()
    code = main(["lint", "--for", name, "--output=json", *arguments])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", [row.name for row in PROFILES])
def test_what_is_converted_for_a_place_passes_there(
    name: str, source: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    output = f"disk.{EXTENSION[name]}"
    assert main(["convert", "--for", name, "source.img", output]) == 0
    assert lint(capsys, name, output) == (0, {"filename": output, "for": name, "accepted": True, "findings": []})
    if name != "gcp":
        assert main(["convert", "-O", "raw", output, "back.raw"]) == 0
        back = Path("back.raw").read_bytes()
        assert back[: len(source)] == source
        assert not any(back[len(source) :])


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["azure", "hyperv", "esxi", "virtualbox", "proxmox"])
def test_the_peer_reads_what_was_made(name: str, source: bytes, qemu_img: Callable[..., object]) -> None:
    output = f"disk.{EXTENSION[name]}"
    assert main(["convert", "--for", name, "source.img", output]) == 0
    kind = DRIVER.get(EXTENSION[name], EXTENSION[name])
    qemu_img("compare", "-f", "raw", "-F", kind, "source.img", output)


def test_the_archive_for_gcp_holds_the_disk(source: bytes) -> None:
    assert main(["convert", "--for", "gcp", "source.img", "disk.tar.gz"]) == 0
    with tarfile.open("disk.tar.gz") as archive:
        (member,) = archive.getmembers()
        assert (member.name, member.size) == ("disk.raw", 1 << 30)
        file = archive.extractfile(member)
        assert file is not None
        assert file.read(len(source)) == source
    assert sorted(os.listdir()) == ["disk.tar.gz", "source.img"]


def test_a_file_for_hyperv_has_no_holes(source: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "--for", "hyperv", "source.img", "disk.vhdx"]) == 0
    found = os.stat("disk.vhdx")
    assert found.st_blocks * 512 >= found.st_size
    assert main(["convert", "-O", "vhdx", "source.img", "sparse.vhdx"]) == 0
    code, said = lint(capsys, "hyperv", "sparse.vhdx")
    assert code == 1
    assert "holes" in said["findings"][-1]["message"]


@pytest.mark.parametrize(
    ("name", "command", "said"),
    [
        ("azure", ["create", "-f", "vpc", "x.vhd", "8M"], "the format is vpc dynamic; Azure takes vpc fixed"),
        (
            "azure",
            ["create", "-f", "vpc", "-o", "subformat=fixed,force_size=on", "x.vhd", "1000K"],
            "no multiple of 1048576",
        ),
        ("azure", ["create", "-f", "vpc", "-o", "subformat=fixed,force_size=on", "x.img", "8M"], "must end in .vhd"),
        ("esxi", ["create", "-f", "vmdk", "x.vmdk", "8M"], "vmdk monolithicSparse; ESXi takes vmdk streamOptimized"),
        ("gcp", ["create", "-f", "raw", "disk.raw", "8M"], "no multiple of 1073741824"),
        ("gcp", ["create", "-f", "raw", "mydisk.raw", "1G"], "must be disk.raw"),
        ("proxmox", ["create", "-f", "vhdx", "x.vhdx", "8M"], "the format is vhdx"),
        ("virtualbox", ["create", "-f", "vdi", "x.vdi", "3T"], "takes up to 2199023255552"),
    ],
)
def test_why_an_image_is_refused(name: str, command: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 0
    code, found = lint(capsys, name, next(word for word in command if word.partition(".")[2]))
    assert code == 1
    assert any(said in row["message"] for row in found["findings"]), found
    assert not found["accepted"]


def test_layers_and_keys_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("key").write_text("secret")
    assert main(["create", "-q", "-f", "qcow2", "base.qcow2", "8M"]) == 0
    assert main(["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2"]) == 0
    luks = "encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=10"
    secret = "secret,id=k,file=key"
    assert main(["create", "-q", "--object", secret, "-f", "qcow2", "-o", luks, "locked.qcow2", "8M"]) == 0
    assert main(["create", "-q", "-f", "qcow2", "-o", "data_file=data.raw", "split.qcow2", "8M"]) == 0
    for image, said in (("top", "backing file"), ("locked", "encrypted"), ("split", "data file")):
        code, found = lint(capsys, "proxmox", f"{image}.qcow2")
        assert code == 1
        assert said in found["findings"][0]["message"]
    os.unlink("base.qcow2")
    assert lint(capsys, "proxmox", "top.qcow2")[0] == 1


def test_snapshots_are_noted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["create", "-q", "-f", "qcow2", "x.qcow2", "8M"]) == 0
    assert main(["snapshot", "-c", "s", "x.qcow2"]) == 0
    assert lint(capsys, "proxmox", "x.qcow2") == (
        0,
        {"filename": "x.qcow2", "for": "proxmox", "accepted": True, "findings": []},
    )
    code, found = lint(capsys, "aws", "x.qcow2")
    assert code == 1
    assert found["findings"][-1]["severity"] == "note"


def test_archives_that_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    import gzip
    import io

    def archive(name: str, size: int) -> bytes:
        with io.BytesIO() as out, tarfile.open(fileobj=out, mode="w") as made:
            info = tarfile.TarInfo(name)
            info.size = size
            made.addfile(info, io.BytesIO(bytes(size)))
            return out.getvalue()

    for content, said in (
        (b"junk", "not compressed"),
        (b"", "not compressed|no tar"),
        (gzip.compress(b"junk" * 200), "no tar archive"),
        (gzip.compress(archive("other.raw", 512)), "begins with 'other.raw'"),
        (gzip.compress(archive("disk.raw", 512)), "no multiple"),
    ):
        Path("x.tar.gz").write_bytes(content)
        code, found = lint(capsys, "gcp", "x.tar.gz")
        assert code == 1
        messages = " ".join(row["message"] for row in found["findings"])
        assert any(word in messages for word in said.split("|")), found
    assert main(["lint", "--for", "gcp", "nosuch.tar.gz"]) == 1


def test_text_and_wrong_usage(source: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lint", "--for", "azure", "source.img"]) == 1
    out = capsys.readouterr().out
    assert out.endswith("source.img: Azure refuses this image\n")
    assert "refused: the format is raw; Azure takes vpc fixed (byre convert --for azure)" in out
    assert main(["convert", "--for", "virtualbox", "source.img", "x.vdi"]) == 0
    assert main(["lint", "--for", "virtualbox", "x.vdi"]) == 0
    assert capsys.readouterr().out == "x.vdi: VirtualBox takes this image\n"
    for arguments in (
        ["lint", "x.vdi"], ["lint", "--for", "moon", "x.vdi"], ["lint", "--for", "aws"],
        ["lint", "--for", "aws", "--output=xml", "x.vdi"], ["convert", "--for", "moon", "x.vdi", "y"],
        ["convert", "--for", "azure", "-O", "qcow2", "x.vdi", "y"], ["convert", "-n", "--for", "aws", "x.vdi", "y"],
    ):  # fmt: skip
        assert main(arguments) == 1, arguments
        assert len(capsys.readouterr().err.splitlines()) <= 2
        assert not Path("y").exists()


def test_places_that_say_nothing_of_sizes_take_any(source: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    """The size of an old VHD is one of a geometry, a multiple of a sector only."""
    assert main(["create", "-q", "-f", "vpc", "-o", "subformat=fixed", "disk.vhd", "5M"]) == 0
    os.posix_fallocate(os.open("disk.vhd", os.O_RDWR), 0, os.stat("disk.vhd").st_size)
    assert lint(capsys, "hyperv", "disk.vhd")[0] == 0
    code, said = lint(capsys, "azure", "disk.vhd")
    assert code == 1
    assert "no multiple of 1048576" in said["findings"][0]["message"]


def test_only_places_for_streams_mind_how_old_their_header_is(
    source: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", "-O", "vmdk", "-o", "subformat=streamOptimized", "source.img", "disk.vmdk"]) == 0
    with open("disk.vmdk", "r+b") as file:
        file.seek(4)
        file.write(b"\1")
    assert lint(capsys, "virtualbox", "disk.vmdk")[0] == 0
    code, said = lint(capsys, "esxi", "disk.vmdk")
    assert code == 1
    assert any("version 1" in finding["message"] for finding in said["findings"])
