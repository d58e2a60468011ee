"""`shmstore copy flask-session+redis://...`: the sessions of a real Flask-Session, copied while nothing runs."""

from __future__ import annotations

import json
import pickle
import secrets
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
from command_line import invoke
from flask import Flask
from old_shop import cookie, customer, goes_on, old_shop, shop
from processes import Start
from redis_servers import RedisCluster, RedisServer

from shmstore import RedisStore, connect
from shmstore.contract import AnyStore
from shmstore.flask import Sessions

Call = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def prefix() -> str:
    return f"old{secrets.token_hex(4)}:"


@pytest.fixture
def client(redis_server: RedisServer) -> redis.Redis:
    return redis_server.client()


@pytest.fixture
def url(redis_server: RedisServer, prefix: str) -> str:
    return f"flask-session+{redis_server.url}?prefix={prefix}"


def told(*arguments: object) -> dict[str, int]:
    done = invoke("copy", *arguments, "--json")
    assert (done.returncode, done.stderr) == (0, ""), done
    counts: dict[str, int] = json.loads(done.stdout)
    return counts


def new_shop(store: AnyStore, **config: Any) -> Flask:
    app = shop(**config)
    Sessions(app, store=store)
    return app


def test_customers_stay_logged_in(client: redis.Redis, url: str, prefix: str, manage: Start, store_dir: Path) -> None:
    app = old_shop(SESSION_TYPE="redis", SESSION_REDIS=client, SESSION_KEY_PREFIX=prefix)
    old = [customer(app) for _ in range(3)]
    ids = [cookie(browser) for browser, _ in old]
    with manage("new").store() as store:
        assert told(url, store_dir / "new")["copied"] == 3
        assert told(url, store_dir / "new") == {"copied": 0, "skipped": 3, "refused": 0, "missing": 0, "total": 3}
        assert sorted(store.owned_by("ada")) == sorted(ids)
        new = new_shop(store)
        for browser, token in old:
            there = goes_on(browser, new)
            assert there.get("/").json == {"user": "ada", "cart": ["tea"]}
            assert there.post("/cart", data={"what": "milk", "csrf_token": token}).status_code == 200
            assert cookie(there) not in ids, "its id is ours from the first page on"
        assert store.length() == 3
        assert not set(store.ids()) & set(ids)
    assert len(client.keys(f"{prefix}*")) == 3, "FROM does not change"


def test_customers_of_an_application_with_a_prefix_stay_logged_in(
    client: redis.Redis, url: str, prefix: str, manage: Start, store_dir: Path
) -> None:
    browser, _ = customer(old_shop(SESSION_TYPE="redis", SESSION_REDIS=client, SESSION_KEY_PREFIX=prefix))
    with manage("new").store() as store:
        assert told(url, store_dir / "new", "--key-prefix", "shop:")["copied"] == 1
        assert store.owned_by("ada") == store.ids() == [f"shop:{cookie(browser)}"]
        there = goes_on(browser, new_shop(store, SESSION_KEY_PREFIX="shop:"))
        assert there.get("/").json == {"user": "ada", "cart": ["tea"]}


def test_lives_owners_and_the_order_of_use(
    client: redis.Redis, url: str, prefix: str, manage: Start, store_dir: Path
) -> None:
    data = {
        "first": ({"_user_id": 7, "n": 1}, 100), "last": ({"n": 2}, 1000), "never": ({"_user_id": ""}, None),
        "middle": ({"_user_id": "ada"}, 500),
    }  # fmt: skip
    for sid, (session, life) in data.items():
        client.set(f"{prefix}{sid}", msgspec.msgpack.encode(session), ex=life)
    with manage("new").store() as store:
        assert told(url, store_dir / "new")["copied"] == 4
        assert [sid for sid in store.ids() if sid != "never"] == ["last", "middle", "first"]
        assert [store.owned_by(owner) for owner in ("7", "ada")] == [["first"], ["middle"]]
        for sid, (_, life) in data.items():
            loaded = store.load(sid)
            assert loaded is not None
            assert loaded.remaining == float("inf") if life is None else life - 60 < loaded.remaining <= life + 1


def test_to_a_server_and_to_a_file(
    client: redis.Redis, url: str, prefix: str, redis_server: RedisServer, tmp_path: Path
) -> None:
    client.set(f"{prefix}abc", msgspec.json.encode({"n": 1}), ex=100)
    to, file = f"{redis_server.url}?prefix=new{prefix}", tmp_path / "sessions.snapshot"
    assert told(url, to)["copied"] == 1
    assert told(url, file)["copied"] == 1
    with RedisStore.from_url(to) as store:
        assert (store.get("abc") or {})["n"] == 1
        store.clear()
        assert told(file, to)["copied"] == 1


def test_from_a_cluster(redis_cluster: RedisCluster, prefix: str, manage: Start, store_dir: Path) -> None:
    host, port = "127.0.0.1", redis_cluster.servers[0].port
    client: Any = redis.RedisCluster(host=host, port=port)
    try:
        for number in range(20):
            client.set(f"{prefix}{number}", msgspec.msgpack.encode({"n": number}), ex=100)
    finally:
        client.close()
    with manage("new").store() as store:
        assert told(f"flask-session+{redis_cluster.url}?prefix={prefix}", store_dir / "new")["copied"] == 20
        assert {data["n"] for data in store.all().values()} == set(range(20))


def test_what_else_is_there_is_left(client: redis.Redis, url: str, prefix: str, manage: Start, store_dir: Path) -> None:
    client.set(f"{prefix}good", msgspec.msgpack.encode({"n": 1}), ex=100)
    client.set(f"{prefix}bad", b"\xc1", ex=100)
    client.set(f"{prefix}note", b"hello.", ex=100)
    client.set(f"{prefix}no:id", msgspec.msgpack.encode({"n": 1}), ex=100)
    client.hset(f"{prefix}hash", "a", "b")
    with manage("new").store() as store:
        done = invoke("copy", url, store_dir / "new")
        assert (done.returncode, done.stdout) == (1, "1 session copied, 0 skipped, 2 refused\n")
        assert "2 sessions refused, damaged: " in done.stderr
        assert store.ids() == ["good"]


def test_a_pickle_is_read_only_on_request(
    client: redis.Redis, url: str, prefix: str, manage: Start, store_dir: Path
) -> None:
    client.set(f"{prefix}abc", pickle.dumps({"_user_id": "ada", "x": 1j}), ex=100)
    with manage("new").store() as store:
        done = invoke("copy", url, store_dir / "new")
        assert (done.returncode, done.stdout) == (1, "")
        assert "--allow-pickle reads them, which executes what is in them" in done.stderr
        assert store.ids() == []
        done = invoke("copy", url, store_dir / "new", "--allow-pickle")
        assert (done.returncode, done.stdout) == (0, "1 session copied, 0 skipped, 0 refused\n")
        assert done.stderr == "1 value left out, of a type that cannot be stored\n"
        assert store.owned_by("ada") == ["abc"]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["flask-session+redis://:hunter2@127.0.0.1:1", "{store}"], "cannot be reached"),
        (["flask-session+shm://shop", "{store}"], "is not the URL of a Redis or Valkey server"),
        (["{store}", "flask-session+redis://127.0.0.1:1"], "sessions are copied from Flask-Session, not to it"),
        (["{store}", "{store}", "--allow-pickle"], "--allow-pickle is for sessions of Flask-Session"),
        (["{store}", "{store}", "--key-prefix", "a:"], "--key-prefix is for sessions of Flask-Session"),
        (["flask-session+redis://127.0.0.1:1", "{store}", "--key-prefix", "a"], "KEY_PREFIX must be a text whose last"),
    ],
    ids=["away", "no server", "to", "a flag without effect", "a prefix without effect", "an invalid prefix"],
)
def test_what_it_cannot_copy_is_said(arguments: list[str], what: str, manage: Start, store_dir: Path) -> None:
    manage("new").start()
    done = invoke("copy", *(each.format(store=store_dir / "new") for each in arguments))
    assert done.returncode != 0
    assert what in done.stderr
    assert "hunter2" not in done.stderr
    connect("new", directory=store_dir).close()
