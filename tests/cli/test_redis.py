"""The command line on a store of a real server: what it does there, and what it says it cannot do."""

from __future__ import annotations

import itertools
import json
import os
import secrets
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from command_line import invoke
from redis_servers import RedisCluster, RedisServer, StartRedis

from shmstore import RedisStore
from shmstore.codec.ids import require_key, short_digest
from shmstore.listing import Listing, digest

ADA, ADA_TOO, EVE, GUEST = IDS = [secrets.token_urlsafe(32) for _ in range(4)]
Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(params=["server", "cluster"])
def url(request: pytest.FixtureRequest) -> str:
    server: RedisServer | RedisCluster = request.getfixturevalue(f"redis_{request.param}")
    return f"{server.url}?prefix=cli{os.getpid()}.{secrets.token_hex(4)}:"


@pytest.fixture
def shop(url: str) -> Iterator[RedisStore]:
    with RedisStore.from_url(url) as store:
        store.set(ADA, {"cart": ["tea"], "secret": "xyzzy"}, owner="ada")
        store.set(EVE, {"n": 3}, owner="eve\x1b[31m\x07\nroot", ttl=float("inf"))
        store.set(GUEST, {"n": 1, 2: b"bytes"})
        store.set(ADA_TOO, {"n": 2}, owner="ada")
        yield store


@pytest.fixture
def cli() -> Cli:
    """Return a function that runs a command to its end. No output of it may contain an id."""

    def call(*arguments: object, answer: str = "") -> subprocess.CompletedProcess[str]:
        done = invoke(*arguments, answer=answer)
        told = done.stdout + done.stderr
        assert not [sid for sid in IDS if sid in told], told
        assert "Traceback" not in told
        assert "\x1b" not in told
        return done

    return call


def told(done: subprocess.CompletedProcess[str]) -> Any:
    assert (done.returncode, done.stderr) == (0, ""), done
    return json.loads(done.stdout)


def refused(done: subprocess.CompletedProcess[str]) -> str:
    assert (done.returncode, done.stdout) == (1, ""), done
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_stats_are_those_of_all_processes(shop: RedisStore, url: str, cli: Cli) -> None:
    shop.get(ADA)
    shop.get("nobody")
    shop.stats()  # sends what was counted
    stats = told(cli("stats", url, "--json"))
    assert (stats["name"], stats["running"]) == (url.partition("prefix=")[2], True)
    assert stats["server"].startswith(("Redis at ", "the Redis Cluster at "))
    assert (stats["sessions"], stats["owned"], stats["hits"], stats["misses"], stats["sets"]) == (4, 3, 1, 1, 4)
    assert stats["evicted_owned"] is stats["lock_waits"] is stats["snapshot_age"] is None, "not known there"
    text = cli("stats", url).stdout
    assert "hits            1 (50.0%)" in text
    assert "of the whole server" in text
    assert "lock" not in text


def test_top_watches_it(shop: RedisStore, url: str, cli: Cli) -> None:
    sample = told(cli("top", url, "--interval", "0.1", "--count", "1", "--json"))
    assert (sample["sessions"], sample["memory_used"], sample["lock_waits_per_second"]) == (4, None, None)
    assert cli("top", url, "--interval", "0.1", "--count", "1").stdout.split()[8:10] == ["4", "-"]


def test_ls_lists_by_digests(shop: RedisStore, url: str, cli: Cli) -> None:
    listed = told(cli("ls", url, "--json"))
    assert listed["total"] == 4
    assert [each["digest"] for each in listed["sessions"]] == [digest(sid) for sid in (ADA_TOO, GUEST, EVE, ADA)]
    assert [each["owner"] for each in told(cli("ls", url, "--owner", "ada", "--json"))["sessions"]] == ["ada", "ada"]
    assert told(cli("ls", url, "--owner", "nobody", "--json"))["total"] == 0
    assert told(cli("ls", url, "--idle", "1000", "--json"))["total"] == 0
    assert told(cli("ls", url, "--expired", "--json"))["total"] == 0
    some = cli("ls", url, "--limit", "2")
    assert [line[:8] for line in some.stdout.splitlines()[1:]] == [short_digest(ADA_TOO), short_digest(GUEST)]
    assert some.stderr == "2 of 4 sessions: --limit 0 shows all\n"
    assert "never" in cli("ls", url).stdout


def test_show_shows_one_and_does_not_use_it(shop: RedisStore, url: str, cli: Cli) -> None:
    before = shop.stats().gets
    shown = told(cli("show", url, short_digest(ADA)[:6], "--values", "--json"))
    assert (shown["owner"], shown["values"]) == ("ada", {"cart": ["tea"], "secret": "xyzzy"})
    assert "xyzzy" not in cli("show", url, digest(ADA)).stdout
    assert "no sessions have a digest that begins with" in refused(cli("show", url, "0" * 32))
    assert shop.stats().gets == before


def test_an_ambiguous_digest_names_no_session(shop: RedisStore, url: str, cli: Cli) -> None:
    first: dict[str, str] = {}
    sid, twin = next(
        (sid, first[start])
        for sid in map(str, itertools.count())
        if (start := short_digest(sid)[:4]) in first or first.setdefault(start, sid) != sid
    )
    shop.set(sid, {})
    shop.set(twin, {})
    assert "2 sessions have a digest that begins with" in refused(cli("rm", url, short_digest(sid)[:4]))
    assert sid in shop
    assert len(list(Listing(shop, digest=short_digest(sid)[:4]).rows())) == 2


def test_rm_and_logout_and_clear_end_sessions(shop: RedisStore, url: str, cli: Cli) -> None:
    assert cli("rm", url, short_digest(GUEST)).stdout == "1 session removed\n"
    assert GUEST not in shop
    assert told(cli("logout", url, "ada", "--json")) == {"ended": 2}
    assert shop.ids() == [EVE]
    assert cli("clear", url, answer="n\n").returncode == 1
    assert shop.ids() == [EVE]
    assert told(cli("clear", url, "--yes", "--json")) == {"removed": 1}
    assert shop.ids() == []


def test_prune_says_what_it_does_there(shop: RedisStore, url: str, cli: Cli) -> None:
    done = cli("prune", url, "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, {"pruned": 0})
    assert "removes expired sessions by itself" in done.stderr
    assert shop.length() == 4


@pytest.mark.parametrize(
    ("command", "instead"),
    [
        (("rm", "--yes"), "shmstore clear"),
        (("check",), "shmstore doctor"),
        (("save", "x.snapshot"), "shmstore copy URL FILE"),
        (("load", "x.snapshot"), "shmstore copy FILE URL"),
        (("serve",), "a store of this host is needed"),
        (("stats", "--directory", "."), "omit --directory"),
    ],
    ids=lambda each: each if isinstance(each, str) else each[0],
)
def test_what_it_cannot_do_there_is_said(url: str, cli: Cli, command: tuple[str, ...], instead: str) -> None:
    name, *rest = command
    assert instead in refused(cli(name, url, *rest))


COMMANDS = [("stats",), ("top",), ("ls",), ("show", "abcd"), ("rm", "abcd"), ("logout", "ada"), ("prune",), ("clear",)]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_server_that_is_not_there_is_named_without_the_password(cli: Cli, command: tuple[str, ...]) -> None:
    name, *rest = command
    said = refused(cli(name, "redis://:hunter2@127.0.0.1:1", *rest))
    assert "Redis at 127.0.0.1:1 cannot be reached" in said
    assert "hunter2" not in said


@pytest.mark.parametrize("command", [("stats", "{}"), ("serve", "{}"), ("copy", "{}", "shop"), ("copy", "shop", "{}")])
@pytest.mark.parametrize(
    "misspelt",
    [
        "rediss//u:hunter2@h", "redis;//u:hunter2@h/0", "redis.//:hunter2@h", "redis:/u:hunter2@h", "hunter2@h",
        "rediss//u:x@h/0?password=hunter2", "redis.//u:hunt/hunter2@h:6379/0",
    ],
)  # fmt: skip
def test_a_misspelt_url_is_quoted_without_the_password(cli: Cli, misspelt: str, command: tuple[str, ...]) -> None:
    said = refused(cli(*(each.format(misspelt) for each in command)))
    assert "hunter2" not in said
    assert "@h" in said or command[-1] == "{}"


def levels(done: subprocess.CompletedProcess[str]) -> dict[str, tuple[str, str]]:
    return {each["about"]: (each["level"], each["advice"]) for each in json.loads(done.stdout)["findings"]}


def test_doctor_finds_it_well_and_leaves_nothing(shop: RedisStore, url: str, cli: Cli) -> None:
    done = cli("doctor", url, "--json")
    assert done.returncode == 0, done
    found = levels(done)
    assert found["server"][0] == found["trial"][0] == found["store"][0] == "ok"
    assert found["memory"][0] == "warning"
    assert "hiredis" in found
    assert (shop.length(), shop.owned_by("ada")) == (4, [ADA_TOO, ADA])


def test_doctor_says_what_is_wrong_with_a_server(start_redis: StartRedis, cli: Cli) -> None:
    server = start_redis()
    client = server.client()
    for policy, why in (("allkeys-lru", "indexes of owners"), ("noeviction", "refuses writes"), ("volatile-lru", "")):
        client.config_set("maxmemory", "64mb")
        client.config_set("maxmemory-policy", policy)
        level, advice = levels(cli("doctor", server.url, "--json"))["memory"]
        assert (level, why in advice) == ("warning" if why else "ok", True)
    client.execute_command("ACL", "SETUSER", "poor", "on", ">password", "~*", "+@all", "-zadd")
    poor = f"unix://poor:password@{server.socket}"
    done = cli("doctor", poor, "--json")
    assert (done.returncode, levels(done)["trial"][0]) == (1, "broken")
    assert "ACL SETUSER <user> +zadd" in done.stdout
    server.kill()
    done = cli("doctor", server.url)
    assert done.returncode == 1
    assert "broken   server: Redis at" in done.stdout


def test_doctor_knows_a_replica(start_redis: StartRedis, cli: Cli) -> None:
    server = start_redis()
    server.client().replicaof("127.0.0.1", "1")
    done = cli("doctor", server.url, "--json")
    assert (done.returncode, levels(done)["server"][0]) == (1, "broken")


def test_a_listing_leaves_out_what_is_gone_or_unreadable(shop: RedisStore) -> None:
    listing = Listing(shop)
    shop.destroy(GUEST)
    value = shop._engine.read(shop._engine.key(require_key(EVE)))
    assert value is not None
    shop._link.write("SET", shop._engine.key(require_key(EVE)), value._replace(body=b"\xff" * 40).pack())
    assert [row.digest for row in listing.rows()] == [digest(ADA_TOO), digest(ADA)]
    assert len(listing) == 4
