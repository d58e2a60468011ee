"""Restricted environments: a hardened service, a container, a sandbox."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import hard_place
import pytest
from hard_place import UNSHARE
from processes import ROOT, Run, Start
from sampling import some

from shmstore import StoreUnavailable
from shmstore.engine import layout

# All operations of a store that start a process, open a file or make an unusual system call.
USE = """
import os
from shmstore import Store, StoreManager, connect

with Store(memory=2**20) as store:
    store.set("ada", {"user": "ada"})
    assert store.get("ada") == {"user": "ada"}
    store.stats()

options = {"memory": 2**20, "dispose": lambda *about: None, "persist": False, **OPTIONS}
with StoreManager("shop", **options) as manager:
    store = manager.store()
    store.set("ada", {"user": "ada"})
    assert store.get("ada") == {"user": "ada"}
    with store.lock("ada", 10), connect("shop", **OPTIONS) as other:
        assert other.update("ada", {"seen": 1})
    assert store.destroy("ada") == 1
    assert store.ping() and store.prune() == 0
    store.stats()
    for fd in range(3):  # what C code prints there must not get into the store
        try:
            assert not os.path.sameopenfile(fd, store.arena.file._descriptor.fd)
        except OSError:
            pass  # closed
"""

Place = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def in_place(tmp_path: Path) -> Iterator[Place]:
    """Return a function that runs Python code in a `hard_place`."""
    started: list[subprocess.Popen[str]] = []

    def run(place: str, code: str = USE, *, options: str = "{}") -> subprocess.CompletedProcess[str]:
        if place not in hard_place.UNPRIVILEGED:
            try:
                tried = subprocess.run([*UNSHARE, "mount", "-t", "tmpfs", "tmpfs", "/proc/sys"], capture_output=True)
            except FileNotFoundError:
                pytest.skip("unshare is not installed")
            if tried.returncode:
                pytest.skip(f"nothing can be mounted here, not even apart from others: {tried.stderr.decode()}")
        code = f"OPTIONS = {options}\n{code}"
        with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
            process = subprocess.Popen(
                [*([] if place in hard_place.UNPRIVILEGED else UNSHARE),
                 sys.executable, hard_place.__file__, place, sys.executable, "-c", code],
                stdout=out, stderr=err, stdin=subprocess.DEVNULL, text=True, start_new_session=True,
                env=os.environ | {"PYTHONPATH": ROOT},
            )  # fmt: skip
            started.append(process)
            process.wait()
        said, logged = (tmp_path / "out").read_text(), (tmp_path / "err").read_text()
        if process.returncode == hard_place.IMPOSSIBLE:
            pytest.skip(f"this place cannot be made here: {logged}")
        return subprocess.CompletedProcess(place, process.returncode, said, logged)

    yield run
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def works(done: subprocess.CompletedProcess[str]) -> None:
    """Assert success, and that the log has only the lines of a server that starts and exits."""
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if "[INFO]" not in line] == []


@some("place", {each: each for each in ("read-only", "full")})
def test_without_a_temporary_directory(place: str, in_place: Place, store_dir: Path) -> None:
    works(in_place(place, options="{}" if place == "read-only" else repr({"directory": str(store_dir)})))
    code = "import tempfile, shmstore; tempfile.gettempdir()"
    assert "No usable temporary directory" in in_place(place, code).stderr, "the place is as it should be"


def test_a_service_with_a_read_only_root(in_place: Place) -> None:
    """The command of deploy/shmstore.service, where ``ProtectSystem=strict`` leaves no writable directory."""
    done = in_place("read-only", SERVE)
    assert done.returncode == 0, done.stderr
    assert "serving the store at" in done.stderr
    assert "Traceback" not in done.stderr


SERVE = """
import signal, socket, subprocess, sys, os
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
    systemd.bind("/dev/shm/notify")
    systemd.settimeout(60)
    serve = subprocess.Popen(
        [sys.executable, "-m", "shmstore", "serve", "shop", "--memory", "1M"],
        env=os.environ | {"NOTIFY_SOCKET": "/dev/shm/notify"},
    )
    try:
        assert systemd.recv(100) == b"READY=1"
        from shmstore import connect
        with connect("shop") as store:
            store.set("ada", {})
    finally:
        serve.send_signal(signal.SIGTERM)
        assert serve.wait(60) == 0
"""


@pytest.mark.processes("executed")
@some("closed", {str(each): each for each in chain.from_iterable(combinations(range(3), n) for n in (1, 2, 3))}, 2)
def test_with_closed_standard_descriptors(closed: tuple[int, ...], store_dir: Path, tmp_path: Path) -> None:
    script, report = tmp_path / "script.py", tmp_path / "report"
    script.write_text(f"""
import traceback
report = "done"
try:
    exec({f"OPTIONS = {{'directory': {str(store_dir)!r}}}" + USE!r})
except BaseException:
    report = traceback.format_exc()
open({str(report)!r}, "w").write(report)
""")
    closing = " ".join(f"{fd}>&-" for fd in closed)
    subprocess.run(
        ["sh", "-c", f'exec "$0" "$1" {closing}', sys.executable, script], env=os.environ | {"PYTHONPATH": ROOT},
    )  # fmt: skip
    assert report.read_text() == "done"


@some("place", {each: each for each in ("no-proc", "no-proc-sys")})
def test_without_proc(place: str, in_place: Place, store_dir: Path) -> None:
    works_and_lives(in_place(place, USE_AND_LIFE, options=repr({"directory": str(store_dir)})))


def test_services_with_and_without_proc_sys_share_a_store(in_place: Place, manage: Start, store_dir: Path) -> None:
    store = manage().store()
    store.set("ada", {"user": "ada"})
    done = in_place("no-proc-sys", SHARE, options=repr({"directory": str(store_dir)}))
    assert done.returncode == 0, done.stderr
    assert store.get("ada") == {"user": "ada", "seen": 1}


SHARE = """
from shmstore import connect
with connect("shop", **OPTIONS) as store:
    assert store.update("ada", {"seen": 1}) and store.ping()
"""


def test_a_store_on_a_disk_whose_boot_is_not_known_is_refused(in_place: Place, tmp_path: Path) -> None:
    """The deadlines on such a disk would be meaningless after a reboot."""
    if layout.in_memory(str(tmp_path)):
        pytest.skip("the temporary directory is in memory")
    done = in_place("no-proc-sys", options=repr({"directory": str(tmp_path)}))
    assert "is on a disk, and /proc/sys/kernel/random/boot_id cannot be read" in done.stderr
    assert done.returncode == 1


FORK = """
import os
from shmstore.attach import attach_or_start

store = attach_or_start("shm://shop")  # as a master that loads the application before it forks
for number in range(3):
    if not (child := os.fork()):
        with store.lock("ada", 10):
            os._exit(not (store.update("ada", {number: 1}) if number else store.add("ada", {0: 1})))
    assert os.waitpid(child, 0)[1] == 0
assert store.get("ada") == {0: 1, 1: 1, 2: 1}
"""


def test_without_dev_shm_a_store_is_private(in_place: Place, tmp_path: Path) -> None:
    """To a process and the children that it forks: here there are mutexes for them."""
    for code in (USE, FORK):
        done = in_place("no-shm", code)
        assert done.returncode == 0, done.stderr
        assert re.fullmatch(
            "store 'shop' is private to this process: .*: there is no /dev/shm; name another directory, .*: "
            "directory=PATH\n", done.stderr,
        )  # fmt: skip
    works(in_place("no-shm", options=repr({"directory": str(tmp_path)})))


def test_dev_shm_cannot_be_written(in_place: Place, tmp_path: Path) -> None:
    done = in_place("read-only-shm")
    assert re.search(
        r"/dev/shm/shmstore-\d+ cannot be created: .*; .* name another directory, .*: directory=PATH", done.stderr
    )
    works(in_place("read-only-shm", options=repr({"directory": str(tmp_path)})))


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("no-shm", r"broken +directory: no directory /dev/shm\n +name another directory, .*: directory=PATH"),
        ("read-only-shm", r"broken +directory: /dev/shm is not writable\n +name a directory"),
        ("no-proc", None),
        ("no-proc-sys", None),
        ("no-pidfd-EPERM", None),
        ("read-only", None),
    ],
)
def test_doctor_tries_to_start_a_store(place: str, said: str | None, in_place: Place, store_dir: Path) -> None:
    arguments = ["doctor", *([] if said or place == "read-only" else ["--directory", str(store_dir)])]
    done = in_place(place, f"from shmstore.cli import main; main({arguments})")
    assert done.returncode == (1 if said else 0), done.stdout + done.stderr
    assert re.search(said or r"ok +shared store: starts, works and ends", done.stdout), done.stdout
    assert done.stderr == ""
    assert not [*store_dir.iterdir()]


LIFE = """
import os, signal, time
from shmstore import StoreManager
from shmstore.client import watch

def another(pid):
    deadline = time.monotonic() + 60
    while store.stats().server_pid in (0, pid) or not store.ping():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return store.stats().server_pid

watch._CHECK_INTERVAL = 0.1  # seconds; a server that does not answer then is asked, as ever
with StoreManager("shop", memory=2**20, **OPTIONS) as manager:
    store = manager.store()
    store.set("ada", {})
    os.kill(pid := store.stats().server_pid, signal.SIGKILL)
    pid = another(pid)
    os.kill(pid, signal.SIGSTOP)  # the watch ends one that does not answer
    pid = another(pid)
    assert store.get("ada") == {}
    store.close()
    os.kill(pid, signal.SIGSTOP)  # and so does who wants the end of it
manager.join(60)  # its last thread holds the lock a moment longer
assert manager._files().server() is None
"""
LIFE_BEGINS = "the server is killed"
USE_AND_LIFE = f"{USE}\nimport sys\nprint({LIFE_BEGINS!r}, file=sys.stderr, flush=True)\n{LIFE}"


def works_and_lives(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr
    used, life, _ = done.stderr.partition(LIFE_BEGINS)
    assert life
    works(subprocess.CompletedProcess(done.args, 0, done.stdout, used))


@some("place", {each: each for each in ("no-pidfd-ENOSYS", "no-pidfd-EPERM")})
def test_without_pidfds(place: str, in_place: Place, store_dir: Path) -> None:
    works_and_lives(in_place(place, USE_AND_LIFE, options=repr({"directory": str(store_dir)})))


@pytest.mark.processes("executed")
def test_a_sys_path_entry_with_a_colon(manage: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For example, a directory named by a time of day: PYTHONPATH would split it at the colon."""
    place = tmp_path / "12:30"
    place.mkdir()
    (place / "module_of_this_test.py").write_text("def dispose(sid, session, reason): open(sid, 'w')")
    monkeypatch.syspath_prepend(place)
    import module_of_this_test  # type: ignore[import-not-found]

    with manage(dispose=module_of_this_test.dispose, max=1) as manager:
        store = manager.store()
        store.set(str(tmp_path / "dropped"), {})
        store.destroy(str(tmp_path / "dropped"))
        assert (tmp_path / "dropped").exists()


LIMITED = """
import os, resource, sys
from multiprocess.spawn import set_executable
from shmstore import Store, StoreFull, StoreManager, StoreUnavailable
Store(memory=2**20).close()  # what is imported late is imported: the next user may be unable to read it
if os.geteuid() == 0 and sys.argv[1] == "RLIMIT_NPROC":
    os.chown(sys.argv[3], 54321, 54321)
    os.setuid(54321)  # root has no such limit
    set_executable("/bin/true")  # it comes not so far, but this user may have no right to this Python
resource.setrlimit(getattr(resource, sys.argv[1]), (int(sys.argv[2]),) * 2)
for make in [lambda: Store(memory=2**20), lambda: StoreManager("shop", memory=2**20, directory=sys.argv[3]).start()]:
    try:
        make()
    except (StoreFull, StoreUnavailable) as exc:
        print(f"{type(exc).__name__}: {exc}")
    else:
        print("done")
"""


@pytest.mark.parametrize(
    ("limit", "value", "said"),
    [
        ("RLIMIT_FSIZE", 2**19, ["StoreFull: cannot reserve .*ulimit -f"] * 2),
        ("RLIMIT_NPROC", 1, ["StoreUnavailable: .*ulimit -u"] * 2),
    ],
)
def test_resource_limits_are_named_in_errors(
    limit: str, value: int, said: list[str], run: Run, store_dir: Path
) -> None:
    out, _ = run(LIMITED, limit, value, store_dir).communicate(timeout=300)
    for line, pattern in zip(out.splitlines(), said, strict=True):
        assert re.match(pattern, line), out


def test_a_group_writable_volume(manage: Start, store_dir: Path) -> None:
    """As a Kubernetes volume with an fsGroup."""
    volume = store_dir / "volume"
    volume.mkdir()
    volume.chmod(0o2777)
    with pytest.raises(StoreUnavailable, match=f"has mode 2777.*directory={volume}/stores"):
        manage(directory=volume).start()
    with manage(directory=volume / "stores") as manager:
        manager.store().set("ada", {})


PIDS = [*UNSHARE, "--pid", "--fork", "--kill-child", "--mount-proc"]

FIRST = """
import sys
from shmstore import StoreManager
store = StoreManager("shop", memory=2**20, directory=sys.argv[1]).store()
store.set("ada", {"user": "ada"})
assert store.ping()
print("ready", flush=True)
sys.stdin.read()  # until it is killed, with all that it has started
"""

SECOND = """
import sys
from shmstore.engine.verify import verify
from shmstore import StoreManager, StoreUnavailable, connect
for open_it in [lambda: connect("shop", directory=sys.argv[1]), StoreManager("shop", directory=sys.argv[1]).store]:
    try:
        store = open_it()
    except StoreUnavailable as exc:
        print(exc)
    else:
        print(store.get("ada"), store.set("eve", {}))
        verify(store.arena)
"""


def test_a_restarted_container_keeps_its_sessions(store_dir: Path, tmp_path: Path) -> None:
    """As in a Kubernetes pod, where /dev/shm stays and a restarted container has new pids. Two at once are refused."""
    try:
        tried = subprocess.run([*PIDS, "true"], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("unshare is not installed")
    if tried.returncode:
        pytest.skip(f"no pid namespace can be made here: {tried.stderr}")

    def container(code: str, **pipes: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*PIDS, sys.executable, "-c", code, store_dir], text=True, stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": ROOT}, **pipes,
        )  # fmt: skip

    with container(FIRST, stdin=subprocess.PIPE) as first:
        try:
            assert first.stdout is not None
            assert first.stdout.readline() == "ready\n"
            with container(SECOND) as second:
                said, _ = second.communicate(timeout=300)
            assert len(re.findall(r"is in use in another container: .*shareProcessNamespace", said)) == 2, said
        finally:
            first.kill()
    with container(SECOND) as second:
        said, _ = second.communicate(timeout=300)
    assert said == "{'user': 'ada'} None\n" * 2
