"""Repeats a step of a store that was stopped by a replaced arena, by damage, or for a dispose."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Concatenate, Final, ParamSpec, TypeVar

from shmstore.engine.arena import Arena
from shmstore.engine.layout import ArenaDamaged
from shmstore.engine.mapping import ArenaReplaced
from shmstore.store.dispose import DisposeRequired
from shmstore.store.holder import ArenaHolder, Remote

__all__ = ["retrying"]

P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S", bound=ArenaHolder)

_REPAIRS: Final = 2  # of one step: damaged options are restored first, then the sessions are carried over


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


def _resume(store: ArenaHolder, arena: Arena, stop: Exception, step: Callable[[], T], remote: Remote | None) -> T:
    if not isinstance(stop, DisposeRequired):
        try:
            return _retry(store, step, arena, stop)
        except DisposeRequired as required:
            stop = required
    return store._upkeep.dispose(store, stop, lambda: _retry(store, step), remote)


def _retry(store: ArenaHolder, step: Callable[[], T], arena: Arena | None = None, stop: Exception | None = None) -> T:
    """Repeat a step after a replaced arena or damage, until it succeeds or is stopped for a dispose."""
    repairs = 0
    while True:
        if isinstance(stop, ArenaReplaced):
            store.reattach()
        elif isinstance(stop, ArenaDamaged) and arena is not None:
            if repairs == _REPAIRS:
                raise stop
            store._upkeep.repair(store, arena, stop)
            repairs += 1
        arena = store.arena
        try:
            return step()
        except (ArenaReplaced, ArenaDamaged) as another:
            stop = another
