"""Encrypted qcow2 images: opening, creating, key slots, and the peer in both directions."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

import byre
from byre.crypto.luks_slots import SlotChange
from byre.errors import AccessDenied, ByreError, ImageError, InvalidArgument, NotSupported
from byre.formats.qcow2 import layout
from byre.graph.creating import create
from byre.protocols.memory import MemoryNode
from conftest import Run
from support.encrypted import SECRETS, new_encrypted, open_encrypted
from support.images import new_image, open_image
from support.walk import walk

SIZE = 4 << 20
WORD = "correct horse"


def luks(**options: object) -> MemoryNode:
    return new_encrypted("qcow2", SIZE, format="luks", **options)


class TestOpening:
    def test_luks(self) -> None:
        memory = luks()
        with open_encrypted(memory, "qcow2") as image:
            image.write(100, b"secret text" * 100)
        assert b"secret text" not in memory.to_bytes()
        with open_encrypted(memory, "qcow2", read_only=True) as image:
            assert image.read(100, 1100) == b"secret text" * 100
            assert image.read(0, 100) == bytes(100)
        assert walk(memory.to_bytes()) == ([], [], [])

    def test_the_old_method_takes_any_key(self) -> None:
        memory = new_encrypted("qcow2", SIZE, format="aes")
        with open_encrypted(memory, "qcow2") as image:
            image.write(0, b"text" * 1000)
        with open_image(memory, options={"encrypt.key-secret": "s"}, secrets={"s": "other"}) as image:
            assert image.read(0, 4000) != b"text" * 1000
        with open_image(memory, options={"encrypt.key-secret": "s"}, secrets={"s": "correct horse!!!"}) as image:
            assert image.read(0, 4000) != b"text" * 1000
        with open_encrypted(memory, "qcow2") as image:
            assert image.read(0, 4000) == b"text" * 1000

    @pytest.mark.parametrize(
        ("options", "secrets", "said"),
        [
            ({}, {}, "'encrypt.key-secret' is not given"),
            ({"encrypt.key-secret": "s"}, {"s": "wrong"}, "no key slot opens"),
            ({"encrypt.key-secret": "t"}, SECRETS, "no secret with id 't'"),
            ({"encrypt.key-secret": "s", "encrypt.format": "aes"}, SECRETS, "encrypted with 'luks'"),
        ],
    )
    def test_refusals(self, options: dict[str, object], secrets: dict[str, str], said: str) -> None:
        memory = luks()
        before = memory.to_bytes()
        with pytest.raises(ByreError, match=said):
            open_image(memory, options=options, secrets=secrets)
        assert memory.to_bytes() == before

    def test_a_plain_image_is_not_taken_for_an_encrypted_one(self) -> None:
        with pytest.raises(InvalidArgument, match="not encrypted"):
            open_image(new_image("qcow2", SIZE), options={"encrypt.format": "luks"})

    def test_without_the_header_extension(self) -> None:
        data = bytearray(new_image("qcow2", SIZE).to_bytes())
        data[32:36] = (layout.CRYPT_LUKS).to_bytes(4, "big")
        for more in ({"no_io": True, "read_only": True}, {}):
            with pytest.raises(ImageError, match="no encryption header"):
                open_image(MemoryNode(data), options={"encrypt.key-secret": "s"}, secrets=SECRETS, **more)

    def test_the_header_lies_within_its_area(self) -> None:
        data = bytearray(luks().to_bytes())
        at = data.index((layout.EXTENSION_CRYPTO).to_bytes(4, "big"))
        data[at + 16 : at + 24] = (600).to_bytes(8, "big")
        with pytest.raises(ByreError):
            open_encrypted(MemoryNode(data), "qcow2")

    def test_an_odd_size_ends_with_a_whole_sector(self) -> None:
        data = bytearray(luks().to_bytes())
        data[24:32] = (SIZE - 100).to_bytes(8, "big")
        with open_encrypted(MemoryNode(data), "qcow2") as image:
            assert image.size == SIZE - 512
            image.write(SIZE - 1000, b"x" * 488)
            assert image.read(SIZE - 1000, 488) == b"x" * 488


class TestCreating:
    @pytest.mark.parametrize("cluster_size", [512, 4096, 65536, 2 << 20])
    @pytest.mark.parametrize("preallocation", ["off", "metadata", "full"])
    @pytest.mark.parametrize("compat", ["0.10", "1.1"])
    def test_layouts(self, cluster_size: int, preallocation: str, compat: str) -> None:
        memory = luks(cluster_size=cluster_size, preallocation=preallocation, compat=compat)
        assert walk(memory.to_bytes()) == ([], [], [])
        with open_encrypted(memory, "qcow2") as image:
            assert image.node.has_zero_init == (preallocation == "off")
            image.write(0, b"x" * 10_000)
            assert image.read(0, 10_000) == b"x" * 10_000
        assert walk(memory.to_bytes()) == ([], [], [])

    @pytest.mark.parametrize(
        "options",
        [
            {"encrypt.format": "rot13", "encrypt.key-secret": "s"},
            {"encrypt.key-secret": "s"},
            {"encryption": "on"},
            {"encrypt.format": "luks"},
            {"encryption": "on", "encrypt.format": "luks", "encrypt.key-secret": "s"},
            {"encrypt.format": "luks", "encrypt.key-secret": "s", "encrypt.cipher-alg": "rot13"},
            {"encrypt.format": "luks", "encrypt.key-secret": "nobody"},
        ],
    )
    def test_refusals(self, options: dict[str, object], tmp_path: Path) -> None:
        with pytest.raises(ByreError):
            create(str(tmp_path / "a"), "qcow2", SIZE, options=options, secrets=SECRETS)
        assert not (tmp_path / "a").exists()

    def test_no_compressed_clusters(self) -> None:
        with open_encrypted(luks(), "qcow2") as image:
            with pytest.raises(NotSupported, match="compressed"):
                image.write_compressed(0, bytes(65536))
            with pytest.raises(NotSupported, match="compressed"):
                image.write_compressed_clusters(0, [b"x"])

    def test_an_overlay_of_an_encrypted_image_needs_no_key(self, tmp_path: Path) -> None:
        base, top = str(tmp_path / "base"), str(tmp_path / "top")
        options = {"encrypt.format": "luks", "encrypt.key-secret": "s", "encrypt.iter-time": 0}
        create(base, "qcow2", SIZE, options=options, secrets=SECRETS)
        create(top, "qcow2", options={"backing_file": base, "backing_fmt": "qcow2"})
        with pytest.raises(AccessDenied):
            byre.open(top)
        with byre.open({"driver": "qcow2", "file.filename": top, "backing.encrypt.key-secret": "s"},
                       secrets=SECRETS) as image:  # fmt: skip
            assert image.read(0, 512) == bytes(512)


def test_key_slots() -> None:
    memory = luks()
    with open_encrypted(memory, "qcow2") as image:
        image.write(0, b"x" * 512)
        node = image.node
        node.change_key_slots(SlotChange(True, new_secret=b"two", iter_time=0), WORD.encode())  # type: ignore[attr-defined]
        node.change_key_slots(SlotChange(False, slot=0), b"")  # type: ignore[attr-defined]
        assert [slot["active"] for slot in node.format_info()["encrypt"]["slots"]][:2] == [False, True]  # type: ignore[attr-defined]
    with pytest.raises(AccessDenied):
        open_encrypted(memory, "qcow2")
    with open_image(memory, options={"encrypt.key-secret": "s"}, secrets={"s": "two"}) as image:
        assert image.read(0, 512) == b"x" * 512
    assert walk(memory.to_bytes()) == ([], [], [])


def test_info_in_the_peers_order() -> None:
    with open_image(luks(ivgen_alg="essiv", cipher_mode="cbc"), read_only=True, no_io=True) as image:
        about = image.node.format_info()  # type: ignore[attr-defined]
    assert list(about) == ["compat", "compression-type", "lazy-refcounts", "refcount-bits", "encrypt", "corrupt",
                           "extended-l2"]  # fmt: skip
    assert " ".join(about["encrypt"]) == (
        "ivgen-alg detached-header hash-alg cipher-alg uuid ivgen-hash-alg format cipher-mode slots payload-offset "
        "master-key-iters"
    )
    with open_image(new_encrypted("qcow2", SIZE, format="aes"), read_only=True, no_io=True) as image:
        assert image.node.format_info()["encrypt"] == {"format": "aes"}  # type: ignore[attr-defined]


# -- the peer -------------------------------------------------------------------------------------

METHODS = [
    {"encrypt.format": "luks"},
    {"encrypt.format": "luks", "encrypt.cipher-mode": "cbc", "encrypt.ivgen-alg": "essiv", "cluster_size": "4096"},
    {"encrypt.format": "luks", "compat": "0.10"},
    {"encrypt.format": "aes"},
]
SECRET = f"secret,id=s,data={WORD}"


def asked_again(run: Run, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The peer measures its processor time and at times finds none."""
    for _ in range(9):
        done = run(*arguments, check=False)
        if done.returncode == 0:
            return done
    pytest.skip(done.stderr)


def image_options(path: Path) -> str:
    return f"driver=qcow2,file.filename={path},encrypt.key-secret=s"


def content_of(path: Path) -> bytes:
    chooser = random.Random(5)
    content = bytearray(SIZE)
    for _ in range(20):
        at = chooser.randrange(SIZE - 50_000)
        content[at : at + 50_000] = chooser.randbytes(50_000)
    path.write_bytes(content)
    return bytes(content)


@pytest.mark.oracle
@pytest.mark.parametrize("options", METHODS, ids=lambda options: "-".join(options.values()))
class TestQemuImg:
    def test_it_reads_and_checks_what_byre_writes(self, options: dict[str, str], tmp_path: Path, qemu_img: Run) -> None:
        content, path = content_of(tmp_path / "plain"), tmp_path / "a.qcow2"
        time = {"encrypt.iter-time": 0} if options["encrypt.format"] == "luks" else {}
        create(str(path), "qcow2", SIZE, options={**options, **time, "encrypt.key-secret": "s"}, secrets=SECRETS)
        spec = {"driver": "qcow2", "file.filename": str(path), "encrypt.key-secret": "s"}
        with byre.open(spec, read_only=False, secrets=SECRETS) as image:
            order = list(range(0, SIZE, 10_000))
            random.Random(6).shuffle(order)
            for at in order:
                image.write(at, content[at : at + 10_000])
        qemu_img("check", "--object", SECRET, "--image-opts", image_options(path))
        qemu_img("compare", "--object", SECRET, "--image-opts", f"driver=raw,file.filename={tmp_path}/plain",
                 image_options(path))  # fmt: skip

    def test_byre_reads_what_it_writes(self, options: dict[str, str], tmp_path: Path, qemu_img: Run) -> None:
        content, path = content_of(tmp_path / "plain"), tmp_path / "a.qcow2"
        time = {"encrypt.iter-time": 0} if options["encrypt.format"] == "luks" else {}
        create(str(path), "qcow2", SIZE, options={**options, **time, "encrypt.key-secret": "s"}, secrets=SECRETS)
        qemu_img("convert", "-n", "--object", SECRET, "--image-opts", "--target-image-opts",
                 f"driver=raw,file.filename={tmp_path}/plain", image_options(path))  # fmt: skip
        spec = {"driver": "qcow2", "file.filename": str(path), "encrypt.key-secret": "s"}
        with byre.open(spec, read_only=False, secrets=SECRETS) as image:
            assert image.read(0, SIZE) == content
            image.write(70_001, b"changed")
        qemu_img("check", "--object", SECRET, "--image-opts", image_options(path))


@pytest.mark.oracle
def test_images_that_the_peer_creates(tmp_path: Path, qemu_img: Run) -> None:
    path = tmp_path / "a.qcow2"
    words = "encrypt.format=luks,encrypt.iter-time=100,encrypt.key-secret=s"
    asked_again(qemu_img, "create", "-q", "--object", SECRET, "-f", "qcow2", "-o", words, path, SIZE)
    spec = {"driver": "qcow2", "file.filename": str(path), "encrypt.key-secret": "s"}
    with byre.open(spec, read_only=False, secrets=SECRETS) as image:
        image.write(70_001, b"changed")
        assert image.read(70_000, 9) == b"\0changed\0"
    qemu_img("check", "--object", SECRET, "--image-opts", image_options(path))


@pytest.mark.parametrize("format", ["luks", "aes"])
def test_map_does_not_say_where_encrypted_bytes_lie(
    format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    from byre.cli.main import main

    path = tmp_path / "a.qcow2"
    options = {"encrypt.format": format, "encrypt.key-secret": "s", "preallocation": "metadata"}
    if format == "luks":
        options["encrypt.iter-time"] = 0  # type: ignore[assignment]
    create(str(path), "qcow2", SIZE, options=options, secrets=SECRETS)
    with byre.open({"driver": "qcow2", "file.filename": str(path), "encrypt.key-secret": "s"}, read_only=False,
                   secrets=SECRETS) as image:  # fmt: skip
        image.write(0, b"x" * 65536)
    (tmp_path / "key").write_text(WORD)
    secret = ["--object", f"secret,id=s,file={tmp_path}/key", "--image-opts", image_options(path)]
    assert main(["map", "--output", "json", *secret]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["start"], row["data"], row["zero"], "offset" in row) for row in rows] == [(0, True, False, False)]
    assert main(["map", *secret]) == 1
    assert "encrypted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "header"), [("format=luks", 2097152), ("format=luks,cluster_size=4k", 2068480), ("format=aes", 0)]
)
def test_measure_counts_the_header(words: str, header: int, capsys: pytest.CaptureFixture[str]) -> None:
    """As the peer does: in whole clusters."""
    from byre.cli.main import main

    encryption, _, rest = words.partition(",")
    sizes = []
    for given in (f"encrypt.{encryption},encrypt.key-secret=s,{rest}".rstrip(","), rest):
        assert main(["measure", "-O", "qcow2", "--size", "1G", *(["-o", given] if given else [])]) == 0
        sizes.append([int(line.rpartition(" ")[2]) for line in capsys.readouterr().out.splitlines()])
    assert [one - other for one, other in zip(*sizes, strict=True)] == [header, header]
