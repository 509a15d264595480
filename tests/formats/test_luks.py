"""LUKS volumes: the format contract, creation, refusals; and the peers, qemu-img and cryptsetup, in both directions."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import byre
from byre.crypto.luks import read_volume
from byre.crypto.luks_slots import SlotChange
from byre.errors import AccessDenied, ByreError, ImageError, InvalidArgument, NotFound, NotSupported, ReadOnly
from byre.formats.encryption import NodeArea
from byre.graph.creating import create
from byre.graph.graph import Graph
from byre.graph.node import Node
from byre.graph.opening import Policy
from byre.protocols.memory import MemoryNode
from conftest import Run, peer_program
from contracts.node import FormatContract
from support.encrypted import SECRETS, new_encrypted, open_encrypted
from support.images import detached, open_image

SIZE = 3 << 20
WORD = "correct horse"


class TestContract(FormatContract):
    @pytest.fixture(params=["xts", "cbc", "ctr"])
    def node(self, request: pytest.FixtureRequest) -> Iterator[Node]:
        memory = new_encrypted("luks", len(self.content), cipher_mode=request.param)
        with open_encrypted(memory, "luks") as image:
            image.write(0, self.content)
            yield image.node

    def test_growth_reads_as_zeroes_and_what_was_cut_off_does_not_come_back(self, node: Node) -> None:
        node.resize(1 << 20)
        assert node.size == 1 << 20
        node.resize(2 << 20)
        assert node.size == 2 << 20

    def test_data_extents_point_to_the_bytes(self, node: Node) -> None:
        extents = list(node.extents(0, node.size))
        assert [(e.offset, e.length, e.kind) for e in extents] == [(0, node.size, 0)]
        assert not node.has_zero_init


# -- creating and opening -------------------------------------------------------------------------


def test_create_and_open(tmp_path: Path) -> None:
    path = str(tmp_path / "a.luks")
    create(path, "luks", SIZE, options={"key-secret": "s", "iter-time": 0}, secrets={"s": WORD})
    assert (tmp_path / "a.luks").stat().st_size == SIZE + 2068480
    with byre.open(f"json:{{'driver':'luks','file.filename':'{path}','key-secret':'s'}}", secrets={"s": WORD}) as image:
        assert image.size == SIZE
        about = image.node.format_info()  # type: ignore[attr-defined]
    assert list(about) == ["ivgen-alg", "detached-header", "hash-alg", "cipher-alg", "uuid", "cipher-mode", "slots",
                           "payload-offset", "master-key-iters"]  # fmt: skip
    assert about["slots"][:2] == [{"active": True, "iters": 1000, "key-offset": 4096, "stripes": 4000},
                                  {"active": False, "key-offset": 262144}]  # fmt: skip
    with byre.open(path, no_io=True) as image:  # probed
        assert image.format == "luks"


def test_info_names_the_key_that_was_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from byre.cli.main import main

    path = tmp_path / "a.luks"
    create(str(path), "luks", SIZE, options={"key-secret": "s", "iter-time": 0}, secrets={"s": WORD})
    assert main(["info", "--object", f"secret,id=s,file={tmp_path}/nowhere", "--image-opts", luks_options(path)]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == (
        f'image: json:{{"driver": "luks", "file": {{"driver": "file", "filename": "{path}"}}, "key-secret": "s"}}'
    )
    assert "encrypted: yes" in rest
    assert not any("cluster_size" in line for line in rest)


def test_wrong_key_and_no_key() -> None:
    memory = new_encrypted("luks", SIZE)
    before = memory.to_bytes()
    for secrets, options, said in (
        ({"s": "wrong"}, {"key-secret": "s"}, "no key slot opens with this secret"),
        ({"s": ""}, {"key-secret": "s"}, "no key slot opens with this secret"),
        ({}, {}, "'key-secret' is not given"),
    ):
        with pytest.raises(AccessDenied, match=said) as caught:
            open_image(memory, "luks", options=options, secrets=secrets)
        assert "wrong" not in str(caught.value)
    with pytest.raises(NotFound, match="no secret with id 'other'"):
        open_image(memory, "luks", options={"key-secret": "other"}, secrets=SECRETS)
    assert memory.to_bytes() == before


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"cipher-alg": "aes-512"}, InvalidArgument),
        ({"cipher-alg": "cast5-128"}, NotSupported),
        ({"cipher-mode": "gcm"}, InvalidArgument),
        ({"cipher-mode": "cbc", "ivgen-alg": "essiv", "ivgen-hash-alg": "sha1"}, NotSupported),
        ({"hash-alg": "tiger"}, InvalidArgument),
        ({"key-secret": "nobody"}, NotFound),
        ({"key-secret": "binary"}, InvalidArgument),
        ({"detached-header": True, "preallocation": "full"}, InvalidArgument),
    ],
)
def test_refused_creation_leaves_no_file(options: dict[str, object], kind: type[ByreError], tmp_path: Path) -> None:
    path = tmp_path / "a.luks"
    with pytest.raises(kind):
        create(str(path), "luks", SIZE, options={"key-secret": "s", **options}, secrets={"s": WORD, "binary": b"\xff"})
    assert not path.exists()


def test_a_spoiled_file_does_not_stay(tmp_path: Path) -> None:
    path = tmp_path / "a.luks"
    path.touch()
    with pytest.raises(InvalidArgument, match="UTF-8"):
        create(str(path), "luks", SIZE, options={"key-secret": "s"}, secrets={"s": b"\xff"})
    assert not path.exists()


@pytest.mark.parametrize("mode", ["off", "falloc", "full"])
def test_preallocation(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "a.luks"
    options = {"key-secret": "s", "iter-time": 0, "preallocation": mode}
    create(str(path), "luks", SIZE, options=options, secrets={"s": WORD})
    assert (path.stat().st_blocks * 512 >= SIZE) == (mode != "off")


def test_detached_header(tmp_path: Path) -> None:
    header, payload = str(tmp_path / "header"), str(tmp_path / "payload")
    create(header, "luks", 0, options={"key-secret": "s", "iter-time": 0, "detached-header": True}, secrets=SECRETS)
    create(payload, "raw", SIZE)
    spec = {"driver": "luks", "file.filename": payload, "header.filename": header, "key-secret": "s"}
    with byre.open(spec, read_only=False, secrets=SECRETS) as image:
        assert image.size == SIZE
        image.write(0, b"hello" * 1000)
        about = image.node.format_info()  # type: ignore[attr-defined]
        assert (about["detached-header"], about["payload-offset"]) == (True, 0)
        image.node.change_key_slots(SlotChange(True, new_secret=b"two", iter_time=0), WORD.encode())  # type: ignore[attr-defined]
    with byre.open(spec, secrets={"s": "two"}) as image:
        assert image.read(0, 5000) == b"hello" * 1000


def test_resize() -> None:
    memory = new_encrypted("luks", SIZE)
    with open_encrypted(memory, "luks") as image:
        image.write(0, b"x" * 100)
        image.resize(2 * SIZE)
        assert image.size == 2 * SIZE
        assert image.read(0, 100) == b"x" * 100
        image.resize(SIZE, shrink=True)
    assert memory.size == SIZE + 2068480


def test_key_slots_need_a_writable_image() -> None:
    memory = new_encrypted("luks", SIZE)
    with open_encrypted(memory, "luks", read_only=True) as image, pytest.raises(ReadOnly):
        image.node.change_key_slots(SlotChange(False, slot=0), b"")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ((0, b"XXXX"), "magic"),
        ((6, b"\0\3"), "LUKS version 3"),
        ((104, b"\x7f\xff\xff\xff"), "behind the end of the file"),
        ((212, b"\xff\xff\xff\xff"), "4294967295 iterations"),
        ((164, b"\xff\xff\xff\xff"), "4294967295 iterations"),
        ((8, b"rot13\0"), "not supported"),
        ((40, b"xts-benbi\0"), "not supported"),
    ],
)
def test_damaged_headers_are_refused_by_name(change: tuple[int, bytes], said: str) -> None:
    data = bytearray(new_encrypted("luks", 65536).to_bytes())
    data[change[0] : change[0] + len(change[1])] = change[1]
    with pytest.raises(ByreError, match=said):
        open_encrypted(MemoryNode(data), "luks")


def test_limits_can_be_set() -> None:
    memory = new_encrypted("luks", SIZE)
    with pytest.raises(ImageError, match="1000 iterations, allowed are 1 to 500"):
        open_encrypted(memory, "luks", policy=Policy(max_iterations=500))


def test_a_file_cut_short() -> None:
    data = new_encrypted("luks", SIZE).to_bytes()
    with open_encrypted(MemoryNode(data[: 2068480 + 5000]), "luks") as image:
        assert image.size == 4608  # whole sectors
    with pytest.raises(ImageError):
        open_encrypted(MemoryNode(data[:2000000]), "luks")


def test_a_node_as_an_area() -> None:
    graph, memory = Graph(), detached(new_encrypted("luks", 0))
    graph.add(memory)
    area = NodeArea(memory, 0, 1000)
    assert len(area.read(990, 100)) == 100
    with pytest.raises(ImageError, match="no room"):
        area.write(999, b"xx")
    assert read_volume(NodeArea(memory)).version == 1


# -- the peers ------------------------------------------------------------------------------------

GRID = [
    {},
    {"cipher-alg": "aes-128", "hash-alg": "sha1"},
    {"cipher-alg": "aes-192", "hash-alg": "sha512"},
    {"cipher-mode": "cbc", "ivgen-alg": "essiv"},
    {"cipher-alg": "aes-128", "cipher-mode": "cbc", "ivgen-alg": "plain", "hash-alg": "ripemd160"},
    {"cipher-mode": "ctr", "hash-alg": "sha384"},
    {"cipher-mode": "ecb", "hash-alg": "sha224"},
    {"cipher-alg": "cast5-128", "cipher-mode": "cbc"},
    {"cipher-alg": "serpent-256"},
    {"cipher-alg": "serpent-128", "cipher-mode": "cbc"},
    {"cipher-alg": "twofish-128"},
    {"cipher-alg": "twofish-256", "cipher-mode": "cbc", "ivgen-alg": "essiv"},
]


@pytest.fixture
def cryptsetup() -> Callable[..., subprocess.CompletedProcess[str]]:
    program = peer_program("cryptsetup")

    def run(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([program, "-q", *map(str, arguments)], text=True, capture_output=True, timeout=60,
                              stdin=subprocess.DEVNULL)  # fmt: skip
        assert not check or done.returncode == 0, done.stderr
        return done

    return run


def plain_file(path: Path, size: int = SIZE) -> bytes:
    content = random.Random(7).randbytes(size // 2).ljust(size, b"\0")
    path.write_bytes(content)
    return content


def luks_options(path: Path) -> str:
    return f"driver=luks,file.filename={path},key-secret=s"


def create_patiently(run: Run, *arguments: object) -> None:
    """The peer measures its processor time and at times finds none: it is asked again."""
    for _ in range(9):
        done = run(*arguments, check=False)
        if done.returncode == 0:
            return
        if "CPU usage" not in done.stderr:
            break
    pytest.skip(f"the peer cannot create this volume: {done.stderr}")


@pytest.mark.oracle
@pytest.mark.parametrize("options", GRID, ids=lambda options: "-".join(options.values()) or "default")
class TestQemuImg:
    def test_it_reads_what_byre_writes(self, options: dict[str, str], tmp_path: Path, qemu_img: Run) -> None:
        content = plain_file(tmp_path / "plain")
        path = tmp_path / "a.luks"
        try:
            create(str(path), "luks", SIZE, options={"key-secret": "s", "iter-time": 0, **options}, secrets={"s": WORD})
        except NotSupported as error:
            pytest.skip(str(error))
        spec = {"driver": "luks", "file.filename": str(path), "key-secret": "s"}
        with byre.open(spec, read_only=False, secrets={"s": WORD}) as image:
            image.write(0, content)
        qemu_img("compare", "--object", f"secret,id=s,data={WORD}", "--image-opts",
                 f"driver=raw,file.filename={tmp_path}/plain", luks_options(path))  # fmt: skip

    def test_byre_reads_what_it_writes(self, options: dict[str, str], tmp_path: Path, qemu_img: Run) -> None:
        content = plain_file(tmp_path / "plain")
        path = tmp_path / "a.luks"
        try:
            create(str(path), "luks", SIZE, options={"key-secret": "s", "iter-time": 0, **options}, secrets={"s": WORD})
        except NotSupported as error:
            pytest.skip(str(error))
        qemu_img("convert", "-n", "--object", f"secret,id=s,data={WORD}", "--image-opts", "--target-image-opts",
                 f"driver=raw,file.filename={tmp_path}/plain", luks_options(path))  # fmt: skip
        spec = {"driver": "luks", "file.filename": str(path), "key-secret": "s"}
        with byre.open(spec, secrets={"s": WORD}) as image:
            assert image.read(0, SIZE) == content


@pytest.mark.oracle
@pytest.mark.parametrize("words", ["", ",cipher-mode=cbc,ivgen-alg=essiv,cipher-alg=aes-128,ivgen-hash-alg=md5"])
def test_volumes_that_the_peer_creates(words: str, tmp_path: Path, qemu_img: Run) -> None:
    content = plain_file(tmp_path / "plain")
    path, secret = tmp_path / "a.luks", f"secret,id=s,data={WORD}"
    create_patiently(qemu_img, "create", "-q", "--object", secret, "-f", "luks", "-o",
                     f"key-secret=s,iter-time=100{words}", path, SIZE)  # fmt: skip
    qemu_img("convert", "-n", "--object", secret, "--image-opts", "--target-image-opts",
             f"driver=raw,file.filename={tmp_path}/plain", luks_options(path))  # fmt: skip
    spec = {"driver": "luks", "file.filename": str(path), "key-secret": "s"}
    with byre.open(spec, secrets={"s": WORD}) as image:
        assert image.read(0, SIZE) == content


@pytest.mark.oracle
class TestCryptsetup:
    @pytest.mark.parametrize("options", [*GRID[:2], GRID[3], {"cipher-alg": "aes-192", "cipher-mode": "cbc"}], ids=str)
    def test_it_opens_what_byre_creates(
        self, options: dict[str, str], tmp_path: Path, cryptsetup: Callable[..., subprocess.CompletedProcess[str]]
    ) -> None:
        path, key = tmp_path / "a.luks", tmp_path / "key"
        key.write_text(WORD)
        create(str(path), "luks", SIZE, options={"key-secret": "s", "iter-time": 0, **options}, secrets={"s": WORD})
        shown = cryptsetup("luksDump", path).stdout
        assert "Version:       \t1" in shown
        assert "Key Slot 0: ENABLED" in shown
        cryptsetup("open", "--test-passphrase", "--key-file", key, path)
        key.write_text("wrong")
        assert cryptsetup("open", "--test-passphrase", "--key-file", key, path, check=False).returncode == 2

    def test_slots_changed_by_either(
        self, tmp_path: Path, cryptsetup: Callable[..., subprocess.CompletedProcess[str]]
    ) -> None:
        path, one, two = tmp_path / "a.luks", tmp_path / "one", tmp_path / "two"
        one.write_text("one")
        two.write_text("two")
        path.write_bytes(bytes(8 << 20))
        cryptsetup("luksFormat", "--type", "luks1", "--pbkdf-force-iterations", 1000, path, "--key-file", one)
        spec = {"driver": "luks", "file.filename": str(path), "key-secret": "s"}
        with byre.open(spec, read_only=False, secrets={"s": "one"}) as image:
            image.node.change_key_slots(SlotChange(True, new_secret=b"two", iter_time=0, slot=3), b"one")  # type: ignore[attr-defined]
        cryptsetup("open", "--test-passphrase", "--key-slot", 3, "--key-file", two, path)
        cryptsetup("luksKillSlot", path, 0, "--key-file", two)
        with pytest.raises(AccessDenied):
            byre.open(spec, secrets={"s": "one"})
        byre.open(spec, secrets={"s": "two"}).close()

    @pytest.mark.parametrize("sector_size", [512, 4096])
    @pytest.mark.parametrize("kdf", ["pbkdf2", "argon2i", "argon2id"])
    def test_luks2_is_read(
        self, kdf: str, sector_size: int, tmp_path: Path, cryptsetup: Callable[..., subprocess.CompletedProcess[str]]
    ) -> None:
        """The volume is encrypted in place, so its content is known."""
        path, key = tmp_path / "a.luks", tmp_path / "key"
        key.write_text(WORD)
        content = plain_file(path, 1 << 20)
        with path.open("r+b") as file:
            file.truncate((1 << 20) + (32 << 20))
        cost = ["--pbkdf-force-iterations", 1000] if kdf == "pbkdf2" else \
            ["--pbkdf-force-iterations", 4, "--pbkdf-memory", 256, "--pbkdf-parallel", 1]  # fmt: skip
        done = cryptsetup("reencrypt", "--encrypt", "--type", "luks2", "--pbkdf", kdf, *cost, "--sector-size",
                          sector_size, "--reduce-device-size", "32M", path, "--key-file", key, check=False)  # fmt: skip
        if done.returncode:
            pytest.skip(f"cryptsetup cannot encrypt a file here: {done.stderr}")
        spec = {"driver": "luks", "file.filename": str(path), "key-secret": "s"}
        with byre.open(spec, secrets={"s": WORD}) as image:
            assert image.read(0, 1 << 20) == content
            assert image.read(12345, 6789) == content[12345 : 12345 + 6789]
            about = image.node.format_info()  # type: ignore[attr-defined]
            assert (about["version"], about["sector-size"]) == (2, sector_size)
        with pytest.raises(AccessDenied):
            byre.open(spec, secrets={"s": "wrong"})
        with pytest.raises(NotSupported, match="only be read"):
            byre.open(spec, read_only=False, secrets={"s": WORD})
        # The second header serves when the first is damaged, and neither is believed without its checksum.
        data = bytearray(path.read_bytes())
        data[4096 + 10] ^= 1
        with open_encrypted(MemoryNode(data), "luks", read_only=True) as image:
            assert image.read(0, 4096) == content[:4096]
        data[16384 + 4096 + 10] ^= 1
        with pytest.raises(ImageError, match="checksum"):
            open_encrypted(MemoryNode(data), "luks", read_only=True)
