"""Keeps the parts of these pages that the program itself knows: python docs/generate.py [--check]

Between ``<!-- begin: NAME -->`` and ``<!-- end -->`` stands what NAME gives: ``formats`` the table of drivers,
``help VERB`` the options of a verb. ``--check`` changes nothing and fails if a page is out of date.
"""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGES = ("commands.md", "formats.md")
BLOCK = re.compile(r"(<!-- begin: (?P<name>[^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)
# Every verb has these; the page describes them once.
COMMON = re.compile(r"^  (-h, --help|--untrusted|--allow-ref|--max-size=SIZE)  ")


def content(name: str) -> str:
    if name == "formats":
        import contextlib
        import io

        from byre.cli.main import main

        with contextlib.redirect_stdout(io.StringIO()) as out:
            main(["formats", "--markdown"])
        return f"\n{out.getvalue().strip()}\n\n"
    verb = name.removeprefix("help ")
    text = import_module(f"byre.cli.{verb}").HELP
    lines = [line for line in text.strip().splitlines() if not COMMON.match(line)]
    return "\n```\n" + "\n".join(lines) + "\n```\n\n"


def updated(page: str) -> str:
    return BLOCK.sub(lambda found: found[1] + content(found["name"]) + found[3], page)


def main() -> int:
    stale = []
    for name in PAGES:
        path = HERE / name
        before = path.read_text()
        after = updated(before)
        if after != before:
            stale.append(name)
            if "--check" not in sys.argv:
                path.write_text(after)
    if "--check" in sys.argv:
        for name in stale:
            print(f"docs/{name} is out of date: run python docs/generate.py", file=sys.stderr)
        return 1 if stale else 0
    print("changed: " + (", ".join(stale) or "nothing"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
