"""``DEBUG=shmstore``, or the logger at DEBUG: one line for each operation, without ids of sessions."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from forks import ForkingProcess
from processes import ROOT, Start

from shmstore import SerializationError, Store, StoreTimeout, connect
from shmstore.codec.ids import short_digest
from shmstore.contract import AnyStore

SECRET = "not-for-any-log"

OPERATIONS: list[tuple[str, tuple[Any, ...], str]] = [
    ("set", (SECRET, {SECRET: SECRET}, 60, SECRET), "done"),
    ("get", (SECRET,), "hit"),
    ("get", (f"no {SECRET}",), "miss"),
    ("peek", (SECRET,), "hit"),
    ("load", (SECRET,), "hit"),
    ("load", (f"no {SECRET}",), "miss"),
    ("add", (SECRET, {}), "False"),
    ("replace", (SECRET, {}), "True"),
    ("update", (SECRET, {"x": SECRET}), "True"),
    ("touch", (SECRET,), "True"),
    ("rename", (SECRET, f"new {SECRET}"), "True"),
    ("owned_by", (SECRET,), "0 sessions"),
    ("destroy_owned", (SECRET,), "0"),
    ("ids", (), "1 sessions"),
    ("all", (), "1 sessions"),
    ("length", (), "1"),
    ("__contains__", (SECRET,), "False"),
    ("destroy_if_empty", (SECRET,), "False"),
    ("destroy", (SECRET,), "0"),
    ("gone", (SECRET,), "False"),
    ("prune", (), "0"),
    ("clear", (), "done"),
    ("start_interval", (100.0,), "done"),
    ("stop_interval", (), "done"),
]


@pytest.fixture(params=["private", "in place", "through the server"])
def store(request: pytest.FixtureRequest, manage: Start, store_dir: Path) -> Iterator[AnyStore]:
    if request.param == "private":
        with Store(memory=2**20) as private:
            yield private
    else:
        with manage(), connect("shop", directory=store_dir, in_place=request.param == "in place") as proxy:
            yield proxy


def test_each_operation_is_traced(store: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="shmstore"):
        for operation, arguments, outcome in OPERATIONS:
            caplog.clear()
            getattr(store, operation)(*arguments)
            (line,) = [record.getMessage() for record in caplog.records if record.name == "shmstore"]
            about = ["[0-9a-f]{8}" for name in arguments if isinstance(name, str)]
            expected = " ".join([operation, *about[: 2 if operation == "rename" else 1]])
            assert re.fullmatch(f"{expected}: {outcome}", line)
    caplog.clear()
    store.get(SECRET)
    assert not caplog.records


def test_an_error_is_traced(store: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="shmstore"), suppress(SerializationError):
        store.set(SECRET, {"x": object()})
    assert re.fullmatch("set [0-9a-f]{8}: SerializationError", caplog.messages[0])


def test_only_digests_of_ids_and_owners_are_traced(store: Any, caplog: pytest.LogCaptureFixture) -> None:
    name = short_digest(SECRET)
    with caplog.at_level(logging.DEBUG, logger="shmstore"):
        store.set(owner="ada", session={}, sid=SECRET)
        store.rename(new="b", old=SECRET)
        store.destroy_owned(keep=[SECRET], owner=SECRET)
        store.peek(4711)
        store.destroy([SECRET, "c"])
        store.length(live=True)
        with store.lock(SECRET), suppress(StoreTimeout), store.lock(SECRET, timeout=0):
            pass
    assert [record.getMessage() for record in caplog.records if record.name == "shmstore"] == [
        f"set {name}: done", f"rename {name} {short_digest('b')}: True", f"destroy_owned {name}: 0", "peek <int>: miss",
        "destroy <list>: 0", "length: 1", f"lock {name}: done", f"lock {name}: StoreTimeout",
    ]  # fmt: skip


CODE = """
import sys
from shmstore import StoreManager
manager = StoreManager("shop", memory=2**20, directory=sys.argv[1])
manager.start()
manager.store().set("not-for-any-log", {})
manager.shutdown()
"""


@pytest.mark.parametrize(
    ("debug", "lines"),
    [("shmstore", 1), ("memorystore", 1), ("other,shmstore", 1), ("shm*", 1), ("", 0), ("1", 0), ("true", 0)],
)
def test_tracing_is_enabled_by_the_environment(
    store_dir: Path, tmp_path: Path, forker: ForkingProcess, debug: str, lines: int
) -> None:
    script, log = tmp_path / "script.py", tmp_path / "log"
    script.write_text(CODE)
    with log.open("wb") as output:
        environ = os.environ | {"DEBUG": debug, "PYTHONPATH": ROOT}
        process = forker.script([str(script), str(store_dir)], output, tmp_path, environ)
    with process:
        assert process.wait() == 0, log.read_text()
    logged = log.read_text()
    assert len(re.findall(r"\[DEBUG\] shmstore: set [0-9a-f]{8}: done\n", logged)) == lines
    assert SECRET not in logged
    assert logged.count("DEBUG") >= lines


def test_a_program_that_configures_logging_gets_the_trace_there(store_dir: Path) -> None:
    code = f"import logging; logging.basicConfig(format='MINE %(message)s')\n{CODE}"
    done = subprocess.run(
        [sys.executable, "-c", code, store_dir],
        env=os.environ | {"DEBUG": "shmstore", "PYTHONPATH": ROOT}, capture_output=True, text=True, timeout=300,
        check=True,
    )  # fmt: skip
    assert len(re.findall(r"MINE set [0-9a-f]{8}: done\n", done.stderr)) == 1
    assert not re.search(r"\[DEBUG\] shmstore: set", done.stderr)
