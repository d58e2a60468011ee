"""
Build the wheels and the sdist, and try them as strangers would: `make package`.

The wheel for this machine is installed with each Python that is promised (the classifiers say which) and found here,
first alone, then with its extras. The sdist is unpacked elsewhere, where it runs its tests: first without a C compiler
and Python's headers, then with both; some files of them, or all with `--all`. The wheel for aarch64 runs tests under
emulation. Nothing of this tree is on the path of what is tried. What this machine lacks for a trial is named.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import arm
import hidden
import wheels

ROOT = Path(__file__).parents[2]
CAN_BUILD = wheels.can_build()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = ",".join(PROJECT["optional-dependencies"])

# One test of each kind: the engine, a server process, Flask, and the documents, which start Gunicorn and run commands.
SOME = (
    "project/test_package", "store/test_store", "codec/test_body", "server/test_shared_store", "flask/test_config",
    "docs/test_wsgi_example",
)  # fmt: skip
WITHOUT_CORE = ("project/test_core_build", "project/test_package", "store/test_store")

ALONE = """
import re, sys, tempfile
import shmstore
from flask import Flask, session
from shmstore.flask import Sessions
from shmstore.flask.admin import admin_blueprint

assert shmstore.__file__.startswith(sys.prefix), shmstore.__file__
with shmstore.Store(memory=2**20) as store:
    store.set("a", {"n": (1, 2)}, owner="ada")
    assert store.get("a") == {"n": (1, 2)} and store.owned_by("ada") == ["a"]

with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
    with shmstore.StoreManager("trial", memory=2**20, directory=directory) as manager, manager.store() as proxy:
        proxy.set("a", {"n": 1})
        assert proxy.update("a", {"m": 2}) and proxy.prune() == 0 and proxy.ping()
        with shmstore.connect("trial", directory=directory) as other:
            assert other.get("a") == {"n": 1, "m": 2}

app = Flask(__name__)
with shmstore.Store(memory=2**20) as store:
    Sessions(app, store=store)
    app.register_blueprint(admin_blueprint(authorize=lambda: True), url_prefix="/admin")

    @app.get("/")
    def count():
        session["n"] = session.get("n", 0) + 1
        return str(session["n"])

    browser = app.test_client()
    assert [browser.get("/").text for _ in range(3)] == ["1", "2", "3"]
    page = browser.get("/admin/").text
    files = re.findall('(?:src|href)="(/admin/static/[^"]+)"', page)
    assert {file.rpartition(".")[2] for file in files} == {"css", "js", "svg"}, page
    for file in files:
        with browser.get(file) as answer:
            assert answer.status_code == 200 and answer.data, file

for extra in ("metrics", "django"):
    try:
        __import__(f"shmstore.{extra}")
    except ImportError as error:
        assert f"pip install 'shmstore[{extra}]'" in str(error), error
    else:
        raise SystemExit(f"shmstore.{extra} works without its extra")
"""

APP = """
import os
from flask import Flask, session
from shmstore.flask import Sessions

app = Flask(__name__)
app.config["SESSION_STORE"] = "shm://" + os.environ["STORE"]
Sessions(app)


@app.get("/")
def count():
    session["n"] = session.get("n", 0) + 1
    return f"{session['n']} {os.getpid()}"
"""

CONF = """
import os
import shmstore.gunicorn

bind = "unix:" + os.environ["SOCKET"]
workers = 2
control_socket_disable = True
hooks = shmstore.gunicorn.Hooks("shm://" + os.environ["STORE"], memory=2**20)
on_starting, on_reload, on_exit = hooks.on_starting, hooks.on_reload, hooks.on_exit
"""

WITH_EXTRAS = """
import os, signal, socket, subprocess, sys, time
from http.client import HTTPResponse

import shmstore
from prometheus_client import CollectorRegistry, generate_latest
from shmstore.metrics import StoreCollector


def ask(cookie):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(os.environ["SOCKET"])
        sock.sendall(f"GET / HTTP/1.0\\r\\nCookie: {cookie}\\r\\n\\r\\n".encode())
        response = HTTPResponse(sock)
        response.begin()
        count, pid = response.read().decode().split()
        return int(count), pid, (response.headers["Set-Cookie"] or cookie).partition(";")[0]


here = os.path.dirname(sys.executable)
gunicorn = subprocess.Popen([f"{here}/gunicorn", "-c", "gunicorn.conf.py", "app:app"])
try:
    deadline = time.monotonic() + 60
    while not os.path.exists(os.environ["SOCKET"]):
        assert gunicorn.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    cookie, pids, count = "", set(), 0
    while len(pids) < 2:
        assert time.monotonic() < deadline
        now, pid, cookie = ask(cookie)
        count += 1
        assert now == count, (now, count)
        pids.add(pid)
    stats = subprocess.check_output([f"{here}/shmstore", "stats", os.environ["STORE"]], text=True)
    assert stats.split()[2:4] == ["sessions", "1"], stats
    with shmstore.connect("shm://" + os.environ["STORE"]) as store:
        registry = CollectorRegistry()
        registry.register(StoreCollector(lambda: store, "trial"))
        assert b'shmstore_up{store="trial"} 1.0' in generate_latest(registry)
finally:
    gunicorn.send_signal(signal.SIGTERM)
    assert gunicorn.wait(30) == 0
"""

TYPED = """
from shmstore import Store

with Store(memory=2**20) as store:
    session = store.get("a")
    session.items()
    store.touch(1)
"""
WRONG = ("[union-attr]", "[arg-type]")  # the errors that mypy must report: a session may be None, an id is a str


def promised() -> list[str]:
    """Return the versions of Python that the classifiers name."""
    return [found[1] for line in PROJECT["classifiers"] if (found := re.search(r":: (3\.\d+)$", line))]


def interpreter(version: str) -> str | None:
    """Return a Python of that version, on PATH or of pyenv; None if neither has it."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    for candidate in (sys.executable, f"python{version}", *map(str, root.glob(f"versions/{version}.*/bin/python"))):
        code = "import sys, venv, ensurepip; print(sys.base_prefix, *sys.version_info[:2])"
        try:
            done = subprocess.run([candidate, "-c", code], capture_output=True, text=True)
        except FileNotFoundError:
            continue
        prefix, _, found = done.stdout.strip().partition(" ")
        if not done.returncode and found.replace(" ", ".") == version:
            return f"{prefix}/bin/python{version}"
    return None


def run(*words: str | Path, cwd: Path | None = None, **environ: str) -> str:
    """Run a command; return its output, or exit with the output if it fails."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV", "MAKE"))}
    return wheels.run(*words, cwd=cwd, environ=clean | environ)


def build(dist: Path) -> tuple[Path, Path]:
    """Build the sdist, and from that the wheel as it is built at an installation; return both."""
    for old in dist.glob("shmstore-*"):
        old.unlink()
    run(sys.executable, "-m", "build", "--outdir", dist, cwd=ROOT)
    wheel, sdist = next(dist.glob("*.whl")), next(dist.glob("*.tar.gz"))
    names = zipfile.ZipFile(wheel).namelist()
    info = f"shmstore-{PROJECT['version']}.dist-info"
    assert {"shmstore/py.typed", f"{info}/licenses/LICENSE", f"{info}/entry_points.txt"} <= set(names)
    assert {name.partition("/")[0] for name in names} == {"shmstore", info}
    with tarfile.open(sdist) as archive:
        assert f"{sdist.name.removesuffix('.tar.gz')}/LICENSE" in archive.getnames()
    assert ("shmstore/engine/_core.abi3.so" in names) == CAN_BUILD
    assert ("-cp311-abi3-" if CAN_BUILD else "-py3-none-any") in wheel.name
    return wheel, sdist


def build_for_all(sdist: Path, place: Path) -> Iterator[Path]:
    """Build the wheels of all platforms beside the sdist; audit each."""
    place.mkdir()
    for tag in wheels.TARGETS:
        wheel = wheels.build(sdist, tag, place / tag, sdist.parent)
        wheels.audit(wheel, tag, place / tag)
        yield wheel


def environment(python: str, path: Path, *what: str) -> Path:
    """Create an environment with something installed; return the directory of its programs."""
    if not path.exists():
        run(python, "-m", "venv", path)
    run(path / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *what)
    return path / "bin"


def try_wheel(python: str, wheel: Path, place: Path) -> None:
    """Install the wheel, alone and then with its extras, and use it."""
    place.mkdir()
    programs = environment(python, place / "venv", str(wheel))
    (place / "alone.py").write_text(ALONE)
    run(programs / "python", "-W", "error", "alone.py", cwd=place)
    assert "doctor" in run(programs / "shmstore", "--help", cwd=place)
    assert "shmstore" in run(programs / "flask", "--help", cwd=place)
    found = run(programs / "shmstore", "doctor", cwd=place)
    assert "ok       flask" in found
    assert ("engine: c\n" in found) == ("-abi3-" in wheel.name), found
    environment(python, place / "venv", f"{wheel}[{EXTRAS}]")
    (place / "extras.py").write_text(WITH_EXTRAS)
    (place / "app.py").write_text(APP)
    (place / "gunicorn.conf.py").write_text(CONF)
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="shmstore-trial-") as directory:
        try:
            run(
                programs / "python", "-W", "error", "extras.py", cwd=place,
                STORE=f"{directory}/trial", SOCKET=f"{directory}/http",
            )  # fmt: skip
        finally:
            shutil.rmtree(f"{directory}/trial", ignore_errors=True)


def try_types(python: str, wheel: Path, place: Path) -> None:
    """Let mypy check a program that uses the wheel."""
    place.mkdir()
    programs = environment(python, place / "venv", str(wheel), "mypy")
    (place / "typed.py").write_text(TYPED)
    done = subprocess.run([programs / "mypy", "--strict", "typed.py"], cwd=place, text=True, stdout=subprocess.PIPE)
    found = re.findall(r"\[[\w-]+\]$", done.stdout, re.MULTILINE)
    assert found == list(WRONG), done.stdout


def try_without_core(tree: Path, place: Path) -> None:
    """Install, run and test the sources without a compiler and headers, then get the core as the docs say."""
    without = hidden.without_headers(place / "empty")
    path = hidden.path_without_compilers(place / "bin")
    said = run(*without, "make", ".venv/run.stamp", ".venv/test.stamp", f"PYTHON={sys.executable}", cwd=tree, PATH=path)
    assert said.count("engine: python (the C core was not built") == 2, said
    assert "install a C compiler" in said, said
    run(*without, tree / ".venv/bin/python", "-m", "pytest", "-q", "-n", "2", *paths(WITHOUT_CORE), cwd=tree, PATH=path)
    assert "engine: python (the C core was not built" in log_of_demo(tree, without, place, path)
    python = environment(sys.executable, place / "venv", "pip") / "python"
    install = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    cache = str(place / "cache")  # pip's own has no wheel that was built here
    run(*without, python, *install, tree, PATH=path, PIP_CACHE_DIR=cache)
    found = run(python, "-m", "shmstore", "doctor", cwd=place)
    assert "engine: python" in found, found
    assert "install a C compiler" in found, found
    run(python, *install, "--no-cache-dir", "--force-reinstall", "--no-deps", tree)
    found = run(python, "-m", "shmstore", "doctor", cwd=place)
    assert "engine: c\n" in found, found


def log_of_demo(tree: Path, without: Sequence[str], place: Path, path: str) -> str:
    """Run the demo, with a /dev/shm of its own; return what it logs until its store is served."""
    demo = subprocess.Popen(
        [*without, "sh", "-c", "mount -t tmpfs none /dev/shm && exec make run"], cwd=tree, start_new_session=True,
        env=os.environ | {"PATH": path, "HOST": f"unix:{place}/socket"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert demo.stdout is not None
    log = ""
    try:
        for line in demo.stdout:
            log += line
            if " serves " in line:
                return log
        sys.exit(f"{log}\nended with {demo.wait()}")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(demo.pid, signal.SIGTERM)
        demo.communicate()


def paths(names: Sequence[str]) -> list[str]:
    """Return the paths of files of tests."""
    return [f"tests/{name}.py" for name in names]


def try_sdist(tree: Path, everything: bool) -> str:
    """Run the tests of the sdist, in an environment that it makes itself; return what they say."""
    said = run("make", ".venv/test.stamp", f"PYTHON={sys.executable}", cwd=tree)
    assert ("engine: c\n" in said) == CAN_BUILD, said
    tests = [] if everything else paths(SOME)
    said = run(tree / ".venv/bin/python", "-m", "pytest", "-q", "-n", "2", *tests, cwd=tree)
    return said.strip().splitlines()[-1]


def trials(everything: bool, native: bool) -> Iterator[str]:
    """Do it all; say what was done, one line after the other."""
    dist = ROOT / "dist"
    wheel, sdist = build(dist)
    yield f"built {wheel.name} and {sdist.name}"
    missing = []
    with tempfile.TemporaryDirectory(prefix="shmstore-trial-") as directory:
        place = Path(directory)
        if lacking := "--native" if native else wheels.lacking():
            yield f"NOT BUILT, the wheels for {', '.join(wheels.TARGETS)}: {lacking}"
        else:
            for built in build_for_all(sdist, place / "wheels"):
                yield f"built {built.name}, and found that it needs nothing else"
            wheel.unlink()  # it is for this machine and those like it
            wheel = next(dist.glob(f"*-manylinux_*_{platform.machine()}.whl"))
        run(sys.executable, "-m", "twine", "check", "--strict", *dist.glob("shmstore-*"))
        for version in promised():
            if python := interpreter(version):
                try_wheel(python, wheel, place / version)
                yield f"Python {version}: the wheel works, alone and with {EXTRAS}"
            else:
                missing.append(version)
        try_types(sys.executable, wheel, place / "types")
        yield "mypy sees the types"
        with tarfile.open(sdist) as archive:
            archive.extractall(place, filter="data")
        tree = place / sdist.name.removesuffix(".tar.gz")
        if CAN_BUILD and hidden.can_hide_headers():
            (place / "without").mkdir()
            try_without_core(tree, place / "without")
            yield "without a C compiler and Python's headers: it runs on the Python engine; then with both: on the core"
        else:
            yield "NOT TRIED, to do without a C compiler and Python's headers: this user may not hide them, or has none"
        yield f"the tests of the sdist: {try_sdist(tree, everything)}"
        if lacking := lacking or arm.lacking():
            yield f"NOT RUN, the wheel for aarch64: {lacking}"
        else:
            built = next(dist.glob(f"*-manylinux_*_{arm.MACHINE}.whl"))
            yield f"aarch64 under emulation: {arm.try_wheel(built, sdist, place / 'arm', everything)}"
    if missing:
        yield f"NOT TRIED, because not found here: Python {', '.join(missing)}"


def main() -> None:
    """Print each result as it comes, with the seconds since the start."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="run all tests of the sdist: ten minutes")
    parser.add_argument("--native", action="store_true", help="build only the wheel of this machine")
    given = parser.parse_args()
    begun = time.monotonic()
    for line in trials(given.all, given.native):
        print(f"{time.monotonic() - begun:4.0f} s  {line}", flush=True)


if __name__ == "__main__":
    main()
