"""
Build the wheels that carry the C core, one for each platform, and audit them.

One compiler does it, from the package `ziglang`: it has the headers and the symbol versions of each C library.
`auditwheel` checks what a wheel needs from its platform, `abi3audit` what it needs from Python.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

TOOLS = ("ziglang", "auditwheel", "abi3audit")

# The tag of each wheel, and the compiler's name for the oldest system that it is for.
TARGETS = {
    "manylinux_2_17_x86_64": "x86_64-linux-gnu.2.17",
    "manylinux_2_17_aarch64": "aarch64-linux-gnu.2.17",
    "musllinux_1_2_x86_64": "x86_64-linux-musl",
    "musllinux_1_2_aarch64": "aarch64-linux-musl",
}

COMPILE = "-O3 -fPIC -fno-sanitize=undefined -Wall -Wextra -Wconversion -Werror"

# All that the core may need from a C library.
SYSTEM = {
    "clock_gettime", "memcmp", "memcpy", "memmove", "memset", "pthread_mutex_consistent", "pthread_mutex_trylock",
    "pthread_mutex_unlock",
}  # fmt: skip

# Python's headers are those of this machine. What `pyconfig.h` says must be true of the target too.
SIZES = {
    "SHORT": "short", "INT": "int", "LONG": "long", "LONG_LONG": "long long", "VOID_P": "void *", "SIZE_T": "size_t",
    "WCHAR_T": "wchar_t", "PID_T": "pid_t", "TIME_T": "time_t", "OFF_T": "off_t", "PTHREAD_T": "pthread_t",
}  # fmt: skip
CHECKS = "\n#include <pthread.h>\n#include <stddef.h>\n#include <sys/types.h>\n#include <time.h>\n" + "".join(
    f'_Static_assert(SIZEOF_{name} == sizeof({kind}), "{kind}");\n' for name, kind in SIZES.items()
)


def can_build() -> bool:
    """Return whether an installation here builds the core."""
    compiler: str = os.environ.get("CC") or sysconfig.get_config_var("CC")
    return bool(shutil.which(compiler.split()[0])) and _has_headers()


def lacking() -> str:
    """Return what is missing here to build and audit the wheels; "": nothing."""
    missing = [name for name in TOOLS if not find_spec(name)]
    missing += [] if _has_headers() else ["Python's headers"]
    return f"there is no {', no '.join(missing)}" if missing else ""


def _has_headers() -> bool:
    return Path(sysconfig.get_path("include"), "Python.h").exists()


def run(*words: str | Path, cwd: Path | None = None, environ: Mapping[str, str] = os.environ) -> str:
    """Run a command; return what it prints, or end with that if it fails."""
    done = subprocess.run(words, cwd=cwd, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))}\n{done.stdout}\nended with {done.returncode}")
    return done.stdout


def copy_headers(place: Path) -> Path:
    """Copy Python's headers; the copy of `pyconfig.h` checks what it says."""
    include = Path(sysconfig.get_path("include"))
    copied = Path(shutil.copytree(include, place / "include"))
    # Debian keeps one for each kind of machine.
    debian = include.parent / (sysconfig.get_config_var("MULTIARCH") or "") / include.name / "pyconfig.h"
    config = debian if debian.exists() else include / "pyconfig.h"
    (copied / "pyconfig.h").write_text(config.read_text() + CHECKS)
    return copied


def build(sdist: Path, tag: str, place: Path, dist: Path) -> Path:
    """Build the wheel of one platform from the sdist."""
    place.mkdir()
    with tarfile.open(sdist) as archive:
        archive.extractall(place, filter="data")
    compiler = f"{sys.executable} -m ziglang cc -target {TARGETS[tag]}"
    # musl is not named: Python has loaded it, and the name of its file differs between systems.
    link = "-shared -s -nolibc -lcompiler_rt" if "musl" in tag else "-shared -s"
    said = run(
        sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", dist,
        f"-C--build-option=--plat-name={tag}", place / sdist.name.removesuffix(".tar.gz"),
        environ=os.environ | {
            "CC": compiler, "LDSHARED": f"{compiler} {link}", "CFLAGS": f"{COMPILE} -I{copy_headers(place)}",
        },
    )  # fmt: skip
    found = list(dist.glob(f"*-cp311-abi3-{tag}.whl"))
    assert found, said
    return found[0]


def audit(wheel: Path, tag: str, place: Path) -> None:
    """Check that the wheel needs nothing but what its tag stands for."""
    from elftools.elf.elffile import ELFFile
    from elftools.elf.sections import SymbolTableSection

    shown = run(sys.executable, "-m", "auditwheel", "show", "--ldpaths=", wheel)
    assert f'is consistent with the following platform tag: "{tag}"' in " ".join(shown.split()), shown
    run(sys.executable, "-m", "abi3audit", "--strict", wheel)
    shutil.unpack_archive(wheel, place / "unpacked", "zip")
    with (place / "unpacked/shmstore/engine/_core.abi3.so").open("rb") as file:
        section = ELFFile(file).get_section_by_name(".dynsym")
        assert isinstance(section, SymbolTableSection)
        needed = {symbol.name for symbol in section.iter_symbols() if symbol["st_shndx"] == "SHN_UNDEF"}
    assert {name for name in needed if not re.match("_?Py", name)} - {""} <= SYSTEM, needed
