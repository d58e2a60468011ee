"""The Prometheus collector: every process exports the same numbers, and they are right."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from gunicorns import StartGunicorn
from processes import ROOT, Run, Start, wait_for
from prometheus_client import CollectorRegistry, generate_latest
from redis_servers import RedisServer

from shmstore import RedisStore, Store, StoreManager, StoreUnavailable, connect
from shmstore.contract import ArenaStore
from shmstore.engine.arena import Arena
from shmstore.engine.header import USED_BLOCKS
from shmstore.errors import RecordTooLarge, StoreTimeout
from shmstore.ipc.directory import StoreFiles
from shmstore.metrics import StoreCollector
from shmstore.store.stats import stats_of
from shmstore.system.clock import boottime_ns

APP = """
import os
from prometheus_client import CollectorRegistry, generate_latest
from shmstore.attach import attach_or_start
from shmstore.metrics import StoreCollector

registry = CollectorRegistry()
registry.register(StoreCollector(lambda: attach_or_start("shop"), "shop"))

def app(environ, start_response):
    path = environ["PATH_INFO"].strip("/")
    if path == "metrics":
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"# process %d\\n" % os.getpid(), generate_latest(registry)]
    store = attach_or_start("shop")
    store.set(path, {"visits": (store.get(path) or {"visits": 0})["visits"] + 1})
    start_response("200 OK", [("Content-Type", "application/json")])
    return [b'{"pid": %d}' % os.getpid()]
"""


class Scrape:
    """Reads the samples that a collector exports now."""

    def __init__(self, collector: StoreCollector) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(collector)

    def __call__(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"shmstore_{name}", {"store": "shop", **labels})

    def text(self) -> str:
        return generate_latest(self.registry).decode()


@pytest.fixture
def manager(manage: Start) -> StoreManager:
    return manage(memory=2**20, check_period=None, max=20, lock_timeout=30)


@pytest.fixture
def store(manager: StoreManager) -> Iterator[ArenaStore]:
    with manager.store() as store:
        yield store


@pytest.fixture
def scrape(store: Store) -> Scrape:
    return Scrape(StoreCollector(store, "shop"))


def test_operations_are_counted(store: Store, scrape: Scrape) -> None:
    for number in range(30):
        store.set(f"s{number}", {"n": number}, owner="ada" if number < 5 else None)
    assert store.get("s29") == {"n": 29}
    assert store.get("nobody") is None
    store.touch("s29", ttl=60)
    store.destroy("s28")
    store.set("late", {}, ttl=0)
    with pytest.raises(RecordTooLarge):
        store.set("large", {"x": "x" * 2**20})
    assert scrape("up") == 1
    assert scrape("hits_total") == 1
    assert scrape("misses_total") == 1
    assert scrape("sets_total") == 31
    assert scrape("touches_total") == 1
    assert scrape("destroys_total") == 1
    assert scrape("evicted_total", owned="no") == 10
    assert scrape("evicted_total", owned="yes") == 0
    assert scrape("refused_total") == 1
    assert scrape("sessions", state="live") == 19
    assert scrape("sessions", state="expired") == 1
    assert scrape("owned_sessions") == 5
    assert scrape("used_blocks") == store.arena.cells[USED_BLOCKS]
    assert scrape("memory_bytes") == store.arena.geometry.size
    assert store.prune() == 1
    assert scrape("expired_total") == 1
    assert scrape("sessions", state="expired") == 0
    assert scrape("server_restarts_total") == 0
    assert scrape("rebuilds_total") == 0


def test_waits_for_the_lock_are_counted(
    store: Store, store_dir: Path, run: Run, scrape: Scrape, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.set("a", {})
    holder = run(
        """
import sys
import shmstore
store = shmstore.connect("shop", directory=sys.argv[1])
arena = store.arena
arena.lock(5)
print("held", flush=True)
sys.stdin.readline()
arena.unlock()
sys.stdin.read()
""",
        store_dir,
    )
    assert holder.stdin
    assert holder.stdout
    assert holder.stdout.readline() == "held\n"
    told, sleep, naps = holder.stdin, time.sleep, list[float]()

    def sleep_and_end_it(pause: float) -> None:
        naps.append(time.monotonic())
        if naps[-1] - naps[0] > 0.1:
            told.write("enough\n")
            told.flush()
        sleep(pause)

    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", sleep_and_end_it)  # a wait for the lock calls it again and again
        store.set("a", {})
    store.get("a")  # a process that only writes publishes its counters after a while
    assert scrape("lock_wait_seconds_count") == 1
    assert scrape("lock_wait_seconds_bucket", le="0.01") == 0
    assert scrape("lock_wait_seconds_bucket", le="+Inf") == 1
    waited = scrape("lock_wait_seconds_sum")
    assert waited is not None
    assert 0.01 < waited < 20


def test_waits_of_a_process_that_only_writes_are_exported(store: Store, scrape: Scrape) -> None:
    arena = store.arena
    arena.counters._waited(0.05)
    assert scrape("lock_wait_seconds_count") == 0
    for number in range(8):
        store.set("a", {"n": number})
    assert scrape("lock_wait_seconds_count") == 1


def test_waits_of_the_server_are_exported(manage: Start, store_dir: Path) -> None:
    with (
        manage(check_period=None, lock_timeout=0.2) as manager,
        manager.store() as store,
        connect("shop", directory=store_dir, in_place=False) as through,
    ):
        try:
            store.arena.lock(5)
            with pytest.raises(StoreTimeout):
                through.set("a", {})
        finally:
            store.arena.unlock()
        scrape = Scrape(StoreCollector(store, "shop"))
        wait_for(lambda: scrape("lock_wait_seconds_count") == 1, "the server's count")


def test_counts_of_dead_processes_are_kept(store: Store, store_dir: Path, run: Run, scrape: Scrape) -> None:
    script = """
import sys
import shmstore
store = shmstore.connect("shop", directory=sys.argv[1])
store.get("nobody")
store.arena.counters._waited(0.5)
"""
    for _ in range(3):
        assert run(script, store_dir).wait(30) == 0
    assert scrape("misses_total") == 3
    assert scrape("lock_wait_seconds_count") == 3
    assert scrape("lock_wait_seconds_sum") == 1.5


def test_server_restarts_and_repairs_are_exported(manager: StoreManager, store: Store, scrape: Scrape) -> None:
    store.set("a", {"n": 1})
    os.kill(store.stats().server_pid, signal.SIGKILL)
    wait_for(lambda: scrape("server_restarts_total") == 1, "the restart")
    arena = store.arena
    arena.cells[arena.table.next + arena.find(arena.table.key_at(arena.table.live_slots()[0]))] = 2**60
    arena.cells[arena.table.prev] = 2**60
    store.set("b", {"n": 2})
    store.set("a", {"n": 3})
    assert scrape("rebuilds_total") == 1
    assert scrape("server_restarts_total") == 1
    assert scrape("hits_total") is not None


def test_a_server_that_was_shut_down_is_exported_as_down(manage: Start, store_dir: Path) -> None:
    for end in (StoreManager.shutdown, StoreManager.detach, StoreManager.detach):
        manager = manage()
        with manager.store() as store:
            assert store.stats().server_restarts == 0
            wait_for(lambda: store.stats().server_uptime > 0, "its beginning")
        end(manager)
        wait_for(lambda: StoreFiles.of("shop", store_dir).server() is None, "its end")
        arena = Arena.open(store_dir / "shop" / "arena")
        assert stats_of(arena, boottime_ns()).server_uptime == 0
        arena.close()


def test_an_unreachable_store_is_exported_as_down() -> None:
    def gone() -> Store:
        raise StoreUnavailable("no")

    scrape = Scrape(StoreCollector(gone, "shop"))
    assert scrape("up") == 0
    assert scrape("sessions", state="live") is None
    with Store(memory=2**20) as store:
        closed = Scrape(StoreCollector(store, "shop"))
        assert closed("up") == 1
    assert closed("up") == 0


def test_one_collector_exports_several_stores() -> None:
    with Store(memory=2**20) as shop, Store(memory=2**20) as other:
        other.set("a", {})
        registry = CollectorRegistry()
        registry.register(StoreCollector({"shop": shop, "other": lambda: other}))
        text = generate_latest(registry).decode()
        lines = [line for line in text.splitlines() if line.startswith("# TYPE")]
        assert len(lines) == len(set(lines))
        assert registry.get_sample_value("shmstore_sets_total", {"store": "shop"}) == 0
        assert registry.get_sample_value("shmstore_sets_total", {"store": "other"}) == 1
        shop.close()
        assert registry.get_sample_value("shmstore_up", {"store": "shop"}) == 0
        assert registry.get_sample_value("shmstore_up", {"store": "other"}) == 1
        with pytest.raises(ValueError, match="Duplicated"):  # two samples of one name are not valid
            registry.register(StoreCollector(other, "third"))


def test_a_failing_store_function_does_not_affect_other_stores(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    def fails() -> Store:
        raise OSError("no such host")

    registry = CollectorRegistry()
    registry.register(StoreCollector({"broken": fails, "shop": store}))
    assert registry.get_sample_value("shmstore_up", {"store": "broken"}) == 0
    assert registry.get_sample_value("shmstore_up", {"store": "shop"}) == 1
    assert "store 'broken': the function that returns it" in caplog.text


def test_expiry_is_judged_by_the_clock_of_the_store() -> None:
    now = boottime_ns()
    with Store(memory=2**20, clock=lambda: now, check_period=None) as store:
        registry = CollectorRegistry()
        registry.register(StoreCollector(store))
        store.set("a", {}, 10)
        now += 20 * 10**9
        assert registry.get_sample_value("shmstore_sessions", {"store": "sessions", "state": "expired"}) == 1


def test_registering_opens_no_store() -> None:
    CollectorRegistry().register(StoreCollector(lambda: pytest.fail("opened")))


def test_every_worker_exports_the_same_figures(gunicorn: StartGunicorn) -> None:
    g = gunicorn().booted()
    for number in range(40):
        g.get(f"/visitor{number % 7}")
    told: dict[str, str] = {}
    deadline = time.monotonic() + 60
    while len(told) < 3 and time.monotonic() < deadline:
        process, _, metrics = g.ask("/metrics").body.partition("\n")
        told[process] = "\n".join(line for line in metrics.splitlines() if "uptime" not in line)
    assert len(told) == 3
    assert len(set(told.values())) == 1
    some = next(iter(told.values()))
    assert 'shmstore_hits_total{store="shop"} 33.0' in some
    assert 'shmstore_misses_total{store="shop"} 7.0' in some


def test_the_dashboard_shows_the_exported_metrics(scrape: Scrape) -> None:
    dashboard = json.loads((Path(ROOT) / "deploy" / "grafana-dashboard.json").read_text())
    told = set(re.findall(r"^(shmstore_\w+)", scrape.text(), re.MULTILINE))
    told.add("shmstore_snapshot_age_seconds")  # of a store that has a snapshot
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    shown = {name for each in expressions for name in re.findall(r"shmstore_\w+", each)}
    assert shown <= told
    assert all(each.count('{store="$store", instance=~"$instance"}') == each.count("shmstore_") for each in expressions)
    assert {"datasource", "store", "instance"} == {each["name"] for each in dashboard["templating"]["list"]}
    assert {name for name in told if not name.endswith(("_created", "_sum", "_count"))} <= shown | {
        "shmstore_dispose_errors_total",
        "shmstore_unreadable_total",
    }
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_the_documented_alerts_use_exported_metrics(scrape: Scrape) -> None:
    page = (Path(ROOT) / "docs" / "operate" / "metrics.md").read_text()
    told = set(re.findall(r"^(shmstore_\w+)", scrape.text(), re.MULTILINE))
    told.add("shmstore_snapshot_age_seconds")  # of a store that has a snapshot
    alerts = page.split("## Alerts")[1].split("```")[1]
    used = set(re.findall(r"shmstore_\w+", alerts))
    assert len(used) > 5
    assert used <= told


def test_the_age_and_failures_of_snapshots_are_exported(manage: Start, tmp_path: Path) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    with manage(snapshot=place / "shop.snapshot", snapshot_period=0.02) as manager, manager.store() as store:
        scrape = Scrape(StoreCollector(store, "shop"))
        wait_for(lambda: scrape("snapshot_age_seconds") is not None, "a snapshot")
        assert scrape("snapshot_failures") == 0
        place.rename(tmp_path / "away")
        store.set("a", {})
        wait_for(lambda: scrape("snapshot_failures"), "a failure")
    with Store(memory=2**20) as private:
        assert Scrape(StoreCollector(private, "shop"))("snapshot_age_seconds") is None


def test_on_redis_all_processes_are_one_series(redis_server: RedisServer) -> None:
    with RedisStore.from_url(f"{redis_server.url}?prefix=metrics:") as store:
        scrape = Scrape(StoreCollector(store, "shop"))
        before = scrape("sets_total") or 0
        store.set("a", {})
        child = os.fork()
        if not child:
            store.set("a", {})
            store.set("a", {})
            store.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert scrape("sets_total") == before + 3
        assert "process=" not in scrape.text()
        assert scrape("expired_total") is not None  # of the whole server
        assert scrape("sessions", state="live") == 1
