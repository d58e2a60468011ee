"""Two Gunicorns, as on two hosts, that share their sessions in one Redis: overlapping requests lose nothing."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from gunicorns import Answer, Gunicorn, StartGunicorn
from load import some_worker_class
from overlap import APP as ONE_HOST
from overlap import LATE, Browser
from processes import alive, wait_for
from redis_servers import RedisServer

from shmstore import RedisStore

APP = ONE_HOST.replace(
    'app.config["SESSION_STORE"] = "shm://shop"',
    'app.config["SESSION_STORE"] = os.environ["TEST_REDIS"]\n@app.get("/pid")\ndef pid(): return {"pid": os.getpid()}',
)
CLIENTS, REQUESTS = 6, 500 if os.environ.get("SHMSTORE_FULL") == "1" else 12

# A host without shared memory; preloaded, so that the store may be created before the fork.
CONF = """
on_starting = on_reload = on_exit = lambda server: None
import sys
preload_app = "gevent" not in sys.argv  # gevent patches ssl, and redis-py imports it before that
"""


# For the wait for a lock whose holder has died; otherwise it takes nine seconds.
SHORT_LEASE = """
from shmstore.redis import named_locks
named_locks._LEASE, named_locks._RENEWAL_PERIOD = 3.0, 0.5
"""


class Hosts:
    """Two Gunicorns behind a balancer that alternates between them."""

    def __init__(self, hosts: list[Gunicorn]) -> None:
        self.hosts = hosts
        self._turn = 0

    def ask(self, path: str, cookie: str = "") -> Answer:
        self._turn += 1
        return self.hosts[self._turn % len(self.hosts)].ask(path, cookie)

    @property
    def log(self) -> object:
        return self.hosts[0].log

    def complaints(self) -> list[str]:
        return [line for host in self.hosts for line in host.complaints()]


class Visitor(Browser):
    """A browser whose requests go to both hosts."""

    def __init__(self, hosts: Hosts) -> None:
        super().__init__(hosts)  # type: ignore[arg-type]  # answers the same


@pytest.fixture
def url(redis_server: RedisServer, request: pytest.FixtureRequest) -> str:
    name = "".join(each for each in request.node.name if each.isalnum())
    return f"{redis_server.url}?prefix={name[-50:]}:"


@pytest.fixture
def store(url: str) -> Iterator[RedisStore]:
    with RedisStore.from_url(url) as store:
        store.clear()
        yield store


@pytest.fixture
def conf() -> str:
    return CONF


@pytest.fixture
def hosts(
    gunicorn: StartGunicorn, arguments: tuple[str, ...], conf: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> Hosts:
    monkeypatch.setenv("TEST_REDIS", url)
    started = [gunicorn(*arguments, "--workers", "2", conf=conf) for _ in range(2)]
    return Hosts([each.booted(2) for each in started])


@some_worker_class
def test_no_change_is_lost(hosts: Hosts, store: RedisStore, figure: Callable[[str], None]) -> None:
    visitor = Visitor(hosts)
    visitor.get("/put/start/0")
    visitor.tabs([[f"/add/{tab}/{n}" for n in range(REQUESTS)] for tab in range(CLIENTS)])
    found = visitor.get("/look")
    assert found == {"start": 0, **{str(tab): list(range(REQUESTS)) for tab in range(CLIENTS)}}
    figure(f"{CLIENTS * REQUESTS} changes")
    assert hosts.complaints() == []


@some_worker_class
def test_every_flash_message_is_shown_once(hosts: Hosts, store: RedisStore, seed: int) -> None:
    rnd = random.Random(seed)
    visitor = Visitor(hosts)
    visitor.get("/put/start/0")
    flashing = [[f"/flash/{client}-{n}" for n in range(REQUESTS)] for client in range(CLIENTS)]
    changing = [rnd.choice(["/shown", "/shown", "/put/a/1"]) for _ in range(REQUESTS)]
    answers = visitor.tabs([changing, *flashing])[0] + [visitor.get("/shown")]
    shown = Counter(message for answer in answers if isinstance(answer, list) for message in answer)
    assert shown == Counter(path.removeprefix("/flash/") for paths in flashing for path in paths)


@some_worker_class
def test_a_counter_under_the_lock_loses_no_increment(hosts: Hosts, store: RedisStore) -> None:
    visitor = Visitor(hosts)
    visitor.get("/put/start/0")
    visitor.tabs([["/count"] * REQUESTS] * CLIENTS)
    assert visitor.get("/look")["n"] == CLIENTS * REQUESTS


def overtaken(hosts: Hosts, cookie: str, ending: str, late: str) -> str:
    """Let a request on one host overtake a slow request on the other; return the browser's cookie afterwards."""
    slow, fast = Browser(hosts.hosts[0]), Browser(hosts.hosts[1])
    slow.cookie = fast.cookie = cookie
    with slow.slow(f"{ending}-{late}", late) as answer:
        assert not answer.done(), answer.result()
        fast.get(f"/do/{ending}")
        there = fast.get("/look")
    late_answer = answer.result()
    assert (late_answer.status, late_answer.cookies) == (200, []), (late_answer, slow.gunicorn.log.read_text())
    assert json.loads(late_answer.body)["start"] == 0, "it had seen the session"
    assert fast.get("/look") == there
    return fast.cookie


@some_worker_class
@pytest.mark.parametrize("ending", ["clear", "destroy"])
def test_a_logout_is_not_undone_by_an_overlapping_request(hosts: Hosts, store: RedisStore, ending: str) -> None:
    visitor = Visitor(hosts)
    for late in LATE:
        visitor.get("/do/login")
        visitor.get("/put/start/0")
        visitor.get("/put/cart/0")
        store.update(visitor.cookie, {"cart": []})
        old = visitor.cookie
        visitor.cookie = overtaken(hosts, old, ending, late)
        assert len(store) == 0
        for path in ("/look", "/put/late/1", "/flash/late", "/do/rotate"):
            assert hosts.ask(path, old) == (200, [], "{}\n")
        assert len(store) == 0
    assert hosts.complaints() == []


@some_worker_class
@pytest.mark.parametrize("change", ["rotate", "login"])
def test_a_login_is_not_undone_by_an_overlapping_request(hosts: Hosts, store: RedisStore, change: str) -> None:
    for late in LATE:
        store.clear()
        visitor = Visitor(hosts)
        visitor.get("/put/start/0")
        store.update(visitor.cookie, {"cart": []})
        old = visitor.cookie
        new = overtaken(hosts, old, change, late)
        assert store.ids() == [new] != [old]
        whole = {"start": 0, "cart": [], **({"_user_id": "ada"} if change == "login" else {})}
        assert store.get(new) == whole
        assert store.owned_by("ada") == ([new] if change == "login" else [])
        for path in ("/look", "/put/late/1", "/flash/late", "/do/rotate", "/do/destroy"):
            assert hosts.ask(path, old) == (200, [], "{}\n")
        assert store.all() == {new: whole}
    assert hosts.complaints() == []


@pytest.mark.parametrize(("arguments", "conf"), [(("-k", "sync"), CONF + SHORT_LEASE)], ids=["sync"])
def test_a_waiter_on_another_host_gets_the_lock_of_a_killed_worker(hosts: Hosts, store: RedisStore) -> None:
    from concurrent.futures import ThreadPoolExecutor

    visitor = Visitor(hosts)
    visitor.get("/put/start/0")
    first, second = hosts.hosts
    with ThreadPoolExecutor(1) as pool:
        pool.submit(first.ask, "/hold", visitor.cookie)  # never answered
        holder = first.place / "holder"
        pid = int(wait_for(lambda: holder.exists() and holder.read_text(), "the holder"))
        assert second.ask("/count?timeout=0.05", visitor.cookie).status == 503
        os.kill(pid, 9)
        wait_for(lambda: not alive(pid), "the holder's end")
        assert second.ask("/count?timeout=50", visitor.cookie).status == 200


@pytest.mark.parametrize("arguments", [("-k", "gthread", "--threads", "4")])
def test_a_restart_of_the_server_loses_its_sessions_and_no_worker(
    gunicorn: StartGunicorn, start_redis: Callable[[], RedisServer], monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
) -> None:  # fmt: skip
    server = start_redis()
    monkeypatch.setenv("TEST_REDIS", server.url)
    host = gunicorn(*arguments, conf=CONF).booted()
    browser = Browser(host)
    browser.get("/put/start/0")
    pids = {browser.get("/pid")["pid"] for _ in range(20)}
    server.kill()
    assert host.ask("/look", browser.cookie).status == 500
    assert host.ask("/pid", browser.cookie).status == 200  # a request that does not use its session succeeds
    server.start()
    browser.cookie = ""
    for n in range(20):
        browser.get(f"/put/again/{n}")
        pids.add(browser.get("/pid")["pid"])
    assert browser.get("/look") == {"again": 19}
    assert pids <= host.workers()
