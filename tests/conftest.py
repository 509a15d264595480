"""Fixtures for all tests: the peer programs, run with text output.

A peer that is missing skips the test on a user's machine and fails it where ``CI`` is set.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable

import pytest

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def peer_program(name: str) -> str:
    """The path of a peer program; ``BYRE_<NAME>`` in the environment overrides the search."""
    path = os.environ.get(f"BYRE_{name.upper().replace('-', '_')}") or shutil.which(name)
    if path is None:
        message = f"{name} is not installed"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return path


def _runner(name: str) -> Run:
    program = peer_program(name)

    def run(
        *arguments: object, check: bool = True, input: str | None = None, timeout: float = 60, **more: object
    ) -> subprocess.CompletedProcess[str]:
        """Run the program; ``check`` makes a failure an AssertionError with its output."""
        command = [program, *map(str, arguments)]
        done = subprocess.run(
            command, text=True, capture_output=True, errors="replace", timeout=timeout,
            **({"stdin": subprocess.DEVNULL} if input is None else {"input": input}), **more,  # type: ignore[call-overload]
        )  # fmt: skip
        if check and done.returncode != 0:
            raise AssertionError(f"{' '.join(command)} gave {done.returncode}\n{done.stdout}{done.stderr}")
        return done  # type: ignore[no-any-return]

    return run


@pytest.fixture
def qemu_img() -> Run:
    """``qemu_img("info", path)`` -> CompletedProcess; ``check=False`` allows failure."""
    return _runner("qemu-img")


@pytest.fixture
def qemu_io() -> Run:
    """``qemu_io("-c", "read 0 4k", path)`` -> CompletedProcess; ``check=False`` allows failure."""
    return _runner("qemu-io")


@pytest.fixture
def qemu_nbd() -> Run:
    return _runner("qemu-nbd")


@pytest.fixture
def qemu_io_path() -> str:
    """For tests that keep the program running."""
    return peer_program("qemu-io")


@pytest.fixture
def ewfacquire() -> Run:
    """Makes forensic images (Debian package ewf-tools)."""
    return _runner("ewfacquire")


@pytest.fixture
def fsck_fat() -> Run:
    """Checks FAT file systems (Debian package dosfstools)."""
    return _runner("fsck.fat")


@pytest.fixture
def mcopy() -> Run:
    """Copies files out of FAT file systems (Debian package mtools)."""
    return _runner("mcopy")
