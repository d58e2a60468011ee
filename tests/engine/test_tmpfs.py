"""Small and full tmpfs (C17): what does not fit is refused, running processes continue; no SIGBUS, no crash loop."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tmpfs_child
from processes import ROOT
from sampling import LONGEST, some

AS_ROOT = os.geteuid() == 0
UNSHARE = ["unshare", "--mount"] if AS_ROOT else ["unshare", "--user", "--map-root-user", "--mount"]

# What the log must have, in this order, and nothing beside it but evictions.
LOGS = {
    "small": [],
    "hogged": [
        r"store 'shop': its server had died; started process \d+",
        # The second time by the proxy that wrote, if that was faster: it was still connected to the one before.
        r"store 'shop': its server (had died; started|was gone; started another,) process \d+",
        r"\[ERROR\] .*store 'shop': its directory, or a file in it, was removed or replaced; the server restores it",
        r"\[ERROR\] .*store 'shop': its files in .* cannot be restored: .*No space left on device",
        r"\[WARNING\] .*store 'shop' keeps the memory it has: cannot reserve \d+ bytes in .*give a smaller memory",
    ],
    "begun": [
        r"store 'shop': its server cannot be started: .*no space left",
        r"store 'shop': its server had died; started process \d+",
    ],
    "unsaved": [
        r"\[ERROR\] .*store 'shop': the snapshot was not saved: .*shop.snapshot cannot be written: No space left",
        r"\[INFO\] .*saved 306 sessions",
        r"\[ERROR\] .*store 'shop': the snapshot was not saved: .*shop.snapshot cannot be written: No space left",
        r"\[INFO\] .*restored 306 sessions",
    ],
}  # fmt: skip
SAID = {
    "small": [r"cannot reserve 670\d{5} bytes in .*/shop \(\d+ bytes are free\): give a smaller memory="] * 2,
    "hogged": [r"store 'shop' keeps the options it had: .*No space left on device"] * 2,
    "begun": [r"(?i).*/shop.*no space left"] * 7,
    "unsaved": [],
}
PASSING = re.compile(r"evicting live sessions|\[INFO\]|cannot be started|new options that this process cannot follow")


@pytest.fixture(scope="module")
def may_mount(tmp_path_factory: pytest.TempPathFactory) -> None:
    place = tmp_path_factory.mktemp("mount")
    try:
        done = subprocess.run(
            [*UNSHARE, "mount", "-t", "tmpfs", "tmpfs", str(place)], capture_output=True, text=True, timeout=300
        )
    except FileNotFoundError:
        pytest.skip("unshare is not installed")
    if done.returncode:
        pytest.skip(f"nothing can be mounted here, not even apart from others: {done.stderr.strip()}")


@pytest.mark.usefixtures("may_mount")
@pytest.mark.timeout(1200)
@some("scenario", {name: name for name in tmpfs_child.SCENARIOS})
def test_a_store_in_a_tmpfs_that_is_too_small(scenario: str, tmp_path: Path, figure: Callable[[str], None]) -> None:
    place, log = tmp_path / "mount", tmp_path / "log"
    place.mkdir(0o700)
    begun = time.monotonic()
    with (tmp_path / "out").open("wb") as out, log.open("wb") as err:  # files: servers do not log to pipes
        process = subprocess.Popen(
            [*UNSHARE, sys.executable, tmpfs_child.__file__, scenario, str(place)],
            stdout=out, stderr=err, start_new_session=True, env=os.environ | {"PYTHONPATH": ROOT},
        )  # fmt: skip
        try:
            process.wait(timeout=LONGEST)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    said, logged = (tmp_path / "out").read_text().splitlines(), log.read_text()
    assert process.returncode == 0, logged
    assert said.pop() == "done", logged
    assert "Traceback" not in logged
    assert len(said) == len(SAID[scenario]), (said, logged)
    for line, pattern in zip(said, SAID[scenario], strict=True):
        assert re.match(pattern, line), said
    lines = logged.splitlines()
    rest = iter(lines)
    for pattern in LOGS[scenario]:
        assert any(re.search(pattern, line) for line in rest), f"no {pattern} in\n{logged}"
    others = [line for line in lines if not PASSING.search(line)]
    assert len(others) <= len(LOGS[scenario]), logged
    assert len(lines) < 40, logged
    figure(f"{time.monotonic() - begun:.0f} s, {len(lines)} lines in the log")
