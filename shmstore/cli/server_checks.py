"""What `doctor` checks of a store on a server of Redis or Valkey."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterator, Mapping
from statistics import median
from typing import TYPE_CHECKING, Final

from shmstore.cli.findings import BROKEN, NOTE, OK, Finding
from shmstore.cli.output import sessions
from shmstore.cli.target import Target
from shmstore.errors import ShmStoreError, StoreUnavailable
from shmstore.options import format_duration, format_size

if TYPE_CHECKING:
    from shmstore.redis import RedisStore

_OLDEST: Final = (6, 2)
_ROUND_TRIPS: Final = 20
_POLICIES: Final = {
    "noeviction": "a full server refuses writes",
    "volatile-ttl": "it evicts locks and tombstones first",
    "volatile-random": "it evicts sessions that are in use",
}


def check_server(target: Target[RedisStore]) -> Iterator[Finding]:
    """Yield what is found on the server, or on each primary of a Cluster, and of the store there."""
    store = target.store
    try:
        store.ping()
    except StoreUnavailable as exc:
        yield Finding("server", BROKEN, str(exc))
        return
    try:
        servers = store._link.info()
    except StoreUnavailable as exc:
        yield Finding("server", NOTE, str(exc), "nothing is known of its version, its memory and its persistence")
    else:
        for info in servers:
            yield _version(info, target.place)
            yield _memory(info)
            yield _persistence(info)
    yield _trial(store)
    try:
        yield Finding("store", OK, f"prefix {target.name}, {sessions(store.length())}")
    except StoreUnavailable as exc:
        yield Finding("store", BROKEN, str(exc))


def _version(info: Mapping[str, str], place: str) -> Finding:
    name = "Valkey" if "valkey_version" in info else "Redis"
    version = info.get("valkey_version") or info.get("redis_version", "")
    up = format_duration(float(info.get("uptime_in_seconds", 0)))
    text = f"{name} {version}, process {info.get('process_id', '?')}, for {up}: {place}"
    if info.get("role") == "slave":
        return Finding("server", BROKEN, f"{text}; a replica, which accepts no writes", "name its primary")
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < _OLDEST:
        return Finding("server", BROKEN, text, "use 6.2 or newer")
    return Finding("server", OK, text)


def _memory(info: Mapping[str, str]) -> Finding:
    used, limit = (int(info.get(name, 0)) for name in ("used_memory", "maxmemory"))
    policy = info.get("maxmemory_policy", "unknown")
    if not limit:
        advice = "set maxmemory, with maxmemory-policy volatile-lru: else sessions may take all memory of the machine"
        return Finding("memory", NOTE, f"{format_size(used)} used, no limit", advice)
    text = f"{format_size(used)} of {format_size(limit)} used, {policy}"
    why = "it may evict the indexes of owners" if policy.startswith("allkeys") else _POLICIES.get(policy)
    if why:
        return Finding("memory", NOTE, text, f"set maxmemory-policy to volatile-lru: {why}")
    return Finding("memory", OK, text)


def _persistence(info: Mapping[str, str]) -> Finding:
    about = "persistence"
    failed = [name for name in ("rdb_last_bgsave_status", "aof_last_write_status") if info.get(name, "ok") != "ok"]
    if failed:
        return Finding(about, NOTE, f"the last one failed ({', '.join(failed)})", "see the log of the server")
    if info.get("aof_enabled") == "1":
        return Finding(about, OK, "appendonly")
    return Finding(about, OK, "no appendonly: after a restart sessions and logouts since the last snapshot are lost")


def _trial(store: RedisStore) -> Finding:
    """Use a session of its own, as an application would, to find out what prevents it."""
    about = "trial"
    first, second = (f"doctor-{secrets.token_urlsafe(16)}" for _ in range(2))
    try:
        store.set(first, {"ill": False}, ttl=60, owner=first)
        done = (
            store.update(first, {"ill": None}, ttl=60)
            and store.rename(first, second)
            and store.touch(second, ttl=60)
            and store.get(second) == {"ill": None}
            and store.owned_by(first) == [second]
        )
        with store.lock(second):
            done = done and store.destroy(second) == 1
        store.stats()
    except ShmStoreError as exc:
        return Finding(about, BROKEN, str(exc))
    if not done:
        return Finding(about, BROKEN, "a session that was written could not be read")
    times = []
    for _ in range(_ROUND_TRIPS):
        begun = time.perf_counter()
        store.ping()
        times.append(time.perf_counter() - begun)
    return Finding(about, OK, f"works; a round trip takes {median(times) * 1000:.2f} ms")
