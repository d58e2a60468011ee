"""The cost of each operation as the number of sessions grows."""

from __future__ import annotations

import os

from benchmarks import operations
from benchmarks.figures import SIZE, Plan, Results

_BYTES = 3500  # of memory for each session, the random numbers of the measurement included


def run(plan: Plan) -> Results:
    """Return microseconds by operation and number of sessions; a number too large for this machine is named."""
    table: Results = {}
    missing: dict[str, str] = {}
    for sessions in plan.growth:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if free < sessions * _BYTES:
            missing[f"{sessions} sessions"] = f"takes {sessions * _BYTES >> 20} MiB, {free >> 20} are free"
            continue
        for name, value in operations.one_process(sessions, SIZE).items():
            table.setdefault(name, {})[str(sessions)] = value
    return {"operations": table, "missing": missing}
