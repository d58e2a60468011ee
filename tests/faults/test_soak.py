"""`make soak` can be interrupted and leaves nothing behind."""

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
