"""Ctrl-C and SIGTERM in the middle of a command: what it made is removed or said, sources stay, nothing hangs."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

MIB = 1 << 20
BYRE = [sys.executable, "-m", "byre"]


def started(folder: Path, *words: str, **more: object) -> subprocess.Popen[str]:
    """A command that takes SIGINT, whatever started the tests."""

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    return subprocess.Popen([*BYRE, *words], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            preexec_fn=prepare, **more)  # type: ignore[call-overload,no-any-return]  # fmt: skip


def until_written(path: Path, process: subprocess.Popen[str], blocks: int = 8) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and path.stat().st_blocks > blocks:
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} was not begun: {process.communicate()}")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").write_bytes(os.urandom(24 * MIB))
    return tmp_path / "source"


CONVERSIONS = (
    ("convert", "-r", "2M", "-f", "raw", "-O", "raw", "source", "target"),
    ("convert", "-r", "2M", "-f", "raw", "-O", "qcow2", "source", "target"),
    ("convert", "-r", "2M", "-c", "-W", "-f", "raw", "-O", "qcow2", "source", "target"),
    ("convert", "-r", "2M", "-p", "-f", "raw", "-O", "qcow2", "-o", "data_file=data", "source", "target"),
)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("words", CONVERSIONS, ids=["raw", "qcow2", "compressed", "data-file"])
def test_a_target_that_was_begun_is_removed(source: Path, words: tuple[str, ...], number: signal.Signals) -> None:
    folder = source.parent
    before = digest(source)
    process = started(folder, *words)
    until_written(folder / ("data" if "data_file=data" in words else "target"), process)
    process.send_signal(number)
    _, error = process.communicate(timeout=20)
    assert process.returncode == (130 if number == signal.SIGINT else 143)
    assert error == ""
    assert sorted(p.name for p in folder.iterdir()) == ["source"]
    assert digest(source) == before


def test_an_existing_target_is_said(source: Path) -> None:
    target = source.parent / "target"
    target.write_bytes(bytes(MIB))
    process = started(source.parent, "convert", "-r", "2M", "-f", "raw", "-O", "raw", "source", "target")
    until_written(target, process, blocks=4096)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert (process.returncode, error) == (130, "byre: warning: target was left behind incomplete\n")


def test_a_target_that_is_filled_is_said(source: Path) -> None:
    target = source.parent / "target"
    with target.open("wb") as file:
        file.truncate(24 * MIB)
    process = started(source.parent, "convert", "-n", "-r", "2M", "-f", "raw", "-O", "raw", "source", "target")
    until_written(target, process)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=20)
    assert (process.returncode, error) == (143, "byre: warning: target is only partly overwritten\n")


def test_impatience(source: Path) -> None:
    """The second and third Ctrl-C neither hang nor print what Python had in mind."""
    process = started(source.parent, "convert", "-r", "1M", "-f", "raw", "-O", "qcow2", "source", "target")
    until_written(source.parent / "target", process)
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        time.sleep(0.004)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in error


def test_at_any_moment(source: Path) -> None:
    """From the start of the interpreter to its end, in steps: either all was done, or nothing is left."""
    folder, before = source.parent, digest(source)
    commands = (
        ("convert", "-f", "raw", "-O", "qcow2", "source", "target"),
        ("create", "-q", "-f", "raw", "-o", "preallocation=full", "target", "24M"),
        ("create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", "target", "24M"),
        ("dd", "if=source", "of=target", "bs=1M"),
    )
    for step in range(16):
        words = commands[step % len(commands)]
        process = started(folder, *words)
        time.sleep(0.06 + step * 0.02)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=20)
        left = (folder / "target").exists()
        assert process.returncode in (0, 143, -signal.SIGTERM), error
        assert left == (process.returncode == 0), (words, process.returncode, error)
        assert "Traceback" not in error
        (folder / "target").unlink(missing_ok=True)
    assert digest(source) == before


@pytest.mark.parametrize(
    "words", [("check", "image"), ("compare", "image", "source"), ("map", "image"), ("info", "image")]
)
def test_commands_that_only_look(source: Path, words: tuple[str, ...]) -> None:
    folder = source.parent
    subprocess.run([*BYRE, "convert", "-f", "raw", "-O", "qcow2", "source", "image"], cwd=folder, check=True)
    before = digest(folder / "image")
    for delay in (0.1, 0.2, 0.3):
        process = started(folder, *words)
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
        assert process.returncode in (0, 130, -signal.SIGINT)
    assert digest(folder / "image") == before


SLOW = (
    ("stream", "-r", "50", "top"),
    ("commit", "-r", "50", "top"),
    ("mirror", "-r", "50", "top", "target"),
    ("backup", "-r", "50", "top", "target"),
    ("convert", "-r", "50", "-O", "raw", "top", "target"),
    ("convert", "-r", "50", "-W", "-O", "qcow2", "top", "target"),
)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("words", SLOW, ids=lambda words: words[0])
def test_nobody_waits_for_the_speed_limit(source: Path, words: tuple[str, ...], number: signal.Signals) -> None:
    """One piece takes hours at this speed."""
    folder = source.parent
    assert subprocess.run([*BYRE, "create", "-q", "-f", "qcow2", "-b", "source", "-F", "raw", "top"], cwd=folder,
                          check=False).returncode == 0  # fmt: skip
    assert subprocess.run([*BYRE, "io", "-c", "write -P 1 0 6M", "top"], cwd=folder, capture_output=True,
                          check=False).returncode == 0  # fmt: skip
    process = started(folder, *words, "-p")
    assert process.stdout is not None
    process.stdout.read(1)  # it is at work
    time.sleep(0.3)
    process.send_signal(number)
    _, error = process.communicate(timeout=10)
    assert process.returncode == (130 if number == signal.SIGINT else 143)
    assert error == ""
    assert sorted(p.name for p in folder.iterdir()) == ["source", "top"]


def test_sigusr1_shows_how_far_it_is(source: Path) -> None:
    process = started(source.parent, "convert", "-r", "8M", "-f", "raw", "-O", "qcow2", "source", "target")
    until_written(source.parent / "target", process)
    for _ in range(3):
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.1)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "/100%)" in error


def test_amend_leaves_a_good_image(tmp_path: Path) -> None:
    """Going down a version, zero clusters over a backing file are written, a long time with small clusters."""
    (tmp_path / "base").write_bytes(b"k" * (32 * MIB))
    create = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "-b", "base", "-F", "raw", "image"]
    for words in (create, ["io", "-c", "write -q -z 0 31M", "-c", "write -q -P 3 31M 1M", "image"]):
        subprocess.run([*BYRE, *words], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    process = started(tmp_path, "amend", "-p", "-o", "compat=0.10", "image")
    until_written(tmp_path / "image", process, blocks=(tmp_path / "image").stat().st_blocks + 4096)
    process.send_signal(signal.SIGINT)
    shown, error = process.communicate(timeout=20)
    assert (process.returncode, error) == (130, "")
    assert shown.endswith("\n")
    reads = ["io", "-r", "-c", "read -P 0 0 31M", "-c", "read -P 3 31M 1M", "image"]
    for words in (["check", "image"], reads):
        done = subprocess.run([*BYRE, *words], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "failed" not in done.stdout
    assert (tmp_path / "image").read_bytes()[7] == 3
