"""Journal: what it says after a crash at any moment is the truth."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from byre.errors import AlreadyExists, ByreError, ImageError, InvalidArgument, NotFound
from byre.jobs.journal import BITS_AT, Journal

ABOUT = {"job": "mirror", "source": [{"file": [1, 2], "size": 1000}], "sync": "full"}
UNIT = 4096


def nothing() -> None:
    pass


def runs(journal: Journal) -> list[tuple[int, int]]:
    return list(journal.done())


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "job.journal")


def test_what_is_done_survives(path: str) -> None:
    journal = Journal.create(path, ABOUT, 100 * UNIT + 5, UNIT)
    journal.finished(0, 3 * UNIT)
    journal.finished(10 * UNIT + 1, 3 * UNIT)  # two whole parts
    journal.finished(99 * UNIT, UNIT + 5)  # to the end
    assert runs(journal) == []
    journal.checkpoint(nothing)
    journal.close()
    again = Journal.open(path)
    assert runs(again) == [(0, 3 * UNIT), (11 * UNIT, 2 * UNIT), (99 * UNIT, UNIT + 5)]
    again.check(ABOUT)
    again.remove()
    assert not os.path.exists(path)


def test_nothing_counts_before_the_target_is_flushed(path: str) -> None:
    journal = Journal.create(path, ABOUT, 10 * UNIT, UNIT)
    journal.finished(0, UNIT)

    def fails() -> None:
        assert runs(Journal.open(path)) == []
        raise ByreError("no flush")

    with pytest.raises(ByreError, match="no flush"):
        journal.checkpoint(fails)
    assert runs(journal) == runs(Journal.open(path)) == []
    journal.checkpoint(nothing)
    assert runs(Journal.open(path)) == [(0, UNIT)]


def test_a_change_takes_back_what_was_done_before_it_happens(path: str) -> None:
    journal = Journal.create(path, ABOUT, 10 * UNIT, UNIT)
    journal.finished(0, 10 * UNIT)
    journal.checkpoint(nothing)
    entry = journal.begin_change(3 * UNIT + 10, 1)
    assert runs(Journal.open(path)) == [(0, 3 * UNIT), (4 * UNIT, 6 * UNIT)]
    journal.finished(0, 10 * UNIT)  # while it is being changed, nothing can be said of it
    journal.checkpoint(nothing)
    assert runs(journal) == [(0, 3 * UNIT), (4 * UNIT, 6 * UNIT)]
    journal.end_change(entry)
    journal.finished(3 * UNIT, UNIT)
    journal.checkpoint(nothing)
    assert runs(Journal.open(path)) == [(0, 10 * UNIT)]


def test_a_change_during_the_flush_counts(path: str) -> None:
    journal = Journal.create(path, ABOUT, 10 * UNIT, UNIT)
    journal.finished(0, 4 * UNIT)
    journal.checkpoint(lambda: journal.end_change(journal.begin_change(UNIT, UNIT)))
    assert runs(Journal.open(path)) == [(0, UNIT), (2 * UNIT, 2 * UNIT)]


def test_a_change_while_a_range_is_copied_counts(path: str) -> None:
    journal = Journal.create(path, ABOUT, 10 * UNIT, UNIT)
    before = journal.begin_change(5 * UNIT, UNIT)
    spoiled = journal.begin_copy(0, 10 * UNIT)
    journal.end_change(before)  # it began before the copy, and its bytes may have come after the reading
    journal.end_change(journal.begin_change(2 * UNIT, UNIT))  # all of it between reading and writing
    journal.finished(0, 10 * UNIT, spoiled)
    journal.end_copy(spoiled)
    journal.checkpoint(nothing)
    assert runs(Journal.open(path)) == [(0, 2 * UNIT), (3 * UNIT, 2 * UNIT), (6 * UNIT, 4 * UNIT)]


@pytest.mark.parametrize("seed", range(4))
def test_many_changes_while_a_range_is_copied_count(path: str, seed: int) -> None:
    """Hundreds, under a busy writer; the work and the memory that they take are those of a list."""
    chooser = random.Random(seed)
    journal = Journal.create(path, ABOUT, 100 * UNIT, UNIT)
    spoiled = journal.begin_copy(0, 100 * UNIT)
    left = set(range(100))
    for number in range(300):
        first = chooser.randrange(80 if number % 3 else 20)
        count = chooser.choice((1, 1, 2))
        if number < 12 or first < 8:
            left -= set(range(first, first + count))
            journal.end_change(journal.begin_change(first * UNIT, count * UNIT))
    journal.finished(0, 100 * UNIT, spoiled)
    journal.end_copy(spoiled)
    journal.checkpoint(nothing)
    done = [range(start // UNIT, (start + length) // UNIT) for start, length in runs(Journal.open(path))]
    assert {part for parts in done for part in parts} == left


def test_checkpoints_come_by_themselves(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    from byre.jobs import journal as module

    monkeypatch.setattr(module, "_INTERVAL", 0.01)
    flushed = threading.Event()
    journal = Journal.create(path, ABOUT, 10 * UNIT, UNIT)
    journal.finished(0, UNIT)
    journal.start(flushed.set)
    assert flushed.wait(5)
    journal.stop()
    assert runs(Journal.open(path)) == [(0, UNIT)]


def test_another_job_is_refused(path: str) -> None:
    journal = Journal.create(path, ABOUT, 10 * UNIT, UNIT)
    for change, word in (({"sync": "top"}, "sync"), ({"more": 1}, "more"), ({"source": []}, "source")):
        with pytest.raises(InvalidArgument, match=f"its {word} is"):
            journal.check({**ABOUT, **change})
    with pytest.raises(AlreadyExists, match="--resume"):
        Journal.create(path, ABOUT, 10 * UNIT, UNIT)
    with pytest.raises(NotFound):
        Journal.open(path + "x")
    for size, unit in ((11 * UNIT, UNIT), (10 * UNIT, 512)):
        with pytest.raises(InvalidArgument, match="another job"):
            Journal.begin(path, ABOUT, size, unit, resume=True)
    with pytest.raises(InvalidArgument, match="larger granularity"):
        Journal.create(path + "x", ABOUT, 1 << 62, 512)
    assert not os.path.exists(path + "x")


def test_a_source_that_changed_begins_anew(path: str) -> None:
    before, after = ({**ABOUT, "source": [{"file": [1, 2], "changed": time}]} for time in (5, 6))
    journal = Journal.begin(path, before, 10 * UNIT, UNIT, resume=True)
    journal.finished(0, UNIT)
    journal.ensure(0, 1, nothing)
    assert runs(Journal.begin(path, before, 10 * UNIT, UNIT, resume=True)) == [(0, UNIT)]
    assert runs(Journal.begin(path, after, 10 * UNIT, UNIT, resume=True, vouched=True)) == [(0, UNIT)]
    assert runs(Journal.begin(path, after, 10 * UNIT, UNIT, resume=True)) == []
    assert Journal.open(path).about == after
    with pytest.raises(AlreadyExists):
        Journal.begin(path, after, 10 * UNIT, UNIT, resume=False)


def damage(at: int) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        data[at] ^= 0xFF

    return change


@pytest.mark.parametrize(
    "spoil", [damage(0), damage(17), damage(30), damage(70), lambda data: data.pop(), lambda data: data.clear()]
)
def test_damaged_journals_are_refused(path: str, spoil: Callable[[bytearray], None]) -> None:
    Journal.create(path, ABOUT, 10 * UNIT, UNIT).close()
    data = bytearray(Path(path).read_bytes())
    spoil(data)
    Path(path).write_bytes(data)
    with pytest.raises(ImageError, match=r"damaged|no journal"):
        Journal.open(path)


def test_it_gets_its_name_when_it_is_complete(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before that, it leaves nothing behind."""
    seen = []
    pwrite, fsync = os.pwrite, os.fsync
    monkeypatch.setattr(os, "pwrite", lambda *given: (seen.append(os.path.exists(path)), pwrite(*given))[1])
    monkeypatch.setattr(os, "fsync", lambda *given: (seen.append(os.path.exists(path)), fsync(*given))[1])
    Journal.create(path, ABOUT, 10 * UNIT, UNIT).close()
    assert seen == [False, False, False, True]  # the last one is of the folder


def test_where_files_must_have_names(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "O_TMPFILE", os.O_CREAT | os.O_EXCL)  # refused for a folder
    Journal.create(path, ABOUT, 10 * UNIT, UNIT).close()
    Journal.open(path).close()
    with pytest.raises(AlreadyExists, match="unfinished job"):
        Journal.create(path, ABOUT, 10 * UNIT, UNIT)


@pytest.mark.parametrize("content", [b"", b"QFI\xfb" * 100000, bytes(BITS_AT + 2)])
def test_a_file_that_is_no_journal_is_not_to_be_deleted(path: str, content: bytes) -> None:
    Path(path).write_bytes(content)
    with pytest.raises(AlreadyExists, match=r"no journal.*another name") as refused:
        Journal.create(path, ABOUT, 10 * UNIT, UNIT)
    assert "delete" not in str(refused.value)
    with pytest.raises(ImageError, match="no journal") as refused_too:
        Journal.begin(path, ABOUT, 10 * UNIT, UNIT, resume=True)
    assert "delete" not in str(refused_too.value)
    assert Path(path).read_bytes() == content


def test_a_journal_that_was_being_made_is_refused(path: str) -> None:
    Path(path).write_bytes(bytes(BITS_AT + 2))
    with pytest.raises(ImageError, match="never complete"):
        Journal.open(path)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["finish", "begin", "end", "checkpoint", "crash"]), st.integers(0, 199), st.integers(1, 90)
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_against_a_model(tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int]]) -> None:
    """The target is ``synced`` where a part was copied after its last change; only such parts may be called done."""
    path = str(tmp_path_factory.mktemp("journal") / "j")
    count = 200
    journal = Journal.create(path, ABOUT, count * UNIT, UNIT)
    synced = [False] * count
    open_changes: list[tuple[tuple[int, int], range]] = []
    chooser = random.Random(1)
    for step, start, length in steps:
        parts = range(start, min(start + length, count))
        if step == "finish":
            for part in parts:
                synced[part] = not any(part in changed for _, changed in open_changes)
            journal.finished(parts.start * UNIT, len(parts) * UNIT)
        elif step == "begin":
            entry = journal.begin_change(parts.start * UNIT, len(parts) * UNIT)
            open_changes.append((entry, parts))
            for part in parts:
                synced[part] = False
        elif step == "end" and open_changes:
            journal.end_change(open_changes.pop(chooser.randrange(len(open_changes)))[0])
        elif step == "checkpoint":
            journal.checkpoint(nothing)
            assert [
                part for offset, size in journal.done() for part in range(offset // UNIT, (offset + size) // UNIT)
            ] == [part for part in range(count) if synced[part]]
        copy = f"{path}.copy"
        shutil.copyfile(path, copy)
        for offset, size in Journal.open(copy).done():
            assert all(synced[offset // UNIT : (offset + size) // UNIT])
    assert runs(journal) == runs(Journal.open(path))
