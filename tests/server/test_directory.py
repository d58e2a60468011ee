"""Names, URLs and directories of stores: which users may use them, and what is refused."""

from __future__ import annotations

import os
import re
import socket
import stat
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shmstore import urls
from shmstore.client import connection
from shmstore.client.connection import dial
from shmstore.engine.layout import pid_namespace
from shmstore.errors import ConfigError, StoreTimeout, StoreUnavailable
from shmstore.ipc.directory import StoreFiles
from shmstore.server.single_instance import listen
from shmstore.system.files import try_lock

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's files")


@pytest.mark.parametrize("name", ["shop", "a", "x" * 64, "Shop_2.test-3", "a.", "-"])
def test_a_name_and_its_urls_give_the_same_store(name: str) -> None:
    assert urls.parse(name) == (name, None)
    assert urls.parse(f"shm://{name}", "/base") == (name, "/base")
    assert urls.parse(f"shm:///base/dir/{name}/") == (name, "/base/dir")


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".hidden", "a/b", "/etc", "../up", "x" * 65, "a b", "a\n", "a\0", "ü", "shop?", "a:b", "٣"],
)
def test_a_name_with_other_characters_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="use 1 to 64"):
        urls.parse(name)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis://localhost/0", "use shm://NAME"),
        ("http://shop", "not a store URL"),
        ("shm://", "is not a valid store name"),
        ("shm:///", "is not a valid store name"),
        ("shm://shop/more", "is not a valid store name"),
        ("shm://shop?max=3", "no query"),
        ("shm:///base/..", "is not a valid store name"),
    ],
)
def test_other_urls_are_refused(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        urls.parse(url)


@pytest.mark.parametrize(
    ("url", "meant"),
    [
        ("shm:/x", "shm://x"),
        ("shm:x", "shm://x"),
        ("SHM:x", "shm://x"),
        ("smh://x", "shm://x"),
        ("shm:/run/stores/x", "shm:///run/stores/x"),
        ("/run/stores/x", "shm:///run/stores/x"),
        ("shmm:///run/stores/x", "shm:///run/stores/x"),
        ("reddis://x", "redis://x"),
        ("redis:/x:6379/0", "redis://x:6379/0"),
        ("redis+sentinal://x/y", "redis+sentinel://x/y"),
        ("valky://me:secret@x?password=secret", "valkey://...@x"),
        ("redis:me:secret@x", "redis://...@x"),
    ],
)
def test_a_misspelt_url_is_corrected_without_its_password(url: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"; did you mean '{meant}'?")) as error:
        urls.parse(url)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("url", ["http://me:secret@x", "xyz:me:secret@x"])
def test_no_password_is_in_the_refusal_of_another_url(url: str) -> None:
    with pytest.raises(ConfigError) as error:
        urls.parse(url)
    assert "secret" not in str(error.value)
    assert "did you mean" not in str(error.value)


def test_a_path_and_a_directory_are_refused_together() -> None:
    with pytest.raises(ConfigError, match="omit directory"):
        urls.parse("shm:///base/shop", "/other")


def test_a_name_that_is_not_a_str_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be a str, not int"):
        urls.parse(3)  # type: ignore[arg-type]


def test_the_default_directory_is_that_of_the_effective_user() -> None:
    assert StoreFiles.of("shop").path == f"/dev/shm/shmstore-{os.geteuid()}/shop"


def test_directories_are_made_for_the_owner_alone(store_dir: Path) -> None:
    files = StoreFiles.of("shop", store_dir / "base")
    old = os.umask(0)
    try:
        files.create()
    finally:
        os.umask(old)
    for path in (store_dir / "base", store_dir / "base" / "shop"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    files.create()  # creating it again is allowed


def test_a_missing_store_is_unavailable(store_dir: Path) -> None:
    with pytest.raises(StoreUnavailable, match="there is no store 'shop'"):
        StoreFiles.of("shop", store_dir).check()


@pytest.mark.parametrize("mode", [0o750, 0o701, 0o777])
def test_a_store_open_to_others_is_refused(store_dir: Path, mode: int) -> None:
    files = StoreFiles.of("shop", store_dir)
    files.create()
    os.chmod(files.path, mode)
    with pytest.raises(StoreUnavailable, match="chmod 700"):
        files.create()


def test_a_directory_in_which_others_can_replace_the_store_is_refused(store_dir: Path) -> None:
    base = store_dir / "base"
    base.mkdir()
    base.chmod(0o777)
    with pytest.raises(StoreUnavailable, match="chmod go-w"):
        StoreFiles.of("shop", base).create()
    base.chmod(0o1777)  # as /tmp: others cannot replace a file of this user
    StoreFiles.of("shop", base).create()


def test_symbolic_links_and_files_are_refused(store_dir: Path) -> None:
    (store_dir / "real").mkdir(0o700)
    (store_dir / "link").symlink_to(store_dir / "real")
    (store_dir / "file").touch()
    with pytest.raises(StoreUnavailable, match="symbolic link"):
        StoreFiles.of("link", store_dir).create()
    with pytest.raises(StoreUnavailable, match="symbolic link"):
        StoreFiles.of("shop", store_dir / "link").create()
    with pytest.raises(StoreUnavailable, match="not a directory"):
        StoreFiles.of("file", store_dir).create()


@root_only
def test_another_users_directory_is_refused_by_name(store_dir: Path) -> None:
    files = StoreFiles.of("shop", store_dir)
    files.create()
    os.chown(files.path, 65534, 65534)
    with pytest.raises(StoreUnavailable, match=r"belongs to uid 65534 \(nobody\), not to uid 0"):
        files.check()


@root_only
def test_root_makes_a_store_for_another_user(store_dir: Path) -> None:
    files = StoreFiles.of("shop", store_dir, uid=65534, gid=65534)
    files.create()
    status = os.stat(files.path)
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (65534, 65534, 0o700)
    assert store_dir.stat().st_uid == 0, "a directory that was named, not made, stays whose it is"


@root_only
def test_root_makes_a_directory_for_the_stores_of_another_user(store_dir: Path) -> None:
    files = StoreFiles.of("shop", store_dir / "stores", uid=65534, gid=65534)
    files.create()
    for path in store_dir / "stores", files.path:
        status = os.stat(path)
        assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (65534, 65534, 0o700)


def test_a_socket_with_a_long_path_is_reachable(store_dir: Path) -> None:
    deep = store_dir / ("d" * 100) / ("e" * 100)
    deep.parent.mkdir()
    files = StoreFiles.of("shop", deep)
    files.create()
    assert len(files.address) > 200
    with listen(files) as listener, dial(files, 1.0) as client:
        server, _ = listener.accept()
        with server:
            client.sendall(b"hello")
            assert server.recv(5) == b"hello"


def test_a_new_socket_replaces_an_old_one(store_dir: Path) -> None:
    files = StoreFiles.of("shop", store_dir)
    files.create()
    listen(files).close()
    with pytest.raises(ConnectionRefusedError):
        dial(files, 1.0)
    with listen(files), dial(files, 1.0) as client:
        assert isinstance(client, socket.socket)


def test_only_one_process_can_claim_a_store(store_dir: Path) -> None:
    files = StoreFiles.of("shop", store_dir)
    files.create()
    assert files.server() is None
    first = files.claim(0)
    assert first is not None
    assert files.claim(0) is None
    assert files.server() == os.getpid()
    os.close(first)
    assert files.server() is None


def test_the_pid_of_a_server_in_another_container_is_not_mistaken_for_a_local_one(store_dir: Path) -> None:
    files = StoreFiles.of("shop", store_dir)
    files.create()
    held = files.claim(0)
    assert held is not None
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        lock = Path(files.lock)
        lock.write_text(lock.read_text().replace(str(os.getpid()), str(stranger.pid), 1))
        assert files.server() == stranger.pid
        lock.write_text(f"{stranger.pid} 99\n")
        assert files.server() is None
        assert files.claim(0) is None, "though it is there"
        assert not connection.kill(files)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()
        os.close(held)


def test_only_one_process_can_start_and_a_forked_child_does_not_keep_the_lock(store_dir: Path) -> None:
    files = StoreFiles.of("shop", store_dir)
    files.create()
    go_on, done = os.pipe()
    with files.starting(0):
        with pytest.raises(StoreTimeout, match="another process"), files.starting(0):
            pass
        child = os.fork()
        if not child:
            os.close(done)
            os.read(go_on, 1)
            os._exit(0)
    os.close(go_on)
    with files.starting(0):
        pass
    os.close(done)
    assert os.waitpid(child, 0)[1] == 0


def test_removing_a_store_removes_its_directory_only(store_dir: Path) -> None:
    files = StoreFiles.of("shop", store_dir)
    files.create()
    lock = files.claim(0)
    assert lock is not None
    listen(files).close()
    files.remove()
    os.close(lock)
    assert list(store_dir.iterdir()) == []


def start_first(files: StoreFiles) -> None:
    with files.starting(0):
        assert Path(files.path).is_dir()
    os.rmdir(files.path)


def restart(files: StoreFiles) -> None:
    with pytest.raises(StoreUnavailable, match="No such file"):
        connection.connect_or_start(files)


@pytest.mark.parametrize("use", [start_first, restart, StoreFiles.remove])
def test_only_a_first_start_recreates_a_directory_that_is_removed_meanwhile(
    use: Callable[[StoreFiles], object], store_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = StoreFiles.of("shop", store_dir)
    files.create()
    with monkeypatch.context() as patch:

        def remove_first(*arguments: Any) -> bool:
            patch.undo()
            os.rmdir(files.path)
            return try_lock(*arguments)

        patch.setattr("shmstore.ipc.directory.try_lock", remove_first)
        use(files)
    assert list(store_dir.iterdir()) == []


def test_a_first_start_creates_a_directory_that_is_removed_before_it_is_opened(store_dir: Path) -> None:
    files = StoreFiles.of("shop", store_dir)
    with files.starting(0):
        assert Path(files.path).is_dir()


def test_a_url_that_lacks_its_name_is_not_suggested_to_itself() -> None:
    with pytest.raises(ConfigError, match="is not a valid store name") as refused:
        urls.parse("shm:///")
    assert "did you mean" not in str(refused.value)


# -- files that a store's owner, or a killed server, has left ----------------------------------------------------------


@pytest.mark.parametrize("named", ["99999999999999999999", "4294967297", "4194304", "0", "a thread"])
def test_a_lock_file_that_names_no_process_is_no_error(store_dir: Path, named: str) -> None:
    """Its owner can write anything there, and root reads it."""
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    files = StoreFiles.of("shop", store_dir)
    files.create()
    lock = files.claim(1)
    assert lock is not None
    try:
        assert files.server() == os.getpid()
        pid = str(thread.native_id) if named == "a thread" else named
        os.pwrite(lock, f"{pid:<21} {pid_namespace():<10}\n".encode(), 0)
        assert files.server() == (thread.native_id if named == "a thread" else None)
        assert not connection.kill(files)
        assert not connection.kill_stopped(files)
    finally:
        os.close(lock)
        over.set()
        thread.join()


def test_files_that_a_killed_server_has_left_are_removed_with_the_store(store_dir: Path) -> None:
    files = StoreFiles.of("shop", store_dir)
    files.create()
    lock = files.claim(1)
    assert lock is not None
    for path in (files.options, files.address):
        Path(f"{path}.new").touch()
    files.remove()
    os.close(lock)
    assert list(store_dir.iterdir()) == []
