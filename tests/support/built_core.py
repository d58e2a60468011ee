"""Builds of the C core for tests: one that logs each store, and some with deliberate bugs."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sysconfig
import tempfile
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

from engines import COMPILER

import shmstore

SOURCES = Path(shmstore.__file__).parent / "engine"
FLAGS = ("-std=c11", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra", "-Wconversion", "-Werror")
INCLUDE = ("-DPy_LIMITED_API=0x030B0000", f"-I{sysconfig.get_path('include')}")

# core.c calls `CORE_STORED` after each store.
LOG = """
#include <stdint.h>
#define CORE_STORED(cell, value) core_log(cell, value)
enum { LOGGED = 1 << 18 };
extern uint64_t core_logged, core_stores[2 * LOGGED];
static inline void core_log(uint64_t cell, uint64_t value)
{
    if (core_logged < LOGGED) {
        core_stores[2 * core_logged] = cell;
        core_stores[2 * core_logged + 1] = value;
    }
    core_logged++;
}
"""
LOG_DATA = """
#include "log.h"
uint64_t core_logged, core_stores[2 * LOGGED];
"""
MOST = 1 << 18
CORE = "_core.abi3.so"


def can_build() -> bool:
    """Return whether a compiler and Python's headers are installed."""
    return bool(shutil.which(COMPILER)) and Path(sysconfig.get_path("include"), "Python.h").exists()


def write_sources(directory: Path, *, logged: bool = False, replace: tuple[tuple[str, str], ...] = ()) -> None:
    """Copy the sources of the core to a directory; ``replace`` has replacements in core.c, each of one occurrence."""
    source = (SOURCES / "core.c").read_text()
    for old, new in replace:
        assert source.count(old) == 1, f"found {source.count(old)} times: {old}"
        source = source.replace(old, new)
    if logged:
        source = source.replace('#include "core.h"\n', '#include "core.h"\n#include "log.h"\n', 1)
    (directory / "core.c").write_text(source)
    for name in ("core.h", "digest.c", "module.c"):
        shutil.copy(SOURCES / name, directory)
    (directory / "log.h").write_text(LOG)
    (directory / "log.c").write_text(LOG_DATA)


def build(directory: Path, *flags: str, logged: bool = False, replace: tuple[tuple[str, str], ...] = ()) -> Path:
    """Build the core in a directory, from its sources with these replacements; return the path of the module."""
    write_sources(directory, logged=logged, replace=replace)
    built = directory / CORE
    done = subprocess.run(
        [COMPILER, *FLAGS, *INCLUDE, *flags, "-o", built.name, "core.c", "digest.c", "module.c"]
        + (["log.c"] if logged else []),
        cwd=directory, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return built


def load(built: Path) -> ModuleType:
    """Import a build."""
    loader = ExtensionFileLoader("shmstore.engine._core", str(built))
    spec = spec_from_loader("shmstore.engine._core", loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def check_warnings() -> str:
    """Compile the core with all warnings as errors; return the finished process."""
    if not can_build():
        return "no C compiler, or no headers of Python: the core was not checked"
    with tempfile.TemporaryDirectory() as directory:
        build(Path(directory), "-O2")
    return "the core compiles without a warning"


def build_logged(directory: Path, replace: tuple[tuple[str, str], ...] = ()) -> Path:
    """Build what `LoggedCore` needs; unoptimised, which is built in half the time."""
    return build(directory, "-O0", logged=True, replace=replace)


class LoggedCore:
    """A build that logs each store into memory: the cell and its value."""

    def __init__(self, built: Path) -> None:
        self.module = load(built)
        library = ctypes.CDLL(str(built))
        self._logged = ctypes.c_uint64.in_dll(library, "core_logged")
        self._stores = (ctypes.c_uint64 * (2 * MOST)).in_dll(library, "core_stores")

    def clear(self) -> None:
        self._logged.value = 0

    def stores(self) -> list[tuple[int, int]]:
        """Return the stores since `clear`."""
        count = self._logged.value
        assert count < MOST
        flat = self._stores[: 2 * count]
        return list(zip(flat[::2], flat[1::2], strict=True))


if __name__ == "__main__":
    print(check_warnings())
