"""The wheel for aarch64 on a machine of another kind: tests with Debian's Python for it, under emulation."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tarfile
from pathlib import Path

import wheels

MACHINE = "aarch64"
EMULATOR = "qemu-aarch64-static"
SOURCES = Path("/etc/apt/sources.list.d/debian.sources")

# Both engines on the same operations. The emulator has no robust futexes and starts no other program: tests that kill
# or start processes cannot run.
SOME = ("tests/engine/test_engines.py", "-k", "same_bytes and (memory or owners)")
ALL = (
    *("tests/engine/test_engines.py", "tests/engine/test_arena.py", "tests/engine/test_readers.py"),
    *("-k", "not of_the_dead and not another_users_arena and not core_file"),
)


def lacking() -> str:
    """Return what is missing here to do this; "": nothing."""
    missing = [name for name in (EMULATOR, "mmdebstrap") if not shutil.which(name)]
    missing += [] if SOURCES.exists() else [str(SOURCES)]
    return f"there is no {', no '.join(missing)}" if missing else ""


def try_wheel(wheel: Path, sdist: Path, place: Path, everything: bool) -> str:
    """Run the tests of the sdist with the wheel; return what they say."""
    place.mkdir()
    root, site = place / "root", place / "site"
    suite = platform.freedesktop_os_release()["VERSION_CODENAME"]
    wheels.run(
        "mmdebstrap", "--variant=extract", "--architectures=arm64", "--include=python3", suite, root, SOURCES
    )  # fmt: skip
    version = os.readlink(root / "usr/bin/python3").removeprefix("python")
    with tarfile.open(sdist) as archive:
        archive.extractall(place, filter="data")
    tree = place / sdist.name.removesuffix(".tar.gz")
    shutil.rmtree(tree / "shmstore")  # it is the wheel's that is tried
    wheels.run(
        sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", site,
        "--only-binary=:all:", f"--python-version={version}",
        *(f"--platform=manylinux_2_{minor}_{MACHINE}" for minor in (17, 28)),
        "--group", f"{tree}/pyproject.toml:test",
        "async-timeout",  # which redis wants for Python 3.11.2, Debian's, but not for the one that runs pip
        wheel,
    )  # fmt: skip
    said = wheels.run(
        EMULATOR, "-L", root, root / f"usr/bin/python{version}", "-m", "pytest", "-q", *(ALL if everything else SOME),
        cwd=tree, environ=os.environ | {"PYTHONPATH": str(site)},
    )  # fmt: skip
    return said.strip().splitlines()[-1]
