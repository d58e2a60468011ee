"""The report of `make faults`: the proofs with their full numbers, and a line for each: name, figure, verdict.

`python tests/faults/report.py [PYTEST ARGUMENTS]`; ends with 1 if one fails, or if root skips a proof of a promise.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
SUITES = [
    "cli/cli",
    "codec/body",
    "codec/serializers",
    "engine/arena",
    "engine/damage",
    "engine/engines",
    "engine/flipped_bits",
    "engine/mutex",
    "engine/readers",
    "store/rebuild",
    "engine/tmpfs",
    "faults/core",
    "faults/faults",
    "faults/fuzz",
    "faults/single_steps",
    "gunicorn/deploys",
    "gunicorn/dispose",
    "gunicorn/gunicorn",
    "gunicorn/lifecycle",
    "gunicorn/overlap",
    "redis/gunicorn",
    "redis/store",
    "server/clients",
    "server/cross_talk",
    "server/damaged_start",
    "server/directory",
    "server/hard_places",
    "sanitize/sanitizers",
    "server/security",
    "store/concurrency",
    "store/eviction",
    "store/lost_updates",
    "store/model",
    "transfer/snapshot",
]
FULL = {
    "SHMSTORE_FULL": "1",
    "SHMSTORE_MODEL_OPERATIONS": "200000",
    "SHMSTORE_STRESS_SECONDS": "60",
    "SHMSTORE_STRESS_KILLS": "500",
}
# If one of these pages names a test, root can run it. Another test may need a program that is not installed.
PROMISES = [TESTS.parent / "docs" / "understand" / f"{name}.md" for name in ("what-survives-what", "security")]
RECOVERY = TESTS.parent / "benchmarks" / "recovery.py"
SOAK = [str(TESTS / "support" / "soak.py"), "--minutes", "5"]


@dataclass
class Check:
    """One test, ``folder/test_file.py::test_name``, with all its cases."""

    test: str
    passed: int = 0
    skipped: int = 0
    failed: int = 0
    figures: list[str] = field(default_factory=list)
    reasons: set[str] = field(default_factory=set)  # of what was skipped

    @property
    def verdict(self) -> str:
        return "FAILED" if self.failed else "ok" if self.passed else "skipped"

    @property
    def figure(self) -> str:
        cases = self.passed + self.skipped + self.failed
        if len(self.figures) == cases <= 3:
            return "; ".join(self.figures)
        of = self.figures[0] if len(set(self.figures)) == 1 else ""
        return f"{self.passed} of {cases} cases{', each of ' + of if of else ''}" if cases > 1 else of


class Report:
    """A pytest plugin that gathers the figures that tests record with the fixture ``figure``."""

    def __init__(self) -> None:
        self.checks: dict[str, Check] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = report.nodeid.partition("[")[0].removeprefix("tests/")
        name = test.rpartition("/")[2].replace(".py::", ": ").replace("test_", "")
        check = self.checks.setdefault(name.replace("_", " "), Check(test))
        if report.when == "call":
            check.passed += report.passed
            check.figures += [str(value) for key, value in report.user_properties if key == "figure"]
        check.failed += report.failed
        if report.failed:
            print(f"\nFAILED {report.nodeid}\n{report.longreprtext}", flush=True)  # at once: the others take an hour
        check.skipped += report.skipped
        if report.skipped and isinstance(report.longrepr, tuple):
            check.reasons.add(report.longrepr[2].removeprefix("Skipped: "))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("verdicts")
        for name, check in sorted(self.checks.items()):
            terminalreporter.write_line(f"{name}  {check.figure}  {check.verdict}")


def main() -> None:
    os.environ.update(FULL)
    suites = [str(TESTS / folder / f"test_{name}.py") for folder, name in (suite.split("/") for suite in SUITES)]
    report = Report()
    result = pytest.main([*suites, "-q", *sys.argv[1:]], plugins=[report])
    promised = "".join(page.read_text() for page in PROMISES)
    for name, check in sorted(report.checks.items()):
        if check.skipped:
            failed = os.geteuid() == 0 and f"`{check.test}`" in promised
            result = result or int(failed)
            print(f"not tried: {name}: {', '.join(sorted(check.reasons))}  {'FAILED' if failed else 'skipped'}")
    recovery = subprocess.run([sys.executable, str(RECOVERY)], capture_output=True, text=True)
    for line in recovery.stdout.splitlines()[1:] or [f"{recovery.stderr}  FAILED"]:
        print("recovery:", " ".join(line.split()))
    soak = subprocess.run([sys.executable, *SOAK], stdout=subprocess.PIPE, text=True)
    print(soak.stdout)
    sys.exit(result or recovery.returncode or soak.returncode)


if __name__ == "__main__":
    main()
