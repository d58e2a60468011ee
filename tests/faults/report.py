"""The report of `make faults`: the proofs with their full numbers, and a line for each: name, figure, verdict.

`python tests/faults/report.py [PYTEST ARGUMENTS]`; ends with 1 if one fails.
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
RECOVERY = TESTS.parent / "benchmarks" / "recovery.py"
SOAK = [str(TESTS / "support" / "soak.py"), "--minutes", "5"]


@dataclass
class Check:
    """One test with all its cases."""

    passed: int = 0
    skipped: int = 0
    failed: int = 0
    figures: list[str] = field(default_factory=list)

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
        name = report.nodeid.partition("[")[0].rpartition("/")[2].replace(".py::", ": ").replace("test_", "")
        check = self.checks.setdefault(name.replace("_", " "), Check())
        if report.when == "call":
            check.passed += report.passed
            check.figures += [str(value) for key, value in report.user_properties if key == "figure"]
        check.failed += report.failed
        check.skipped += report.skipped

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("verdicts")
        for name, check in sorted(self.checks.items()):
            terminalreporter.write_line(f"{name}  {check.figure}  {check.verdict}")


def main() -> None:
    os.environ.update(FULL)
    suites = [str(TESTS / folder / f"test_{name}.py") for folder, name in (suite.split("/") for suite in SUITES)]
    report = Report()
    result = pytest.main([*suites, "--timeout=3600", "-q", *sys.argv[1:]], plugins=[report])
    skipped = [name for name, check in report.checks.items() if check.skipped]
    if skipped:
        print(f"not everything was tried, root can do more: {', '.join(skipped)}")
        result = result or int(os.geteuid() == 0)  # root has no excuse
    recovery = subprocess.run([sys.executable, str(RECOVERY)], capture_output=True, text=True)
    for line in recovery.stdout.splitlines()[1:] or [f"{recovery.stderr}  FAILED"]:
        print("recovery:", " ".join(line.split()))
    soak = subprocess.run([sys.executable, *SOAK], stdout=subprocess.PIPE, text=True)
    print(soak.stdout)
    sys.exit(result or recovery.returncode or soak.returncode)


if __name__ == "__main__":
    main()
