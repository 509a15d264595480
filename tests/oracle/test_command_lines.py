"""Command lines from the qemu-img manual, run by the peer and by byre side by side: same output, code and content."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]
pytestmark = pytest.mark.oracle

MIB = 1 << 20

LINES: tuple[tuple[str, ...], ...] = (
    # create -f fmt -b -F -o filename [size]
    (
        "create -f qcow2 -o cluster_size=4k,lazy_refcounts=on new.qcow2 10G",
        "create -f qcow2 -b base.raw -F raw overlay.qcow2",
        "create -f raw -o preallocation=falloc new.raw 1M",
        "info overlay.qcow2",
        "info --output=json new.qcow2",
    ),
    # convert [-c] -O qcow2
    ("convert -f raw -O qcow2 base.raw plain.qcow2", "check plain.qcow2", "compare base.raw plain.qcow2"),
    ("convert -c -p -O qcow2 base.raw small.qcow2", "compare -p base.raw small.qcow2", "check small.qcow2"),
    # convert ... -o backing_file
    (
        "create -q -f qcow2 -b base.raw -F raw top.qcow2",
        "io -c write_-P_7_64k_128k top.qcow2",
        "convert -O qcow2 -B base.raw -F raw top.qcow2 diff.qcow2",
        "compare top.qcow2 diff.qcow2",
        "map diff.qcow2",
        "map --output=json diff.qcow2",
        "info --backing-chain diff.qcow2",
    ),
    # several inputs, -n, -S
    (
        "convert -O raw base.raw base.raw twice.raw",
        "compare base.raw twice.raw",
        "create -q -f qcow2 there.qcow2 8M",
        "convert -n -S 64k -O qcow2 base.raw there.qcow2",
        "compare -s base.raw there.qcow2",
        "compare base.raw there.qcow2",
    ),
    # dd
    ("dd if=base.raw of=some.raw bs=64k count=10", "dd -f raw -O qcow2 if=base.raw of=some.qcow2 bs=1M count=2",
     "compare -f raw some.raw base.raw", "info some.raw"),
    # measure
    (
        "measure --size 2G -O qcow2",
        "measure -O qcow2 base.raw",
        "measure --output=json -O qcow2 -o cluster_size=2M base.raw",
        "measure -O raw base.raw",
    ),
    # resize
    (
        "create -q -f qcow2 grows.qcow2 1M",
        "resize grows.qcow2 +3M",
        "resize grows.qcow2 2M",
        "resize --shrink grows.qcow2 2M",
        "info grows.qcow2",
    ),
    # snapshot
    (
        "create -q -f qcow2 snap.qcow2 1M",
        "io -c write_-P_1_0_64k snap.qcow2",
        "snapshot -c one snap.qcow2",
        "io -c write_-P_2_0_64k snap.qcow2",
        "snapshot -a one snap.qcow2",
        "snapshot -d one snap.qcow2",
        "snapshot -l snap.qcow2",
        "check snap.qcow2",
    ),
    # image-opts, json, cache modes
    (
        "convert -t none -T none -O qcow2 base.raw direct.qcow2",
        "info --image-opts driver=qcow2,file.driver=file,file.filename=direct.qcow2",
        "convert --image-opts driver=raw,offset=65536,size=131072,file.filename=base.raw slice.raw",
        'map --output=json json:{"driver":"raw","file":{"driver":"file","filename":"slice.raw"}}',
        "compare -U -f raw -F qcow2 base.raw direct.qcow2",
    ),
    # what goes wrong
    (
        "info missing",
        "check base.raw",
        "create -f qcow2 unsized.qcow2",
        "convert -O nonsense base.raw x",
        "compare base.raw missing",
        "resize -f raw base.raw 1",
        "snapshot -a none base.raw",
    ),
)  # fmt: skip


def prepared(folder: Path) -> Path:
    folder.mkdir()
    data = bytearray(4 * MIB)
    data[: 64 << 10] = b"boot" * (16 << 10)
    data[MIB : MIB + (300 << 10)] = bytes(range(256)) * 1200
    data[3 * MIB : 3 * MIB + 5000] = b"tail." * 1000
    with (folder / "base.raw").open("wb") as file:
        for start in range(0, len(data), 4096):
            piece = bytes(data[start : start + 4096])
            if any(piece):
                file.seek(start)
                file.write(piece)
        file.truncate(len(data))
    return folder


def neutral(text: str) -> str:
    """Without what two runs, two programs or two releases may differ in."""
    text = text.replace("(0.00/100%)", "").replace("(100.00/100%)", "")
    text = re.sub(r"\s*\(\d+\.\d+/100%\)\r?", "", text)
    text = re.sub(r'(disk size:|"actual-size":) ?.*', r"\1", text)
    text = re.sub(r"(file length:).*", r"\1", text)
    # What release 10 has and older ones lack: nodes below, and where they are; a further key.
    text = re.sub(r"Child node '/file':\n(    .*\n)*", "", text)
    text = re.sub(r', "compressed": (true|false)', "", text)
    # Snapshots never overwrite a table in use here, which takes other clusters.
    text = re.sub(r"(Image end offset:).*", r"\1", text)
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "DATE", text)
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())


def without_children(text: str) -> object:
    """JSON of ``info`` as older releases have it."""
    import json

    found = json.loads(text)
    if isinstance(found, dict):
        for key in ("children", "actual-size", "image-end-offset"):
            found.pop(key, None)
    return found


def byre(folder: Path, words: list[str]) -> subprocess.CompletedProcess[str]:
    """byre under the peer's name, as a link would start it."""
    program = "qemu-io" if words[0] == "io" else "qemu-img"
    start = f"import sys; from byre.cli.main import entry; sys.argv[0] = {program!r}; entry()"
    return subprocess.run([sys.executable, "-c", start, *words[words[0] == "io" :]], cwd=folder, capture_output=True,
                          text=True, timeout=60, stdin=subprocess.DEVNULL)  # fmt: skip


@pytest.mark.parametrize("lines", LINES, ids=[lines[0].split()[0] + str(i) for i, lines in enumerate(LINES)])
def test_side_by_side(lines: tuple[str, ...], tmp_path: Path, qemu_img: Run, qemu_io: Run) -> None:
    theirs, ours = prepared(tmp_path / "theirs"), prepared(tmp_path / "ours")
    for line in lines:
        words = [word.replace("_", " ") if word.startswith("write_") else word for word in line.split()]
        run, rest = (qemu_io, words[1:]) if words[0] == "io" else (qemu_img, words)
        expected = run(*rest, check=False, cwd=theirs)
        got = byre(ours, words)
        assert got.returncode == expected.returncode, f"{line}\n{got.stderr}\n{expected.stderr}"
        if words[0] == "io":
            continue
        if "json" in line and words[0] in ("info", "check"):
            assert without_children(got.stdout) == without_children(expected.stdout), line
        elif expected.returncode == 0:
            assert neutral(got.stdout) == neutral(expected.stdout), line
        assert bool(got.stderr) == bool(expected.stderr), f"{line}\n{got.stderr}\n{expected.stderr}"
        if got.stderr:
            assert got.stderr.startswith("qemu-img: "), line
    names = sorted(path.name for path in theirs.iterdir())
    assert names == sorted(path.name for path in ours.iterdir())
    for name in names:
        if name.endswith(".raw"):
            assert (theirs / name).read_bytes() == (ours / name).read_bytes(), name
        else:
            qemu_img("compare", theirs / name, ours / name)
            assert qemu_img("check", ours / name, check=False).returncode == 0


def test_both_read_what_the_other_wrote(tmp_path: Path, qemu_img: Run) -> None:
    folder = prepared(tmp_path / "one")
    (folder / "noise.raw").write_bytes(os.urandom(MIB + 512))
    for options in ("-c", "-o cluster_size=512", "-o compat=0.10", "-o extended_l2=on", "-c -o compression_type=zstd",
                    "-o data_file=data,data_file_raw=on"):  # fmt: skip
        for source in ("base.raw", "noise.raw"):
            done = byre(folder, ["convert", *options.split(), "-O", "qcow2", source, "a.qcow2"])
            assert done.returncode == 0, done.stderr
            qemu_img("compare", source, "a.qcow2", cwd=folder)
            qemu_img("check", "a.qcow2", cwd=folder)
            (folder / "a.qcow2").unlink()
            (folder / "data").unlink(missing_ok=True)
            qemu_img("convert", *options.split(), "-O", "qcow2", source, "b.qcow2", cwd=folder)
            assert byre(folder, ["compare", source, "b.qcow2"]).returncode == 0
            assert byre(folder, ["check", "b.qcow2"]).returncode == 0
            (folder / "b.qcow2").unlink()
            (folder / "data").unlink(missing_ok=True)


@pytest.mark.parametrize("options", ["", "-c", "-o cluster_size=4k", "-c -o compression_type=zstd"])
def test_files_end_where_the_peers_do(options: str, tmp_path: Path, qemu_img: Run) -> None:
    """With the last cluster, or the last sector of compressed ones: not where the data happens to end."""
    folder = prepared(tmp_path / "one")
    os.truncate(folder / "base.raw", 3 * MIB + 1536)
    assert byre(folder, ["convert", *options.split(), "-O", "qcow2", "base.raw", "ours"]).returncode == 0
    assert (folder / "ours").stat().st_size % (512 if "-c" in options else 4096) == 0
    qemu_img("check", folder / "ours")
    if options != "-c" and "zstd" not in options:  # compressed clusters have other lengths
        qemu_img("convert", *options.split(), "-O", "qcow2", folder / "base.raw", folder / "theirs")
        assert (folder / "ours").stat().st_size == (folder / "theirs").stat().st_size
    before = (folder / "ours").read_bytes()
    assert byre(folder, ["io", "-c", "read 0 512", "ours"]).returncode == 0
    assert (folder / "ours").read_bytes() == before
