"""What must be imported in a certain way. The package imports this module first."""

from __future__ import annotations

import tempfile


def _import_dill() -> None:
    """
    Import dill, which asks for the temporary directory when it is imported. It would fail where there is none: on a
    read-only root, or where all temporary directories are full. Nothing of shmstore writes there.
    """
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        tempfile.tempdir = "/tmp"  # noqa: S108
        try:
            import multiprocess.reduction  # noqa: F401
        finally:
            tempfile.tempdir = None  # the next one who asks is told that there is none, or finds one


_import_dill()
