"""
Prints the oldest version of each dependency that pyproject.toml allows, as constraints for pip: ``make oldest``.

It covers the package and its extras; the tools of the tests are as new as these allow.
"""

from __future__ import annotations

import re
import tomllib
from itertools import chain
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


def declared() -> dict[str, str]:
    """Return the packages that the project declares, and the oldest version of each."""
    found = {}
    for requirement in chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        match = re.fullmatch(r"([a-z0-9-]+)>=([0-9.]+)(?:; .*)?", requirement)
        assert match, f"{requirement} does not say which version is the oldest"
        found[match[1]] = match[2]
    return found


if __name__ == "__main__":
    for name, version in declared().items():
        print(f"{name}=={version}")
