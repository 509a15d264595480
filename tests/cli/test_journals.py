"""``--journal`` and ``--resume``: jobs that are killed go on, and end with the bytes of a run that nobody disturbed."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

import byre
from byre.cli.main import main
from byre.errors import ByreError

MIB = 1 << 20
SIZE = 48 * MIB


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def content(seed: int) -> bytes:
    """Data with holes, in pieces of some MiB."""
    chooser = random.Random(seed)
    return b"".join(chooser.randbytes(MIB) if chooser.random() < 0.8 else bytes(MIB) for _ in range(SIZE // MIB))


def chain() -> tuple[bytes, bytes]:
    """base.raw and top.qcow2 over it; what the two show."""
    base = content(1)
    Path("base.raw").write_bytes(base)
    assert main(["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "top.qcow2"]) == 0
    shown = bytearray(base)
    chooser = random.Random(2)
    with byre.open("top.qcow2", read_only=False) as image:
        for _ in range(20):
            at, data = chooser.randrange(SIZE - MIB), chooser.randbytes(MIB)
            image.write(at, data)
            shown[at : at + MIB] = data
    return base, bytes(shown)


def run_and_kill(*command: str, done: int = -1) -> None:
    """Start byre, and kill it with SIGKILL once its journal says that more than ``done`` bytes are done."""
    process = subprocess.Popen([sys.executable, "-m", "byre", *command], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while done_bytes() <= done:
        assert process.poll() is None, "it ended"
        assert time.monotonic() < deadline, "nothing is done"
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -9


def done_bytes() -> int:
    """What the journal says; -1 if there is none."""
    from byre.jobs.journal import Journal

    try:
        journal = Journal.open("journal")
    except ByreError:
        return -1
    try:
        return sum(length for _, length in journal.done())
    finally:
        journal.close()


def kill_twice(*command: str, rate: str = "8M") -> None:
    """The journal says then that some of the work is done, but not all."""
    run_and_kill(*command, "-r", rate, "--journal", "journal", done=0)
    first = done_bytes()
    run_and_kill(*command, "-r", rate, "--journal", "journal", "--resume", done=first)
    assert 0 < first < done_bytes() < SIZE


def read(name: str) -> bytes:
    with byre.open(name) as image:
        return image.read(0, image.size)


def test_mirror() -> None:
    _, shown = chain()
    kill_twice("mirror", "-O", "qcow2", "top.qcow2", "copy.qcow2")
    assert main(["mirror", "-O", "qcow2", "--journal", "journal", "--resume", "top.qcow2", "copy.qcow2"]) == 0
    assert read("copy.qcow2") == shown
    assert main(["check", "-q", "copy.qcow2"]) in (0, 3)
    assert not os.path.exists("journal")


def test_backup_in_full() -> None:
    _, shown = chain()
    kill_twice("backup", "-O", "raw", "top.qcow2", "copy.raw")
    assert main(["backup", "-O", "raw", "--journal", "journal", "--resume", "top.qcow2", "copy.raw"]) == 0
    assert read("copy.raw") == shown
    assert not os.path.exists("journal")


def test_incremental_backup() -> None:
    data = bytearray(content(1))
    Path("disk.raw").write_bytes(data)
    assert main(["convert", "-O", "qcow2", "disk.raw", "disk.qcow2"]) == 0
    assert main(["bitmap", "--add", "disk.qcow2", "b"]) == 0
    assert main(["backup", "disk.qcow2", "full.qcow2"]) == 0
    chooser = random.Random(5)
    with byre.open("disk.qcow2", read_only=False) as image:
        for at in range(0, SIZE, 3 * MIB):
            new = chooser.randbytes(2 * MIB)
            image.write(at, new)
            data[at : at + len(new)] = new
    command = (
        "backup",
        "-s",
        "incremental",
        "--bitmap",
        "b",
        "-B",
        "full.qcow2",
        "-F",
        "qcow2",
        "disk.qcow2",
        "inc.qcow2",
    )
    kill_twice(*command)
    assert main([*command, "--journal", "journal", "--resume"]) == 0
    assert read("inc.qcow2") == bytes(data)
    with byre.open("disk.qcow2") as image:
        bitmap = image.node.bitmap_store().find("b")  # type: ignore[attr-defined]
        assert not bitmap.inconsistent
        assert bitmap.dirty_bytes == 0


@pytest.mark.parametrize("keep", [True, False])
def test_commit(keep: bool) -> None:
    _, shown = chain()
    command = ("commit", *(["-d"] if keep else []), "top.qcow2")
    kill_twice(*command, rate="3M")
    assert read("top.qcow2") == shown
    assert main([*command, "--journal", "journal", "--resume"]) == 0
    assert read("base.raw") == shown
    assert read("top.qcow2") == shown
    assert not os.path.exists("journal")


@pytest.mark.parametrize(("onto", "compress"), [("other", False), ("none", True)])
def test_rebase(onto: str, compress: bool) -> None:
    _, shown = chain()
    Path("other.raw").write_bytes(content(3))
    # No option of the command makes it slow; a filter does.
    slow = "driver=throttle,throttling.bps-write=4M,file.driver=qcow2,file.file.filename=top.qcow2"
    new = ("-b", "other.raw", "-F", "raw") if onto == "other" else ("-b", "")
    options = (*(["-c"] if compress else []), "--journal", "journal")
    run_and_kill("rebase", *new, *options, "--image-opts", slow, done=0)
    first = done_bytes()
    run_and_kill("rebase", *new, *options, "--resume", "--image-opts", slow, done=first)
    assert 0 < first < done_bytes() < SIZE
    assert read("top.qcow2") == shown
    assert main(["rebase", *new, *options, "--resume", "top.qcow2"]) == 0
    os.unlink("base.raw")
    assert read("top.qcow2") == shown
    assert main(["check", "-q", "top.qcow2"]) == 0
    with byre.open("top.qcow2") as image:
        assert image.node.backing_name == new[1]  # type: ignore[attr-defined]
    assert not os.path.exists("journal")


def test_rebase_that_died_when_all_was_done() -> None:
    _, shown = chain()
    Path("other.raw").write_bytes(content(3))
    command = ("rebase", "-b", "other.raw", "-F", "raw", "--journal", "journal")
    slow = "driver=throttle,throttling.bps-write=4M,file.driver=qcow2,file.file.filename=top.qcow2"
    run_and_kill(*command, "--image-opts", slow, done=0)
    assert main(["rebase", "-b", "other.raw", "-F", "raw", "top.qcow2"]) == 0
    assert main([*command, "--resume", "top.qcow2"]) == 0
    assert read("top.qcow2") == shown
    assert not os.path.exists("journal")


def test_rebase_onto_a_file_that_has_changed_since_begins_anew(capsys: pytest.CaptureFixture[str]) -> None:
    _, shown = chain()
    Path("other.raw").write_bytes(content(3))
    Path("third.raw").write_bytes(content(4))
    command = ("rebase", "-F", "raw", "--journal", "journal", "-b")
    slow = "driver=throttle,throttling.bps-write=4M,file.driver=qcow2,file.file.filename=top.qcow2"
    run_and_kill(*command, "other.raw", "--image-opts", slow, done=0)
    assert main([*command, "third.raw", "--resume", "top.qcow2"]) == 1
    assert "another job" in capsys.readouterr().err
    assert main(["rebase", "-u", "-b", "base.raw", "-F", "raw", "--journal", "journal", "top.qcow2"]) == 1
    assert "no use with -u" in capsys.readouterr().err
    Path("other.raw").write_bytes(content(5))
    assert main([*command, "other.raw", "--resume", "top.qcow2"]) == 0
    assert read("top.qcow2") == shown


def test_progress_of_a_job_that_goes_on_ends_at_its_total(capsys: pytest.CaptureFixture[str]) -> None:
    chain()
    kill_twice("commit", "top.qcow2", rate="3M")
    capsys.readouterr()
    assert main(["commit", "--journal", "journal", "--resume", "--progress=json", "top.qcow2"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert lines[-1]["offset"] == lines[-1]["total"]


def test_stream() -> None:
    _, shown = chain()
    run_and_kill("stream", "-r", "10M", "--journal", "journal", "top.qcow2")
    assert read("top.qcow2") == shown
    assert main(["stream", "--journal", "journal", "--resume", "top.qcow2"]) == 0
    os.unlink("base.raw")
    assert read("top.qcow2") == shown
    assert not os.path.exists("journal")


def test_a_source_that_was_written_to_is_copied_again() -> None:
    _, shown = chain()
    kill_twice("mirror", "-O", "raw", "top.qcow2", "copy.raw")
    with byre.open("top.qcow2", read_only=False) as image:
        image.write(0, b"new" * 1000)
    assert main(["mirror", "-O", "raw", "--journal", "journal", "--resume", "top.qcow2", "copy.raw"]) == 0
    assert read("copy.raw") == b"new" * 1000 + shown[3000:]


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("verb", ["mirror", "backup"])
def test_a_file_that_is_no_journal(verb: str, resume: bool, capsys: pytest.CaptureFixture[str]) -> None:
    chain()
    Path("other").write_bytes(b"precious")
    before = sorted(path.name for path in Path().iterdir())
    for name in ("top.qcow2", "other", *(() if resume else ("target",))):
        words = [verb, "--journal", name, *(["--resume"] if resume else []), "top.qcow2", "target"]
        capsys.readouterr()
        assert main(words) == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "delete" not in said
        assert sorted(path.name for path in Path().iterdir()) == before
    assert Path("other").read_bytes() == b"precious"


@pytest.mark.parametrize("verb", ["mirror", "backup"])
def test_no_folder_for_the_journal(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is made, and what is in the place of the target stays."""
    chain()
    Path("target").write_bytes(b"precious")
    assert main([verb, "--journal", "missing/journal", "top.qcow2", "target"]) == 1
    assert capsys.readouterr().err == "byre: missing/journal: cannot make the journal: No such file or directory\n"
    assert Path("target").read_bytes() == b"precious"


def test_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    _, shown = chain()
    assert main(["create", "-q", "other.raw", str(SIZE)]) == 0
    run_and_kill("mirror", "-O", "raw", "-r", "5M", "--journal", "journal", "top.qcow2", "copy.raw")
    for arguments, said in (
        (["mirror", "-O", "raw", "--journal", "journal", "top.qcow2", "copy.raw"], "--resume"),
        (["mirror", "-O", "raw", "--resume", "top.qcow2", "copy.raw"], "--resume needs --journal"),
        (["backup", "-O", "raw", "--journal", "journal", "--resume", "top.qcow2", "copy.raw"], "another job"),
        (
            ["mirror", "-s", "top", "-O", "raw", "--journal", "journal", "--resume", "top.qcow2", "copy.raw"],
            "another job",
        ),
        (["mirror", "-n", "-O", "raw", "--journal", "journal", "--resume", "top.qcow2", "other.raw"], "another job"),
    ):
        capsys.readouterr()
        assert main(arguments) == 1, arguments
        assert said in capsys.readouterr().err, arguments
    assert main(["mirror", "-O", "raw", "--journal", "journal", "--resume", "top.qcow2", "copy.raw"]) == 0
    assert read("copy.raw") == shown
