"""
Hooks for Gunicorn: the store's server starts with the master and outlives it for as long as a worker needs it.

In ``gunicorn.conf.py``::

    import shmstore.gunicorn

    hooks = shmstore.gunicorn.Hooks("shop", max=100_000)
    on_starting = hooks.on_starting  # required
    on_reload = hooks.on_reload  # changed options take effect at HUP
    on_exit = hooks.on_exit  # the server exits at once, not after some seconds
"""

from __future__ import annotations

import os
from typing import Any

from shmstore.attach import register
from shmstore.client import spawn
from shmstore.errors import ConfigError, ShmStoreError
from shmstore.manager import StoreManager
from shmstore.system.platform import geteuid
from shmstore.system.signals import pass_on_interruption

__all__ = ["Hooks"]

# The running managers, by name. They are not in Hooks: Gunicorn executes its configuration again at each HUP and keeps
# only the new Hooks, which must find what the previous ones started.
_running: dict[str, StoreManager] = {}


class Hooks:
    """
    The hooks for one store.

    Creating them starts nothing. The options are checked, and used by whatever starts the store in this process.

    Args:
        name: The store's name, or its ``shm://`` URL.
        options: The options of `StoreManager`. Functions may be lambdas in the configuration file.

    Raises:
        ConfigError: The name or an option is invalid, or the directory is a relative path.
    """

    def __init__(self, name: str, /, **options: Any) -> None:
        StoreManager(name, **options)
        directory = options.get("directory")
        if directory is not None and not os.path.isabs(directory):
            raise ConfigError(
                f"directory must be an absolute path, not {directory!r}: Gunicorn's chdir would change its meaning"
            )
        register(name, options)
        spawn.keep_stderr = True
        self._name = name
        self._options = options

    def on_starting(self, server: Any) -> None:
        """
        Start the store's server, or attach to a running one, such as the other master's during an upgrade by USR2.

        With ``--user`` the server and its files belong to that user from the start.

        Raises:
            RuntimeError: The server cannot be started. Gunicorn shows the message and exits.
        """
        cfg = server.cfg
        manager = StoreManager(self._name, **self._options)
        try:
            manager.start(user=(cfg.uid, cfg.gid) if geteuid() == 0 else None)
        except ShmStoreError as exc:
            raise RuntimeError(f"store {self._name!r}: {exc}") from exc
        _running[self._name] = manager

    def on_reload(self, server: Any) -> None:
        """Apply the options in the current configuration to the running store. Errors are logged and not raised."""
        manager = _running.get(self._name)
        try:
            if manager is None:
                self.on_starting(server)
            else:
                manager.apply(**self._options)
        except Exception as exc:  # whatever the server's error is, it must not end the master
            pass_on_interruption(exc)
            server.log.warning("store %r keeps the options it had: %s", self._name, exc or repr(exc))

    def on_exit(self, server: Any) -> None:
        """Detach from the server. It stays while another master or its workers use it; otherwise it exits at once."""
        manager = _running.pop(self._name, None)
        if manager is not None:
            manager.detach()
