"""The cost of each operation of each store in one process. The stores take turns within each round."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

from benchmarks import adapters, figures
from benchmarks.adapters import Adapter
from benchmarks.figures import Plan, Results
from benchmarks.peers import Missing, workplace

# "again": used within the last second, so that the order of use is left as it is; "get": mostly longer ago.
OPERATIONS = ("get raw", "get", "get, again", "set raw", "set", "update", "touch", "destroy", "create at capacity")
Call = Callable[[int], object]


def run(plan: Plan, kinds: list[str] | None = None) -> Results:
    """Return microseconds by operation and store, and what is missing."""
    with workplace() as place, adapters.addresses(place, plan.sessions, kinds or [*adapters.KINDS]) as (found, missing):
        stores: dict[str, Adapter] = {kind: adapters.KINDS[kind](address) for kind, address in found.items()}
        for store in stores.values():
            verify(store)
            for number in range(plan.sessions):
                store.set(number)
                if isinstance(store, adapters.Stock):
                    store.set_raw(number)
        table = {
            operation: measure(stores, operation, plan) for operation in OPERATIONS if operation != "create at capacity"
        }
        table["create at capacity"] = at_capacity(stores, plan)
    return {"operations": table, "missing": missing}


def verify(store: Adapter) -> None:
    """Raise if a store does not do what is measured; a wrong answer may be fast."""
    store.set(0)
    assert store.get(0) == store.session, store
    operations = store.operations()
    if "update" in operations:
        operations["update"](0)
        assert store.get(0) == store.session | adapters.CHANGE, store
    if "set raw" in operations:
        operations["set raw"](1)
        raw: Any = operations["get raw"](1)
        assert store.body in (raw if isinstance(raw, bytes) else bytes(raw[-1])), store
        store.set(1)
    if "touch" in operations:
        assert operations["touch"](0), store
    operations["destroy"](0)
    assert store.get(0) is None, store


def measure(stores: dict[str, Adapter], operation: str, plan: Plan) -> dict[str, list[float]]:
    calls = {kind: store.operations()[operation] for kind, store in stores.items() if operation in store.operations()}
    before: dict[str, Call] = {}
    if operation in ("destroy", "get, again"):
        before = {kind: store.set if operation == "destroy" else store.get for kind, store in stores.items()}
    return in_turns(calls, plan, before)


def in_turns(calls: dict[str, Call], plan: Plan, before: dict[str, Call], first: int | None = None) -> dict[str, Any]:
    """
    Return microseconds of each call: median, least and most of the rounds.

    Args:
        calls: The call to measure, by store.
        plan: The size of the run.
        before: Called first, untimed, with each number that a round will use.
        first: The first of ascending numbers; None: random numbers of stored sessions.
    """
    rnd = random.Random(1)
    taken: dict[str, list[float]] = {kind: [] for kind in calls}
    many: dict[str, int] = {}
    fresh = iter(range(first or 0, 10**12))
    for round_ in range(-1, plan.rounds):  # one to warm up, which also tells how many calls fill a turn
        for kind, call in calls.items():
            count = many.get(kind, 10)
            numbers = [rnd.randrange(plan.sessions) if first is None else next(fresh) for _ in range(count)]
            if kind in before:
                numbers = list(dict.fromkeys(numbers))
                for number in numbers:
                    before[kind](number)
            begin = time.perf_counter()
            for number in numbers:
                call(number)
            each = (time.perf_counter() - begin) / len(numbers)
            if round_ < 0:
                many[kind] = max(5, min(5000, int(plan.turn / each)))
            else:
                taken[kind].append(each * 1e6)
    return {kind: figures.figure(times) for kind, times in taken.items()}


def at_capacity(stores: dict[str, Adapter], plan: Plan) -> dict[str, Any]:
    first, calls = plan.sessions, dict[str, Call]()
    for kind, store in stores.items():
        try:
            first = max(first, store.fill_up(first))
            calls[kind] = store.set
        except Missing:
            pass
    return in_turns(calls, plan, {}, first)
