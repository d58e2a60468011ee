"""The first bytes of a connection: whether the server serves this client, which may be of another version."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import struct
from typing import Any, Final

from shmstore.engine import layout
from shmstore.errors import StoreUnavailable
from shmstore.ipc.channel import Channel, Disconnected, Unresponsive
from shmstore.system import version
from shmstore.system.clock import Deadline
from shmstore.system.signals import pass_on_interruption

__all__ = [
    "FULL", "GREETING", "MAGIC", "OTHER", "ConnectionLimitReached", "OtherVersion", "describe_server", "greet",
    "greeting",
]  # fmt: skip

# The greeting. Its form never changes, so that processes of any two versions understand each other.
#
# The client sends 16 bytes: b"shmstore", and as big-endian numbers the protocol (2 bytes), the layout of the arena (2)
# and its release (4; see system/version.py). Release 0 means any release of this protocol and layout. The server sends
# - the same 16 bytes, if it serves this client: what follows is of the protocol;
# - b"shmstore" and 8 bytes 00, if it cannot take another connection; then it closes;
# - b"shmstore" and 8 bytes ff, if it is of another version. If processes use it, or the client has sent release 0, it
#   adds a JSON object and closes: "protocol", "layout", "shmstore" (its version), "python", "pid" and "users", the pids
#   of the processes that use it. Otherwise the client has asked it to exit: it saves its snapshot and ends, closing the
#   connection. Until then it sends a space at intervals as a sign of life. If a process starts to use it in the
#   meantime, it stays, adds the JSON object and closes.
MAGIC: Final = b"shmstore"
PROTOCOL: Final = 3
FULL: Final = MAGIC + bytes(8)
OTHER: Final = MAGIC + b"\xff" * 8
_MAX_ANSWER = 65536  # bytes of white space and JSON
_MAX_SHOWN = 20  # processes that an error names
_WORD = re.compile(r"[ -~]{1,64}")


def greeting(release: int = 0) -> bytes:
    """Return a client's greeting. A ``release`` (`version.fingerprint`) asks a server of another release to exit."""
    return MAGIC + struct.pack(">HHI", PROTOCOL, layout._VERSION, release)


GREETING: Final = greeting()


def describe_server(users: list[int]) -> bytes:
    """Return the JSON object that a server sends to a client of another version."""
    facts = {"protocol": PROTOCOL, "layout": layout._VERSION, "shmstore": version.VERSION, "python": version.PYTHON}
    return json.dumps({**facts, "pid": os.getpid(), "users": users}).encode()


class ConnectionLimitReached(StoreUnavailable):
    """The server runs and cannot take another connection."""


class OtherVersion(StoreUnavailable):
    """
    The server is of another version of shmstore or of Python, and other processes use it.

    Attributes:
        compatible: Whether it serves a client that does not name its release.
        python: The Python that runs it, in the form of `version.PYTHON`.
        users: The processes that use it, as text.
    """

    def __init__(self, facts: dict[str, Any]) -> None:
        self.compatible = (facts["protocol"], facts["layout"]) == (PROTOCOL, layout._VERSION)
        self.python: str = facts["python"]
        pids = [str(pid) for pid in facts["users"][:_MAX_SHOWN]]
        if more := len(facts["users"]) - len(pids):
            pids.append(f"{more} more")
        several = f"processes {', '.join(pids)} use it"
        self.users = several if len(pids) > 1 else f"{f'process {pids[0]}' if pids else 'no process'} uses it"
        other = f"shmstore {facts['shmstore']} on {self.python}, layout {facts['layout']}"
        super().__init__(
            f"the store's server, process {facts['pid']}, is {other}; this is {version.describe()}, layout "
            f"{layout._VERSION}; {self.users}: stop all processes that use the store, then start them"
        )

    @classmethod
    def parse(cls, data: bytes) -> OtherVersion | None:
        """Return the error for the JSON object from a server of another version; None if it is not such an object."""
        try:
            facts: Any = json.loads(data) if len(data) < _MAX_ANSWER else None
        except (ValueError, RecursionError):
            return None
        # A server of another user may have written it, and a root process shows it in its log.
        valid = (
            isinstance(facts, dict)
            and all(_is_number(facts.get(name)) for name in ("protocol", "layout", "pid"))
            and all(_is_word(facts.get(name)) for name in ("shmstore", "python"))
            and isinstance(facts.get("users"), list)
            and all(map(_is_number, facts["users"]))
        )
        return cls(facts) if valid else None


def _is_number(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**32  # excludes bool


def _is_word(value: object) -> bool:
    return isinstance(value, str) and _WORD.fullmatch(value) is not None


def greet(sock: socket.socket, deadline: Deadline, *, leaving: Deadline | None = None) -> Channel:
    """
    Exchange greetings as a client. The answer proves that the server serves, not only that it listens.

    Args:
        sock: The connection.
        deadline: The deadline for the answer.
        leaving: Ask a server of another version to exit, and wait until this deadline for its end. None: do not
            ask.

    Raises:
        Unresponsive: The server did not answer, or did not exit, in time.
        OtherVersion: The server is of another version.
        Disconnected: The server is exiting.
        ConnectionLimitReached: The server cannot take another connection.
        StoreUnavailable: The answer is not that of a store's server.
    """
    channel, sent = Channel(sock), greeting(0 if leaving is None else version.fingerprint())
    try:
        with contextlib.suppress(BrokenPipeError):  # the server may have sent its reason and closed
            sock.sendall(sent)
        answer = channel.read(len(sent), deadline)
        facts = channel.read_until_closed(_MAX_ANSWER, leaving or deadline) if answer == OTHER else b""
    except TimeoutError as exc:
        pass_on_interruption(exc)
        raise Unresponsive("the store's server does not answer") from exc
    except (EOFError, OSError) as exc:
        pass_on_interruption(exc)
        raise Disconnected("the store's server has just exited", delivered=False) from exc
    if answer == OTHER:
        if len(facts) < _MAX_ANSWER and not facts.strip():
            raise Disconnected("the store's server has just exited", delivered=False)
        if other := OtherVersion.parse(facts):
            raise other
    if answer == FULL:
        raise ConnectionLimitReached("the store's server cannot take another connection: see its log")
    if answer != sent:
        raise StoreUnavailable("the process that listens on the store's socket is not a store's server")
    return channel
