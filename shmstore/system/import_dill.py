"""
multiprocess and dill, imported where their own import would fail, and without its side effects.

They take as long to import as all of shmstore. Only a process imports this module that starts or stops a server, calls
a store by messages, or has functions among the options of a store.
"""

from __future__ import annotations

import logging
import sys
import tempfile

__all__ = ["ProcessError", "dill", "managers"]


def _import_dill() -> None:
    """
    Import dill through multiprocess, which needs it.

    dill looks up the temporary directory at import. That fails without a writable one: on a read-only root, or when all
    temporary directories are full. shmstore writes nothing there, so the lookup gets a fixed answer. dill also adds a
    handler to its logger, which is removed: importing a library must not change the logging of a program.
    """
    if "dill" in sys.modules:
        return
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        tempfile.tempdir = "/tmp"  # noqa: S108
        try:
            import multiprocess.reduction
        finally:
            tempfile.tempdir = None  # the next lookup fails, or finds a directory
    else:
        import multiprocess.reduction  # noqa: F401
    logging.getLogger("dill").handlers.clear()


_import_dill()

import dill  # noqa: E402
from multiprocess import ProcessError, managers  # noqa: E402
