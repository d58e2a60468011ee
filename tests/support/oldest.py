"""
Prints the oldest version of each dependency that pyproject.toml allows, as constraints for pip: ``make oldest``.

It covers the package, its extras, and the frameworks and servers for ASGI, which need no extra; the tools of the tests
are as new as these allow.
"""

from __future__ import annotations

import re
import tomllib
from itertools import chain
from pathlib import Path

_CONFIG = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
PROJECT, TESTED = _CONFIG["project"], _CONFIG["dependency-groups"]["test"]
ASGI = ("fastapi", "granian", "hypercorn", "litestar", "quart", "starlette", "uvicorn", "uvicorn-worker")


def declared() -> dict[str, str]:
    """Return the packages that the project declares, and the oldest version of each."""
    found = {}
    for requirement in chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        match = re.fullmatch(r"([a-z0-9-]+)>=([0-9.]+)(?:; .*)?", requirement)
        assert match, f"{requirement} does not say which version is the oldest"
        found[match[1]] = match[2]
    return found


def tested() -> dict[str, str]:
    """Return the frameworks and servers for ASGI, and the oldest version of each."""
    versions = dict(each.split(">=") for each in TESTED if ">=" in each)
    return {name: versions[name] for name in ASGI}


if __name__ == "__main__":
    for name, version in (declared() | tested()).items():
        print(f"{name}=={version}")
