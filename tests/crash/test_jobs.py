"""Live jobs and power cuts: what a job has said is true of the disks that remain; the chain opens at every point."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import byre
from byre.filters.replay import CrashState, WriteLog, crash_states
from byre.filters.writelog import LogNode
from byre.formats.qcow2.image import Qcow2Node
from byre.graph import chain
from byre.graph.graph import Graph
from byre.image import Image
from byre.jobs.active_commit import ActiveCommitJob
from byre.jobs.backup import BackupJob, BackupOptions
from byre.jobs.job import Job
from byre.jobs.mirror import MirrorJob, MirrorOptions
from byre.jobs.states import State
from byre.protocols.memory import MemoryNode
from support.images import detached, new_image, open_image, stack
from support.walk import walk
from support.writers import until

SECTOR = 512
CLUSTER = 4096
SIZE = 24 * CLUSTER
NAMES = ("top", "mid", "base")


def filled(seed: int, *, backing: bool = False, empty: bool = False) -> bytes:
    """The bytes of a small image."""
    options: dict[str, object] = {"backing_file": "base", "backing_fmt": "qcow2"} if backing else {}
    memory = new_image("qcow2", SIZE, cluster_size=CLUSTER, **options)
    chooser = random.Random(seed)
    graph = Graph()
    graph.add(detached(memory))
    with byre.open({"driver": "qcow2", "file": memory.name, "backing": None}, read_only=False, graph=graph) as image:
        for _ in range(0 if empty else 7):
            offset = chooser.randrange(SIZE // SECTOR) * SECTOR
            image.write(offset, chooser.randbytes(min(chooser.choice((512, 6000, 2 * CLUSTER)), SIZE - offset)))
    return memory.to_bytes()


def opened(graph: Graph, layers: Sequence[tuple[str, bytes]], log: WriteLog | None = None, *,
           read_only: bool = False) -> Image:  # fmt: skip
    """The first of (name, bytes) over the second and so on."""
    spec: dict[str, object] | None = None
    for name, data in reversed(layers):
        filters = [LogNode(log, disk=name)] if log is not None else []
        spec = {"driver": "qcow2", "file": stack(graph, MemoryNode(data), filters).name, "backing": spec}
    assert spec is not None
    return byre.open(spec, read_only=read_only, graph=graph)


def content(*layers: tuple[str, bytes]) -> bytes:
    with opened(Graph(), layers, read_only=True) as image:
        return image.read(0, SIZE)


def check(found: bytes, allowed: Sequence[bytes], story: str) -> None:
    """Each sector holds what one of the allowed contents has there."""
    for offset in range(0, SIZE, SECTOR):
        part = found[offset : offset + SECTOR]
        assert any(part == one[offset : offset + SECTOR] for one in allowed), f"{story}\nsector at {offset:#x}"


def sound(data: bytes, story: str) -> None:
    if not data[79] & 1:  # dirty: counts are made anew
        assert not walk(data).damage, story


def of(state: CrashState, name: str) -> bytes:
    data = state.disks[name].to_bytes()
    sound(data, f"{name}: {state.story}")
    return data


class Story:
    """A disk and the job on it, with the contents it went through.

    :ivar contents: before the job, when it took effect, and after that
    """

    def __init__(self, log: WriteLog, image: Image, job: Job) -> None:
        self.contents = [image.read(0, SIZE)]
        job.start()
        until(lambda: job.state is State.READY or job.error)
        log.mark("ready")
        chooser = random.Random(5)
        image.write(3 * CLUSTER + 512, chooser.randbytes(2 * CLUSTER))
        image.write_zeroes(10 * CLUSTER, 2 * CLUSTER)
        self.contents.append(image.read(0, SIZE))
        job.complete()  # type: ignore[attr-defined]
        assert job.join(20)
        assert job.error is None
        log.mark("done")
        image.write(8 * CLUSTER, chooser.randbytes(3 * CLUSTER))
        self.contents.append(image.read(0, SIZE))
        image.flush()
        log.mark("flushed")

    def judge(self, log: WriteLog, before: Callable[[CrashState], bytes], after: Callable[[CrashState], bytes]) -> int:
        """Judge every state; how many.

        :param before: what reads as the disk until the job is done
        :param after: what reads as it from READY on
        """
        count = 0
        seen = set()
        for state in crash_states(log):
            if (state.digest, tuple(state.marks)) in seen:
                continue
            seen.add((state.digest, tuple(state.marks)))
            count += 1
            marks = {str(mark) for mark in state.marks}
            if "done" not in marks:
                check(before(state), self.contents, state.story)
            if "done" in marks:
                check(after(state), self.contents[1:], state.story)
            elif "ready" in marks:
                check(after(state), self.contents, state.story)
            if "flushed" in marks:
                assert after(state) == self.contents[2], state.story
        return count


def test_mirror() -> None:
    for mode in ("background", "write-blocking"):
        log, graph = WriteLog(), Graph()
        source = opened(graph, [("source", filled(1))], log)
        target = opened(graph, [("target", filled(2))], log)
        story = Story(log, source, MirrorJob(source, target, MirrorOptions(copy_mode=mode)))
        for image in (source, target):
            image.close()
        judged = story.judge(
            log,
            lambda state: content(("source", of(state, "source"))),
            lambda state: content(("target", of(state, "target"))),
        )
        assert judged > 50


def test_active_commit() -> None:
    for level in (1, 2):
        log, graph = WriteLog(), Graph()
        layers = [("top", filled(1, backing=True)), ("mid", filled(2, backing=True)), ("base", filled(3))]
        image = opened(graph, layers, log)
        story = Story(log, image, ActiveCommitJob(image, chain.layers(image.node)[level]))
        image.close()
        judged = story.judge(
            log,
            lambda state: content(*((name, of(state, name)) for name in NAMES)),
            lambda state, level=level: content(*((name, of(state, name)) for name in NAMES[level:])),  # type: ignore[misc]
        )
        assert judged > 50


def test_a_bitmap_is_clean_only_where_the_backup_is() -> None:
    log, graph = WriteLog(), Graph()
    memory = MemoryNode(filled(1))
    with open_image(memory) as image:
        assert isinstance(image.node, Qcow2Node)
        image.node.bitmap_store().add("b", CLUSTER)
        image.write(2 * CLUSTER, b"changed" * 2000)
    source = opened(graph, [("source", memory.to_bytes())], log)
    target = opened(graph, [("target", filled(2, empty=True))], log)
    BackupJob(source, target, BackupOptions("incremental", "b")).execute()
    log.mark("done")
    wanted = source.read(2 * CLUSTER, 14000)
    source.close()
    target.close()
    clean = 0
    for state in crash_states(log):
        with opened(Graph(), [("source", of(state, "source"))], read_only=True) as image:
            assert isinstance(image.node, Qcow2Node)
            bitmap = image.node.bitmap_store().find("b")
            is_clean = not bitmap.inconsistent and not bitmap.dirty_bits
        if is_clean or "done" in {str(mark) for mark in state.marks}:
            assert content(("target", of(state, "target")))[2 * CLUSTER : 2 * CLUSTER + 14000] == wanted, state.story
        clean += is_clean
    assert clean
