"""What an application passes to be called: the types, and the check of what a function accepts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from shmstore.errors import ConfigError

__all__ = ["Dispose", "LengthFunction", "Serializer"]

Dispose = Callable[[str, dict[Any, Any] | None, str], object]
"""Called with id, session and reason, which is ``set``, ``destroy``, ``expire``, ``evict`` or ``clear``."""

LengthFunction = Callable[[int, str], int]
"""Called with the bytes of an encoded session, and its id; returns how much of ``max`` the session takes."""


@runtime_checkable
class Serializer(Protocol):
    """Encodes and decodes the values of sessions: an object or a module, such as ``json``."""

    def dumps(self, value: Any, /) -> bytes | str:
        """Return a value as bytes, or as text, which is stored as UTF-8."""

    def loads(self, data: Any, /) -> Any:
        """Return the value that `dumps` encoded. ``data`` is always bytes, although Flask's serializer declares str."""


def check_call(name: str, function: Callable[..., object], arguments: tuple[str, ...]) -> None:
    """
    Make sure that a function passed by the user accepts the arguments that it will be called with.

    Raises:
        ConfigError: It does not accept them; the message names them.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions written in C have no signature
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise ConfigError(
            f"{name} is called with ({', '.join(arguments)}), which {function!r} does not accept: {error}"
        ) from None
