"""Two runs side by side: python benchmarks/compare.py before.jsonl after.jsonl"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def load(path: str) -> dict[tuple[str, str], dict[str, Any]]:
    rows = {}
    for line in Path(path).read_text().splitlines():
        record = json.loads(line)
        if "row" in record and "failed" not in record:
            rows[record["bench"], record["row"]] = record
    return rows


def change(before: float, after: float) -> str:
    return f"{(after / before - 1) * 100:+.1f} %" if before else ""


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    before, after = load(sys.argv[1]), load(sys.argv[2])
    width = max((len(row) for _, row in {**before, **after}), default=10)
    head = f"{'row'.ljust(width)}  {'before':>12}  {'after':>12}  {'change':>9}  {'ratio':>16}  {'peak MiB':>14}"
    print(head)
    print("-" * len(head))
    for key in {**before, **after}:
        old, new = before.get(key), after.get(key)
        if not old or not new:
            print(f"{key[1].ljust(width)}  only in the {'first' if old else 'second'} run")
            continue
        ratios = f"{old.get('ratio', 0):.3f} -> {new.get('ratio', 0):.3f}"
        peaks = f"{old.get('byre_peak_mib', 0):.0f} -> {new.get('byre_peak_mib', 0):.0f}"
        print(
            f"{key[1].ljust(width)}  {old['byre']:>12,.4f}  {new['byre']:>12,.4f}  "
            f"{change(old['byre'], new['byre']):>9}  {ratios:>16}  {peaks:>14}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
