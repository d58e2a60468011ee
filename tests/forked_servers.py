"""
Servers that are forked by a process which has imported all they need: 0.3 s of a processor less for each of hundreds.

They run the same `server.main`, with the same order at their standard input, and detach themselves as always. How a
server is executed, and what it inherits, is shown by the tests that are marked ``servers("executed")``, and by all that
start a Gunicorn or a program.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

MODULE = ["-P", "-m", "shmstore.server"]


class Forker:
    """The process that forks servers; stands in for `subprocess` in `shmstore.launch`."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            )  # fmt: skip
        self.subprocess = SimpleNamespace(Popen=self._popen, DEVNULL=subprocess.DEVNULL)

    def _popen(self, command: Sequence[str], stdin: int, env: dict[str, str], **_: Any) -> Any:
        python, *module, name = command
        assert (python, module) == (sys.executable, MODULE)
        umask = os.umask(0)
        os.umask(umask)
        order = {"env": env, "directory": os.getcwd(), "umask": umask, "name": name}
        socket.send_fds(self._socket, [json.dumps(order).encode()], [stdin, 2])
        return SimpleNamespace(kill=lambda: None, wait=lambda: 0)

    def end(self) -> None:
        self._socket.close()
        self._process.wait()


def main() -> None:
    from shmstore import server

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    orders = socket.socket(fileno=int(sys.argv[1]))
    while True:
        data, fds, _, _ = socket.recv_fds(orders, 2**20, 2)
        if not data:
            return
        if not os.fork():
            orders.close()
            become(json.loads(data), fds)
            server.main()
            return
        for fd in fds:
            os.close(fd)


def become(order: dict[str, Any], fds: list[int]) -> None:
    """Be what `launch` asked to be executed."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, fd in zip((0, 2), fds, strict=True):
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(order["directory"])
    os.umask(order["umask"])
    os.environ.clear()
    os.environ.update(order["env"])
    sys.path[:] = order["env"]["PYTHONPATH"].split(os.pathsep)
    sys.argv[:] = ["shmstore.server", order["name"]]


if __name__ == "__main__":
    main()
