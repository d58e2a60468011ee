"""Killed and stopped processes under a real Gunicorn, with clients that count acknowledged changes."""

from __future__ import annotations

import os
import random
import signal
import statistics
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import load
import pytest
from gunicorns import Gunicorn, StartGunicorn
from load import FULL, SLACK, Figure, Load, breaks, seconds, serving, some_worker_class
from processes import HURRY, alive, state, stop, wait_for

from shmstore.manager import connect

APP = load.APP


def prunes_by_itself(g: Gunicorn) -> None:
    with connect("shop", directory=g.store_dir) as store:
        before = store.stats().expired
        store.set("brief", {}, ttl=0.01)
        wait_for(lambda: store.stats().expired > before, "the automatic prune")


@pytest.mark.timeout(1200)
@some_worker_class
def test_kills_of_the_server_cause_no_errors(
    gunicorn: StartGunicorn, arguments: tuple[str, ...], seed: int, figure: Figure
) -> None:
    rnd = random.Random(seed)
    g = gunicorn(*arguments, "--workers", "4", options="check_period=0.2").booted(4)
    kills, back = 200 if FULL else 3, []
    with Load(g, prune_every=10) as clients:
        for _ in range(kills):
            time.sleep(rnd.random() * 0.2)
            server = g.server
            os.kill(server or 0, signal.SIGKILL)
            back.append(seconds(lambda: wait_for(lambda: serving(g, server), "the restart")))  # noqa: B023
    figure(
        f"{kills} kills, {clients.acknowledged} changes, {len(clients.lost)} lost, {len(clients.failed)} failed, "
        f"server back after {statistics.median(back):.2f} s, {max(back):.2f} s at most"
    )
    clients.check(restart=max(back))
    assert max(back) < 1 + SLACK
    prunes_by_itself(g)
    g.signal("TERM")
    assert g.ended() == 0
    assert g.complaints() == []


@pytest.mark.timeout(1200)
@some_worker_class
def test_dying_workers_do_not_affect_others(
    gunicorn: StartGunicorn, arguments: tuple[str, ...], seed: int, figure: Figure
) -> None:
    """By kill -9, by Gunicorn's own SIGABRT, by max_requests, by a lower number of workers."""
    rnd = random.Random(seed)
    # On a busy machine a worker may report nothing for 30 s, and Gunicorn would kill it: hence the timeout.
    options = ("--workers", "4", "--preload", "--max-requests", "100" if FULL else "20", "--timeout", "300")
    g = gunicorn(*arguments, *options).booted(4)
    server, deaths = g.server, (500 if "sync" in arguments else 100) if FULL else 6
    os.kill(max(g.hearing()), signal.SIGKILL)  # without clients: it breaks off nothing, and cannot come too late
    sent: Counter[tuple[int, str]] = wait_for(g.killed, "the line in the log")
    with Load(g, prune_every=10) as clients:
        for death in range(deaths):
            time.sleep(rnd.random() * 0.1)
            if death % 10 == 5:
                g.signal("TTIN")
                wait_for(lambda: len(g.workers()) >= 5, "one worker more")
                g.signal("TTOU")
            workers = wait_for(lambda: len(found := g.hearing()) > 1 and found, "a worker and another")
            pid, number = rnd.choice([*workers]), rnd.choice([signal.SIGKILL, signal.SIGABRT])
            with suppress(ProcessLookupError):  # it has reached max_requests meanwhile
                os.kill(pid, number)
                sent[pid, number.name] += 1
        wait_for(lambda: "Autorestarting worker" in g.log.read_text(), "max_requests")
    wait_for(lambda: len(g.hearing()) == len(g.workers()) == 4, "all workers, the dead ones reaped")
    killed = g.killed()
    kills = Counter({key: count for key, count in sent.items() if "SIGKILL" in key})  # at SIGABRT most workers exit
    figure(f"{sent.total()} signals, {(killed & kills).total()} of {kills.total()} kills in the log, {clients}")
    clients.check(broken=(sent.total() - 1) * breaks(arguments))
    # SIGTERM is TTOU's, repeated until the worker is gone: it ends one at once that is booting or exiting.
    assert {name for _, name in killed - sent} <= {"SIGTERM"}, "other workers died too"
    assert g.server == server
    g.signal("TERM")
    assert g.ended() == 0
    g.nothing_left()
    assert g.tracebacks() <= {"SystemExit: 1"}, "of requests that SIGABRT broke off"


@pytest.mark.parametrize("how", ["CONT", "KILL"])
def test_a_worker_stopped_with_the_lock_is_named(gunicorn: StartGunicorn, how: str, figure: Figure) -> None:
    g = gunicorn("--timeout", "100", options="lock_timeout=0.5").booted()
    g.get("/write/ada/1")
    with ThreadPoolExecutor(1) as pool:
        frozen = pool.submit(g.ask, "/freeze")
        pid = wait_for(lambda: next((pid for pid in g.workers() if state(pid) == "T"), 0), "the worker's stop")
        end, waits = time.monotonic() + (10 if FULL else 2), []
        while time.monotonic() < end:
            begun = time.monotonic()
            answer = g.ask("/write/ada/2")
            waits.append(time.monotonic() - begun)
            assert answer.status == 503
            assert f"process {pid} (T (stopped)) holds it" in answer.body
            assert g.get("/read/ada")["result"] == 1
        wait_for(
            lambda: f"process {pid} (T (stopped)) holds the store's lock" in g.log.read_text(), "the server's log line"
        )
        os.kill(pid, getattr(signal, f"SIG{how}"))
        recovery = seconds(lambda: wait_for(lambda: g.ask("/write/ada/3").status == 200, "the recovery"))
        if how == "CONT":
            assert frozen.result().status == 200
    figure(f"{how}: told after {max(waits):.2f} s of 0.5, writes again after {recovery:.2f} s")
    assert max(waits) < 0.5 + SLACK
    assert g.get("/read/ada")["result"] == 3
    assert g.ask("/prune").status == 200


@some_worker_class
def test_a_stopped_server_is_replaced(gunicorn: StartGunicorn, arguments: tuple[str, ...], figure: Figure) -> None:
    # The watch looks at the heartbeat less often than it changes, so it asks no server that runs.
    soon = HURRY + "from shmstore.client import watch; watch._CHECK_INTERVAL = 0.5\n"  # seconds
    g = gunicorn(*arguments, conf="" if FULL else soon).booted()
    server = g.server or 0
    with Load(g) as clients, ThreadPoolExecutor(1) as pool:
        # A worker that connects to the stopped server for the first time would wait too, before it continues in place.
        wait_for(lambda: len(clients.workers) == 3, "an answer of each worker")
        stop(server)
        replaced = pool.submit(seconds, lambda: wait_for(lambda: serving(g, server), "its replacement"))
        begun = time.monotonic()
        answer = g.ask("/prune")
        told = time.monotonic() - begun
        replacement = replaced.result()
        assert g.ask("/prune").status == 200
    figure(f"told after {told:.1f} s, replaced after {replacement:.1f} s, {clients.acknowledged} changes meanwhile")
    clients.check()
    assert (answer.status, answer.json["result"][0]) == (503, True), answer
    assert told < 2 + SLACK
    assert replacement < 5 + SLACK
    assert not alive(server)
    assert "Traceback" not in g.log.read_text()


def test_a_stopped_server_does_not_delay_the_end(gunicorn: StartGunicorn, figure: Figure) -> None:
    g = gunicorn().booted()
    g.get("/write/ada/1")
    server = g.server or 0
    stop(server)
    g.signal("TERM")
    end = seconds(lambda: g.process.wait(60))
    figure(f"gone after {end:.1f} s")
    assert end < 5 + SLACK
    wait_for(lambda: not alive(server), "the server's end: no process would ever continue it")
    assert gunicorn().booted().get("/read/ada")["result"] == 1


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["TERM", "INT", "QUIT"])
def test_running_requests_can_write_during_a_shutdown(gunicorn: StartGunicorn, name: str, figure: Figure) -> None:
    """
    As systemd ends a service.

    INT and QUIT tell Gunicorn to drop what is under way, and may hang its workers: gthread's handler of QUIT, which the
    master sends after INT, waits for a lock that the interrupted one for INT holds. The rest is the same.
    """
    who, saved, slowest = [f"client{i}" for i in range(20)], 0, 0.0
    for _ in range(10 if FULL else 1):
        g = gunicorn("-k", "gthread", "--threads", str(len(who))).booted()  # one worker may get all requests
        server, workers = g.server or 0, g.workers()
        with ThreadPoolExecutor(len(who)) as pool:
            answers = [pool.submit(g.ask, f"/late/{sid}") for sid in who]
            wait_for(lambda: all((g.place / f"{sid} arrived").exists() for sid in who), "the requests")  # noqa: B023
            os.kill(server, getattr(signal, f"SIG{name}"))  # it is in Gunicorn's service, not in its process group
            g.group(name)
            wait_for(lambda: f"Handling signal: {name.lower()}" in g.log.read_text(), "the shutdown")  # noqa: B023
            (g.place / "go").touch()
            took = seconds(g.ended)
        told = [sid for sid, answer in zip(who, answers, strict=True) if not answer.exception()]
        if name == "TERM":
            assert told == who, g.log.read_text()
            assert g.complaints() == []
        assert all(answers[who.index(sid)].result().status == 200 for sid in told)
        assert not any(alive(pid) for pid in (server, *workers))
        g.nothing_left()
        assert "Traceback" not in g.log.read_text()
        again = gunicorn().booted()
        there = [sid for sid in who if again.get(f"/read/{sid}")["result"] == 1]
        assert {*there} >= {*told}
        with connect("shop", directory=g.store_dir) as store:
            store.clear()
        again.signal("TERM")
        again.ended()
        saved, slowest = saved + len(there), max(slowest, took)
    figure(f"{name}: {saved} saved, gone after {slowest:.1f} s at most")
    assert slowest < 5 + 2 + SLACK, "graceful_timeout and 2 s"


@pytest.mark.timeout(600)
@some_worker_class
def test_reloads_cause_no_errors(gunicorn: StartGunicorn, arguments: tuple[str, ...], figure: Figure) -> None:
    g = gunicorn(*arguments).booted()
    server, reloads = g.server, 10 if FULL else 2
    with Load(g, prune_every=10) as clients:
        for _ in range(reloads):
            old = g.workers()
            g.signal("HUP")
            wait_for(lambda: len(g.hearing()) == 3 and g.are_gone(old), "new workers")  # noqa: B023
    figure(f"{reloads} reloads, {clients.acknowledged} changes, {len(clients.failed)} failed")
    clients.check()
    assert g.server == server
    assert g.complaints() == []
