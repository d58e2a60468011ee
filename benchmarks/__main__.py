"""
The benchmark suite: what a session costs here and elsewhere, measured in one run.

    python -m benchmarks             everything, about 15 minutes on a machine that does nothing else
    python -m benchmarks --quick     fewer rounds, smaller numbers, the same peers: about 3 minutes
    python -m benchmarks --from results.json --markdown tables.md     tables and charts of an earlier run
    python -m benchmarks --only django asgi     some of the jobs
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks import (
    adapters,
    applications,
    charts,
    engines,
    eviction_quality,
    growth,
    many,
    memory,
    micro,
    peers,
    tables,
    times,
    web,
)  # fmt: skip
from benchmarks.about import about
from benchmarks.figures import FULL, QUICK, SMALLEST, Plan, Results


def in_process(plan: Plan) -> Results:
    """Return the cost that a session adds to a request without any server."""
    from benchmarks import requests

    return requests.in_process(3 * plan.rounds)


def django(plan: Plan) -> Results:
    peers.needs("django")
    from benchmarks import django_sessions

    return django_sessions.run(plan)


def asgi(plan: Plan) -> Results:
    peers.needs("starlette")
    from benchmarks import asgi_sessions

    return asgi_sessions.run(plan)


JOBS: dict[str, Callable[[Plan], Results]] = {
    "web": web.run, "in process": in_process, "micro": micro.run, "many": many.run, "growth": growth.run,
    "memory": memory.run, "times": times.run, "eviction": eviction_quality.run, "asgi": asgi, "django": django,
    "engines": engines.run,
}  # fmt: skip

KINDS = tuple(dict.fromkeys(applications.UNDER_GUNICORN + applications.UNDER_UWSGI))

# The jobs that need no peer, for a trial run of seconds.
ALONE: dict[str, Callable[[Plan], Results]] = {
    "micro": lambda plan: micro.run(plan, [*adapters.NO_PEERS]),
    "many": lambda plan: many.run(plan, [adapters.OURS]),
    "memory": lambda plan: memory.run(plan, ("shmstore",)),
    "times": times.run,
    "eviction": lambda plan: eviction_quality.run(plan, ("ours", "exact")),
}


def measure(configuration: str, only: list[str], kinds: list[str], rounds: int | None, file: Path | None) -> Results:
    """
    Return the results of a run.

    Args:
        configuration: The size of the run.
        only: The jobs; empty: all. Some of them are added to the results in ``file``, in place of earlier ones.
        kinds: The kinds of sessions to measure under load; empty: all.
        rounds: How often each has its turn; None: as the configuration says.
        file: Written after each job, so that an interrupted run leaves what it has measured.
    """
    plan = {"full": FULL, "quick": QUICK, "smallest": SMALLEST}[configuration]
    if rounds is not None:
        plan = replace(plan, rounds=rounds)
    jobs = ALONE if configuration == "smallest" else JOBS
    if kinds and "web" in jobs:
        jobs = jobs | {"web": lambda plan: web.run(plan, tuple(kinds))}
    results: Results = json.loads(file.read_text()) if only and file and file.exists() else {}
    run = about() | {"configuration": configuration, "took": 0}
    partly = "about" in results  # what is not measured again keeps the date and the commit of its run
    results.setdefault("about", run)
    for name, job in jobs.items():
        if not only or name in only:
            started = time.monotonic()
            print(f"{name} ...", end=" ", file=sys.stderr, flush=True)
            try:
                results[name] = job(plan)
            except peers.Missing as exc:
                results[name] = {"missing": {name: str(exc)}}
            took = time.monotonic() - started
            print(f"{took:.0f} s", file=sys.stderr, flush=True)
            results["about"]["took"] += took
            if partly:
                again = f"{run['date']}, commit {run['commit']}, {configuration} run, engine: {run['engine']}"
                results["about"].setdefault("again", {})[name] = again
            if file:
                write(results, file)
    return results


def write(results: Results, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=1) + "\n")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_const", const="quick", dest="configuration")
    size.add_argument("--smallest", action="store_const", const="smallest", dest="configuration")
    parser.set_defaults(configuration="full")
    parser.add_argument("--only", nargs="*", choices=[*JOBS], default=[], help="some of the jobs")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=[], help="some of the sessions of the job web")
    parser.add_argument("--rounds", type=int, help="how often each has its turn: more on a machine that is busy")
    parser.add_argument("--json", type=Path, help="write the results to this file; with --only: add them to it")
    parser.add_argument("--from", type=Path, dest="source", help="measure nothing: take the results from this file")
    parser.add_argument("--svg", type=Path, help="write charts to this directory")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file; those of its marks if it has any")
    parser.add_argument("--note", help="what a reader must know of this run; kept with the results")
    return parser


def main() -> None:
    arguments = parser().parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the peers' servers too
    logging.getLogger("shmstore").setLevel(logging.ERROR)  # it evicts on purpose here, and logs that
    if arguments.source:
        results = json.loads(arguments.source.read_text())
    else:
        results = measure(arguments.configuration, arguments.only, arguments.kinds, arguments.rounds, arguments.json)
    if arguments.note:
        results["about"]["note"] = arguments.note
    made = [*tables.tables(results)]
    print("\n".join([*tables.heading(results["about"]), "", *map(tables.as_text, made)]))
    if arguments.json:
        write(results, arguments.json)
    if arguments.svg:
        charts.write(results, arguments.svg)
    if arguments.markdown:
        old = arguments.markdown.read_text() if arguments.markdown.exists() else ""
        arguments.markdown.write_text(tables.document(old, results))


if __name__ == "__main__":
    main()
