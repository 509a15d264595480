"""``python -m byre``: the same command line as ``byre``."""

from __future__ import annotations

import sys

from .cli.main import entry

if __name__ == "__main__":
    sys.exit(entry())
