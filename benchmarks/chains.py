"""Chains: rebase and compare the top of three layers, commit an overlay; all in the page cache, images made anew."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from harness import Bench, Goal, parse_arguments

PIECE = 1 << 20


def main() -> None:
    given = parse_arguments(__doc__ or "", pairs=5, size="2G")
    with Bench("chains", given) as bench:
        if bench.wants("rebase") or bench.wants("compare"):
            rebase(bench, given.size)
        if bench.wants("commit"):
            commit(bench, given.size)


def rebase(bench: Bench, size: int) -> None:
    """base <- middle (a quarter written) <- top (a tenth), and another base, a tenth changed.

    Once a disk that is mostly holes, as disks are, once one full of data and zeroes, where the time is that of copying.
    """
    wide = size * 32
    for words, virtual, onto_another, onto_none in (
        (f"{wide >> 30} GiB, a fiftieth of it data", wide, Goal(0.8), Goal(0.3)),
        (f"{size / (1 << 30):g} GiB, full", size, Goal(0.8), Goal(0.3)),
    ):
        base, other, middle, top, kept, flat = map(bench.path, ("base", "other", "middle", "top", "kept", "flat"))
        if virtual == size:
            raw = bench.make_image("mixed", "disk.raw", size)
            make(bench, "convert", "-f", "raw", "-O", "qcow2", raw, base)
            Path(raw).unlink()
        else:
            make(bench, "create", "-q", "-f", "qcow2", base, str(wide))
            scribble(bench, base, wide, size * 3 // 5 // PIECE, seed=3)
        shutil.copy(base, other)
        overlay(bench, middle, base)
        overlay(bench, kept, middle)
        for number, (name, share) in enumerate(((other, 10), (middle, 4), (kept, 10))):
            scribble(bench, name, virtual, size // PIECE // share, seed=number)
        make(bench, "convert", "-O", "qcow2", kept, flat)
        for name in (base, other, middle):
            bench.warm(name)

        bench.warm(flat)
        bench.row(f"compare a chain of three with a flat image: {words}",
                  ["compare", "-f", "qcow2", "-F", "qcow2", kept, flat], goal=Goal(0.7))  # fmt: skip

        def fresh(kept: str = kept, top: str = top) -> None:
            shutil.copy(kept, top)

        def verified(flat: str = flat, top: str = top) -> dict[str, object]:
            if not bench.verify or not bench.peer:
                return {}
            bench.run_peer("compare", "-f", "qcow2", "-F", "qcow2", flat, top)
            return {"verified": True}

        for target, name, goal in (
            (["-b", other, "-F", "qcow2"], "onto another base", onto_another),
            (["-b", base, "-F", "qcow2"], "onto a layer of the chain", onto_another),
            (["-b", ""], "onto none", onto_none),
        ):
            bench.row(f"rebase {name}: {words}", ["rebase", "-f", "qcow2", *target, top], goal=goal, prepare=fresh,
                      finish=verified)  # fmt: skip
        for name in (base, other, middle, kept, flat, top):
            Path(name).unlink(missing_ok=True)


def commit(bench: Bench, size: int) -> None:
    """All of the disk is written in the overlay; once with bytes everywhere, once half of it with zeroes."""
    for kind, words in (("dense", "data"), ("mixed", "data and zeroes")):
        base, top, kept = map(bench.path, ("base", "top", "kept"))
        raw = dense(bench, size) if kind == "dense" else bench.make_image("mixed", "disk.raw", size)
        make(bench, "create", "-q", "-f", "qcow2", base, str(size))
        make(bench, "convert", "-S", "0", "-f", "raw", "-O", "qcow2", raw, kept)
        make(bench, "rebase", "-u", "-f", "qcow2", "-b", base, "-F", "qcow2", kept)
        amount = f"{size >> 30} GiB" if size >> 30 else f"{size >> 20} MiB"

        def fresh(base: str = base, top: str = top, kept: str = kept) -> None:
            make(bench, "create", "-q", "-f", "qcow2", base, str(size))
            shutil.copy(kept, top)

        def verified(raw: str = raw, base: str = base) -> dict[str, object]:
            if not bench.verify or not bench.peer:
                return {}
            bench.run_peer("compare", "-f", "raw", "-F", "qcow2", raw, base)
            return {"verified": True}

        for option in ("", "-d"):
            name = " ".join(filter(None, ("commit", option, "of", amount, "of", words)))
            command = ["commit", *filter(None, [option]), "-f", "qcow2", top]
            bench.row(name, command, goal=Goal(1.0), prepare=fresh, finish=verified)
        for path in (base, top, kept, raw):
            Path(path).unlink(missing_ok=True)


def dense(bench: Bench, size: int) -> str:
    """A raw disk without a zero anywhere that is a sector long."""
    path = bench.path("disk.raw")
    piece = random.Random(0).randbytes(16 * PIECE)
    with open(path, "wb") as file:
        for start in range(0, size, len(piece)):
            file.write(piece[: size - start])
    return path


def overlay(bench: Bench, name: str, base: str) -> None:
    make(bench, "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", name)


def scribble(bench: Bench, name: str, size: int, count: int, *, seed: int) -> None:
    """``count`` pieces of a MiB at random places, each with a byte of its own."""
    chooser = random.Random(seed)
    places = [chooser.randrange(size // PIECE) * PIECE for _ in range(count)]
    commands = [f"write -q -P {chooser.randrange(1, 256)} {place} {PIECE}" for place in places]
    for start in range(0, count, 100):
        words = [word for command in commands[start : start + 100] for word in ("-c", command)]
        bench.run_byre("io", "-f", "qcow2", *words, name)


def make(bench: Bench, *arguments: str) -> None:
    """Prepare a file with the peer where there is one: then it is not our own layout that is read."""
    if bench.peer:
        bench.run_peer(*arguments)
    else:
        bench.run_byre(*arguments)


if __name__ == "__main__":
    main()
