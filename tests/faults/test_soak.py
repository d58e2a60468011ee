"""A short run of the soak: it finds no error and leaves nothing behind, even if it is interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import soak
from processes import ROOT, wait_for

SECONDS = 300 if os.environ.get("SHMSTORE_FULL") == "1" else 5

Begin = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Begin]:
    """Return a function that starts the soak; what is left of it at the end is stopped."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: object) -> subprocess.Popen[str]:
        started.append(
            subprocess.Popen(
                [sys.executable, soak.__file__, *map(str, arguments)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=os.environ | {"PYTHONPATH": ROOT, "TMPDIR": str(tmp_path)},
            )
        )
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)  # it cleans up
            process.communicate(timeout=300)


@pytest.mark.timeout(SECONDS * 2 + 120)
def test_the_soak_finds_no_error_while_processes_are_killed(
    begin: Begin, seed: int, figure: Callable[[str], None]
) -> None:
    process = begin("--minutes", SECONDS / 60, "--every", 5 if SECONDS > 60 else 1, "--seed", seed)
    output, _ = process.communicate(timeout=SECONDS * 2 + 100)
    figure("; ".join(" ".join(line.split()) for line in output.splitlines() if line.startswith(("deaths", "wrong"))))
    assert process.returncode == 0, output


def test_the_soak_can_be_interrupted(begin: Begin) -> None:
    process = begin("--report", 0.5)
    assert process.stdout
    store = Path(process.stdout.readline().split()[-1])
    wait_for(lambda: "requests" in process.stdout.readline(), "its first report")  # type: ignore[union-attr]
    assert store.exists()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert not store.exists()
