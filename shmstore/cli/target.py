"""The store that a command works on: on this host, with or without a running server, or on Redis or Valkey."""

from __future__ import annotations

import functools
import glob
import math
import os
import shlex
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from urllib.parse import quote

import click

from shmstore.client import connection
from shmstore.client.store_proxy import StoreProxy
from shmstore.contract import AnyStore, ArenaStore
from shmstore.engine.arena import Arena
from shmstore.engine.header import CLOSED, STATE
from shmstore.engine.layout import ArenaDamaged
from shmstore.errors import ConfigError, StoreUnavailable
from shmstore.ipc import options_file
from shmstore.ipc.channel import Unresponsive
from shmstore.ipc.directory import ARENA, DEFAULT, StoreFiles, lacking
from shmstore.ipc.handshake import ConnectionLimitReached
from shmstore.listing import has_arena
from shmstore.options import Options
from shmstore.store.dispose import DisposeRequired
from shmstore.store.holder import ArenaHolder, Remote, Upkeep
from shmstore.store.store import Store
from shmstore.system.platform import geteuid
from shmstore.urls import is_network, safe, suggestion

if TYPE_CHECKING:
    from shmstore.redis import RedisStore

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


S = TypeVar("S", bound=AnyStore, covariant=True)

PATIENCE = 10.0  # seconds that a server of Redis or Valkey has for an answer


@dataclass(frozen=True)
class Target(Generic[S]):
    """
    An open store.

    Attributes:
        name: Its name; on Redis the prefix of its keys.
        place: Where it is: the path of its directory, or a description of the server without the password.
        store: The store; one of this host works in place.
        running: Whether it has a server; on Redis always.
    """

    name: str
    place: str
    store: S
    running: bool = True


def open_on_server(url: str) -> Target[RedisStore]:
    """
    Open a store on Redis or Valkey. It connects when it is used.

    Raises:
        ConfigError: The URL is invalid, or the package redis is not installed.
    """
    try:
        from shmstore.redis import RedisStore
        from shmstore.redis.client import Address
    except ImportError as exc:
        raise ConfigError(str(exc)) from None
    store = RedisStore.from_url(url, check_period=None, lock_timeout=PATIENCE)
    address = Address.of(url)
    return Target(address.prefix, address.where, store)


def open_target(files: StoreFiles) -> Target[ArenaStore]:
    """
    Open a store of this host, whether it has a server or not. No server is started, now or later.

    Without a server the file is opened as by one more worker. Its lock and journal make that safe even while a server
    is starting. If a session with a ``dispose`` is removed, ``dispose`` is called in this process. Options may refer to
    functions of the application, so its modules are also searched for in the working directory.

    Raises:
        StoreUnavailable: The store does not exist, or cannot be used safely.
        ConfigError: This process cannot read its options.
    """
    exists(files)
    files.check()
    if files.other_owners():
        click.echo(f"This is root's store{_elsewhere(files)}", err=True)
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)  # last, so that files in the working directory replace no installed module
    try:
        with suppress(Unresponsive, ConnectionLimitReached):  # the server runs, and work in place does not need it
            connection.connect(files).close()
        proxy = StoreProxy.attach(files)
    except connection.NoServer:
        return Target(files.name, files.path, _open_without_server(files), running=False)
    proxy._attachment.rescues = False
    return Target(files.name, files.path, proxy)


class _NoServer(Upkeep):
    """The upkeep of a store whose server has ended: a command works on its file, and repairs nothing."""

    def repair(self, store: ArenaHolder, arena: Arena, damage: ArenaDamaged) -> None:
        raise StoreUnavailable(f"the memory of {arena.label} is damaged ({damage}): start its server, which repairs it")

    def dispose(
        self, store: ArenaHolder, required: DisposeRequired, attempt: Callable[[], T], remote: Remote | None
    ) -> T:
        if store.options.dispose is None:
            # A server has started meanwhile, and only the server has the dispose.
            raise StoreUnavailable(
                f"{store.arena.label} has a server now, and with it a dispose: call this command again"
            )
        return super().dispose(store, required, attempt, remote)


def _open_without_server(files: StoreFiles) -> Store:
    try:
        arena = Arena.open(files.arena)
    except FileNotFoundError:
        raise no_store(files) from None
    try:
        options = Options.of(**options_file.load(files.options))
    except FileNotFoundError:
        options = Options()
    except BaseException:
        arena.close()
        raise
    if arena.cells[STATE] == CLOSED:
        arena.close()
        raise no_store(files)
    return Store.over(arena, options, _NoServer())


def exists(files: StoreFiles) -> None:
    """
    Make sure that a store may exist, because other problems are worth reporting only then.

    Raises:
        StoreUnavailable: The store does not exist.
    """
    try:
        os.lstat(files.arena)
    except (FileNotFoundError, NotADirectoryError):
        raise no_store(files) from None
    except OSError:
        pass  # it may belong to another user, which is reported later


def no_store(files: StoreFiles) -> StoreUnavailable:
    """Return the error for a store that does not exist."""
    return StoreUnavailable(
        f"there is no store {files.name!r} in {os.path.dirname(files.path)}{_elsewhere(files)}; "
        "shmstore stores lists those of this host"
    )


def _elsewhere(files: StoreFiles) -> str:
    return files.elsewhere(f"shmstore ... {shlex.quote(files.name)}")


class Seconds(click.FloatRange):
    """A finite duration."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found: float = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{value!r} is not a finite number of seconds", param, ctx)
        return found


directory_option = click.option(
    "--directory", type=click.Path(), help="Where the store NAME is: DIRECTORY/NAME.  [/dev/shm/shmstore-UID]"
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def refuse_misspelt_url(path: str) -> None:
    """
    Refuse a path that is more likely a URL with a password. Errors about a path quote it in full.

    Raises:
        ConfigError: It has an @, and neither it nor its directory exists.
    """
    if "@" in path and not os.path.lexists(path) and not os.path.isdir(os.path.dirname(path)):
        raise ConfigError(f"{safe(path)} is not a store, a URL or a file; a URL begins with redis:// or the like")


def url_of(store: str) -> str:
    """
    Return the name or URL of a store that may also be given as the path of its directory or of its arena file.

    Raises:
        ConfigError: It is a misspelt URL.
    """
    if "/" not in store or "://" in store or suggestion(store):
        return store  # a misspelt URL is refused, with a suggestion
    refuse_misspelt_url(store)
    path = os.path.abspath(store)
    return f"shm://{quote(os.path.dirname(path) if os.path.basename(path) == ARENA and os.path.isfile(path) else path)}"


def store_argument(command: F) -> F:
    """Give a command the argument STORE and the option --directory."""
    return click.argument("store", metavar="STORE", shell_complete=complete)(directory_option(command))


def complete(ctx: click.Context, param: click.Parameter, begun: str) -> list[str]:
    """Return the names of the calling user's stores that begin so, for the completion of the shell."""
    return sorted(os.path.basename(each) for each in glob.glob(f"{DEFAULT}{geteuid()}/{glob.escape(begun)}*"))


def files_of(store: str, directory: str | None) -> StoreFiles:
    """
    Return the files of the store that an argument names.

    Raises:
        StoreUnavailable: Processes cannot share it on this host.
        ConfigError: The argument is not valid.
    """
    files = StoreFiles.of(url_of(store), directory)
    if why := lacking(default=files.default):
        raise StoreUnavailable(why)
    return files


def open_store(store: str, directory: str | None) -> Target[AnyStore]:
    """
    Open the store that an argument names, on this host or on a server.

    Raises:
        StoreUnavailable: The store does not exist, or cannot be used safely.
        ConfigError: The argument is invalid, or this process cannot read the options of the store.
    """
    if not is_network(store):
        return open_target(files_of(store, directory))
    if directory is not None:
        raise ConfigError("the URL of a server says where the store is: omit --directory")
    return open_on_server(store)


def on_store(command: F) -> F:
    """Give a command the argument STORE and the option --directory; it is called with an open `Target`."""

    @store_argument
    @functools.wraps(command)
    def call(store: str, directory: str | None, **kwargs: Any) -> Any:
        target = open_store(store, directory)
        try:
            return command(target, **kwargs)
        finally:
            target.store.close()

    return call  # type: ignore[return-value] # click's decorators keep the function


def on_arena(instead: str) -> Callable[[F], F]:
    """Do the same for a command that needs a store of this host; ``instead`` says what to do with one on a server."""

    def decorate(command: F) -> F:
        @on_store
        @functools.wraps(command)
        def call(target: Target[AnyStore], **kwargs: Any) -> Any:
            if not has_arena(target.store):
                raise ConfigError(f"this command is for a store in shared memory, not for {target.place}: {instead}")
            return command(target, **kwargs)

        return call  # type: ignore[return-value] # click's decorators keep the function

    return decorate
