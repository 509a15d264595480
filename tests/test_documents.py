"""The pages say what the program does: generated parts are current, links lead somewhere, examples run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from byre.cli.main import IMAGE_VERBS, OWN_VERBS, main

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
README = (ROOT / "README.md").read_text()


def test_generated_parts_are_current() -> None:
    command = [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_verb_has_a_section() -> None:
    sections = re.findall(r"^## (\w+)$", (ROOT / "docs" / "commands.md").read_text(), re.MULTILINE)
    assert set(IMAGE_VERBS) | set(OWN_VERBS) <= set(sections)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def readme_block(heading: str, language: str) -> str:
    section = README.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return section.split(f"```{language}\n", 1)[1].split("```", 1)[0]


def test_ten_command_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["create", "-q", "-f", "qcow2", "base.qcow2", "8M"]) == 0
    assert main(["io", "-c", "write -q -P 7 1M 1M", "base.qcow2"]) == 0
    lines = readme_block("Ten command lines", "console").splitlines()
    assert len(lines) == 10
    for line in lines:
        words = shlex.split(line.removeprefix("$ "))
        assert words[0] == "byre"
        assert main(words[1:]) == 0, (line, capsys.readouterr())


def test_the_library_example(tmp_path: Path) -> None:
    code = readme_block("The library", "python")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{10 << 30} b'hello'\n")


LIBRARY_EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "library.md").read_text(), re.DOTALL)
PREPARATION = """
import byre
for name in ("disk.qcow2", "base.qcow2", "a.qcow2", "a0.qcow2", "b0.qcow2"):
    byre.create(name, "qcow2", 64 << 20)
byre.create("overlay.qcow2", "qcow2", options={"backing_file": "base.qcow2", "backing_fmt": "qcow2"})
byre.create("disk.raw", "raw", 2 << 30)
data = bytes(512)
"""


@pytest.mark.parametrize("index", range(len(LIBRARY_EXAMPLES)))
def test_the_library_guide(tmp_path: Path, index: int) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    code = PREPARATION + LIBRARY_EXAMPLES[index]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
