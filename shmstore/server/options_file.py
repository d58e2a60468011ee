"""Options as bytes: for the server, which is another program, and for the next one after it.

A JSON object, which any Python and any version of shmstore can read. Only functions and objects (dispose, length, ttl,
serializer) belong to one version of Python: they are in it as base64 of what dill makes of them.
"""

from __future__ import annotations

import base64
import json
import os
import stat
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

from multiprocess.reduction import ForkingPickler

from shmstore.errors import ConfigError
from shmstore.server.rpc import trusted
from shmstore.system import version
from shmstore.system.greenlet_lock import GreenletLock
from shmstore.system.signals import pass_on_interruption

# Modules no other process can import, though they are in `sys.modules` here: the configuration file as Gunicorn
# loads it, and the main program as multiprocess loads it. dill takes `__main__` by value of itself.
_LOCAL_MODULES = ("__config__", "__mp_main__")
_hiding = GreenletLock()


def pack(options: Mapping[str, Any]) -> bytes:
    """
    Return options as bytes, functions by value: their code, and what of their module's globals they use.

    Raises:
        ConfigError: One of them cannot travel; the message names it.
    """
    plain: dict[str, Any] = {}
    functions: dict[str, str] = {}
    for name, value in options.items():
        if value is None or isinstance(value, (int, float, str)):
            plain[name] = value
        elif isinstance(value, timedelta):
            plain[name] = {"days": value.days, "seconds": value.seconds, "microseconds": value.microseconds}
        elif isinstance(value, os.PathLike):
            plain[name] = os.fsdecode(value)
        else:
            try:
                functions[name] = base64.b64encode(_by_value(value)).decode()
            except Exception as exc:
                pass_on_interruption(exc)
                raise ConfigError(
                    f"{name}={value!r} cannot be handed to the store's server: {exc}; "
                    "define it at the top level of a module, or let it use less"
                ) from exc
    packed: dict[str, Any] = {"options": plain}
    if functions:
        packed |= {"python": version.PYTHON, "functions": functions}
    return json.dumps(packed, sort_keys=True).encode()


def unpack(data: bytes) -> dict[str, Any]:
    """
    Return the options in what `pack` made. This runs what is in them: only for bytes of this very user.

    Raises:
        ConfigError: There are functions of another Python version among them, which do not run here; or they are
            damaged.
    """
    check(data)
    packed = json.loads(data)
    try:
        options = {
            name: timedelta(**value) if isinstance(value, dict) else value for name, value in packed["options"].items()
        }
        for name, function in packed.get("functions", {}).items():
            options[name] = ForkingPickler.loads(base64.b64decode(function))
    except Exception as exc:
        pass_on_interruption(exc)
        raise ConfigError(f"the options of the store cannot be read here: {exc}") from exc
    return options


def check(data: bytes, python: str | None = None) -> None:
    """
    Make sure that packed options can be unpacked by a Python, without running anything of them.

    Args:
        data: What `pack` returned.
        python: As `shmstore.system.version.PYTHON`, which is the default.

    Raises:
        ConfigError: There are functions of another Python version among them; or they are damaged.
    """
    python = python or version.PYTHON
    try:
        packed = json.loads(data)
        functions = sorted(packed.get("functions", {}))
        of = packed["python"] if functions else python
        sound = isinstance(packed["options"], dict) and isinstance(of, str)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise ConfigError("the saved options of the store are damaged; stop its server and start it anew")
    if of != python:
        raise ConfigError(
            f"the store's options {', '.join(functions)} are functions of {of}, and these do not travel to {python}: "
            "stop all processes that use the store, then start them with one version of Python"
        )


def serializer(data: bytes) -> str | None:
    """
    Return the serializer in packed options as it is there, without running anything; None if there is none.

    Raises:
        ConfigError: They are damaged.
    """
    try:
        found: str | None = json.loads(data).get("functions", {}).get("serializer")
    except (ValueError, AttributeError, RecursionError) as exc:
        raise ConfigError("the saved options of the store are damaged") from exc
    return found


def save(path: str, packed: bytes) -> bool:
    """
    Keep packed options in a file that only this user can read; it appears whole or not at all.

    Returns:
        Whether it was written: not if they are what is there.

    Raises:
        OSError: It cannot be written; what was there stays.
    """
    temporary = f"{path}.new"
    with suppress(OSError, ConfigError):
        if read(path) == packed:
            return False
    with suppress(FileNotFoundError):
        os.unlink(temporary)
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(packed)
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    return True


def load(path: str) -> dict[str, Any]:
    """
    Return the options that were saved.

    Raises:
        FileNotFoundError: None were.
        ConfigError: They are not this user's, so that what is in them must not be run; or as for `unpack`.
    """
    return unpack(read(path))


def read(path: str) -> bytes:
    """Return the packed options that were saved; raises as `load`."""
    try:
        # NONBLOCK: a FIFO must not be waited for.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as exc:
        pass_on_interruption(exc)
        raise ConfigError(f"{path} cannot be opened: {exc.strerror}") from exc
    with open(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or not trusted(status.st_uid) or status.st_mode & 0o022:
            raise ConfigError(f"{path} is not a file that only this user can write, so what is in it is not run")
        return file.read()


def _by_value(value: object) -> bytes:
    # dill refers to a function by its module wherever it finds it there, and takes it by value where it does not.
    # So the modules that only this process has are put out of sight for a moment; nobody imports them by name.
    ticket = _hiding.ticket()
    try:
        ticket.acquire()
        hidden = {name: sys.modules[name] for name in _LOCAL_MODULES if name in sys.modules}
        try:
            for name in hidden:
                del sys.modules[name]
            # recurse: only those globals that are used, else a function drags its whole module along.
            with ForkingPickler.dumps(value, byref=False, recurse=True) as view:
                return bytes(view)
        finally:
            sys.modules.update(hidden)
    finally:
        ticket.release()
