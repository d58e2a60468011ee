"""Shared by all jobs of the suite: figures, the sizes of a run, sample sessions."""

from __future__ import annotations

import math
import random
import statistics
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.operations import session_of

# Median, least and most of the rounds: three numbers, so that it goes through JSON as it is.
Figure = Sequence[float]
Results = dict[str, Any]

SIZE = 750


@dataclass(frozen=True)
class Plan:
    """
    The size of a run.

    Attributes:
        rounds: How often each peer is measured.
        seconds: How long a web application is under load at a time.
        visitors: Distinct sessions of the mixed workload.
        sizes: Payloads beside the usual 750 bytes.
        sessions: Sessions in each store of the micro benchmarks.
        growth: Numbers of sessions at which operations are measured.
        recovery: Numbers of sessions at which recovery is measured.
        memory: Sessions whose memory is measured.
        processes: Numbers of concurrent processes.
        turn: Seconds per operation and store in a round.
        prune: Expired sessions, and all sessions.
        trace: Requests in the traces for the quality of eviction.
    """

    rounds: int
    seconds: float
    visitors: int
    sizes: tuple[int, ...]
    sessions: int
    growth: tuple[int, ...]
    recovery: tuple[int, ...]
    memory: int
    processes: tuple[int, ...]
    turn: float
    prune: tuple[int, int]
    trace: int


FULL = Plan(
    rounds=5, seconds=0.6, visitors=10_000, sizes=(100, 4096, 65536), sessions=20_000,
    growth=(1_000, 10_000, 100_000, 1_000_000), recovery=(10_000, 100_000, 1_000_000), memory=200_000,
    processes=(1, 2, 4, 8), turn=0.02, prune=(100_000, 500_000), trace=60_000,
)  # fmt: skip
QUICK = Plan(
    rounds=3, seconds=0.1, visitors=500, sizes=(65536,), sessions=5_000, growth=(1_000, 100_000),
    recovery=(10_000,), memory=20_000, processes=(1, 8), turn=0.005, prune=(10_000, 50_000), trace=20_000,
)  # fmt: skip
SMALLEST = Plan(
    rounds=1, seconds=0.05, visitors=20, sizes=(), sessions=100, growth=(100, 500), recovery=(), memory=500,
    processes=(1, 2), turn=0.0005, prune=(50, 200), trace=2_000,
)  # fmt: skip


def figure(values: Iterable[float]) -> list[float]:
    """Return the median, the least and the most."""
    values = list(values)
    return [statistics.median(values), min(values), max(values)]


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the quantile ``share`` of sorted values."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else math.nan


def sample(size: int = SIZE, seed: int = 1) -> dict[str, Any]:
    """
    Return a session of about that many encoded bytes.

    What fills it up is random: a row of the same letter would be nothing in a signed cookie, which is compressed.
    """
    rnd = random.Random(seed)
    if size < SIZE:
        session: dict[str, Any] = {"_user_id": "4711", "_fresh": True, "history": ""}
        session["history"] = letters(rnd, max(0, size - 40))
    else:
        session = session_of(size)
        session["history"] = letters(rnd, len(session["history"]))
    return session


def letters(rnd: random.Random, count: int) -> str:
    return "".join(rnd.choices(string.ascii_letters + string.digits + "-_", k=count))


def zipf(count: int, rnd: random.Random, length: int, skew: float = 1.0) -> list[int]:
    """Return ``length`` draws out of ``count`` numbers, of which the first is the most popular."""
    cumulated, total = [], 0.0
    for rank in range(1, count + 1):
        total += rank**-skew
        cumulated.append(total)
    return rnd.choices(range(count), cum_weights=cumulated, k=length)
