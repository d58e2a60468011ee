"""The benchmark suite runs, names what it could not measure, and leaves nothing behind. No figure is checked."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from processes import ROOT
from redis_servers import RedisServer

from benchmarks import __main__ as suite
from benchmarks import (
    adapters,
    applications,
    bars,
    charts,
    engines,
    eviction_quality,
    figures,
    load,
    peers,
    tables,
    web,
)
from benchmarks.figures import SMALLEST
from shmstore import RedisStore

KINDS_IN_PROCESS = ("signed cookie", "shmstore")


@pytest.fixture
def nothing_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without the servers and packages of the peers."""
    monkeypatch.setattr(peers, "program", lambda *names: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


def test_the_smallest_run(tmp_path: Path) -> None:
    """The parts that need no peers, from the command line to the files that are written."""
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "benchmarks",
        "--smallest",
        "--json",
        tmp_path / "results" / "a.json",
    ]
    command += ["--svg", tmp_path / "svg", "--markdown", tmp_path / "a.md"]
    with subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:  # fmt: skip
        printed, errors = process.communicate()
    assert process.returncode == 0, errors
    assert not [*Path("/dev/shm").glob(f"shmstore-bench-{process.pid}-*")], "left behind"
    results = json.loads((tmp_path / "results" / "a.json").read_text())
    assert {"about", "micro", "many", "memory", "times", "eviction"} <= results.keys()
    assert set(results["micro"]["operations"]["get"]) == set(adapters.NO_PEERS)
    assert "== Targets" in printed
    assert "### Operations" in (tmp_path / "a.md").read_text()
    svg = ElementTree.fromstring((tmp_path / "svg" / "operations.svg").read_text())
    assert svg.tag.endswith("svg")
    again = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--from", tmp_path / "results" / "a.json"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert again.stdout == printed


def test_a_job_that_fails_loses_no_results_and_can_be_measured_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(plan: figures.Plan) -> figures.Results:
        raise RuntimeError("of a job")

    file = tmp_path / "a.json"
    monkeypatch.setattr(suite, "ALONE", {"micro": lambda plan: {"of": "micro"}, "many": fail})
    with pytest.raises(RuntimeError, match="of a job"):
        suite.measure("smallest", [], [], None, file)
    first = json.loads(file.read_text())["about"]
    monkeypatch.setattr(suite, "ALONE", {"micro": fail, "many": lambda plan: {"of": "many"}})
    monkeypatch.setattr(suite, "about", lambda: {"date": "later", "commit": "another", "engine": "python"})
    results = suite.measure("smallest", ["many"], [], None, file)
    assert {name: results["about"][name] for name in ("date", "commit", "engine")} == {
        name: first[name] for name in ("date", "commit", "engine")
    }
    assert results["about"]["took"] > first["took"]
    assert "many was measured again: later, commit another, smallest run, engine: python" in tables.heading(
        results["about"]
    )
    assert results == json.loads(file.read_text())
    assert (results["micro"], results["many"]) == ({"of": "micro"}, {"of": "many"})


@pytest.mark.usefixtures("nothing_on_path")
def test_missing_peers_are_named(tmp_path: Path) -> None:
    kinds = [kind for kind in adapters.KINDS if kind not in adapters.NO_PEERS]
    with adapters.addresses(tmp_path, 10, kinds) as (found, missing):
        assert found == {}
        assert missing.keys() == set(kinds)
    with web.backing(tmp_path, applications.UNDER_GUNICORN) as (stores, gone):
        assert applications.REDIS in gone
        assert applications.MEMCACHED in gone
        assert applications.REDIS not in stores
        assert applications.REDIS_STORE in gone
    with pytest.raises(peers.Missing, match="uwsgi: not on PATH"):
        web.command("uwsgi", applications.NONE, tmp_path, str(tmp_path / "a"))
    result = eviction_quality.run(SMALLEST)
    assert "redis-server" in result["missing"]["Redis, allkeys-lru"]

    results = {"micro": {"operations": {}, "missing": missing}, "web": {"missing": gone, "cannot": {"x": "why"}}}
    rows = dict(tables.missing(results))
    assert rows.keys() >= {*kinds, applications.MEMCACHED, "x: cannot"}
    with pytest.raises(peers.Missing, match="memcached: not on PATH"), peers.memcached_server(tmp_path):
        pass


def test_each_target_has_a_line_even_without_measurements() -> None:
    lines = bars.targets({})
    assert len(lines) > 12
    assert {line.verdict for line in lines} == {"-"}


def test_redis_store_is_compared_with_flask_session_on_the_same_server() -> None:
    row = {applications.REDIS_STORE: {"cost": [60, 1, 99]}, applications.REDIS: {"cost": [100, 1, 99]}}
    results = {"web": {"servers": {"gunicorn, sync": {"read": row, "login": row}}}}
    [line] = [each for each in bars.targets(results) if "RedisStore" in each.what]
    assert (line.wanted, line.found, line.verdict) == ("<= 0.5 / 0.9 / 0.9", "0.6 / - / 0.6", "NO / - / yes")


def test_each_job_has_a_target_or_a_table() -> None:
    """The results of every job, as they come from a run of all of them with a value in each place."""
    costs = {f"{each}, {kind}": [9.0, 8.0, 10.0] for each in ("unused", *bars.WORKLOADS) for kind in KINDS_IN_PROCESS}
    costs["none"] = [5.0, 4.0, 6.0]
    each = dict.fromkeys(bars.WORKLOADS, 4.0)
    results: figures.Results = {
        "in process": costs,
        "asgi": {"base": 100.0, "costs": {"signed": each, "shmstore": dict.fromkeys(bars.WORKLOADS, 2.0)}},
        "django": {"version": "5.2", "costs": {"shmstore": each, "db (SQLite)": each}},
        "engines": {
            "operations": {"get": {engines.C: [1.0, 1, 1], engines.PYTHON: [5.0, 5, 5]}},
            "requests": {engines.PYTHON: costs},
            "earlier": {"get": 1.1, "encode alone": 9.0},
        },
    }
    made = {table.name: table for table in tables.tables(results)}
    assert [row[1:] for row in made["asgi"].rows] == [["4 (2.0x)"] * 3, ["2"] * 3]
    assert made["django"].rows[1] == ["db (SQLite)", *["4 (1.0x)"] * 3]
    assert made["engines"].rows[:2] == [["get", "1.0", "5.0"], ["Flask in one process: read", "-", "4.0"]]
    found = {line.what: line.found for line in bars.targets(results)}
    assert found[f"Python engine, any operation: times its cost at commit {engines.BASELINE}"] == "1.1"
    assert "2 / 2 / 2" in found.values()


def test_the_application_on_redis(redis_server: RedisServer) -> None:
    app = applications.make_app(applications.REDIS_STORE, f"{redis_server.url}?prefix=benchmark:")
    client = app.test_client()
    assert client.get("/login?who=7&size=750").text == "7"
    assert [client.get("/write?who=7").text for _ in range(2)] == ["7 1 7", "7 2 7"]
    assert client.get("/read?who=7").text == "7 7"
    with RedisStore.from_url(f"{redis_server.url}?prefix=benchmark:") as store:
        assert [session["count"] for session in store.all().values()] == [2]
        store.clear()


def test_tables_are_replaced_in_a_document() -> None:
    about: dict[str, object] = {
        "servers": {},
        "packages": {},
        "date": "today",
        "commit": "1",
        "took": 1,
        "configuration": "quick",
    }
    about |= {
        "processor": "p",
        "engine": "c",
        "cores": 2,
        "memory": 2**30,
        "kernel": "k",
        "python": "3",
        "load before": 0,
    }
    old = (
        "# Title\n\n<!-- table targets -->\nold\n<!-- end -->\n\nText.\n\n<!-- table growth -->\nolder\n<!-- end -->\n"
    )
    once = tables.document(old, {"about": about})
    assert once.startswith("# Title\n\n<!-- table targets -->\n\n| what | target |")
    assert "old\n" not in once
    assert once.endswith("\n<!-- end -->\n\nText.\n\n<!-- table growth -->\nolder\n<!-- end -->\n")
    assert tables.document(once, {"about": about}) == once


def test_a_target_is_reached_or_missed() -> None:
    assert [bars.Bar(2, value).reached for value in (2.0, 1.9, None)] == [True, False, None]
    assert [bars.Bar(2, value, least=False).reached for value in (2.0, 2.1)] == [True, False]
    line = bars.Target("a", [bars.Bar(6, 7.04), bars.Bar(10, 11.2, least=False, unit=" ms")])
    assert (line.wanted, line.found, line.verdict) == (">= 6 / <= 10 ms", "7.04 / 11.2 ms", "yes / NO")


@pytest.mark.parametrize("size", [100, 750, 4096, 65536])
def test_sessions_have_the_given_size(size: int) -> None:
    assert abs(len(adapters.encode(figures.sample(size))) - size) <= max(20, size // 100)


def test_popular_sessions_are_visited_often() -> None:
    draws = figures.zipf(1000, random.Random(1), 10_000)
    assert draws.count(0) > 5 * draws.count(100)
    assert max(draws) < 1000


def test_the_end_of_an_answer_is_found() -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc"
    assert load.whole(answer, False) == len(answer)
    assert load.whole(answer + b"more", False) == len(answer)
    assert load.whole(answer[:-1], False) == 0
    assert load.whole(b"HTTP/1.1 200 OK\r\n\r\nabc", False) == 0
    assert load.whole(b"HTTP/1.1 200 OK\r\n\r\nabc", True) == 22


def test_charts_are_well_formed_and_have_both_colours() -> None:
    groups = {"get": {"shmstore": [1.0, 0.5, 2.0], "b": [30.0, 20.0, 40.0]}}
    svg = charts.chart("A & B", ["note"], [charts.Panel("time", "us", groups, log=True)], "shmstore")
    assert ElementTree.fromstring(svg).findtext("{http://www.w3.org/2000/svg}title") == "A & B"
    assert "prefers-color-scheme: dark" in svg


def test_a_chart_shows_throughput_and_cpu_of_what_was_measured() -> None:
    row = {kind: {"of none": [0.9, 0.8, 1.0], "cost": [42.0, 40.0, 44.0]} for kind in applications.UNDER_GUNICORN}
    del row[applications.MEMCACHED]
    results = {"about": {"date": "2026-01-02 03:04"}, "web": {"servers": {"gunicorn, sync": {"read": row}}}}
    made = charts.charts(results)
    assert made.keys() == {"session-cost.svg"}
    texts = [text.text for text in ElementTree.fromstring(made["session-cost.svg"]).iter() if text.text]
    assert texts.count("90 %") == texts.count("42 us") == len(charts.SHOWN) - 1
    assert "Gunicorn's stash" in texts
    assert applications.MEMCACHED not in texts


def test_percentiles_and_figures() -> None:
    assert figures.figure([3, 1, 2]) == [2, 1, 3]
    assert figures.percentile([1, 2, 3, 4], 0.5) == 3
    assert figures.percentile([1, 2, 3, 4], 1.0) == 4
