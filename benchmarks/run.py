"""All benchmarks one after the other; the JSON lines go to build/bench/ as well.

python benchmarks/run.py [--quick] [--scratch DIR]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from datetime import datetime
from pathlib import Path

from harness import render

HERE = Path(__file__).resolve().parent
# name: (options of a full run, options of a quick one)
SCRIPTS = {
    "startup": ([], ["--pairs", "7"]),
    "requests": ([], ["--pairs", "3", "--size", "512M"]),
    "metadata": ([], ["--pairs", "1", "--size", "128G"]),
    "streaming": (["--size", "4G"], ["--pairs", "3", "--size", "512M"]),
    "chains": ([], ["--pairs", "3", "--size", "512M"]),
    "jobs": ([], ["--pairs", "3", "--size", "256M"]),
    "formats_small": (["--size", "2G"], ["--pairs", "3", "--size", "512M"]),
    "formats_vhd": (["--size", "2G"], ["--pairs", "3", "--size", "512M"]),
    "formats_vmdk": (["--size", "2G"], ["--pairs", "3", "--size", "512M"]),
    "maintenance": ([], ["--pairs", "1", "--size", "64G"]),
    "encryption": (["--size", "2G"], ["--pairs", "3", "--size", "512M"]),
    "nbd": ([], ["--pairs", "1"]),
    "nbd_client": (["--size", "4G"], ["--pairs", "3", "--size", "512M"]),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small images and few runs: minutes instead of an hour")
    parser.add_argument("--scratch", help="folder on a real disk for the images")
    given = parser.parse_args()
    folder = HERE.parent / "build" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{datetime.now():%Y-%m-%d-%H%M%S}.jsonl"
    rows = []
    with log.open("w") as file:
        for name, (full, quick) in SCRIPTS.items():
            command = [sys.executable, str(HERE / f"{name}.py"), *(quick if given.quick else full)]
            command += ["--scratch", given.scratch] if given.scratch else []
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                for line in process.stdout or ():
                    file.write(line)
                    file.flush()
                    record = json.loads(line)
                    rows += [record] if "row" in record else []
            if process.returncode:
                print(f"{name} failed", file=sys.stderr)
                return 1
    print("\nall rows\n")
    print(render(rows))
    print(f"\nJSON lines: {log}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
