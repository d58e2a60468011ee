"""What stops a step of a store, and how it is repeated."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from shmstore.codec.body import Codec
from shmstore.engine.arena import Arena
from shmstore.engine.header import STATE
from shmstore.engine.layout import ArenaDamaged
from shmstore.engine.mapping import ArenaReplaced
from shmstore.errors import StoreUnavailable
from shmstore.options import Options
from shmstore.store.dispose import Disposal, DisposeRequired

__all__ = ["LocalUpkeep", "Remote", "Upkeep", "reopen", "retrying"]

_TIMEOUT = 5.0  # seconds to wait for a process that is replacing a file

P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S", bound="Retryable")

Remote = tuple[str, dict[str, Any]]
"""A method of the contract, and its arguments."""


class Retryable(Protocol):
    """What recovery needs of a store."""

    disposal: Disposal
    upkeep: Upkeep
    _arena: Arena

    @property
    def options(self) -> Options:
        """The options of the store."""
        ...

    @property
    def codec(self) -> Codec:
        """Turns sessions into bytes and back."""
        ...

    @property
    def arena(self) -> Arena:
        """The memory that holds the sessions now."""
        ...

    def reattach(self) -> None:
        """Continue on the arena that has taken the place of this one."""
        ...

    def repair(self, arena: Arena, damage: ArenaDamaged, progress: Callable[[int], object] = ...) -> None:
        """Repair the arena. Only its owner may do this."""
        ...


class Upkeep(Protocol):
    """What a store leaves to the owner of its arena, which is this process or a server."""

    def reopen(self, store: Retryable) -> Arena:
        """
        Return the arena that has taken the place of the store's arena.

        Raises:
            StoreUnavailable: There is no such arena.
        """
        ...

    def repair(self, store: Retryable, arena: Arena, damage: ArenaDamaged) -> None:
        """
        Restore damaged options, or have all undamaged sessions carried over to another file.

        Raises:
            StoreUnavailable: That cannot be done now.
        """
        ...

    def dispose(
        self, store: Retryable, required: DisposeRequired, attempt: Callable[[], T], remote: Remote | None
    ) -> T:
        """
        Have dispose called, and complete the step that was stopped for it.

        Args:
            store: The store.
            required: For which session.
            attempt: Repeats the step.
            remote: What a server can do instead of the step; None: remove the session that is in the way.
        """
        ...

    def refresh_options(self, store: Retryable) -> bool:
        """Apply the options of the store if they have changed; return whether they had."""
        ...

    def before_write(self, store: Retryable) -> None:
        """Prepare for a write. Called without the lock."""
        ...


class LocalUpkeep:
    """The upkeep of an arena by this process, which owns it."""

    def reopen(self, store: Retryable) -> Arena:
        return reopen(store._arena.file.path)

    def repair(self, store: Retryable, arena: Arena, damage: ArenaDamaged) -> None:
        store.repair(arena, damage)

    def dispose(
        self, store: Retryable, required: DisposeRequired, attempt: Callable[[], T], remote: Remote | None
    ) -> T:
        return store.disposal.carry_out(required, attempt, store.options, store.codec)

    def refresh_options(self, store: Retryable) -> bool:
        return False

    def before_write(self, store: Retryable) -> None:
        pass


def reopen(path: str | None) -> Arena:
    """
    Return the arena that has taken the place of the one that was at ``path``.

    Raises:
        StoreUnavailable: There is no such arena.
    """
    if path is None:
        raise StoreUnavailable("the store is no longer in use")
    while True:
        try:
            arena = Arena.open(path)
        except (FileNotFoundError, ArenaDamaged) as error:
            raise StoreUnavailable(f"{path} was removed or replaced, and there is no other store") from error
        if not arena.cells[STATE]:
            return arena
        # A process may be replacing this file too, or have died while it did. The lock tells.
        try:
            arena.lock(_TIMEOUT)
        except ArenaReplaced:
            arena.close()
        except BaseException:
            arena.close()
            raise
        finally:
            arena.unlock()


def retrying(
    remote: Callable[..., Remote | None] = lambda *_, **__: None,
) -> Callable[[Callable[Concatenate[S, P], T]], Callable[Concatenate[S, P], T]]:
    """
    Return a decorator for a step of a store. The step is repeated if the arena was replaced or damaged, or if a dispose
    must be called first. It has changed nothing when it is stopped.

    Args:
        remote: Returns what the owner of the arena does instead of the step, given the arguments of the step.
    """

    def decorate(step: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
        @wraps(step)
        def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
            arena = self._arena
            try:
                return step(self, *args, **kwargs)
            except (ArenaReplaced, ArenaDamaged, DisposeRequired) as stop:
                return _resume(self, arena, stop, partial(step, self, *args, **kwargs), remote(*args, **kwargs))

        return call

    return decorate


def _resume(store: Retryable, arena: Arena, stop: Exception, step: Callable[[], T], remote: Remote | None) -> T:
    if not isinstance(stop, DisposeRequired):
        try:
            return _retry(store, step, arena, stop)
        except DisposeRequired as required:
            stop = required
    return store.upkeep.dispose(store, stop, lambda: _retry(store, step), remote)


def _retry(store: Retryable, step: Callable[[], T], arena: Arena | None = None, stop: Exception | None = None) -> T:
    """Deal with what has stopped a step on an arena, and repeat the step until it is stopped for a dispose only."""
    repaired = False
    while True:
        if isinstance(stop, ArenaReplaced):
            store.reattach()
        elif isinstance(stop, ArenaDamaged) and arena is not None:
            if repaired:
                raise stop
            store.upkeep.repair(store, arena, stop)
            repaired = True
        arena = store.arena
        try:
            return step()
        except (ArenaReplaced, ArenaDamaged) as another:
            stop = another
