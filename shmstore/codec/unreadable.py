"""Values of a session that cannot be read, because a class or the serializer has changed: said in the log."""

from __future__ import annotations

import logging

from shmstore.errors import outline
from shmstore.system.throttle import Throttle

log = logging.getLogger("shmstore")

_throttle = Throttle()


def report(label: str, key: object, error: BaseException) -> None:
    """
    Log, now and then, how many values could not be read, and the key and the error of the last one.

    Args:
        label: The store.
        key: The key of the value in its session.
        error: What the serializer raised. Its text is left out: that may quote the value.
    """
    if times := _throttle.due():
        log.error(
            "%s: %d stored values cannot be read, and are left out of their sessions; the last is %.100r: %s",
            label, times, key, outline(error),
        )  # fmt: skip
