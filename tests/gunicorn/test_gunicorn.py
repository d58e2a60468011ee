"""The hooks under real Gunicorn, with real signals: what happens to the server and to the sessions."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from gunicorns import StartGunicorn
from processes import HURRY, ROOT, Run, alive, wait_for
from sampling import some

from shmstore.errors import ConfigError
from shmstore.gunicorn import Hooks
from shmstore.ipc.directory import StoreFiles
from shmstore.manager import connect

APP = """
import json, os
from shmstore.attach import attach_or_start

def app(environ, start_response):
    store = attach_or_start("shop")
    path = environ["PATH_INFO"].strip("/")
    if path:
        visits = (store.get(path) or {"visits": 0})["visits"] + 1
        store.set(path, {"visits": visits})
    else:
        visits = None
    life = store.load(path).remaining if path else None
    answer = {"pid": os.getpid(), "uid": os.geteuid(), "visits": visits, "life": life, "pruned": store.prune(),
              "server": store.stats().server_pid, "length": len(store)}
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(answer).encode()]
"""


@pytest.mark.processes("executed")
@some(
    "arguments",
    {
        "sync": (),
        "preload": ("--preload",),
        "gthread": ("-k", "gthread", "--threads", "4"),
        "gevent": ("-k", "gevent"),
    },
    2,
)
def test_all_workers_see_every_session(gunicorn: StartGunicorn, arguments: tuple[str, ...]) -> None:
    g = gunicorn(*arguments).booted()
    answers = [g.get("/ada") for _ in range(30)]
    assert [answer["visits"] for answer in answers] == list(range(1, 31))
    assert len({answer["server"] for answer in answers}) == 1
    g.signal("TERM")
    assert g.ended() == 0
    assert g.complaints() == []


@pytest.mark.parametrize("conf", ["import gevent.monkey; gevent.monkey.patch_all()\nworker_class = 'gevent'\n"])
def test_a_configuration_that_patches_gevent_first_boots(gunicorn: StartGunicorn, conf: str) -> None:
    g = gunicorn(conf=conf).booted()
    assert [g.get("/ada")["visits"] for _ in range(5)] == [1, 2, 3, 4, 5]
    server = g.server or 0
    os.kill(server, signal.SIGKILL)
    wait_for(lambda: g.server not in (None, server), "the restart")
    assert g.get("/ada")["visits"] == 6
    assert g.get("/ada")["pruned"] == 0
    g.signal("TERM")
    assert g.ended() == 0


@pytest.mark.processes("executed")
def test_without_hooks_the_first_worker_starts_the_server(tmp_path: Path, gunicorn: StartGunicorn) -> None:
    g = gunicorn(conf=HURRY + "del on_starting, on_reload, on_exit\n").booted()
    assert [g.get("/ada")["visits"] for _ in range(10)] == list(range(1, 11))
    g.signal("TERM")
    assert g.ended() == 0


def test_lambdas_of_the_configuration_are_used_by_all_processes(gunicorn: StartGunicorn, store_dir: Path) -> None:
    g = gunicorn().booted()
    assert 90 < g.get("/ada")["life"] <= 100
    with connect("shop", directory=store_dir, in_place=False) as store:
        store.set("bob", {})
        loaded = store.load("bob")
        assert loaded is not None
        assert 90 < loaded.remaining <= 100


@pytest.mark.parametrize("name", ["TERM", "INT", "QUIT"])
@pytest.mark.parametrize("whom", ["signal", "group"])
def test_gunicorn_exits_cleanly_and_the_sessions_stay(
    gunicorn: StartGunicorn, name: str, whom: str, store_dir: Path
) -> None:
    g = gunicorn().booted()
    g.get("/ada")
    server = g.server
    assert server
    getattr(g, whom)(name)
    assert g.ended() == 0
    assert not alive(server)
    assert not (store_dir / "shop" / "socket").exists()
    assert g.complaints() == []
    again = gunicorn().booted()
    assert again.get("/ada")["visits"] == 2


def test_without_persistence_no_files_are_left(gunicorn: StartGunicorn, store_dir: Path) -> None:
    g = gunicorn(options="persist=False").booted()
    g.get("/ada")
    g.signal("TERM")
    assert g.ended() == 0
    wait_for(lambda: not (store_dir / "shop").exists(), "the removal")


def test_hup_applies_changed_options_and_keeps_the_server(gunicorn: StartGunicorn) -> None:
    g = gunicorn().booted()
    g.get("/ada")
    server, old = g.server, g.workers()
    g.configure("max=2", "DAY = 1000\n")
    g.signal("HUP")
    wait_for(lambda: len(g.workers()) == 3 and g.are_gone(old), "new workers")
    for who in "abcd":
        answer = g.get(f"/{who}")
        assert answer["length"] <= 2
        assert 900 < answer["life"] <= 1000
    assert g.server == server


def test_hup_logs_options_that_take_effect_later(gunicorn: StartGunicorn) -> None:
    g = gunicorn().booted()
    g.get("/ada")
    old = g.workers()
    conf = g.place / "gunicorn.conf.py"
    # Another length too: Python does not recompile a file with the same second and length.
    conf.write_text(conf.read_text().replace("memory=2**20", "memory=4 * 2**20"))
    g.signal("HUP")
    wait_for(lambda: len(g.workers()) == 3 and g.are_gone(old), "new workers")
    assert g.get("/ada")["visits"] == 2
    log = g.log.read_text()
    assert "keeps its memory until" in log, log
    assert "keeps its max" not in log, log


def test_hup_with_an_unusable_snapshot_keeps_the_previous_one(gunicorn: StartGunicorn, tmp_path: Path) -> None:
    path = tmp_path / "shop.snapshot"
    g = gunicorn(options=f"snapshot={str(path)!r}").booted()
    g.get("/ada")
    old = g.workers()
    g.configure("snapshot='/nowhere/at/all/shop.snapshot'")
    g.signal("HUP")
    wait_for(lambda: len(g.workers()) == 3 and g.are_gone(old), "new workers")
    assert "keeps the options it had: no snapshot can be saved: there is no directory" in g.log.read_text()
    g.signal("TERM")
    assert g.ended() == 0
    assert path.exists()


def test_killed_workers_lose_nothing(gunicorn: StartGunicorn) -> None:
    g = gunicorn().booted()
    server = g.get()["server"]
    for visit in range(1, 16):
        answer = g.get("/ada")
        assert answer["visits"] == visit
        if visit % 3 == 0:
            os.kill(answer["pid"], signal.SIGKILL)
            wait_for(lambda: not alive(answer["pid"]), "the worker's end")  # noqa: B023
    assert g.server == server


def test_the_server_survives_workers_that_exit(gunicorn: StartGunicorn) -> None:
    """F4: a worker's atexit killed the server of a manager that was its parent's daemon."""
    g = gunicorn("--max-requests", "3").booted()
    server = g.get()["server"]
    assert [g.get("/ada")["visits"] for _ in range(25)] == list(range(1, 26))
    assert g.server == server
    assert len(g.pids) > 5
    assert g.complaints() == []


def test_a_killed_server_is_restarted_without_an_error(gunicorn: StartGunicorn) -> None:
    g = gunicorn().booted()
    g.get("/ada")
    for visit in range(2, 6):
        server = g.server
        os.kill(server or 0, signal.SIGKILL)
        assert g.get("/ada")["visits"] == visit
        wait_for(lambda: g.server not in (None, server), "the restart")  # noqa: B023
    g.signal("TERM")
    assert g.ended() == 0
    assert "Traceback" not in g.log.read_text()


TWO_STORES = """
other = shmstore.gunicorn.Hooks("other", memory=2**20, directory={directory!r})
def on_starting(server):
    hooks.on_starting(server)
    other.on_starting(server)
def on_exit(server):
    hooks.on_exit(server)
    other.on_exit(server)
"""


def test_two_stores_in_two_configurations_are_separate(gunicorn: StartGunicorn, store_dir: Path) -> None:
    g = gunicorn(conf=TWO_STORES.format(directory=str(store_dir))).booted()
    g.get("/ada")
    with connect("other", directory=store_dir) as other:
        assert len(other) == 0
    g.signal("TERM")
    assert g.ended() == 0
    wait_for(lambda: StoreFiles.of("other", store_dir).server() is None, "the other's leaving")


def test_an_error_at_the_start_is_one_log_line(gunicorn: StartGunicorn, store_dir: Path) -> None:
    (store_dir / "shop").mkdir(0o755)
    (store_dir / "shop").chmod(0o755)
    g = gunicorn()
    assert g.process.wait(timeout=300) != 0
    log = g.log.read_text()
    assert "Error: store 'shop':" in log
    assert "chmod 700" in log
    assert "Traceback" not in log


def test_wrong_options_are_found_when_the_configuration_is_read() -> None:
    with pytest.raises(ConfigError, match="unknown option"):
        Hooks("shop", maxx=3)
    with pytest.raises(ConfigError, match="is not a valid store name"):
        Hooks("a/b")
    with pytest.raises(ConfigError, match=r"must be an absolute path, not 'stores': Gunicorn's chdir"):
        Hooks("shop", directory="stores")


@pytest.mark.processes("executed")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can serve as somebody else")
def test_with_user_the_server_runs_as_that_user(gunicorn: StartGunicorn, store_dir: Path, tmp_path: Path) -> None:
    store_dir.chmod(0o755)
    for path in (tmp_path, *tmp_path.parents[:2]):
        path.chmod(0o755)
    g = gunicorn("--user", "nobody", "--group", "nogroup", "--preload").booted()
    answers = [g.get("/ada") for _ in range(10)]
    assert [answer["visits"] for answer in answers] == list(range(1, 11))
    assert {answer["uid"] for answer in answers} == {65534}
    server = g.server or 0
    assert re.search(r"Uid:\s+65534\s+65534\s+65534\s+65534", Path(f"/proc/{server}/status").read_text())
    assert {entry.stat().st_uid for entry in (store_dir / "shop").iterdir()} == {65534}
    old = g.workers()
    g.signal("HUP")
    wait_for(lambda: len(g.workers()) == 3 and g.are_gone(old), "new workers")
    assert g.get("/ada")["visits"] == 11
    os.kill(server, signal.SIGKILL)
    wait_for(lambda: g.server not in (None, server), "the restart")
    assert g.get("/ada")["visits"] == 12
    g.signal("TERM")
    assert g.ended() == 0
    assert g.complaints() == []


def test_the_configuration_file_in_deploy_is_valid() -> None:
    conf: dict[str, Any] = {}
    source = Path(ROOT, "deploy", "gunicorn.conf.py").read_text()
    exec(compile(source, "gunicorn.conf.py", "exec"), conf)
    assert conf["workers"] == 4
    assert conf["preload_app"] is True
    assert conf["bind"].endswith(":8000") or "PORT" in os.environ
    assert callable(conf["on_starting"])


WORKER = """
import logging, runpy, sys
from gunicorn.config import Config
from gunicorn.glogging import Logger
cfg = Config()
cfg.set("logconfig_dict", runpy.run_path(sys.argv[1]).get("logconfig_dict", {}))
Logger(cfg).info("from gunicorn")
for name in ("shmstore", "another"):
    logging.getLogger(name).warning("from %s", name)
    logging.getLogger(name).debug("traced")
"""


@pytest.mark.parametrize("debug", ["", "shmstore"])
def test_the_configuration_file_in_deploy_formats_warnings_of_workers(
    run: Run, debug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEBUG", debug)
    worker = run(WORKER, Path(ROOT, "deploy", "gunicorn.conf.py"), stderr=subprocess.PIPE)
    lines = [re.sub(r"\d+", "N", line) for line in worker.communicate()[1].splitlines()]
    assert lines == [
        "[N-N-N N:N:N +N] [N] [INFO] from gunicorn",
        "[N-N-N N:N:N +N] [N] [WARNING] shmstore: from shmstore",
        *(["[N-N-N N:N:N +N] [N] [DEBUG] shmstore: traced"] if debug else []),
        "[N-N-N N:N:N +N] [N] [WARNING] another: from another",
    ]
