"""The quality of eviction: hit ratios on traces, beside exact LRU and Redis' allkeys-lru, for the same sessions."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

from cachetools import LRUCache

from benchmarks import adapters, figures, peers
from benchmarks.figures import Plan, Results
from benchmarks.operations import identity
from benchmarks.peers import Missing, workplace
from shmstore import Store

# A trace: the number of each visitor, and whether that visitor is logged in.
Trace = list[tuple[int, bool]]
BODY = b"x" * 700
SKEW = 0.9


def traces(length: int, users: int) -> dict[str, Trace]:
    """Return the traces, the same at each call."""
    rnd = random.Random(20)
    plain = [(who, True) for who in figures.zipf(users, rnd, length, SKEW)]
    strangers = iter(range(users, 10**9))
    scan: Trace = []  # in each tenth of the trace, a crawler that sends no cookie
    for at, visit in enumerate(plain):
        if at % (length // 10) == length // 20:
            scan += [(next(strangers), False) for _ in range(users // 5)]
        scan.append(visit)
    flood: Trace = []  # in the middle third, three strangers to each user
    for at, visit in enumerate(plain):
        if length // 3 < at < 2 * length // 3:
            flood += [(next(strangers), False) for _ in range(3)]
        flood.append(visit)
    return {"Zipf": plain, "scan": scan, "flood": flood}


def hit_ratio(trace: Trace, get: Callable[[int], object], put: Callable[[int, bool], object]) -> float:
    """Return the share of the users' visits that find their session; after a miss a session is created."""
    hits = visits = 0
    for who, owned in trace:
        found = get(who)
        if found is None:
            put(who, owned)
        if owned:
            visits += 1
            hits += found is not None
    return hits / visits


def ours(trace: Trace, budget: int, *, owners: bool) -> float:
    """Return the hit ratio of a store; ``owners``: whether the store knows which visitors are logged in."""
    session = {"history": BODY}
    with Store(max=budget, memory=budget * 2500 + 2**20, check_period=None, recency=0) as store:

        def put(who: int, owned: bool) -> None:
            store.set(identity(who), session, adapters.DAY, str(who) if owners and owned else None)

        return hit_ratio(trace, lambda who: store.get(identity(who)), put)


def exact(trace: Trace, budget: int) -> float:
    cache: LRUCache[int, bool] = LRUCache(budget)

    def put(who: int, owned: bool) -> None:
        cache[who] = True

    return hit_ratio(trace, cache.get, put)


def redis(trace: Trace, budget: int, address: str) -> float:
    """Return Redis' hit ratio with the memory that ``budget`` sessions take in it."""
    import redis as package

    client: Any = package.Redis(unix_socket_path=address)
    client.config_set("maxmemory", 0)
    client.flushall()
    for number in range(budget):
        client.set(identity(10**10 + number), BODY, ex=adapters.DAY)
    client.config_set("maxmemory-policy", "allkeys-lru")
    # The filler stays until it is evicted first: a small empty server has nothing to evict, and refuses to write.
    client.config_set("maxmemory", client.info("memory")["used_memory"])
    return hit_ratio(
        trace, lambda who: client.get(identity(who)), lambda who, _: client.set(identity(who), BODY, ex=86400)
    )


def run(plan: Plan, kinds: Iterable[str] = ("ours", "exact", "redis")) -> Results:
    """Return hit ratios of the users' visits by trace and kind, and what is missing."""
    users = plan.trace // 10
    budget = users // 10
    results: Results = {"requests": plan.trace, "users": users, "budget": budget, "traces": {}, "missing": {}}
    with workplace() as place, ExitStack() as stack:
        address = ""
        if "redis" in kinds:
            try:
                address = stack.enter_context(peers.redis_server(place)).address
            except Missing as exc:
                results["missing"]["Redis, allkeys-lru"] = str(exc)
        for name, trace in traces(plan.trace, users).items():
            row = {
                "shmstore": ours(trace, budget, owners=True),
                "shmstore, without owners": ours(trace, budget, owners=False),
                "exact LRU": exact(trace, budget),
            }
            if address:
                row["Redis, allkeys-lru"] = redis(trace, budget, address)
            results["traces"][name] = row
    return results
