"""Requests of one browser that overlap, under real Gunicorns with all kinds of workers."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from gunicorns import StartGunicorn
from load import some_worker_class
from overlap import APP as APP
from overlap import LATE, Browser
from processes import alive, wait_for

from shmstore import connect
from shmstore.contract import AnyStore

CLIENTS = 8
REQUESTS = 500 if os.environ.get("SHMSTORE_FULL") == "1" else 15  # of each client


@pytest.fixture
def browser(gunicorn: StartGunicorn, arguments: tuple[str, ...]) -> Browser:
    browser = Browser(gunicorn(*arguments).booted())
    browser.get("/put/start/0")
    return browser


@contextmanager
def store_of(browser: Browser) -> Iterator[AnyStore]:
    with connect("shop", directory=browser.gunicorn.store_dir) as store:
        yield store


def measured(work: Callable[[], Any]) -> str:
    begun = time.monotonic()
    work()
    return f"{CLIENTS * REQUESTS / (time.monotonic() - begun):.0f} requests a second"


@some_worker_class
def test_no_change_is_lost(browser: Browser, figure: Callable[[str], None]) -> None:
    """Each tab has a key of its own; an old value of it that another tab writes back is also detected."""
    tabs = [[f"/add/{tab}/{n}" for n in range(REQUESTS)] for tab in range(CLIENTS)]
    speed = measured(lambda: browser.tabs(tabs))
    found = browser.get("/look")
    whole = {str(tab): list(range(REQUESTS)) for tab in range(CLIENTS)}
    there = sum(len({*values} & {*found.get(tab, ())}) for tab, values in whole.items())
    figure(f"{there} of {CLIENTS * REQUESTS} changes, {speed}")
    assert found == {"start": 0, **whole}
    assert browser.gunicorn.complaints() == []


@some_worker_class
def test_every_flash_message_is_shown_once(browser: Browser, seed: int, figure: Callable[[str], None]) -> None:
    """One tab shows them: two tabs at the same moment may both show the same messages."""
    rnd = random.Random(seed)
    flashing = [[f"/flash/{client}-{n}" for n in range(REQUESTS)] for client in range(CLIENTS)]
    changing = [rnd.choice(["/shown", "/shown", "/put/a/1"]) for _ in range(REQUESTS)]
    answers = browser.tabs([changing, *flashing])[0] + [browser.get("/shown")]
    shown = Counter(message for answer in answers if isinstance(answer, list) for message in answer)
    sent = [path.removeprefix("/flash/") for paths in flashing for path in paths]
    figure(f"{shown.total()} of {len(sent)} messages")
    assert shown == Counter(sent)
    assert browser.get("/shown") == []


@some_worker_class
def test_a_counter_under_the_lock_loses_no_increment(browser: Browser, figure: Callable[[str], None]) -> None:
    speed = measured(lambda: browser.tabs([["/count"] * REQUESTS] * CLIENTS))
    number = browser.get("/look")["n"]
    figure(f"{number} of {CLIENTS * REQUESTS}, {speed}")
    assert number == CLIENTS * REQUESTS


def overtaken(browser: Browser, ending: str, late: str) -> None:
    """Let a slow request be overtaken by another that ends or renames the session; check that it changes nothing."""
    with browser.slow(f"{ending} {late}".replace(" ", "-"), late) as slow:
        assert not slow.done(), slow.result()
        browser.get(f"/do/{ending}")
        there = browser.get("/look")
    answer = slow.result()
    assert (answer.status, answer.cookies) == (200, []), (answer, browser.gunicorn.log.read_text())
    assert json.loads(answer.body)["start"] == 0, "it had seen the session"
    assert browser.get("/look") == there


@some_worker_class
@pytest.mark.parametrize("ending", ["clear", "destroy"])
def test_after_a_logout_no_request_restores_the_session(browser: Browser, ending: str) -> None:
    with store_of(browser) as store:
        for late in LATE:
            browser.get("/do/login")
            browser.get("/put/start/0")
            browser.get("/put/cart/0")
            store.update(browser.cookie, {"cart": []})
            old = browser.cookie
            overtaken(browser, ending, late)
            assert len(store) == 0
            for path in ("/look", "/put/late/1", "/flash/late", "/do/rotate"):
                assert browser.gunicorn.ask(path, old) == (200, [], "{}\n")
            assert len(store) == 0
    assert browser.gunicorn.complaints() == []


@some_worker_class
@pytest.mark.parametrize("change", ["rotate", "login"])
def test_after_a_change_of_the_id_the_old_id_changes_nothing(browser: Browser, change: str) -> None:
    with store_of(browser) as store:
        for late in LATE:
            store.clear()
            browser.cookie = ""
            browser.get("/put/start/0")
            store.update(browser.cookie, {"cart": []})
            old = browser.cookie
            overtaken(browser, change, late)
            assert store.ids() == [browser.cookie] != [old]
            whole = {"start": 0, "cart": [], **({"_user_id": "ada"} if change == "login" else {})}
            assert store.get(browser.cookie) == whole
            assert store.owned_by("ada") == ([browser.cookie] if change == "login" else [])
            for path in ("/look", "/put/late/1", "/flash/late", "/do/rotate", "/do/destroy"):
                assert browser.gunicorn.ask(path, old) == (200, [], "{}\n")
            assert store.all() == {browser.cookie: whole}
    assert browser.gunicorn.complaints() == []


@some_worker_class
def test_a_waiter_gets_the_lock_when_its_holder_is_killed(browser: Browser) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(browser.gunicorn.ask, "/hold", browser.cookie)  # never answered
        holder = browser.gunicorn.place / "holder"
        pid = int(wait_for(lambda: holder.exists() and holder.read_text(), "the holder"))
        assert browser.ask("/count?timeout=0.05").status == 503
        browser.get("/put/a/1")  # a request that does not take the lock is not blocked
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not alive(pid), "the holder's end")
        assert browser.tabs([["/count"] * 5] * 3) == [[{}] * 5] * 3
    assert browser.get("/look") == {"start": 0, "a": 1, "n": 15}
