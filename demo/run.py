"""byre's main job on a real file system, in a minute: `make demo`.

Builds a disk with an ext2 file system, makes it a base image, stacks two overlays with changes on it, shows the chain,
converts it to a compressed stand-alone image, checks and compares that, and draws what every layer holds. Everything
lies in demo-out/ afterwards. Needs byre and what it depends on; ``qemu-img`` and ``e2fsck`` are asked as well where
they are installed.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import content
import numpy as np
from ext2 import Ext2
from picture import Layer, draw, write_png
from rich.console import Console

import byre
from byre.graph import chain
from byre.units import format_size

if TYPE_CHECKING:
    from collections.abc import Sequence

MIB = 1 << 20
OUT = Path("demo-out")
DISK_SIZE = 192 * MIB
PARTITION = 1 * MIB  # where the file system begins
PARTITION_SIZE = DISK_SIZE - PARTITION
CLUSTER = 65536
NOW = 1_740_787_200  # 1 March 2025: the disk is the same every time it is made
MAP_LINES = 12

console = Console(highlight=False)


class Partition:
    """The file system's part of an image, for :class:`ext2.Ext2`."""

    def __init__(self, image: byre.Image) -> None:
        self.image = image

    def read(self, offset: int, length: int) -> bytes:
        return self.image.read(PARTITION + offset, length)

    def write(self, offset: int, data: bytes) -> None:
        self.image.write(PARTITION + offset, data)

    def zero(self, offset: int, length: int) -> None:
        self.image.write_zeroes(PARTITION + offset, length, unmap=True)

    def discard(self, offset: int, length: int) -> None:
        self.image.discard(PARTITION + offset, length)


def main() -> int:
    started = time.perf_counter()
    if OUT.exists():
        shutil.rmtree(OUT)
    OUT.mkdir()
    os.chdir(OUT)
    console.print(f"[bold]byre {byre.__version__}[/]: everything below happens in {OUT}/")

    files = make_base()
    make_overlays(files)
    show_chain()
    make_standalone()
    check_files(files)
    ask_others()
    path = draw_layers()

    console.print(f"\nDone in {time.perf_counter() - started:.1f} s. The allocation of every layer is drawn in")
    console.print(f"[bold]{path}[/]")
    return 0


# -- the steps ------------------------------------------------------------------------------------


def make_base() -> content.Files:
    """disk.raw with a partition and a file system, and base.qcow2 made from it."""
    step("A disk with a real file system, written through byre's Python interface")
    run("byre", "create", "-f", "raw", "disk.raw", str(DISK_SIZE))
    with byre.open("disk.raw", format="raw", read_only=False) as image:
        image.write(0, partition_table())
        system = Ext2.format(Partition(image), PARTITION_SIZE, label="byre-demo", uuid=bytes(range(16)), now=NOW)
        files = content.install(system)
    size = sum(map(len, files.values()))
    say(f"ext2 on partition 1: {len(files)} files, {format_size(size)}, real ones and generated ones")
    step("The disk becomes a base image")
    run("byre", "convert", "-f", "raw", "-O", "qcow2", "disk.raw", "base.qcow2")
    return files


def make_overlays(files: content.Files) -> None:
    """update.qcow2 on base.qcow2, today.qcow2 on update.qcow2; ``files`` follows the changes."""
    step("Two overlays; each is changed by rewriting blocks of the file system inside it")
    run("byre", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "update.qcow2")
    with byre.open("update.qcow2", read_only=False) as image:
        partition = Partition(image)
        written, removed = content.update(Ext2(partition), partition.zero)
        follow(files, "update.qcow2", written, removed)
    run("byre", "create", "-q", "-f", "qcow2", "-b", "update.qcow2", "-F", "qcow2", "today.qcow2")
    with byre.open("today.qcow2", read_only=False) as image:
        partition = Partition(image)
        written, removed = content.today(Ext2(partition), files[content.DATABASE], partition.discard)
        follow(files, "today.qcow2", written, removed)


def follow(files: content.Files, layer: str, written: content.Files, removed: Sequence[str]) -> None:
    say(f"{layer}: {len(written)} files written, {len(removed)} removed")
    files.update(written)
    for path in removed:
        del files[path]


def show_chain() -> None:
    step("The chain, and where each byte of the disk is found")
    run("byre", "info", "--backing-chain", "today.qcow2")
    run("byre", "map", "today.qcow2", limit=MAP_LINES)


def make_standalone() -> None:
    step("One compressed image instead of three")
    run("byre", "convert", "-c", "-p", "-O", "qcow2", "today.qcow2", "standalone.qcow2", live=True)
    run("byre", "check", "standalone.qcow2")
    run("byre", "compare", "today.qcow2", "standalone.qcow2")
    chain_size = sum(os.stat(name).st_size for name in ("base.qcow2", "update.qcow2", "today.qcow2"))
    size = os.stat("standalone.qcow2").st_size
    say(f"three images, {format_size(chain_size)}, became one of {format_size(size)}")


def check_files(files: content.Files) -> None:
    """Read the file system inside the stand-alone image and compare every file with what was written."""
    step("Is every file as it was left?")
    with byre.open("standalone.qcow2") as image:
        system = Ext2(Partition(image))
        found = set(system.files())
        wrong = sorted(found ^ set(files))
        wrong += [path for path in sorted(found & set(files)) if system.read_file(path) != files[path]]
    if wrong:
        raise SystemExit(f"demo: {len(wrong)} files differ, the first is {wrong[0]}")
    say(f"all {len(files)} files are there, byte for byte")


def ask_others() -> None:
    """Programs that know the formats and had no part in this, where they are installed."""
    step("What other programs say")
    if shutil.which("qemu-img"):
        run("qemu-img", "check", "standalone.qcow2")
        run("qemu-img", "compare", "today.qcow2", "standalone.qcow2")
    else:
        say("qemu-img is not installed, so it is not asked")
    checker = shutil.which("e2fsck", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if checker:
        run("byre", "convert", "-O", "raw", "standalone.qcow2", "standalone.raw")
        run(checker, "-fn", f"standalone.raw?offset={PARTITION}", shown="e2fsck")
    else:
        say("e2fsck is not installed, so it is not asked")


def draw_layers() -> str:
    """layers.png: a band for each layer of the chain and for the stand-alone image."""
    with byre.open("today.qcow2") as image:
        nodes = reversed(chain.layers(image.node))
        layers = [band(os.path.basename(node.filename), node) for node in nodes]
    with byre.open("standalone.qcow2") as image:
        layers.append(band("standalone.qcow2", image.node))
    notes = (
        "the base image",
        "on top of it: a new release",
        "on top of that: a day's work",
        "the whole chain, compressed",
    )
    layers = [layer._replace(title=f"{layer.title} - {note}") for layer, note in zip(layers, notes, strict=True)]
    path = "layers.png"
    write_png(path, draw("What each layer of the chain holds", layers, CLUSTER))
    return os.path.abspath(path)


def band(name: str, node: byre.graph.node.Node) -> Layer:
    """One layer's clusters and a line of figures about them."""
    extents = node.extents(0, node.size)
    counts = (extents.length + extents.offset % CLUSTER) // CLUSTER
    kinds = np.repeat(extents.kind, counts)
    words = []
    for kind, (word, count) in enumerate(
        zip(("data", "zero", "", "compressed"), np.bincount(kinds, minlength=4), strict=True)
    ):
        if word and count and kind < 4:
            words.append(f"{format_size(int(count) * CLUSTER)} {word}")
    words.append(f"file {format_size(os.stat(name).st_size)}")
    return Layer(name, ", ".join(words), kinds)


# -- around them ----------------------------------------------------------------------------------


def partition_table() -> bytes:
    """A master boot record with one Linux partition (type 0x83)."""
    entry = struct.pack("<B3sB3sII", 0, b"\xfe\xff\xff", 0x83, b"\xfe\xff\xff", PARTITION // 512, PARTITION_SIZE // 512)
    return (bytes(440) + b"byre\0\0" + entry).ljust(510, b"\0") + b"\x55\xaa"


def step(words: str) -> None:
    console.print(f"\n[bold cyan]{words}[/]")


def say(words: str) -> None:
    console.print(f"[green]{words}[/]")


def run(program: str, *arguments: str, shown: str = "", limit: int = 0, live: bool = False) -> None:
    """Run a command as a user would and show what it prints.

    :param shown: the program's name to show
    :param limit: show at most this many lines
    :param live: the command writes to the terminal itself
    """
    console.print(f"[bold]$ {shown or program} {' '.join(arguments)}[/]", markup=True, soft_wrap=True)
    command = [find(program), *arguments]
    if live:
        sys.stdout.flush()
        done = subprocess.run(command, check=False)
    else:
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        lines = done.stdout.splitlines()
        cut = len(lines) - limit if limit and len(lines) > limit + 1 else 0
        for line in lines[: len(lines) - cut]:
            console.print(f"  {line}".rstrip(), markup=False, soft_wrap=True)
        if cut:
            console.print(f"  ... and {cut} lines more", style="dim")
    if done.returncode:
        raise SystemExit(f"demo: {shown or program} failed with exit status {done.returncode}")


def find(program: str) -> str:
    """The program beside this interpreter, else the one on the search path."""
    beside = Path(sys.executable).parent / program  # an absolute name stays as it is
    return str(beside) if beside.exists() else program


if __name__ == "__main__":
    sys.exit(main())
