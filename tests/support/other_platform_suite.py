"""What must work on every operating system. `tests/project/test_platforms.py` runs it as on those that are not here."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import secrets
import time
from functools import partial
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import redis
from asgi_browsing import Browser, look, make_app, put
from command_line import invoke
from flask import Flask, session
from prometheus_client import CollectorRegistry

import shmstore.flask
import shmstore.gunicorn
from shmstore import RedisStore, Store, StoreManager, StoreUnavailable, connect, snapshot
from shmstore.asgi.session import ScopeSession
from shmstore.attach import attach_or_start
from shmstore.cli import main
from shmstore.errors import SnapshotError
from shmstore.flask.admin import admin_blueprint
from shmstore.listing import digest
from shmstore.metrics import StoreCollector
from shmstore.system.platform import LACKING
from shmstore.testing import StoreContract
from shmstore.testing.base import at_once

WARNING = f"is private to this process: no other process sees its sessions, and they end with the process: {LACKING}"
_RUN = secrets.token_hex(4)  # runs as on several platforms share the Redis server
_numbers = itertools.count()


def a_name() -> str:
    return f"shop-{_RUN}-{next(_numbers)}"


def test_processes_cannot_share_a_store() -> None:
    assert LACKING.startswith("a store that processes share needs CPython on 64-bit Linux")


class TestStore(StoreContract):
    def make_store(self, **options: Any) -> Any:
        return Store(**options)


class TestNamedStore(StoreContract):
    def make_store(self, **options: Any) -> Any:
        return StoreManager(a_name(), **options).store()


class TestRedisStore(StoreContract):
    def make_store(self, **options: Any) -> Any:
        return RedisStore.from_url(f"{os.environ['REDIS_URL']}?prefix={a_name()}:", **options)


# -- a name --------------------------------------------------------------------------------------------------------


def test_a_name_is_one_store_of_this_process(caplog: pytest.LogCaptureFixture) -> None:
    name = a_name()
    with pytest.raises(StoreUnavailable, match=f"this process has no store '{name}'.*needs CPython on 64-bit Linux"):
        connect(name)
    with StoreManager(name, max=10) as manager:
        store = manager.store()
        store.set("a", {"n": 1})
        assert store.options.max == 10
        for same in (connect(f"shm://{name}"), attach_or_start(f"shm://{name}"), StoreManager(name).store()):
            with same:
                assert same.get("a") == {"n": 1}
            assert same.closed
            with pytest.raises(StoreUnavailable, match="closed"):
                same.get("a")
        with StoreManager(name, ttl=7) as other:  # what is given wins, what is not stays
            store.set("b", {})  # what changes options is noticed at the next write
            assert (store.options.max, store.options.ttl) == (10, 7)
            assert other.apply(max=20) == []
        store.set("b", {})
        assert (store.options.max, store.options.ttl) == (20, None)
        assert [record.getMessage() for record in caplog.records] == [f"store '{name}' {WARNING}"]


def test_it_outlives_its_manager_as_a_server_s_does() -> None:
    name, brief = a_name(), a_name()
    for each, persist in ((name, True), (brief, False)):
        with StoreManager(each, persist=persist) as manager:
            manager.store().set("a", {"n": 1})
    assert connect(name).get("a") == {"n": 1}
    with pytest.raises(StoreUnavailable):
        connect(brief)
    with StoreManager(brief, persist=False) as manager:
        assert manager.store().get("a") is None


def test_a_manager_of_no_server() -> None:
    name = a_name()
    with pytest.raises(StoreUnavailable):
        StoreManager(name).connect()
    owner = StoreManager(name, memory=2**20)
    owner.start()
    assert StoreManager(name, ttl=7).store().options.ttl == 7
    other = StoreManager(name)
    other.connect()
    other.store().set("a", {"n": 1})
    assert owner.apply(memory=2**21) == []
    assert 2**21 - 4096 < owner.store().stats().memory <= 2**21
    assert owner.store().get("a") == {"n": 1}
    other.join()
    other.detach()
    assert owner.store().get("a") == {"n": 1}


def test_dispose_is_called_once_whoever_removes_the_session() -> None:
    name, disposed = a_name(), list[str]()

    def dispose(sid: str, session: object, reason: str) -> None:
        time.sleep(0.001)  # lets another thread try
        disposed.append(sid)

    users = [StoreManager(name, dispose=dispose).store(), *(connect(name) for _ in range(3))]
    sids = [f"{number}" for number in range(30)]
    for sid in sids:
        users[0].set(sid, {})
        at_once([partial(user.destroy, sid) for user in users])
    assert disposed == sids


def test_a_dispose_that_is_given_later_is_called_whoever_finds_the_session_expired() -> None:
    disposed = list[str]()
    with StoreManager(a_name(), stale=True, check_period=None) as manager:
        user = manager.store()
        user.set("a", {"n": 1}, ttl=-1)
        manager.apply(stale=True, check_period=None, dispose=lambda sid, session, reason: disposed.append(sid))
        assert user.get("a") == {"n": 1}
        assert disposed == ["a"]


def test_what_only_a_shared_store_has(caplog: pytest.LogCaptureFixture) -> None:
    name = a_name()
    StoreManager(name, snapshot=os.path.abspath("file"), directory=os.path.abspath("."), persist=True).store()
    assert [record.getMessage() for record in caplog.records] == [
        f"store '{name}' {WARNING}",
        f"store '{name}': the option snapshot has no effect on a private store",
    ]
    with pytest.raises(SnapshotError, match="needs CPython on 64-bit Linux"), Store() as store:
        snapshot.save(store, os.path.abspath("file"))
    with pytest.raises(SnapshotError, match="needs CPython on 64-bit Linux"):
        snapshot.describe(os.path.abspath("file"))


def test_a_store_that_was_forked_is_the_child_s_own() -> None:
    if not hasattr(os, "fork"):
        pytest.skip("processes do not fork on this platform")
    with Store(memory=2**20) as store:
        store.set("a", {"n": 1})
        try:
            with store.lock("a", 1):
                store.arena.lock(1)  # as if another thread were in a call just now
                child = os.fork()
                if not child:
                    try:
                        with store.lock("a", 0):
                            store.set("a", {"n": 2})
                        os._exit(store.stats().server_pid == os.getpid() and store.get("a") == {"n": 2})
                    finally:
                        os._exit(77)
        finally:
            store.arena.unlock()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
        assert store.get("a") == {"n": 1}
        assert store.stats().server_pid == os.getpid()


# -- an application ------------------------------------------------------------------------------------------------


def test_an_application_of_flask(caplog: pytest.LogCaptureFixture) -> None:
    app = Flask(__name__)
    name = a_name()
    app.config.update(SESSION_STORE=f"shm://{name}", SESSION_STORE_OPTIONS={"max": 100})
    shmstore.flask.Sessions(app)

    @app.post("/cart/<item>")
    def put_into_cart(item: str) -> list[str]:
        session.setdefault("cart", []).append(item)
        cart: list[str] = session["cart"]
        return cart

    @app.post("/login/<user>")
    def login(user: str) -> str:
        session["_user_id"] = user
        return ""

    @app.post("/logout")
    def logout() -> str:
        session.clear()
        return ""

    ada, bob = app.test_client(), app.test_client()
    assert ada.post("/cart/tea").json == ["tea"]
    assert ada.post("/cart/milk").json == ["tea", "milk"]
    ada.post("/login/ada")
    bob.post("/login/bob")
    assert len(connect(name).owned_by("ada")) == 1
    ada.post("/logout")
    assert connect(name).all() == {connect(name).owned_by("bob")[0]: {"_user_id": "bob"}}
    assert [record.getMessage() for record in caplog.records] == [f"store '{name}' {WARNING}"]


def test_an_application_of_django(caplog: pytest.LogCaptureFixture) -> None:
    from django.contrib.auth import get_user_model, login, logout
    from django.core.management import call_command
    from django.test import override_settings
    from django_project import Browser

    name = a_name()
    with override_settings(SHMSTORE={"STORE": f"shm://{name}", "MAX": 100}):
        call_command("check")
        call_command("migrate", verbosity=0)
        user = get_user_model().objects.create_user("ada")
        ada, bob = Browser(), Browser()
        ada.put(cart=["tea"])
        bob.put(cart=["milk"])
        ada.visit(lambda request: login(request, user))
        assert ada.look()["cart"] == ["tea"]
        assert connect(name).owned_by(str(user.pk)) == [ada.key]
        ada.visit(logout)
        call_command("clearsessions")
        assert connect(name).all() == {bob.key: {"cart": ["milk"]}}
    assert [record.getMessage() for record in caplog.records] == [f"store '{name}' {WARNING}"]


def test_an_application_of_asgi(caplog: pytest.LogCaptureFixture) -> None:
    name = a_name()
    ada = Browser(make_app(f"shm://{name}", store_options={"max": 100}))
    bob = Browser(ada.app)

    async def count(session: ScopeSession) -> None:
        async with session.lock(timeout=60):
            n = session["n"]
            await asyncio.sleep(0)
            session["n"] = n + 1

    async def main() -> None:
        await asyncio.gather(ada.get(put(n=0)), bob.get(put(_user_id="bob")))
        await ada.get(put(_user_id="ada"))
        await asyncio.gather(*(ada.tab().get(count) for _ in range(5)))
        await ada.socket(put(seen=True))
        assert (await ada.get(look)).body == {"n": 5, "_user_id": "ada", "seen": True}
        assert connect(name).owned_by("ada") == [ada.cookie]
        await ada.get(lambda session: session.clear())
        assert ada.cookie == ""
        assert connect(name).all() == {bob.cookie: {"_user_id": "bob"}}

    asyncio.run(main())
    assert [record.getMessage() for record in caplog.records] == [f"store '{name}' {WARNING}"]


def test_an_application_of_asgi_on_a_server() -> None:
    url = f"{os.environ['REDIS_URL']}?prefix={a_name()}:"
    browser = Browser(make_app(url))

    async def main() -> None:
        await browser.get(put(a=1))
        assert (await browser.get(look)).body == {"a": 1}
        await browser.app._close()

    asyncio.run(main())
    with RedisStore.from_url(url) as store:
        assert store.all() == {browser.cookie: {"a": 1}}


@pytest.mark.parametrize("where", ["shm://{}", "{REDIS_URL}?prefix={}:"])
def test_the_admin_page_and_metrics(where: str) -> None:
    url = where.format(a_name(), **os.environ)
    app = Flask(__name__)
    shmstore.flask.Sessions(app, store=url)
    app.register_blueprint(admin_blueprint(authorize=lambda: True), url_prefix="/admin")
    app.add_url_rule("/", view_func=lambda: session.setdefault("_user_id", "ada"))
    ada, admin = app.test_client(), app.test_client()
    assert ada.get("/").text == "ada"
    assert ">ada<" in admin.get("/admin/").text
    registry = CollectorRegistry()
    registry.register(StoreCollector(attach_or_start(url), "shop"))
    assert registry.get_sample_value("shmstore_owned_sessions", {"store": "shop"}) == 1


def test_sessions_of_flask_session_continue() -> None:
    name, old = a_name(), a_name()
    with redis.Redis.from_url(os.environ["REDIS_URL"]) as client:
        client.set(f"{old}:{'A' * 43}", msgspec.msgpack.encode({"_user_id": "ada"}))
        app = Flask(__name__)
        there = shmstore.flask.FlaskSession(client, prefix=f"{old}:")
        shmstore.flask.Sessions(app, store=f"shm://{name}", migrate_from=there)
        app.add_url_rule("/", view_func=lambda: session["_user_id"])
        browser = app.test_client()
        browser.set_cookie("session", "A" * 43)
        assert browser.get("/").text == "ada"
        assert len(connect(name).owned_by("ada")) == 1


def test_workers_without_a_common_store_are_told(caplog: pytest.LogCaptureFixture) -> None:
    app = Flask(__name__)
    shmstore.flask.Sessions(app, store=f"shm://{a_name()}")
    app.add_url_rule("/", view_func=lambda: session.setdefault("n", "1"))
    for _ in range(3):  # the first one opens the store
        app.test_client().get("/", environ_overrides={"wsgi.multiprocess": True})
    assert [record.getMessage().partition(":")[0] for record in caplog.records[1:]] == [
        "each process of this server has a private store"
    ]


def test_the_hooks_of_gunicorn_start_nothing(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    name = a_name()
    monkeypatch.setattr("shmstore.attach._registered", {})
    server = SimpleNamespace(cfg=SimpleNamespace(uid=1, gid=1), log=logging.getLogger("gunicorn"))
    hooks = shmstore.gunicorn.Hooks(name, max=10)
    hooks.on_starting(server)
    assert attach_or_start(name).options.max == 10
    shmstore.gunicorn.Hooks(name, max=20).on_reload(server)
    attach_or_start(name).set("a", {})
    assert attach_or_start(name).options.max == 20
    hooks.on_exit(server)
    assert [record.getMessage() for record in caplog.records] == [f"store '{name}' {WARNING}"]


# -- commands ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", *sorted(main.commands)])
def test_help(name: str) -> None:
    done = invoke(*filter(None, [name]), "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Usage: shmstore {name}".rstrip())


@pytest.mark.parametrize(
    "command",
    ["serve shop", "stores", "stats shop", "top shop", "ls shop", "show shop abcd", "rm shop abcd", "rm shop --yes",
     "logout shop ada", "prune shop", "clear shop --yes", "save shop file", "load shop file", "check shop",
     "doctor shop", "copy shop redis://127.0.0.1:1", "copy shm:///tmp/shop redis://127.0.0.1:1"],
)  # fmt: skip
def test_a_command_for_shared_stores_says_what_is_missing(command: str) -> None:
    done = invoke(*command.split())
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"Error: {LACKING}\n")


def test_doctor_tries_a_private_store() -> None:
    done = invoke("doctor")
    assert (done.returncode, done.stderr) == (0, "")
    assert "ok       private store: works\n" in done.stdout
    assert f"engine: python\n           the C core is for stores that processes share; {LACKING}\n" in done.stdout
    assert f"warning  shared store: {LACKING}\n" in done.stdout


def test_commands_on_a_server() -> None:
    url = f"{os.environ['REDIS_URL']}?prefix={a_name()}:"
    with RedisStore.from_url(url) as store:
        for sid, owner in ("a", "ada"), ("b", "ada"), ("c", "bob"), ("d", None):
            store.set(sid, {"n": sid}, owner=owner)

        def run(command: str, *arguments: str) -> str:
            done = invoke(command, url, *arguments)
            assert (done.returncode, done.stderr) == (0, "")
            return done.stdout

        assert json.loads(run("stats", "--json"))["sessions"] == 4
        assert len(run("ls").splitlines()) == 5
        assert json.loads(run("show", digest("c"), "--json"))["owner"] == "bob"
        assert json.loads(run("top", "--count", "1", "--interval", "0.1", "--json"))["sessions"] == 4
        assert run("logout", "ada") == "2 sessions ended\n"
        assert run("rm", digest("c")) == "1 session removed\n"
        run("doctor")
        assert store.all() == {"d": {"n": "d"}}
        run("clear", "--yes")
        assert store.ids() == []


def test_sessions_are_copied_between_servers() -> None:
    here, there = (f"{os.environ['REDIS_URL']}?prefix={a_name()}:" for _ in range(2))
    with RedisStore.from_url(here) as store:
        store.set("ada", {"n": 1})
    done = invoke("copy", here, there)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 session copied, 0 skipped, 0 refused\n", "")
    with RedisStore.from_url(there) as store:
        assert store.get("ada") == {"n": 1}
