"""The C core beside the Python engine, and the Python engine beside an earlier commit: operations and requests."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

from benchmarks import figures
from benchmarks.figures import SIZE, Plan, Results
from benchmarks.peers import ROOT, Missing, environ, workplace
from shmstore.engine.core import problem

# The commit that the Python engine is compared with.
BASELINE = "909c164"

C, PYTHON, EARLIER = "C core", "Python engine", "earlier"

# Runs in a process of its own: an engine is chosen when the package is imported.
OPERATIONS = """
import json, sys
from benchmarks.operations import one_process
print(json.dumps(one_process(int(sys.argv[1]), int(sys.argv[2]))))
"""
REQUESTS = """
import json, sys
from benchmarks.requests import in_process
print(json.dumps(in_process(int(sys.argv[1]))))
"""


def run(plan: Plan) -> Results:
    """Return microseconds by operation and engine, of requests by engine, and the ratio of the fastest rounds."""
    missing: dict[str, str] = {}
    with workplace() as place:
        engines: dict[str, tuple[Path, str]] = {PYTHON: (ROOT, "python")}
        if problem():
            missing[C] = problem()
        else:
            engines[C] = (ROOT, "c")
        try:
            engines[EARLIER] = (earlier(place / "earlier"), "python")
        except Missing as exc:
            missing[f"Python engine at {BASELINE}"] = str(exc)
        taken: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
        for _ in range(plan.rounds):
            for name, (root, engine) in engines.items():
                taken[name].append(child(root, engine, OPERATIONS, plan.sessions, SIZE))
        requests = {
            name: child(ROOT, engine, REQUESTS, 3 * plan.rounds)
            for name, (_, engine) in engines.items() if name != EARLIER
        }  # fmt: skip
    table = {
        operation: {name: figures.figure(row[operation] for row in taken[name]) for name in engines if name != EARLIER}
        for operation in taken[PYTHON][0]
    }
    fastest = {kind: {name: min(row[name] for row in rows) for name in table} for kind, rows in taken.items()}
    other = fastest.get(EARLIER, {})
    ratios = {name: fastest[PYTHON][name] / other[name] for name in other}
    return {"operations": table, "requests": requests, "earlier": ratios, "missing": missing}


def earlier(place: Path) -> Path:
    """Return a copy of the sources at the commit to compare with."""
    git = subprocess.run(["git", "archive", BASELINE], cwd=ROOT, capture_output=True)
    if git.returncode:
        raise Missing(git.stderr.decode().strip())
    with tarfile.open(fileobj=io.BytesIO(git.stdout)) as archive:
        archive.extractall(place, filter="data")
    return place


def child(root: Path, engine: str, code: str, *arguments: object) -> Any:
    """Run code in a process of its own with an engine, and the package at ``root``; return what it prints."""
    env = environ(SHMSTORE_ENGINE=engine, PYTHONPATH=str(root))
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)
