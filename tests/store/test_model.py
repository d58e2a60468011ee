"""The store against a plain model and against cachetools: random operations, with a full comparison after each."""

from __future__ import annotations

import dataclasses
import math
import os
import random
import threading
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import cachetools
import fault_injection as faults
import hypothesis.strategies as some
import pytest
from engines import on_each_engine
from fault_injection import Clock
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from shmstore import KEEP, RecordTooLarge, Store
from shmstore.codec.body import pack
from shmstore.codec.ids import key_of
from shmstore.engine.frame import OVERHEAD
from shmstore.engine.header import NEVER
from shmstore.engine.layout import CELL
from shmstore.engine.verify import verify

pytestmark = on_each_engine

OPERATIONS = int(os.environ.get("SHMSTORE_MODEL_OPERATIONS", "1500"))
STEPS = 50  # in one run of the state machine

DAY = 86_400
NS = 10**9

Data = dict[str, Any]

REASONS = {"expired": "expire", "destroyed": "destroy", "evicted": "evict", "displaced": "evict", "cleared": "clear"}


@dataclasses.dataclass
class Session:
    """What the model keeps; ``end`` is the first instant at which it is expired, ``blocks`` what the store took."""

    data: Data
    owner: str | None
    end: int
    blocks: int = 0


def end_of(now: int, ttl: Any) -> int:
    """Return the end of a ttl that starts now."""
    life = ttl.total_seconds() if isinstance(ttl, timedelta) else ttl
    return NEVER if life == math.inf else now + int(life * NS) + 1 if life > 0 else 0


def blocks_of(store: Store, sid: str) -> int:
    """Return the number of blocks that a session takes."""
    arena = store.arena
    return arena._last_run(arena.cells[arena.table.record + arena.find(key_of(sid.encode()))])[1]


class Model:
    """
    The expected behaviour of a store, in plain Python.

    Attributes:
        sessions: By id, the least recently used first.
        count: What `Stats` counts.
        most: The option ``max``.
        disposals: The calls of ``dispose`` that are due.
    """

    def __init__(self, store: Store, clock: Clock) -> None:
        self.clock = clock
        self.codec = store.codec
        self.taken: Callable[[str], int] = lambda sid: blocks_of(store, sid)
        self.geometry = store.arena.geometry
        self.limit = store.options.session_limit
        self.ttl: Any = store.options.ttl
        self.most = store.options.max
        self.most_per_owner = store.options.max_per_owner
        self.length = store.options.length or (lambda size, sid: 1)
        self.announces_set = not store.options.no_dispose_on_set
        self.sessions: dict[str, Session] = {}
        self.count: Counter[str] = Counter()
        self.disposals: list[tuple[str, Data, str]] = []

    def expired(self, sid: str) -> bool:
        return self.sessions[sid].end <= self.clock.now

    def live(self, sid: str) -> Session | None:
        return self.sessions[sid] if sid in self.sessions and not self.expired(sid) else None

    def recent(self) -> list[str]:
        return list(reversed(self.sessions))

    def length_of(self, sid: str, session: Session) -> int:
        return OVERHEAD + len(pack(sid, session.owner, self.codec.name, self.codec.encode(session.data)))

    def blocks(self, sid: str, session: Session) -> int:
        """Return the number of blocks of a session that was just written: at least what it needs, and few more."""
        blocks = self.taken(sid)
        length, each, shortest = self.length_of(sid, session), self.geometry.block_size, self.geometry.shortest
        assert length + CELL <= blocks * each
        assert self.geometry.holds(blocks) < length + 2 * shortest * each
        return blocks

    def weight(self, sid: str, session: Session) -> int:
        return self.length(len(self.codec.encode(session.data)), sid)

    def too_large(self, data: Data) -> bool:
        return len(self.codec.encode(data)) > self.limit

    def too_heavy(self, sid: str, data: Data) -> bool:
        return self.most is not None and self.weight(sid, Session(data, None, 0)) > self.most

    def life(self, data: Data) -> Any:
        """Return the ttl of a session by the rule."""
        if self.ttl is not None:
            return self.ttl
        age = data.get("cookie", {}).get("max_age")
        return DAY if age is None else age

    def use(self, sid: str) -> None:
        self.sessions[sid] = self.sessions.pop(sid)

    def drop(self, sid: str, reason: str) -> None:
        if self.expired(sid) and reason != "cleared":
            reason = "expired"
        self.count[reason] += 1
        self.disposals.append((sid, self.sessions[sid].data, REASONS[reason]))
        del self.sessions[sid]

    def overwrite(self, sid: str) -> None:
        """Record that a session is about to be overwritten."""
        if self.live(sid) and self.announces_set:
            self.disposals.append((sid, self.sessions[sid].data, "set"))

    def put(self, sid: str, session: Session, there: set[str], old: str | None = None, count: str = "sets") -> None:
        """
        Store a session as the most recently used, after evicting what the store evicted.

        Args:
            sid: The id of the session.
            session: The session to store.
            there: The ids in the store after the same operation.
            old: The previous id, if it changes.
            count: The counter to increment.
        """
        if sid in self.sessions and self.expired(sid):
            self.drop(sid, "expired")
        keep = sid if old is None else old
        gone = self.sessions.keys() - there - {keep}
        gone -= self.evict_owned(gone, keep, session.owner)
        before = dict(self.sessions)

        def fits(gone: set[str]) -> bool:
            left = {each: kept for each, kept in before.items() if each not in gone}
            return self.fits(left, keep, sid, session)

        lasts = self.evict(gone, keep)
        assert fits(gone), "too few were evicted"
        assert not gone or any(not fits(gone - {last}) for last in lasts), f"{gone} went idly"
        self.sessions.pop(keep, None)
        self.sessions[sid] = session
        session.blocks = self.blocks(sid, session)
        self.count[count] += 1

    def evict_owned(self, gone: set[str], keep: str, owner: str | None) -> set[str]:
        """Forget and return the sessions that are evicted because a write gives an owner too many sessions."""
        if (
            owner is None
            or self.most_per_owner is None
            or (keep in self.sessions and self.sessions[keep].owner == owner)
        ):
            return set()
        theirs = [sid for sid in self.recent() if sid != keep and self.live(sid) and self.sessions[sid].owner == owner]
        victims = theirs[self.most_per_owner - 1 :]
        assert gone.issuperset(victims), f"{owner} has too many sessions"
        for sid in victims:
            self.drop(sid, "displaced")
        return set(victims)

    def evict(self, gone: set[str], keep: str = "") -> list[str]:
        """
        Forget the victims, if no other session had to be evicted first; return which of them can have been the last.

        All slots are within one look of the store's hand: it takes any expired session, but none alive before it.
        """
        expired = {sid for sid in self.sessions if sid != keep and self.expired(sid)}
        alive = (sid for sid in self.sessions if sid != keep and sid not in expired)
        order = sorted(alive, key=lambda sid: bool(self.sessions[sid].owner))
        live = [sid for sid in order if sid in gone]
        if live:
            first = expired.union(order[: order.index(live[-1])])
            assert first <= gone, f"{live[-1]} was evicted, not {first - gone}"
        for sid in gone:
            if sid in live and self.sessions[sid].owner:
                self.count["evicted_owned"] += 1
            self.drop(sid, "evicted")
        return [*(expired & gone), *live[-1:]]

    def fits(self, left: dict[str, Session], keep: str, sid: str, session: Session) -> bool:
        """Return whether a session fits beside the remaining ones, with its old record but without its old weight."""
        others = {each: other for each, other in left.items() if each != keep}
        if len(others) >= self.geometry.slots or self.length_of(sid, session) > self.geometry.holds(
            self.geometry.blocks - sum(other.blocks for other in left.values())
        ):
            return False
        return self.most is None or self.weigh(others) + self.weight(sid, session) <= self.most

    def weigh(self, sessions: dict[str, Session]) -> int:
        return sum(self.weight(sid, session) for sid, session in sessions.items())

    def stats(self) -> dict[str, int]:
        names = (
            "hits",
            "misses",
            "sets",
            "touches",
            "destroyed",
            "expired",
            "evicted",
            "evicted_owned",
            "displaced",
            "cleared",
        )
        blocks = sum(session.blocks for session in self.sessions.values())
        taken = max(blocks / self.geometry.blocks, len(self.sessions) / self.geometry.slots)
        return {name: self.count[name] for name in names} | {
            "gets": self.count["hits"] + self.count["misses"],
            "sessions": len(self.sessions),
            "owned": sum(session.owner is not None for session in self.sessions.values()),
            "bytes": round(taken * self.geometry.size),
        }


IDS = [f"id {number}" for number in range(12)]
ids = some.sampled_from(IDS)
numbers = some.integers(0, len(IDS) - 1)
owners = some.sampled_from([None, None, "ada", "bob"])
new_owners = some.sampled_from([KEEP, KEEP, KEEP, None, "ada", "bob"])
new_sizes = some.sampled_from([None, *range(10)])
lives = some.sampled_from([None, None, 3600, 3600, math.inf, timedelta(days=3), 0, -1, 1, 2.5, timedelta(seconds=3)])
cookies = some.sampled_from([None, None, None, {"max_age": 0}, {"max_age": 2}, {"max_age": None}])
touches: some.SearchStrategy[Data | None] = some.sampled_from(
    [None, None, {"a": 1}, {"cookie": {}}, {"cookie": {"max_age": 0}}, {"cookie": {"max_age": 2}}]
)


class StoreMachine(RuleBasedStateMachine):
    """Apply every operation to a store and to its model."""

    operations = 0
    most: int | None = 6
    sizes: tuple[int, ...] = (0, 100)
    length: Callable[[int, str], int] | None = None

    @initialize(
        ttl=some.sampled_from([None, None, 2, timedelta(seconds=60), math.inf]), stale=some.booleans(),
        per_owner=some.sampled_from([None, None, 1, 2]), disposes=some.booleans(), on_set=some.booleans(),
    )  # fmt: skip
    def begin(self, ttl: Any, stale: bool, per_owner: int | None, disposes: bool, on_set: bool) -> None:
        self.clock = Clock()
        self.disposals: list[tuple[str, Data, str]] = []
        self.store = Store(
            memory=2**16, max=self.most, ttl=ttl, clock=self.clock, recency=0, check_period=None, lock_timeout=60,
            stale=stale, max_per_owner=per_owner, length=type(self).length, no_dispose_on_set=not on_set,
            dispose=(lambda *call: self.disposals.append(call)) if disposes else None,
        )  # fmt: skip
        self.model = Model(self.store, self.clock)
        self.number = 0
        self.fill(0, 3600)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()

    def pick(self, number: int) -> str:
        """Return the id of a stored session; for 0, of any."""
        there = self.model.recent()
        return there[number % len(there)] if there and number else IDS[0]

    def data(self, size: int, cookie: Data | None) -> Data:
        """Return a unique session."""
        self.number += 1
        made = {"number": self.number, "data": "d" * self.sizes[size % len(self.sizes)]}
        return made if cookie is None else made | {"cookie": cookie}

    def put(self, sid: str, session: Session, old: str | None = None, count: str = "sets") -> None:
        self.model.put(sid, session, set(self.store.ids()), old, count)

    def refused(self, sid: str) -> None:
        """A refused write may remove an expired session, or leave it."""
        if sid in self.model.sessions and sid not in self.store.ids():
            assert self.model.expired(sid)
            self.model.drop(sid, "expired")

    @rule(first=numbers, ttl=some.sampled_from([3600, 10 * DAY]))
    def fill(self, first: int, ttl: Any) -> None:
        """Add live sessions: most of what the other rules do needs one."""
        for number in range(6):
            self.write("set", IDS[(first + number) % len(IDS)], number, None, ttl, ("ada", None, "bob")[number % 3])

    @rule(how=some.sampled_from(["set", "set", "set", "add", "replace"]), sid=ids, size=some.integers(0, 9),
          cookie=cookies, ttl=lives, owner=owners)  # fmt: skip
    def write(self, how: str, sid: str, size: int, cookie: Data | None, ttl: Any, owner: str | None) -> None:
        data = self.data(size, cookie)
        call = getattr(self.store, how)
        if self.model.too_large(data):
            with pytest.raises(RecordTooLarge):
                call(sid, data, ttl, owner)
            return
        there = self.model.live(sid) is not None
        if {"set": True, "add": not there, "replace": there}[how]:
            if self.model.too_heavy(sid, data):
                with pytest.raises(RecordTooLarge):
                    call(sid, data, ttl, owner)
                self.refused(sid)
                return
            self.model.overwrite(sid)
        written = call(sid, data, ttl, owner)
        assert written is {"set": None, "add": not there, "replace": there}[how]
        if written is False:
            self.refused(sid)
        else:
            life = self.model.life(data) if ttl is None else ttl
            self.put(sid, Session(data, owner, end_of(self.clock.now, life)))

    @rule(number=numbers, size=new_sizes, delete=some.booleans(), ttl=lives, owner=new_owners)
    def update(self, number: int, size: int | None, delete: bool, ttl: Any, owner: Any) -> None:
        self.change(self.pick(number), None, size, delete, ttl, owner)

    @rule(number=numbers, new=ids, size=new_sizes, delete=some.booleans(), ttl=lives, owner=new_owners)
    def rename(self, number: int, new: str, size: int | None, delete: bool, ttl: Any, owner: Any) -> None:
        self.change(self.pick(number), new, size, delete, ttl, owner)

    def change(self, sid: str, new: str | None, size: int | None, delete: bool, ttl: Any, owner: Any) -> None:
        """Update, or rename if there is a new id."""
        model = self.model
        changes = {} if size is None else self.data(size, None)
        keys = ["data", "missing"] if delete else []
        arguments = (changes, keys, ttl, owner)
        old = model.live(sid)
        possible = old is not None and (new is None or model.live(new) is None)
        if old is not None and new != sid:
            data = {key: value for key, value in old.data.items() if key not in keys or key in changes} | changes
            if model.too_large(data) or (possible and model.too_heavy(new or sid, data)):
                with pytest.raises(RecordTooLarge):
                    self.store.update(sid, *arguments) if new is None else self.store.rename(sid, new, *arguments)
                self.refused(new or sid)
                return
        done = self.store.update(sid, *arguments) if new is None else self.store.rename(sid, new, *arguments)
        assert done is possible
        if old is not None and possible:
            end = old.end if ttl is None else end_of(self.clock.now, ttl)
            session = Session(data, old.owner if owner is KEEP else owner, end)
            self.put(sid if new is None else new, session, sid)
        else:
            self.refused(sid)
            self.refused(new or sid)

    @rule(number=numbers, session=touches, ttl=lives)
    def touch(self, number: int, session: Data | None, ttl: Any) -> None:
        sid, model = self.pick(number), self.model
        old = model.live(sid)
        data = old.data | session if old is not None and session is not None and "cookie" in session else None
        if data is not None and (model.too_large(data) or model.too_heavy(sid, data)):
            with pytest.raises(RecordTooLarge):
                self.store.touch(sid, session, ttl)
            return
        assert self.store.touch(sid, session, ttl) is (old is not None)
        if old is None:
            self.refused(sid)
            return
        life = model.life(old.data if session is None else session) if ttl is None else ttl
        end = end_of(self.clock.now, life)
        if data is not None:
            self.put(sid, Session(data, old.owner, end), count="touches")
        else:
            old.end = end
            model.use(sid)
            model.count["touches"] += 1

    @rule(number=numbers)
    def get(self, number: int) -> None:
        sid = self.pick(number)
        session = self.model.live(sid)
        stale = self.model.sessions.get(sid) if self.store.options.stale else None
        found = session or stale
        assert self.store.get(sid) == (found and found.data)
        self.model.count["misses" if session is None else "hits"] += 1
        if session is not None:
            self.model.use(sid)
        elif stale is not None:
            self.model.drop(sid, "expired")

    @rule(sid=ids)
    def peek(self, sid: str) -> None:
        session = self.model.live(sid)
        assert self.store.peek(sid) == (session and session.data)
        assert (sid in self.store) is (session is not None)

    @rule(sids=some.lists(ids, min_size=1, max_size=3))
    def destroy(self, sids: list[str]) -> None:
        live = {sid for sid in sids if self.model.live(sid) is not None}
        assert self.store.destroy(sids if len(sids) > 1 else sids[0]) == len(live)
        for sid in self.model.sessions.keys() & set(sids):
            self.model.drop(sid, "destroyed")

    @rule(owner=some.sampled_from(["ada", "bob", "nobody"]), keep=some.lists(ids, max_size=2))
    def destroy_owned(self, owner: str, keep: list[str]) -> None:
        sessions = self.model.sessions
        theirs = [sid for sid in sessions if sessions[sid].owner == owner and sid not in keep]
        assert self.store.destroy_owned(owner, keep) == sum(not self.model.expired(sid) for sid in theirs)
        for sid in theirs:
            self.model.drop(sid, "destroyed")

    def owned_by(self, owner: str) -> list[str]:
        sessions = self.model.sessions
        return [sid for sid in self.model.recent() if sessions[sid].owner == owner and not self.model.expired(sid)]

    @rule(span=some.sampled_from([1, NS, 2 * NS + 1, 3600 * NS, 2 * DAY * NS]))
    def wait(self, span: int) -> None:
        self.clock.now += span

    @rule(sure=some.integers(0, 3))
    def prune_or_clear(self, sure: int) -> None:
        model = self.model
        going = [sid for sid in model.sessions if sure == 3 or model.expired(sid)]
        if sure == 3:  # seldom: what has grown is worth more
            self.store.clear()
        else:
            assert self.store.prune() == len(going)
        for sid in going:
            model.drop(sid, "cleared" if sure == 3 else "expired")

    @rule(most=some.sampled_from([1, 3, 6, None]))
    def limit(self, most: int | None) -> None:
        """Change ``max`` while the store is in use; what is beyond it may go at once."""
        self.model.most = most
        self.store.change_options(dataclasses.replace(self.store.options, max=most))
        for thread in threading.enumerate():
            if thread.name == "shmstore-shrink":
                thread.join()
        gone = self.model.sessions.keys() - set(self.store.ids())
        before = dict(self.model.sessions)
        lasts = self.model.evict(gone)
        assert self.model.weigh(self.model.sessions) <= (most or math.inf), "too few were evicted"
        if gone:
            left = [{sid: before[sid] for sid in before.keys() - (gone - {last})} for last in lasts]
            assert any(self.model.weigh(each) > (most or math.inf) for each in left), f"{gone} went idly"

    @invariant()
    def is_like_the_model(self) -> None:
        model, store = self.model, self.store
        expected = {sid: (each.data, each.owner, each.end) for sid, each in model.sessions.items()}
        assert faults.content(store) == expected
        assert store.ids() == model.recent()
        live = [sid for sid in model.recent() if not model.expired(sid)]
        assert list(store.all().items()) == [(sid, model.sessions[sid].data) for sid in live]
        assert (store.length(), store.length(live=True)) == (len(model.sessions), len(live))
        for owner in ("ada", "bob"):
            assert store.owned_by(owner) == self.owned_by(owner)
        stats, counted = dataclasses.asdict(store.stats()), model.stats()
        assert {name: stats[name] for name in counted} == counted
        due, model.disposals = model.disposals, []
        done, self.disposals = self.disposals, []
        assert store.options.dispose is None or sorted(map(repr, done)) == sorted(map(repr, due))
        verify(store.arena)
        type(self).operations += 1


class LimitedByMax(StoreMachine):
    pass


class LimitedByMemory(StoreMachine):
    """At 64 KiB four or five of the larger sessions fit; the largest is refused."""

    most = None
    sizes = (0, 60, 300, 3000, 7000, 14_000, 20_000)


class LimitedByWeight(StoreMachine):
    """Sessions weigh one to four, so each change may need room, and the heaviest session may be refused."""

    sizes = (0, 100, 200, 300)

    @staticmethod
    def length(size: int, sid: str) -> int:
        return 1 + size // 100


MACHINES = [LimitedByMax, LimitedByMemory, LimitedByWeight]


@pytest.mark.parametrize("machine", MACHINES)
def test_a_store_behaves_like_the_model(machine: type[StoreMachine], figure: Callable[[str], None]) -> None:
    machine.operations = 0
    while machine.operations < OPERATIONS // len(MACHINES):
        rest = OPERATIONS // len(MACHINES) - machine.operations
        bounds = settings(
            max_examples=min(-(-rest // STEPS), 200), stateful_step_count=STEPS, deadline=None, print_blob=True,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        run_state_machine_as_test(machine, settings=bounds)
    figure(f"{machine.operations} operations")


def test_lru_and_ttl_equal_those_of_cachetools(seed: int, figure: Callable[[str], None]) -> None:
    rnd = random.Random(seed)
    clock = Clock()
    most = 20

    def end(_: str, value: tuple[int, int], now: float) -> float:
        return now + value[1] * NS + 1  # at exactly its age a session is alive

    other: cachetools.TLRUCache[str, tuple[int, int]] = cachetools.TLRUCache(most, ttu=end, timer=clock)
    with Store(memory=2**18, max=most, clock=clock, recency=0, check_period=None) as store:
        for number in range(OPERATIONS):
            sid = str(int(rnd.gauss(0, 20)))
            kind = rnd.choices(["set", "get", "peek", "destroy", "wait"], [6, 8, 2, 1, 3])[0]
            if kind == "set":
                ttl = rnd.choice([1, 5, 60, 3600])
                store.prune()  # cachetools does at each write
                store.set(sid, {"value": (number, ttl)}, ttl)
                other[sid] = number, ttl
            elif kind == "get":
                found = store.get(sid)
                assert (found and found["value"]) == other.get(sid)
            elif kind == "peek":
                assert (sid in store) is (sid in other)
            elif kind == "destroy":
                assert store.destroy(sid) == (other.pop(sid, None) is not None)
            else:
                clock.now += rnd.choice([1, NS, 5 * NS, 60 * NS])
            assert store.all().keys() == set(other)
        verify(store.arena)
    figure(f"{OPERATIONS} operations")
