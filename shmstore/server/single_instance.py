"""What a store's server holds in the store's directory, for as long as it lives: the lock and the socket."""

from __future__ import annotations

import os
import socket

from shmstore.server.directory import StoreFiles


class Place:
    """
    The lock of a store, by which there is one server, and the socket that it listens at. Both may be removed by others.

    Args:
        files: Where.
        lock: What `StoreFiles.claim` returned.

    Attributes:
        listener: The listening socket.

    Raises:
        OSError: The socket cannot be made.
    """

    def __init__(self, files: StoreFiles, lock: int) -> None:
        self._files = files
        self._lock = lock
        self.listen()

    def listen(self) -> None:
        """Make the socket, again. Who is connected stays; the listener before is the caller's to close."""
        listener = self._files.listen()
        listener.setblocking(False)
        self.listener: socket.socket = listener
        self._bound = os.lstat(self._files.address)

    def has_lock(self) -> bool:
        """Return whether the lock is where who looks for the server finds it."""
        return _leads_to(self._files.lock, os.fstat(self._lock))

    def has_socket(self) -> bool:
        """Return whether the socket is where clients find it."""
        return _leads_to(self._files.address, self._bound)

    def take_lock(self) -> bool:
        """Take the lock again after it was removed; return whether it is ours, and not another server's by now."""
        if not self.has_lock():
            lock = self._files.claim(0)
            if lock is None:
                return False
            os.close(self._lock)
            self._lock = lock
        return True

    def leave(self) -> None:
        """Go out of sight, so that nobody connects any more; but the socket may be a successor's by now."""
        if self.has_socket():
            os.unlink(self._files.address)
        self.listener.close()


def _leads_to(path: str, there: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.lstat(path), there)
    except FileNotFoundError:
        return False
