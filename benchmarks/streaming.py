"""Streaming: convert and compare a disk of data, zeroes and holes, everything in the page cache."""

from __future__ import annotations

from pathlib import Path

from harness import Bench, Goal, parse_arguments

PEER_FASTEST = ("-W", "-m", "16")  # out of order, sixteen in flight: the peer's quickest setting for compression
DENSE = ("--level", "6")


def main() -> None:
    given = parse_arguments(__doc__ or "", pairs=5, size="1G")
    with Bench("streaming", given) as bench:
        raw = bench.make_image("mixed", "disk.raw", given.size)
        plain_copies(bench, raw)
        compressed_copies(bench, raw)


def plain_copies(bench: Bench, raw: str) -> None:
    image, target = bench.path("disk.qcow2"), bench.path("target")
    make(bench, "convert", "-f", "raw", "-O", "qcow2", raw, image)
    bench.warm(raw)
    bench.warm(image)
    for source, output in (("raw", "qcow2"), ("qcow2", "raw"), ("qcow2", "qcow2")):
        name = raw if source == "raw" else image
        bench.row(
            f"convert {source} to {output}",
            ["convert", "-f", source, "-O", output, name, target],
            goal=Goal(0.9),
            outputs=[target],
            finish=lambda output=output: verify(bench, raw, target, output),
        )
    Path(target).unlink(missing_ok=True)
    if bench.wants("compare"):
        copy = bench.path("copy.qcow2")
        make(bench, "convert", "-f", "qcow2", "-O", "qcow2", image, copy)
        bench.warm(copy)
        bench.row("compare two equal qcow2", ["compare", "-f", "qcow2", "-F", "qcow2", image, copy], goal=Goal(0.7))
        Path(copy).unlink()
    Path(image).unlink()


def compressed_copies(bench: Bench, raw: str) -> None:
    target = bench.path("target.qcow2")
    bench.warm(raw)

    def compress(name: str, goal: Goal, *options: str, own: tuple[str, ...] = (), size_goal: float = 0) -> None:
        common = ("-c", "-f", "raw", "-O", "qcow2", *options)
        bench.row(
            name,
            ["convert", *common, *own, raw, target],
            ["convert", *common, *PEER_FASTEST, raw, target],
            goal=goal,
            size_goal=size_goal,
            outputs=[target],
            finish=lambda: verify(bench, raw, target, "qcow2"),
        )

    compress("convert -c zlib, against -W -m 16", Goal(0.15), size_goal=1.06)
    compress("convert -c zlib dense, against -W -m 16", Goal(0.4), own=DENSE, size_goal=1.0)
    compress("convert -c zstd, against -W -m 16", Goal(0.6), "-o", "compression_type=zstd")
    Path(target).unlink(missing_ok=True)

    output = bench.path("target.raw")
    for kind, goal in (("zlib", Goal(0.45)), ("zstd", Goal(0.5))):
        name = f"convert compressed {kind} to raw"
        if bench.wants(name):
            source = bench.path(f"{kind}.qcow2")
            make(bench, "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", f"compression_type={kind}", raw, source)
            bench.warm(source)
            bench.row(
                name,
                ["convert", "-f", "qcow2", "-O", "raw", source, output],
                goal=goal,
                outputs=[output],
                finish=lambda: verify(bench, raw, output, "raw"),
            )
            Path(source).unlink()


def make(bench: Bench, *arguments: str) -> None:
    """Prepare a source with the peer where there is one: then it is not our own layout that is read."""
    bench.log("preparing")
    if bench.peer:
        bench.run_peer(*arguments)
    else:
        bench.run_byre(*arguments)


def verify(bench: Bench, raw: str, target: str, output: str) -> dict[str, object]:
    """Let the peer compare what byre wrote with the source."""
    if not bench.verify or not bench.peer:
        return {}
    bench.run_peer("compare", "-f", "raw", "-F", output, raw, target)
    return {"verified": True}


if __name__ == "__main__":
    main()
