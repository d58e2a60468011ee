"""A real connection between a client and a server, on which a test can count, delay and drop data."""

from __future__ import annotations

import select
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path


class Wire:
    """
    A socket that forwards to another one and back, with a thread for each connection.

    Attributes:
        path: Where it listens.
        trips: The number of round trips.
        requests: The data that the clients have sent, joined for each round trip.
        delay: Seconds by which each answer is delayed.
        lose: How many of the next answers are dropped: the connection breaks instead.
    """

    def __init__(self, path: Path, server: Path) -> None:
        self.path, self._server = path, server
        self.trips, self.delay, self.lose = 0, 0.0, 0
        self.requests: list[bytes] = []
        self._ended = False
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    @property
    def url(self) -> str:
        return f"unix://{self.path}"

    def end(self) -> None:
        """Break all connections."""
        self._ended = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(30)

    def _accept(self) -> None:
        while not self._ended:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._pass_on, args=[client], daemon=True)
            self._threads.append(thread)
            thread.start()

    def _pass_on(self, client: socket.socket) -> None:
        asking = False
        with client, socket.socket(socket.AF_UNIX) as server, suppress(OSError):
            server.connect(str(self._server))
            while not self._ended:
                ready, _, _ = select.select([client, server], [], [], 0.1)
                if client in ready:
                    if not (data := client.recv(2**16)):
                        return
                    if asking:
                        self.requests[-1] += data
                    else:
                        self.requests.append(data)
                        self.trips += 1
                    asking = True
                    server.sendall(data)
                elif server in ready:
                    if not (data := server.recv(2**16)):
                        return
                    asking = False
                    if self.lose:
                        self.lose -= 1
                        return
                    if self.delay:
                        time.sleep(self.delay)
                    client.sendall(data)
