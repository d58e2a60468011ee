"""Every operation interrupted at every step, every reader overtaken at every step; and proof that this finds bugs."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import fault_injection as faults
import file_faults
import kill_at_every_step
import pytest
from fault_injection import (
    SITUATIONS,
    Interrupted,
    Relentless,
    Situation,
    Steps,
    body,
    content,
    interrupt,
    stepping,
)
from sampling import FULL, LONGEST, some

from shmstore.codec.ids import key_of
from shmstore.engine import header as at
from shmstore.engine.arena import Arena
from shmstore.engine.journal import Journal
from shmstore.engine.layout import CELL, JOURNAL, SLOT, ArenaDamaged
from shmstore.engine.table import Table
from shmstore.engine.verify import verify
from shmstore.errors import StoreTimeout
from shmstore.store.store import Store

Figure = Callable[[str], None]
every_situation = pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.name)


# In the short version, of a situation with more steps: a clear does the same for one session after another.
MOST = 8


def some_of(steps: int, seed: int | None) -> list[int]:
    """Return the steps to stop at: all, or MOST of them, chosen at random. Without a seed: all."""
    numbers = range(1, steps + 1)
    return [*numbers] if FULL or seed is None or steps <= MOST else sorted(random.Random(seed).sample(numbers, MOST))


def kill(seed: int, count: int, *names: str) -> str:
    """Run `kill_at_every_step`."""
    done = subprocess.run(
        [sys.executable, kill_at_every_step.__file__, str(seed), str(count), *names],
        capture_output=True, text=True, timeout=LONGEST,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.mark.timeout(1200)
@every_situation
def test_killed_at_every_step(situation: Situation, seed: int, figure: Figure) -> None:
    """In the short version, a kill is replayed: a copy of the memory at that step is used without the process."""
    if FULL:
        figure(kill(0, 0, situation.name))
        return
    before, after, steps = faults.outcome(situation)
    moments = faults.moments(situation)
    assert len(moments) == steps >= 3, "nothing was stepped"
    with situation.store() as like:
        last = None
        for step in some_of(steps, seed):
            if (moment := moments[step - 1]) is not last:
                last = moment
                with faults.restored(like, moment) as store:
                    try:
                        faults.check_outcome(store, before, after, atomic=situation.atomic)
                    except BaseException:
                        print(f"killed at step {step} of {steps}")
                        raise


@pytest.mark.timeout(1200)
def test_a_real_kill_leaves_the_replayed_memory(seed: int, figure: Figure) -> None:
    figure(kill(seed, 1))


def files_at_every_line(name: str, action: str, directory: Path, lines: str | int) -> str:
    done = subprocess.run(
        [sys.executable, file_faults.__file__, name, action, str(directory), str(lines)],
        capture_output=True, text=True, timeout=LONGEST,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) > 10, "nothing was stepped"
    return done.stdout.strip()


# Each situation at every line, in parts that run at the same time; in the short version, some at some lines.
LINES = ["1/4", "2/4", "3/4", "4/4"] if FULL else [""]
FILE_FAULTS = {f"{name} {lines}".rstrip(): (name, lines) for name in file_faults.SITUATIONS for lines in LINES}


@pytest.mark.timeout(1200)
@some("case", FILE_FAULTS, 2)
def test_killed_at_every_line_that_uses_files(
    case: tuple[str, str], store_dir: Path, seed: int, figure: Figure
) -> None:
    name, lines = case
    figure(files_at_every_line(name, "kill", store_dir, lines or seed))


@pytest.mark.timeout(1200)
@some("case", FILE_FAULTS, 2)
def test_an_exception_at_every_line_that_uses_files(
    case: tuple[str, str], store_dir: Path, seed: int, figure: Figure
) -> None:
    name, lines = case
    figure(files_at_every_line(name, "raise", store_dir, lines or seed))


@pytest.mark.parametrize("name", file_faults.STARTS)
def test_no_second_server_starts_at_any_line(name: str, store_dir: Path, seed: int, figure: Figure) -> None:
    figure(files_at_every_line(name, "second", store_dir, seed))


def interrupt_everywhere(situation: Situation, seed: int | None = None) -> None:
    before, after, steps = faults.outcome(situation)
    for chosen in some_of(steps, seed):
        with situation.store() as store:
            with stepping(store.arena, Steps(chosen, interrupt)), pytest.raises(Interrupted):
                situation.operation(store)
            faults.check_outcome(store, before, after, atomic=situation.atomic)


@every_situation
def test_an_exception_at_every_step(situation: Situation, seed: int) -> None:
    interrupt_everywhere(situation, seed)


def test_an_exception_at_every_step_of_the_plan_after_the_last_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Damage may leave the last number there. No plan has number 0, which means that no plan is pending."""
    store = Situation.store

    def last_number(situation: Situation) -> Store:
        made = store(situation)
        made.arena.cells[JOURNAL // CELL] = 2**64 - 1
        return made

    monkeypatch.setattr(Situation, "store", last_number)
    interrupt_everywhere(situation("destroy"))


def read_at_every_step(situation: Situation) -> None:
    """Stop the writer at each step and read everything: hits are whole, old or new; readers wait only for changes."""
    before, after, steps = faults.outcome(situation)
    touched = {sid for sid in before.keys() | after.keys() if before.get(sid) != after.get(sid)}
    with situation.store() as store, faults.second_view(store) as reader:

        def look() -> None:
            for sid in before.keys() | after.keys():
                key = key_of(sid.encode())
                try:
                    entry = reader.arena.reader.read(key, 0)
                except StoreTimeout:
                    assert sid in touched, f"{sid} cannot be read while another session changes"
                    continue
                if entry is None:
                    assert sid in touched, f"{sid} is missed while another session changes"
                    assert None in faults.possible(sid, before, after), f"{sid} is missed"
                    continue
                record = faults.record_of(entry)
                found = reader.codec.decode(record.payload), record.owner, entry[2]
                assert found in faults.possible(sid, before, after), f"{sid}: {found}"

        looks = Relentless(0, look)
        with stepping(store.arena, looks):
            situation.operation(store)
        assert looks.count == steps


@every_situation
def test_readers_while_a_writer_is_stopped_at_every_step(situation: Situation) -> None:
    read_at_every_step(situation)


def test_a_renamed_session_has_one_id_and_its_owner_at_every_step() -> None:
    rename = next(each for each in SITUATIONS if each.name == "rename with changes")
    before, after, _ = faults.outcome(rename)
    seen = set()
    with faults.populated() as store, faults.second_view(store) as reader:

        def look() -> None:
            found = {}
            for sid in ("a", "z"):
                try:
                    entry = reader.arena.reader.read(key_of(sid.encode()), 0)
                except StoreTimeout:  # readers wait until the step is over
                    seen.add("waiting")
                    return
                if entry is not None:
                    record = faults.record_of(entry)
                    found[sid] = (reader.codec.decode(record.payload), record.owner, entry[2])
            assert found in ({"a": before["a"]}, {"z": after["z"]})
            seen.update(found)

        with stepping(store.arena, Relentless(0, look)):
            rename.operation(store)
    assert seen >= {"a", "z"}


def recycle(store: Store) -> None:
    """Give the slot and the blocks of "a" to another session of the same shape."""
    store.destroy("a")
    store.set("other", body(600, "x"), ttl=60, owner="ada")


def rewrite(store: Store) -> None:
    store.set("a", body(600, "y"), ttl=60, owner="ada")
    store.set("b", body(600, "w"), ttl=60)


def overtaken_everywhere(change: Callable[[Store], None], allowed: list[Any], sid: str = "a") -> None:
    """Let a writer run between any two instructions of a reader: it must see the old or the new state."""
    chosen = 0
    while True:
        chosen += 1
        with faults.populated() as store, faults.second_view(store) as writer:
            steps = Steps(chosen, lambda writer=writer: change(writer), reads=True)  # type: ignore[misc]
            with stepping(store.arena, steps):
                # The reader's own use of the lock is not overtaken: see the test of the lock for that.
                found = store.arena.reader.read(key_of(sid.encode()), 1)
            if steps.count < chosen:
                assert chosen > 10, "nothing was stepped"
                return
            seen = None if found is None else store.codec.decode(faults.record_of(found).payload)
            assert seen in allowed, f"step {chosen}: {seen}"


def test_a_reader_whose_slot_and_blocks_are_reused_between_any_two_instructions() -> None:
    overtaken_everywhere(recycle, [body(600, "a"), None])


def test_a_reader_whose_session_is_rewritten_between_any_two_instructions() -> None:
    overtaken_everywhere(rewrite, [body(600, "a"), body(600, "y")])


@pytest.mark.parametrize("change", [recycle, rewrite, lambda store: store.destroy("a")])
def test_reading_a_removed_session_keeps_the_order_of_use(change: Callable[[Store], None]) -> None:
    for chosen in count(1):
        with faults.populated() as store, faults.second_view(store) as writer:

            def act(writer: Store = writer) -> None:
                with suppress(StoreTimeout):  # the reader holds the lock by now: a writer waits
                    change(writer)

            steps = Steps(chosen, act, reads=True)
            with stepping(store.arena, steps):
                store.get("a")
            verify(store.arena)
            if steps.count < chosen:
                break
    assert chosen > 20, "nothing was stepped"


def test_a_reader_of_a_scattered_session_that_is_rewritten() -> None:
    def change(store: Store) -> None:
        store.set("scattered", body(1900, "t"), ttl=60)
        store.set("more", body(1900, "u"), ttl=60)

    overtaken_everywhere(change, [body(2000, "s"), body(1900, "t")], "scattered")


def test_a_reader_whose_session_is_renamed_away_and_back() -> None:
    def change(store: Store) -> None:
        store.rename("a", "away")
        store.rename("away", "a", {"mark": "back"})

    overtaken_everywhere(change, [body(600, "a"), body(600, "a") | {"mark": "back"}])


@every_situation
def test_no_plan_stores_twice_into_a_cell_that_readers_use(
    situation: Situation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a plan that is applied again would show readers intermediate values."""
    commit = Journal.commit

    def checked(self: Journal, plan: list[int]) -> None:
        table = Table(self._file)
        fields = (table.key_low, table.key_high, table.record, table.expires, table.chain)
        looked_at = [
            cell
            for cell in plan[::2]
            if table.buckets <= cell < table.owners
            or any(cell in range(field, field + table.owned_list, SLOT) for field in fields)
        ]
        assert len(looked_at) == len(set(looked_at))
        commit(self, plan)

    monkeypatch.setattr(Journal, "commit", checked)
    faults.outcome(situation)
    with faults.populated() as store:
        for number in range(200):  # often in the same bucket
            store.rename("a" if number == 0 else f"a{number}", f"a{number + 1}")


# -- the harness finds bugs --------------------------------------------------------------------------------------------


def situation(name: str) -> Situation:
    return next(each for each in SITUATIONS if each.name == name)


def test_the_harness_finds_stores_in_the_wrong_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def commit(self: Journal, plan: list[int]) -> None:
        for cell, value in zip(plan[::2], plan[1::2], strict=True):  # applied before it is in the journal
            self._file.cells[cell] = value

    monkeypatch.setattr(Journal, "commit", commit)
    with pytest.raises(Exception, match=r"order of use|slot|block"):
        interrupt_everywhere(situation("create"))


@pytest.mark.parametrize("name", ["destroy with a tombstone", "rename with a tombstone", "destroy if empty"])
def test_the_harness_finds_a_tombstone_outside_the_plan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    add = Arena._add_tombstone

    def early(self: Arena, plan: list[int], *rest: Any) -> None:
        planned: list[int] = []
        add(self, planned, *rest)
        self.journal.apply(planned)

    monkeypatch.setattr(Arena, "_add_tombstone", early)
    with pytest.raises(AssertionError, match="gone "):
        interrupt_everywhere(situation(name))


def test_the_harness_finds_a_truncated_ring_of_an_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    leave = Arena._leave_owner

    def short(self: Arena, planned: Any, slot: int, leading: int, first: int) -> None:
        leave(self, planned, slot, leading, first)
        links = self.table.owner_links
        before = self.cells[links + slot] >> 32
        planned[links + before] = self.cells[links + before] & ~(2**32 - 1) | first

    monkeypatch.setattr(Arena, "_leave_owner", short)
    with pytest.raises(ArenaDamaged, match="the owner of"):
        interrupt_everywhere(situation("destroy one in the middle of a ring"))


def test_the_harness_finds_a_missing_version_bump(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = Journal.commit

    def unversioned(self: Journal, plan: list[int]) -> None:
        table = Table(self._file)
        versions = range(table.version, table.version + table.owned_list, SLOT)
        pairs = [pair for pair in zip(plan[::2], plan[1::2], strict=True) if pair[0] not in versions]
        commit(self, [number for pair in pairs for number in pair])

    monkeypatch.setattr(Journal, "commit", unversioned)
    with pytest.raises(AssertionError, match="b: "):
        read_at_every_step(situation("overwrite longer"))


def test_the_harness_finds_a_journal_cleared_by_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = Journal.commit

    def tidy(self: Journal, plan: list[int]) -> None:
        try:
            commit(self, plan)
        except BaseException:
            self._file.cells[at.PENDING] = 0
            raise

    monkeypatch.setattr(Journal, "commit", tidy)
    with pytest.raises(Exception, match=r"order of use|slot|block|changing"):
        interrupt_everywhere(situation("destroy"))
    assert content(faults.populated()), "the harness itself still works"
