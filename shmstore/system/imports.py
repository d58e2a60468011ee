"""What must be imported in a certain way. The package imports this module first."""

from __future__ import annotations

import logging
import sys
import tempfile


def _import_dill() -> None:
    """
    Import dill, by multiprocess, which needs it.

    It asks for the temporary directory when it is imported. That would fail where there is none: on a read-only root,
    or where all temporary directories are full. Nothing of shmstore writes there. And it gives its logger a handler:
    importing a library changes no program's logging.
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
            tempfile.tempdir = None  # the next one who asks is told that there is none, or finds one
    else:
        import multiprocess.reduction  # noqa: F401
    logging.getLogger("dill").handlers.clear()


_import_dill()
