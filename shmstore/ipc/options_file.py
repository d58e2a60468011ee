"""
Options as bytes, for the server, which is another program, and for the servers after it.

They form a JSON object, which any Python and any version of shmstore can read. Only functions and objects (dispose,
length, ttl, serializer) depend on the Python version; the object contains their dill pickles as base64.
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

from shmstore.engine.greenlet_lock import GreenletLock
from shmstore.errors import ConfigError
from shmstore.ipc.peer import trusted
from shmstore.system import version
from shmstore.system.files import open_nofollow
from shmstore.system.signals import pass_on_interruption, suppressing

# Modules that are in `sys.modules` here but that no other process can import: the configuration file as Gunicorn
# loads it, and the main program as multiprocess loads it. dill pickles `__main__` by value without help.
_LOCAL_MODULES = ("__config__", "__mp_main__")
_hiding = GreenletLock()

_UNREADABLE = "this process cannot read the options of the store: {}"


def pack(options: Mapping[str, Any]) -> bytes:
    """
    Return options as bytes. Functions are pickled by value: their code, and the globals of their module that they use.

    Raises:
        ConfigError: An option cannot be pickled; the message names it.
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
                    f"{name}={value!r} cannot be passed to the store's server: {exc}; "
                    "define it at the top level of a module, or make it use fewer objects"
                ) from exc
    packed: dict[str, Any] = {"options": plain}
    if functions:
        packed |= {"python": version.PYTHON, "functions": functions}
    return json.dumps(packed, sort_keys=True).encode()


def unpack(data: bytes) -> dict[str, Any]:
    """
    Return the options in the bytes from `pack`. This unpickles functions: only for bytes of this very user.

    Raises:
        ConfigError: They contain functions of another Python version, or they are damaged.
    """
    options = plain(data)
    try:
        for name, function in functions(data).items():
            from shmstore.system.import_dill import dill  # only if there are functions

            options[name] = dill.loads(base64.b64decode(function))
    except Exception as exc:
        pass_on_interruption(exc)
        raise ConfigError(_UNREADABLE.format(exc)) from exc
    return options


def plain(data: bytes) -> dict[str, Any]:
    """Return the options in the bytes from `pack` that are not in `functions`. Raises the errors of `unpack`."""
    check(data)
    try:
        return {
            name: timedelta(**value) if isinstance(value, dict) else value
            for name, value in json.loads(data)["options"].items()
        }
    except Exception as exc:
        pass_on_interruption(exc)
        raise ConfigError(_UNREADABLE.format(exc)) from exc


def check(data: bytes, python: str | None = None) -> None:
    """
    Make sure that packed options can be unpacked by a Python version, without unpickling anything.

    Args:
        data: What `pack` returned.
        python: The Python version, in the form of `shmstore.system.version.PYTHON`, which is the default.

    Raises:
        ConfigError: They contain functions of another Python version, or they are damaged.
    """
    python = python or version.PYTHON
    try:
        packed = json.loads(data)
        functions = sorted(packed.get("functions", {}))
        packed_by = packed["python"] if functions else python
        valid = isinstance(packed["options"], dict) and isinstance(packed_by, str)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        valid = False
    if not valid:
        raise ConfigError(
            "the saved options of the store are damaged: stop all processes that use it, then start them again"
        )
    if packed_by != python:
        raise ConfigError(
            f"the store's options {', '.join(functions)} are functions of {packed_by}, which {python} cannot run: "
            "stop all processes that use the store, then start them with one version of Python"
        )


def functions(data: bytes) -> dict[str, str]:
    """
    Return the functions and objects in packed options by name, still pickled.

    Raises:
        ConfigError: The options are damaged.
    """
    try:
        return dict(json.loads(data).get("functions", {}))
    except (ValueError, TypeError, AttributeError, RecursionError) as exc:
        raise ConfigError("the saved options of the store are damaged") from exc


def serializer(data: bytes) -> str | None:
    """Return the serializer in packed options, still pickled; None: the default. Raises the errors of `functions`."""
    return functions(data).get("serializer")


def save(path: str, packed: bytes) -> bool:
    """
    Save packed options to a file that only this user can read; it appears complete or not at all.

    Returns:
        Whether it was written; False if the file already contains them.

    Raises:
        OSError: The file cannot be written; the existing one is unchanged.
    """
    temporary = f"{path}.new"
    with suppressing(OSError, ConfigError):
        if read(path) == packed:
            return False
    with suppress(FileNotFoundError):
        os.unlink(temporary)
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(packed)
        os.replace(temporary, path)
    except OSError:
        with suppressing(OSError):
            os.unlink(temporary)
        raise
    return True


def load(path: str) -> dict[str, Any]:
    """
    Return the saved options.

    Raises:
        FileNotFoundError: No options were saved.
        ConfigError: The file is not this user's, so its functions must not run; or as for `unpack`.
    """
    return unpack(read(path))


def read(path: str, *, run: bool = True) -> bytes:
    """
    Return the saved options as packed; raises the errors of `load`.

    Args:
        path: The file.
        run: Whether the functions in it may run: only those of a `trusted` user. Else its effective user is enough.
    """
    try:
        fd = open_nofollow(path)
    except FileNotFoundError:
        raise
    except OSError as exc:
        pass_on_interruption(exc)
        raise ConfigError(f"{path} cannot be opened: {exc.strerror}") from exc
    with open(fd, "rb") as file:
        status = os.fstat(fd)
        own = trusted(status.st_uid) or (not run and status.st_uid == os.geteuid())
        if not stat.S_ISREG(status.st_mode) or not own or status.st_mode & 0o022:
            raise ConfigError(f"{path} is not a file that only this user can write, so its contents are not used")
        return file.read()


def _by_value(value: object) -> bytes:
    # dill pickles a function by reference if its module contains it, and by value otherwise. Modules that exist only in
    # this process are therefore hidden for a moment; no other code imports them by name.
    from shmstore.system.import_dill import dill

    ticket = _hiding.ticket()
    try:
        ticket.acquire()
        hidden = {name: sys.modules[name] for name in _LOCAL_MODULES if name in sys.modules}
        try:
            for name in hidden:
                del sys.modules[name]
            # recurse: only the globals in use; otherwise a function takes its whole module along.
            packed: bytes = dill.dumps(value, byref=False, recurse=True)
            return packed
        finally:
            sys.modules.update(hidden)
    finally:
        ticket.release()
