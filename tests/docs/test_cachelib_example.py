"""The example of a cache: what cachelib's own tests ask of one, and what is particular to a store."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from browsing import Clock
from processes import ROOT

from shmstore import SerializationError, Store

PAIRS = {
    "128": False, "beef": True, "crevettes": {}, "1024": "spam", "sausage": 2048, "3072": [],
    "lobster": ["baked beans", [512]], "4096": {"sauce": [], 256: "truffle"}, "": None, "x" * 1000: b"\0",
    "\u00e4" * 60: 1,
}  # fmt: skip


@pytest.fixture
def cache(clock: Clock) -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location("cachelib_example", Path(ROOT, "examples", "cachelib_cache.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with Store(memory=2**20, clock=clock) as store:
        yield module.StoreCache(store)


def test_what_is_put_in_comes_out(cache: Any) -> None:
    assert cache.set_many(PAIRS) == [*PAIRS]
    assert cache.get_dict(*PAIRS) == PAIRS
    assert not any(cache.add(key, "other") for key in PAIRS)
    assert all(cache.has(key) for key in PAIRS)
    assert cache.get("unknown") is None
    assert not cache.has("unknown")
    assert cache.delete("beef")
    assert not cache.delete("unknown")
    assert cache.get("beef") is None
    assert cache.clear()
    assert not any(map(cache.has, PAIRS))


def test_an_entry_lives_for_its_timeout(cache: Any, clock: Clock) -> None:
    cache.set("never", 1, timeout=0)
    cache.set("short", 1, timeout=10)
    cache.set("default", 1)
    clock.tick(11)
    assert cache.get_dict("never", "short", "default") == {"never": 1, "short": None, "default": 1}
    assert cache.add("short", 2)
    clock.tick(300)
    assert cache.get_dict("never", "default") == {"never": 1, "default": None}


def test_threads_that_count_lose_nothing(cache: Any) -> None:
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: [cache.inc("hits"), cache.dec("left", 2)], range(100)))
    assert (cache.get("hits"), cache.get("left")) == (100, -200)


def test_a_value_that_cannot_be_stored_is_refused(cache: Any) -> None:
    with pytest.raises(SerializationError, match="value"):
        cache.set("a", object())
