"""Results as tables, ratios first; as plain text and as Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from benchmarks import adapters, engines, micro, web
from benchmarks import applications as apps
from benchmarks.bars import WORKLOADS, pick, targets
from benchmarks.figures import Results


class Table(NamedTuple):
    """
    A table: its title, the meaning of its figures, its rows.

    Attributes:
        name: What a mark in a document calls it; empty: no document has it alone.
    """

    title: str
    note: str
    head: list[str]
    rows: list[list[str]]
    name: str = ""


def spread(figure: Any, digits: int = 1) -> str:
    """Return a figure as a text: the median, in brackets the least and the most."""
    if figure is None:
        return "-"
    median, low, high = figure
    return f"{median:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def number(value: Any, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def tables(results: Results) -> Iterator[Table]:
    """Yield all tables for which there are results."""
    yield Table(
        "Targets", "-: not measured, because the run was too small or a peer is missing.",
        ["what", "target", "measured", "reached"],
        [[each.what, each.wanted, each.found, each.verdict] for each in targets(results)], "targets",
    )  # fmt: skip
    makers: dict[str, Callable[[Results], Iterator[Table]]] = {
        "web": _web, "in process": _in_process, "micro": _micro, "many": _many, "growth": _growth,
        "memory": _memory, "times": _times, "eviction": _eviction, "asgi": _asgi, "django": _django,
        "engines": _engines,
    }  # fmt: skip
    for name, maker in makers.items():
        if results.get(name, {}).keys() - {"missing"}:
            yield from maker(results[name])
    if rows := missing(results):
        yield Table("Missing", "What was not measured, and why.", ["what", "why"], rows)


def missing(results: Results) -> list[list[str]]:
    """Return what is missing, with the reasons."""
    found: dict[str, str] = {}
    for part in results.values():
        if isinstance(part, dict):
            found |= part.get("missing", {})
            found |= {f"{what}: cannot": why for what, why in part.get("cannot", {}).items()}
    return [[what, why] for what, why in found.items()]


WEB_HEAD = [
    "session", "throughput, of no session", "of signed cookie", "CPU us/request", "of it for the session", "requests/s",
    "p50 ms", "p99 ms",
]  # fmt: skip


def _web_rows(row: Results, kinds: tuple[str, ...]) -> list[list[str]]:
    rows = []
    for kind in kinds:
        each = row.get(kind)
        if each is None:
            rows.append([kind, "missing", *[""] * 6])
            continue
        rows.append([
            kind, spread(each.get("of none"), 2), spread(each.get("of cookie"), 2), spread(each["cpu"], 0),
            spread(each.get("cost"), 0), spread(each["rate"], 0), spread(each["p50"], 2), spread(each["p99"], 2),
        ])  # fmt: skip
    return rows


def _flask(server: str, results: Results) -> Table:
    """Return the throughput and the CPU of each kind of session under one server."""
    rows = []
    for kind in apps.UNDER_UWSGI if server == "uwsgi" else apps.UNDER_GUNICORN:
        each = [pick(results, "servers", server, workload, kind) or {} for workload in WORKLOADS]
        shares = [number(row["of none"][0], 2) if "of none" in row else "missing" for row in each]
        costs = [number(row["cost"][0], 0) if "cost" in row else "missing" for row in each]
        rows.append([kind, *shares, *costs])
    return Table(
        f"Flask under {server}",
        "Throughput as a share of that without a session, and microseconds of CPU that the session adds to a request.",
        ["session", *(f"{name}: throughput" for name in WORKLOADS), *(f"{name}: CPU us" for name in WORKLOADS)],
        rows, server.split(",")[0],
    )  # fmt: skip


def _web(results: Results) -> Iterator[Table]:
    yield from (_flask(server, results) for server in ("gunicorn, sync", "uwsgi") if server in results["servers"])
    note = "Flask, 2 workers. CPU is that of the server side: workers and the process that keeps the sessions."
    for server, workloads in results["servers"].items():
        kinds = apps.UNDER_UWSGI if server == "uwsgi" else apps.UNDER_GUNICORN
        for workload, row in workloads.items():
            yield Table(f"{server}: {workload}", note, WEB_HEAD, _web_rows(row, kinds))
    for workload, sizes in results["sizes"].items():
        for size, row in sizes.items():
            yield Table(
                f"{web.SERVERS[0]}: {workload}, sessions of {size} bytes", note, WEB_HEAD,
                _web_rows(row, apps.UNDER_GUNICORN),
            )  # fmt: skip


def _in_process(costs: Results) -> Iterator[Table]:
    base = costs["none"][0]
    rows = []
    for workload in ("unused", "read", "write", "login"):
        theirs, mine = (
            [value - base for value in costs[f"{workload}, {kind}"]] for kind in ("signed cookie", "shmstore")
        )
        rows.append([workload, number(theirs[0] / max(mine[0], 0.1)), spread(mine), spread(theirs)])
    yield Table(
        "What a session adds to a request, in process",
        f"Microseconds of CPU beyond a request without any session ({base:.0f} us); no network, no Gunicorn.",
        ["request", "times less than the signed cookie", "shmstore", "signed cookie"], rows,
    )  # fmt: skip


def _micro(results: Results) -> Iterator[Table]:
    table = results["operations"]
    kinds = [*adapters.KINDS]
    ours = {operation: (table[operation].get(adapters.OURS) or [None])[0] for operation in table}

    def cell(operation: str, kind: str, times: bool) -> str:
        figure = table[operation].get(kind)
        if figure is None:
            return "missing" if kind in results["missing"] else "-"
        if not times:
            return spread(figure)
        return f"{figure[0]:.1f} us" if kind == adapters.OURS else f"{figure[0] / ours[operation]:.1f}x"

    what = "A session of 750 bytes, one process"
    for title, name, note in (
        (
            "Operations",
            "operations",
            f"{what}; the others as times shmstore's cost. -: no such operation, or no limit.",
        ),
        ("Operations: microseconds", "", f"{what}: median (least-most)."),
    ):
        yield Table(
            title, note, ["operation", *kinds],
            [[operation, *(cell(operation, kind, bool(name)) for kind in kinds)] for operation in micro.OPERATIONS],
            name,
        )  # fmt: skip


def _most(results: Results) -> Table:
    """Return the throughput of all stores with the most processes."""
    operations = results["operations"]
    count = max(operations["get"], key=int)
    rows = []
    for kind in operations["get"][count]:
        each = [operations[name][count].get(kind) for name in ("get", "set")]
        rows.append([kind, *(text for row in each for text in (number(row["rate"][0], 0), number(row["p99"][0], 0)))])
    return Table(
        f"{count} processes at once", f"Sessions of 750 bytes, {results['processors']} cores.",
        ["store", "get/s", "get: p99 us", "set/s", "set: p99 us"], rows, "processes",
    )  # fmt: skip


def _many(results: Results) -> Iterator[Table]:
    yield _most(results)
    for operation, by_count in results["operations"].items():
        rows = []
        for count, row in by_count.items():
            for kind, each in row.items():
                mine = pick(row, adapters.OURS, "rate")
                rows.append([
                    count, kind, f"{mine[0] / each['rate'][0]:.1f}" if mine else "-", spread(each["rate"], 0),
                    spread(each["p50"]), spread(each["p99"]), number(each["fairness"][0], 2),
                ])  # fmt: skip
        yield Table(
            f"Processes at once: {operation}",
            f"On {results['processors']} cores. Fairness: the slowest process' share of the fastest's count.",
            ["processes", "store", "shmstore, times that", "in all/s", "p50 us", "p99 us", "fairness"], rows,
        )  # fmt: skip


def _growth(results: Results) -> Iterator[Table]:
    table = results["operations"]
    counts = [*next(iter(table.values()), {})]
    rows = [
        [name, number(row[counts[-1]] / row[counts[0]], 2), *(number(row[count], 2) for count in counts)]
        for name, row in table.items()
    ]
    yield Table(
        "Growth", "Microseconds of each operation by the number of sessions stored; the last over the first.",
        ["operation", "grows by", *(f"{count} sessions" for count in counts)], rows, "growth",
    )  # fmt: skip


def _memory(results: Results) -> Iterator[Table]:
    table = results["bytes each"]
    mine = pick(table, "shmstore", "with its process")
    rows = [
        [kind, f"{mine / row['with its process']:.2f}" if mine else "-", *(number(value, 0) for value in row.values())]
        for kind, row in table.items()
    ]
    yield Table(
        "Memory",
        f"Bytes for each of {results['sessions']} sessions of 750 bytes, with their ids. shmstore: the used part of "
        "the arena; that and the server process' own memory; the same beyond an empty store. Others: their own count; "
        "the resident memory of the process; its growth.",
        ["store", "shmstore, times that", "counted by itself", "with its process", "growth"], rows, "memory",
    )  # fmt: skip


def _times(results: Results) -> Iterator[Table]:
    rows = [[what, spread(figure, 2)] for what, figure in results["create and attach"].items()]
    for sessions, row in results["recovery"].items():
        for what, figure in (row or {"not enough memory": None}).items():
            rows.append([f"after a writer was killed, {sessions} sessions: {what}", spread(figure, 3)])
    prune = results["prune"]
    rows.append([f"prune of {prune['expired']} of {prune['sessions']}", f"{prune['ms']:.0f}"])
    for who in ("a writer, calm", "a writer, meanwhile"):
        each = prune[who]
        rows.append([f"{who}: p50, p99, max", " / ".join(number(each[name], 3) for name in ("p50", "p99", "max"))])
        rows.append([f"{who}: writes in a second", number(each.get("rate"), 0)])
    yield Table("Times", "Milliseconds: median (least-most).", ["what", "ms"], rows, "times")


def _eviction(results: Results) -> Iterator[Table]:
    kinds = [*next(iter(results["traces"].values()))]
    rows = [[name, *(number(row[kind], 3) for kind in kinds)] for name, row in results["traces"].items()]
    yield Table(
        "Eviction",
        f"The share of users' visits that find their session: {results['requests']} visits of {results['users']} "
        f"users, room for {results['budget']}. In the scan a crawler begins many sessions ten times; in the flood "
        "three anonymous visitors come with each user for a third of the time. Redis compares idle times in whole "
        "seconds, so it does better at a real pace.",
        ["trace", *kinds], rows, "eviction",
    )  # fmt: skip


def _costs(costs: Results, names: dict[str, str], ours: str) -> list[list[str]]:
    """Return a row for each kind of session: microseconds of CPU, and their ratio to the row of `ours`."""
    rows = []
    for kind, row in costs.items():
        times = [f" ({row[name] / costs[ours][name]:.1f}x)" if kind != ours else "" for name in row]
        rows.append([names.get(kind, kind), *(f"{row[name]:.0f}{each}" for name, each in zip(row, times, strict=True))])
    return rows


def _asgi(results: Results) -> Iterator[Table]:
    from benchmarks.asgi_sessions import KINDS

    yield Table(
        "Starlette under Uvicorn",
        f"Microseconds of CPU that the session adds to a request of {results['base']:.0f} us, and times shmstore's. "
        "One worker, the fastest round. What Redis takes itself is not counted.",
        ["session", *WORKLOADS], _costs(results["costs"], KINDS, "shmstore"), "asgi",
    )  # fmt: skip


def _django(results: Results) -> Iterator[Table]:
    yield Table(
        "Django",
        f"Microseconds of CPU that the session adds to a request, and times shmstore's. Django {results['version']} "
        "in one process, the fastest round. What Redis takes itself is not counted.",
        ["session engine", *WORKLOADS], _costs(results["costs"], {}, "shmstore"), "django",
    )  # fmt: skip


def _engines(results: Results) -> Iterator[Table]:
    rows = [
        [name, *(number((row.get(each) or [None])[0], 1) for each in (engines.C, engines.PYTHON))]
        for name, row in results["operations"].items() if not name.startswith("bytes")
    ]  # fmt: skip
    for workload in WORKLOADS:
        costs = [results["requests"].get(each) for each in (engines.C, engines.PYTHON)]
        beyond = [each and each[f"{workload}, shmstore"][0] - each["none"][0] for each in costs]
        rows.append([f"Flask in one process: {workload}", *(number(each, 1) for each in beyond)])
    yield Table(
        "The two engines", "Microseconds: operations of a private store; what a session adds to a request.",
        ["operation", engines.C, engines.PYTHON], rows, "engines",
    )  # fmt: skip


def heading(about: Results) -> list[str]:
    """Return the machine and the date of a run, as lines."""
    servers = "; ".join(f"{name}: {version}" for name, version in about["servers"].items())
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    lines = [
        about.get("note", ""),
        f"{about['date']}, commit {about['commit']}, {about['took']:.0f} s, {about['configuration']} run",
        f"{about['processor']}, {about['cores']} cores, {about['memory'] / 2**30:.0f} GiB, Linux {about['kernel']}, "
        f"Python {about['python']}, engine: {about['engine']}; load average before the run {about['load before']}",
        *(f"{name} was measured again: {run}" for name, run in about.get("again", {}).items()),
        servers,
        packages,
    ]
    return [line for line in lines if line]


def as_text(table: Table) -> str:
    """Return a table for a terminal."""
    every = [table.head, *table.rows]
    widths = [max(len(row[at]) for row in every) for at in range(len(table.head))]
    lines = []
    for first, *others in every:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([f"== {table.title}", table.note, "", *lines, ""])


MARKED = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def document(old: str, results: Results) -> str:
    """
    Return a document with the tables.

    A table replaces what is between the mark ``<!-- table NAME -->`` and the next ``<!-- end -->`` of ``old``, with the
    line of its meaning below it; ``run`` names the machine, the date and the versions. What was not measured stays as
    it is. A document without marks becomes one of all tables.
    """
    head = "\n".join(f"{line}  " for line in heading(results["about"]))
    made = [*tables(results)]
    if not MARKED.search(old):
        return "\n".join([head, "", *(f"### {each.title}\n\n{as_markdown(each)}" for each in made)])
    texts = {each.name: as_markdown(each) for each in made} | {"run": f"{head.rstrip()}\n"}
    return MARKED.sub(
        lambda found: f"{found[1]}\n{texts[found[2]]}\n{found[3]}" if found[2] in texts else found[0], old
    )


def as_markdown(table: Table) -> str:
    """Return a table for a document, with the meaning of its figures."""
    rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table.rows]
    head = ["| " + " | ".join(table.head) + " |", "|" + "---|" * len(table.head)]
    return "\n".join([*head, *rows, "", table.note, ""])
