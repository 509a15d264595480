"""Encryption: a disk of random bytes into a LUKS volume and out of it, everything in the page cache.

The volume exists already and its key slot asks for few iterations, so that what is measured is the cipher.
"""

from __future__ import annotations

import os
from pathlib import Path

from harness import Bench, Goal, parse_arguments


def main() -> None:
    given = parse_arguments(__doc__ or "", pairs=5, size="1G")
    with Bench("encryption", given) as bench:
        raw, key = bench.path("disk.raw"), bench.path("key")
        with open(raw, "wb") as file:
            for _ in range(given.size >> 20):
                file.write(os.urandom(1 << 20))
        Path(key).write_text("correct horse")
        inside_qcow2(bench, raw, key)
        for mode, goal, more in (("xts", 0.6, ""), ("cbc", 0.6, ",cipher-mode=cbc,ivgen-alg=essiv")):
            both_ways(bench, raw, key, mode, Goal(goal), more)


def both_ways(bench: Bench, raw: str, key: str, mode: str, goal: Goal, more: str) -> None:
    volume, target = bench.path(f"{mode}.luks"), bench.path("target.raw")
    size = str(os.stat(raw).st_size)
    secret = ("--object", f"secret,id=key,file={key}")
    bench.run_byre("create", *secret, "-f", "luks", "-o", f"key-secret=key,iter-time=1{more}", volume, size)
    plain, encrypted = f"driver=raw,file.filename={raw}", f"driver=luks,file.filename={volume},key-secret=key"
    bench.warm(raw)
    bench.row(
        f"convert raw to luks, aes-256-{mode}",
        ["convert", "-n", *secret, "--image-opts", "--target-image-opts", plain, encrypted],
        goal=goal,
        finish=lambda: verify(bench, secret, plain, encrypted),
    )
    bench.warm(volume)
    bench.row(
        f"convert luks, aes-256-{mode}, to raw",
        ["convert", *secret, "--image-opts", "-O", "raw", encrypted, target],
        goal=goal,
        outputs=[target],
        finish=lambda: verify(bench, secret, plain, f"driver=raw,file.filename={target}"),
    )
    for name in (volume, target):
        Path(name).unlink(missing_ok=True)


def inside_qcow2(bench: Bench, raw: str, key: str) -> None:
    """The same cipher in an image whose clusters are allocated on the way."""
    image, target = bench.path("inside.qcow2"), bench.path("target.raw")
    secret = ("--object", f"secret,id=key,file={key}")
    options = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=1"
    size = str(os.stat(raw).st_size)

    def make() -> None:
        Path(image).unlink(missing_ok=True)
        bench.run_byre("create", "-q", *secret, "-f", "qcow2", "-o", options, image, size)

    plain, encrypted = f"driver=raw,file.filename={raw}", f"driver=qcow2,file.filename={image},encrypt.key-secret=key"
    bench.warm(raw)
    bench.row(
        "convert raw to qcow2 with luks",
        ["convert", "-n", *secret, "--image-opts", "--target-image-opts", plain, encrypted],
        goal=Goal(0.6),
        prepare=make,
        finish=lambda: verify(bench, secret, plain, encrypted),
    )
    bench.row(
        "convert qcow2 with luks to raw",
        ["convert", *secret, "--image-opts", "-O", "raw", encrypted, target],
        goal=Goal(0.6),
        outputs=[target],
        finish=lambda: verify(bench, secret, plain, f"driver=raw,file.filename={target}"),
    )
    for name in (image, target):
        Path(name).unlink(missing_ok=True)


def verify(bench: Bench, secret: tuple[str, str], one: str, other: str) -> dict[str, object]:
    """Let the peer compare what byre wrote with the source."""
    if not bench.verify or not bench.peer:
        return {}
    bench.run_peer("compare", *secret, "--image-opts", one, other)
    return {"verified": True}


if __name__ == "__main__":
    main()
