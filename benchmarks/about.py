"""The machine, the date and the versions of a run."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from contextlib import suppress
from pathlib import Path

from benchmarks import peers
from benchmarks.figures import Results
from benchmarks.peers import ROOT, Missing
from shmstore.engine.core import describe


def about() -> Results:
    """Return the machine, the versions, the date and the load of the machine at the start."""
    servers = {}
    for name, command in (
        ("redis", _redis()),
        ("memcached", peers.program("memcached")),
        ("uwsgi", peers.program("uwsgi")),
    ):
        if command:
            servers[name] = peers.version_of([command, "-V" if name == "memcached" else "--version"])
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release().partition("-")[0],
        "python": platform.python_version(),
        "engine": describe(),
        "load before": round(os.getloadavg()[0], 2),
        "servers": servers,
        "packages": peers.versions(),
    }


def _redis() -> str | None:
    with suppress(Missing):
        return peers.redis_program()
    return None


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str:
    with suppress(OSError):
        git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
        return git.stdout.strip()
    return ""
