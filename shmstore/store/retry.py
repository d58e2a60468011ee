"""Repeats a step of a store that was stopped by a replaced arena, by damage, or for a dispose."""

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
from shmstore.store.dispose import Disposal, DisposeRequired, refuse_inside

__all__ = ["LocalUpkeep", "Remote", "Upkeep", "reopen", "retrying"]

_TIMEOUT = 5.0  # seconds to wait for a process that is replacing a file

P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S", bound="Retryable")

Remote = tuple[str, dict[str, Any]]
"""A method of the contract, and its arguments."""


class Retryable(Protocol):
    """The part of a store that a retry uses."""

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

    def apply_options(self, options: Options) -> None:
        """Obey these options."""
        ...

    def reattach(self) -> None:
        """Continue on the arena that has replaced this one."""
        ...

    def repair(self, arena: Arena, damage: ArenaDamaged, progress: Callable[[int], object] = ...) -> None:
        """Repair the arena. Only its owner may do this."""
        ...


class Upkeep(Protocol):
    """The tasks that a store leaves to the owner of its arena, which is this process or a server."""

    def reopen(self, store: Retryable) -> Arena:
        """
        Return the arena that has replaced the store's arena.

        Raises:
            StoreUnavailable: No arena has replaced it.
        """
        ...

    def repair(self, store: Retryable, arena: Arena, damage: ArenaDamaged) -> None:
        """
        Restore damaged options, or have all undamaged sessions carried over to another file.

        Raises:
            StoreUnavailable: The arena cannot be repaired now.
        """
        ...

    def dispose(
        self, store: Retryable, required: DisposeRequired, attempt: Callable[[], T], remote: Remote | None
    ) -> T:
        """
        Have dispose called, and complete the step that was stopped for this.

        Args:
            store: The store.
            required: The session, and the reason.
            attempt: Repeats the step.
            remote: The call to the server that replaces the step; None: the server only removes the session.
        """
        ...

    def refresh_options(self, store: Retryable) -> bool:
        """Apply the options of the store if they have changed; return whether they had."""
        ...

    def before_write(self, store: Retryable) -> None:
        """
        Prepare for a write. Called without the lock.

        Raises:
            RuntimeError: This thread is inside a dispose, see `refuse_inside`.
        """
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
        refuse_inside()


def reopen(path: str | None) -> Arena:
    """
    Return the arena that has replaced the previous one at ``path``.

    Raises:
        StoreUnavailable: No arena has replaced it.
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
        # Another process is replacing this file too, or died while it did. With the lock this is known.
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
    must be called first. A stopped step has changed nothing.

    Args:
        remote: Returns the call to the server that replaces the step, given the arguments of the step.
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
    """Repeat a step after a replaced arena or damage, until it succeeds or is stopped for a dispose."""
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
