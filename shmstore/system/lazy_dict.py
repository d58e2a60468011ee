"""A dict whose content is read at the first access."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Final

__all__ = ["LazyDict"]

# C code may take the size of a dict without asking its class: json writes "{}" for a dict that seems empty, and asks
# any other for its items. So a dict with content must never seem empty.
_PLACEHOLDER: Final[Any] = object()

_UNREAD: Final = {_PLACEHOLDER: None}

_contains, _pop, _update = dict.__contains__, dict.pop, dict.update

_METHODS: Final = (
    "__bool__", "__contains__", "__delitem__", "__eq__", "__getitem__", "__ior__", "__iter__", "__len__", "__ne__",
    "__or__", "__reversed__", "__ror__", "__setitem__", "clear", "copy", "get", "items", "keys", "pop", "popitem",
    "setdefault", "update", "values",
)  # fmt: skip


class LazyDict(dict[str, Any]):
    """
    A dict whose content `_read` returns at the first access.

    Until then its class is a subclass of its own whose methods read first. Then its class becomes the one that it was
    created with, so that all later accesses are those of any dict.

    Threads may share it: the first one reads, the others wait. Printing it does not read.
    """

    __slots__ = ("_lock",)

    _unread: ClassVar[type[LazyDict]]

    _lock: AbstractContextManager[bool]  # reentrant

    def __init_subclass__(cls, *, unread: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not unread:
            methods = {name: _reading(cls, name) for name in _METHODS if hasattr(cls, name)}
            names = {"__module__": cls.__module__, "__doc__": cls.__doc__, "__slots__": ()}
            kind: Any = type(cls)  # ABCMeta, for a subclass that is also a Mapping
            cls._unread = kind(cls.__name__, (cls,), methods | names, unread=True)

    def __init__(self) -> None:
        self._lock = threading.RLock()  # gevent's if it has patched threading
        _update(self, _UNREAD)
        self.__class__ = self._unread

    def _read(self) -> Mapping[str, Any]:
        """Return the content. Called once."""
        raise NotImplementedError

    def _look(self) -> None:
        """Read the content unless it was read."""
        if type(self) is self._unread:
            with self._lock:
                if type(self) is self._unread:
                    self._fill(self._read())

    def _show(self, content: Mapping[str, Any]) -> None:
        """Let C code see the content, which `_read` is going to return: it takes a dict's items without a call."""
        _update(self, content)
        _pop(self, _PLACEHOLDER, None)

    def _fill(self, content: Mapping[str, Any]) -> None:
        """Set the content, if it was not set."""
        if type(self) is self._unread:
            if _contains(self, _PLACEHOLDER):  # else it is shown
                _update(self, content)
                _pop(self, _PLACEHOLDER, None)
            self.__class__ = self._unread.__base__  # type: ignore[assignment]

    def __repr__(self) -> str:
        content = "not read yet" if type(self) is self._unread else super().__repr__()
        return f"<{type(self).__name__} {content}>"

    def __reduce__(self) -> tuple[Any, ...]:
        """Reduce to a plain dict: copies and pickles are never lazy."""
        return dict, (self.copy(),)


def _reading(cls: type[LazyDict], name: str) -> Callable[..., Any]:
    """Return a method that reads the content, and then does what the method of this name does."""

    def method(self: LazyDict, /, *args: Any, **kwargs: Any) -> Any:
        self._look()
        return getattr(cls, name)(self, *args, **kwargs)

    method.__name__ = name
    return method
