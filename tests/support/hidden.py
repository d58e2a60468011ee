"""What a machine without a C compiler, or without Python's headers, is like, for commands that tests run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

_COMPILERS = re.compile(r"(.*-)?(cc|c89|c99|c\+\+|gcc|g\+\+|clang|clang\+\+|tcc)(-[\d.]+)?")


def path_without_compilers(place: Path) -> str:
    """Link each program on PATH but C compilers in a directory; return what PATH is then."""
    place.mkdir()
    for directory in os.get_exec_path():
        for program in Path(directory).glob("*"):
            if not _COMPILERS.fullmatch(program.name) and not os.path.lexists(place / program.name):
                (place / program.name).symlink_to(program)
    return str(place)


def without_headers(place: Path) -> list[str]:
    """Return how a command begins that sees an empty directory in place of Python's headers."""
    place.mkdir(exist_ok=True)
    script = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'
    include = sysconfig.get_path("include")
    return ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh", str(place), include]


def can_hide_headers() -> bool:
    """Return whether this user may mount a directory for one command."""
    if not shutil.which("unshare") or not Path(sysconfig.get_path("include")).exists():
        return False
    command = ["unshare", "--map-root-user", "--mount", "mount", "--bind", "/usr", "/usr"]
    return not subprocess.run(command, capture_output=True).returncode
