"""``links``: programs that are byre under another name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from byre.cli.links import NAMES, script
from byre.cli.main import main

Output = pytest.CaptureFixture[str]


def test_the_programs(tmp_path: Path, capsys: Output) -> None:
    assert main(["links", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / name) for name in NAMES]
    assert sorted(os.listdir(tmp_path)) == sorted(NAMES)
    for name in NAMES:
        done = subprocess.run([tmp_path / name, "--version"], capture_output=True, text=True, timeout=60, cwd="/")
        assert done.returncode == 0
        # The peers do not agree on how they say it.
        assert done.stdout.startswith((f"{name} version 10.", f"{name} 10."))


def test_nothing_is_taken_from_the_environment(tmp_path: Path) -> None:
    (tmp_path / "byre").mkdir()
    (tmp_path / "byre" / "__init__.py").write_text("raise SystemExit('the wrong one')")
    (tmp_path / "os.py").write_text("raise SystemExit('the wrong one')")
    bin = tmp_path / "bin"
    bin.mkdir()
    assert main(["links", "-q", str(bin)]) == 0
    environment = {"PYTHONPATH": str(tmp_path), "PYTHONHOME": "/nonexistent"}
    done = subprocess.run([bin / "qemu-img", "--version"], capture_output=True, text=True, timeout=60, cwd=tmp_path,
                          env=environment)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_command_that_needs_the_dependencies(tmp_path: Path) -> None:
    assert main(["links", "-q", str(tmp_path)]) == 0
    image = tmp_path / "x"
    for arguments in (["create", "-f", "qcow2", image, "1M"], ["map", "--output=json", image]):
        done = subprocess.run([tmp_path / "qemu-img", *arguments], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr


def test_one_process(tmp_path: Path) -> None:
    """The process that is started is the one that runs the commands."""
    assert main(["links", "-q", str(tmp_path)]) == 0
    with subprocess.Popen([tmp_path / "qemu-io"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as running:  # fmt: skip
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
        assert running.stdin is not None
        running.stdin.write(b"sleep 10\n")
        running.stdin.flush()
        if children.exists():
            assert children.read_text() == ""
        running.stdin.close()
        running.wait(60)


def test_other_files_are_left_alone(tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "qemu-io").write_text("mine")
    assert main(["links", str(tmp_path)]) == 1
    assert "--force" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["qemu-io"]
    assert main(["links", "--force", str(tmp_path)]) == 0
    assert main(["links", str(tmp_path)]) == 0  # its own it may replace
    assert sorted(os.listdir(tmp_path)) == sorted(NAMES)


@pytest.mark.parametrize("folder", ["with space", "long" * 40, "quote'd"])
def test_interpreters_in_awkward_places(tmp_path: Path, folder: str) -> None:
    place = tmp_path / folder
    place.mkdir()
    interpreter = place / "python"
    interpreter.symlink_to(sys.executable)
    link = tmp_path / "qemu-img"
    link.write_text(script(str(interpreter), [str(Path(__file__).parents[2] / "src")]))
    link.chmod(0o755)
    done = subprocess.run([link, "--version"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("qemu-img version")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [([], "expecting one folder"), (["/nonexistent/deeper"], "No such file"), (["/dev/null"], "not a folder")],
)
def test_refusals(capsys: Output, arguments: list[str], part: str) -> None:
    assert main(["links", *arguments]) == 1
    assert part in capsys.readouterr().err


def test_the_folder_is_made(tmp_path: Path, capsys: Output) -> None:
    place = tmp_path / "bin"
    assert main(["links", str(place)]) == 0
    assert sorted(path.name for path in place.iterdir()) == ["qemu-img", "qemu-io", "qemu-nbd", "qemu-storage-daemon"]


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: Output) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o555)
    assert main(["links", str(tmp_path)]) == 1
    assert "Permission denied" in capsys.readouterr().err
