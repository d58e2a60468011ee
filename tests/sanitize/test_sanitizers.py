"""The C core under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer: `make sanitize`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import built_core
import damaged_core
import fault_injection
import pytest
from engines import COMPILER, engine, needs_core
from sampling import FULL, LONGEST

from shmstore import Store
from shmstore.engine import core
from shmstore.engine.layout import MUTEX
from shmstore.engine.mutex import DEPTH_WORD, LOCKED_ONCE

DAMAGED = 5000 if FULL else 200
TIMES = 100 if FULL else 1

Figure = Callable[[str], None]

pytestmark = [
    pytest.mark.timeout(1200),
    needs_core,
    pytest.mark.skipif(not built_core.can_build(), reason="no C compiler, or no headers of Python"),
]


def library(name: str) -> str:
    """Return the path of a sanitizer's library; skip the test where the compiler lacks it."""
    found = subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(found):
        pytest.skip(f"the compiler has no {name}")
    return found


def under_asan(tmp_path: Path, seed: int, count: int, *replace: tuple[str, str]) -> subprocess.CompletedProcess[str]:
    """Run `damaged_core` with a core in which both sanitizers check each access."""
    asan = library("libasan.so")
    flags = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    built = built_core.build(tmp_path, *flags, replace=replace)
    environ = {"LD_PRELOAD": asan, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc"}
    return subprocess.run(
        [sys.executable, damaged_core.__file__, built, str(seed), str(count)],
        env=os.environ | environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=LONGEST,
    )  # fmt: skip


def test_no_access_outside_of_a_damaged_arena(tmp_path: Path, seed: int, figure: Figure) -> None:
    done = under_asan(tmp_path, seed, DAMAGED)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    figure(f"{DAMAGED} damaged arenas: {done.stdout.strip()}")


def test_the_sanitizer_finds_an_unchecked_index(tmp_path: Path, seed: int) -> None:
    check = "    return slot && slot <= core->last_slot && slot % SLOT == 0;\n"
    done = under_asan(tmp_path, seed, 50_000, (check, "    (void)core;\n    return slot;\n"))
    assert done.returncode != 0  # it ends at the first one that it finds, usually among some hundred damaged arenas
    assert "Sanitizer" in done.stderr or "core.c:" in done.stderr, done.stderr[-3000:]  # of either sanitizer


def race(
    tmp_path: Path, *flags: str, count: int = 1000, hostile: bool = False, replace: tuple[tuple[str, str], ...] = ()
) -> subprocess.CompletedProcess[str]:
    """
    Run readers beside writers.

    Args:
        tmp_path: An empty directory.
        flags: The flags of the compiler.
        count: How many sessions are written, and how many are read.
        hostile: Whether a further thread damages the arena.
        replace: Replacements in core.c.
    """
    built_core.write_sources(tmp_path, replace=replace)
    source = Path(built_core.__file__).with_name("race.c")
    shutil.copy(source, tmp_path)
    program = tmp_path / "race"
    subprocess.run(
        [COMPILER, "-std=c11", "-O2", "-g", "-pthread", *flags, "-o", program, "core.c", "digest.c", "race.c"],
        cwd=tmp_path, check=True, timeout=300,
    )  # fmt: skip
    with engine("c"), Store(memory=2**18, clock=fault_injection.Clock(), check_period=None) as store:
        (tmp_path / "image").write_bytes(bytes(store.arena.file.memory))
        numbers = MUTEX, DEPTH_WORD, LOCKED_ONCE, *core.numbers(store.arena.geometry, store.arena.table)
    return subprocess.run(
        # Without randomised addresses: older ThreadSanitizers do not know the layout of newer kernels.
        ["setarch", "-R", program, tmp_path / "image", *map(str, (count * TIMES, int(hostile), *numbers))],
        capture_output=True, text=True, timeout=LONGEST,
    )  # fmt: skip


def test_readers_beside_writers_without_a_race(tmp_path: Path, figure: Figure) -> None:
    """The fences are checked in test_memory_order.py: ThreadSanitizer does not know them."""
    library("libtsan.so")
    done = race(tmp_path, "-fsanitize=thread", "-Wno-tsan")
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    figure(done.stdout.strip())


@pytest.mark.parametrize("flags", [(), ("-DCORE_PORTABLE",)], ids=["native", "portable"])
def test_readers_beside_writers_at_full_speed(flags: tuple[str, ...], tmp_path: Path, figure: Figure) -> None:
    done = race(tmp_path, *flags, count=30_000)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    figure(done.stdout.strip())


def test_no_access_outside_of_an_arena_that_is_damaged_meanwhile(tmp_path: Path, figure: Figure) -> None:
    """What was checked may be another number a moment later: nothing is loaded twice."""
    library("libasan.so")
    done = race(tmp_path, "-fsanitize=address,undefined", "-fno-sanitize-recover=all", count=10_000, hostile=True)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    figure(done.stdout.strip())


def test_the_sanitizer_finds_a_race(tmp_path: Path) -> None:
    library("libtsan.so")
    plain = "            buffer[at + i] = load_cell(core, head + 1 + i);\n"
    unmarked = "            buffer[at + i] = *(volatile uint64_t *)&core->cells[head + 1 + i];\n"
    done = race(tmp_path, "-fsanitize=thread", "-Wno-tsan", replace=((plain, unmarked),))
    assert done.returncode != 0
    assert "data race" in done.stderr
