"""
Other projects' own tests: they are in source distributions, which are fetched once and kept beside the environment.

`run_pytest` takes a plugin: a module in this folder that puts the sessions of this project in the place of theirs.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple
from xml.etree import ElementTree

ROOT: Final = Path(__file__).parents[2]
PLACE: Final = Path(sys.prefix, "distributions")


class Outcome(NamedTuple):
    """
    How many tests passed and were skipped, the names of those that failed, and what was printed.

    A test with parameters counts once for each set of them, all under one name.
    """

    passed: int
    skipped: int
    failed: Sequence[str]
    printed: str


def pip(*words: str | Path, python: str | Path = sys.executable) -> None:
    """Run pip. If it fails, say what to do."""
    command = [python, "-m", "pip", *words, "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert not done.returncode, (
        f"other projects' tests are in their source distributions, which cannot be fetched: check the access to the "
        f"package index, or put the PACKAGE-VERSION.tar.gz into {PLACE}/PACKAGE/VERSION\n"
        f"{' '.join(map(str, command))}\n{done.stdout}"
    )


def fetched(package: str, release: str) -> Path:
    """Return the unpacked source distribution of a release, such as "5.2"; "current": the newest one."""
    place = PLACE / package / release
    place.mkdir(parents=True, exist_ok=True)
    with locked(place):
        if not [*place.glob("*.tar.gz")]:
            wanted = package if release == "current" else f"{package}=={release}.*"
            pip("download", "--no-deps", f"--no-binary={package}", "--ignore-requires-python", "--dest", place, wanted)
        archive = next(place.glob("*.tar.gz"))
        unpacked = place / archive.name.removesuffix(".tar.gz")
        if not unpacked.exists():
            with TemporaryDirectory(dir=place) as folder, tarfile.open(archive) as content:
                content.extractall(folder, filter="data")
                Path(folder, unpacked.name).rename(unpacked)
    return unpacked


@contextmanager
def locked(place: Path) -> Iterator[None]:
    """Let one process at a time fetch and install."""
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run_pytest(distribution: Path, plugin: str, tests: str, *packages: Path, **environ: str) -> Outcome:
    """Run tests of a distribution with a plugin; packages in the folders that are given come before the installed."""
    with TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        path = os.pathsep.join(map(str, (*packages, ROOT, Path(__file__).parent)))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", plugin, "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore",
             "-o", "addopts=", "--junitxml", report, tests],
            cwd=distribution, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": path} | environ,
        )  # fmt: skip
        cases = [*ElementTree.parse(report).iter("testcase")] if report.exists() else []
    skipped = [each for each in cases if each.find("skipped") is not None]
    failed = [each for each in cases if each.find("failure") is not None or each.find("error") is not None]
    names = [each.attrib["name"].partition("[")[0] for each in failed]
    return Outcome(len(cases) - len(skipped) - len(failed), len(skipped), names, done.stdout)
