"""Shared by tests with more than one user."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

NOBODY = 65534
IS_ROOT = os.geteuid() == 0

root_only = pytest.mark.skipif(not IS_ROOT, reason="only root can become another user")


def in_child(action: Callable[[], object]) -> str:
    """Return the repr of an action's result in a forked child, or its error."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reader)
            try:
                result = repr(action())
            except Exception as exc:
                result = f"{type(exc).__name__} {getattr(exc, 'errno', '')} {exc}"
            os.write(writer, result.encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as stream:
        result = stream.read().decode()
    os.waitpid(child, 0)
    return result


def as_nobody(action: Callable[[], object]) -> str:
    """Return the result of `in_child` for another user."""

    def lowered() -> object:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        return action()

    return in_child(lowered)
