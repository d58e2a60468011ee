"""The result of importing the package."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import oldest

import shmstore


def test_the_public_names() -> None:
    for name in shmstore.__all__:
        assert getattr(shmstore, name).__module__.startswith("shmstore")
        assert name in dir(shmstore)
    assert issubclass(shmstore.ConfigError, ValueError)
    assert issubclass(shmstore.StoreTimeout, shmstore.StoreUnavailable)
    for error in ("StoreUnavailable", "StoreFull", "RecordTooLarge", "SerializationError", "ConfigError"):
        assert issubclass(getattr(shmstore, error), shmstore.ShmStoreError)


def test_all_that_is_imported_is_declared() -> None:
    """Dependencies of Flask are declared too: Flask may drop them."""
    known = oldest.declared()
    imported = set()
    for path in Path(shmstore.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names.append(node.module or "")
            imported |= {name.partition(".")[0].replace("_", "-") for name in names}
    imported -= {"shmstore", *(name.replace("_", "-") for name in sys.stdlib_module_names)}
    assert imported == known.keys() - {"gunicorn", "tzdata"}, "one imports us, the other is data"


def test_importing_it_changes_no_logging() -> None:
    code = """
import logging
import shmstore, shmstore.flask, shmstore.gunicorn, shmstore.redis, shmstore.metrics
loggers = [logging.root, *(logging.getLogger(name) for name in logging.root.manager.loggerDict)]
print([each for each in loggers if each.handlers], logging.getLogger("shmstore").level)
"""
    for debug in ("", "shmstore"):
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"DEBUG": debug}, capture_output=True, text=True, check=True
        )
        assert done.stdout == "[] 0\n"
