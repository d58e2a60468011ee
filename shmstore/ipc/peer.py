"""The process at the other end of a connection: its credentials, and what may be unpickled from it."""

from __future__ import annotations

import io
import os
import pickle
import socket
import struct
from typing import Any, NamedTuple

from shmstore.errors import ShmStoreError
from shmstore.system.processes import permitted_capabilities

__all__ = ["Peer", "loads", "peer_of", "trusted"]

_CREDENTIALS = struct.Struct("3i")
_HARMLESS = 1 << 10  # CAP_NET_BIND_SERVICE, which many services have; it gives no access to files or processes


class Peer(NamedTuple):
    """The process at the other end, as the kernel knows it."""

    pid: int
    uid: int
    gid: int


def peer_of(sock: socket.socket) -> Peer:
    """Return the credentials of the process that connected, or called ``listen``, at the other end."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return Peer(*_CREDENTIALS.unpack(raw))


def trusted(uid: int) -> bool:
    """
    Return whether this process may unpickle what a process of that user sends: unpickling can run any code.

    All three ids count, because a root process that has only lowered its effective uid can become root again, and so
    can one that has kept capabilities.
    """
    return uid == 0 or (os.getresuid() == (uid, uid, uid) and not permitted_capabilities() & ~_HARMLESS)


def loads(data: bytes | bytearray, uid: int) -> Any:
    """Return the content of a message from a process of this user."""
    return pickle.loads(data) if trusted(uid) else _PlainUnpickler(io.BytesIO(data)).load()  # noqa: S301


class _PlainUnpickler(pickle.Unpickler):
    """
    Accepts plain data and known exceptions from a server of another user.

    A root master that serves as another user (Gunicorn's ``--user``) communicates with that user's server, and must not
    run any code that it sends.
    """

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name) if module in ("shmstore.errors", "builtins") else None
        if isinstance(found, type) and (
            issubclass(found, ShmStoreError) or found in (ValueError, TypeError, AttributeError)
        ):
            return found
        raise pickle.UnpicklingError(f"{module}.{name} is not accepted from another user")
