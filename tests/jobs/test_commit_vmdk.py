"""Commit in chains of VMDK, whose layers notice when the one below was changed: not by this."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

import byre
from byre.cli.main import main
from byre.errors import ImageError
from byre.graph import chain
from byre.jobs.active_commit import ActiveCommitJob
from byre.jobs.job import Job
from byre.jobs.states import State

M = 1 << 20
SIZE = 4 * M


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def three() -> bytes:
    """base <- mid <- top; what the top shows."""
    for level, name in enumerate(("base", "mid", "top")):
        below = {"backing_file": ("", "base", "mid")[level], "backing_fmt": "vmdk"} if level else {}
        byre.create(name, "vmdk", SIZE, options=below)
        with byre.open(name, format="vmdk", read_only=False) as image:
            image.write(level * M, bytes([level + 1]) * (M + 5000))
    return read("top")


def read(name: str) -> bytes:
    with byre.open(name, format="vmdk") as image:
        return image.read(0, SIZE)


@pytest.mark.parametrize("keep", [True, False])
def test_the_overlay_goes_on(keep: bool) -> None:
    shown = three()
    assert main(["commit", "-q", *(["-d"] if keep else []), "-f", "vmdk", "top"]) == 0
    assert read("mid") == shown
    assert read("top") == shown
    with byre.open("top", format="vmdk", read_only=False) as image:
        image.write(3 * M, b"more")
    assert main(["commit", "-q", "-f", "vmdk", "top"]) == 0
    assert read("top")[3 * M : 3 * M + 4] == b"more"


def test_into_a_base_further_down() -> None:
    shown = three()
    assert main(["commit", "-q", "-f", "vmdk", "-b", "base", "top"]) == 0
    assert read("base") == shown
    assert read("top") == shown


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("level", [1, 2])
def test_of_a_disk_in_use(complete: bool, level: int) -> None:
    shown = three()
    with byre.open("top", format="vmdk", read_only=False) as image:
        base = chain.layers(image.node)[level]

        def changed(job: Job, state: State) -> None:
            if state is State.READY:
                image.write(3 * M, b"last")
                (job.complete if complete else job.cancel)()

        job = ActiveCommitJob(image, base)
        job.on_change = changed
        job.execute()
        assert image.read(0, SIZE) == shown[: 3 * M] + b"last" + shown[3 * M + 4 :]
    assert read("top")[: 3 * M] == shown[: 3 * M]
    assert read(("", "mid", "base")[level])[3 * M : 3 * M + 4] == b"last"


def test_other_overlays_of_the_base_still_notice() -> None:
    three()
    byre.create("other", "vmdk", SIZE, options={"backing_file": "mid", "backing_fmt": "vmdk"})
    assert main(["commit", "-q", "-f", "vmdk", "top"]) == 0
    with pytest.raises(ImageError, match="content ID"):
        read("other")


@pytest.mark.oracle
def test_the_peer_reads_it(qemu_img: Callable[..., CompletedProcess[str]]) -> None:
    three()
    assert main(["commit", "-q", "-d", "-f", "vmdk", "top"]) == 0
    assert main(["convert", "-f", "vmdk", "-O", "raw", "top", "flat"]) == 0
    qemu_img("compare", "-f", "vmdk", "-F", "raw", "top", "flat")
