"""Bar charts as SVG, readable on light and on dark pages."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import adapters
from benchmarks import applications as apps
from benchmarks.bars import pick
from benchmarks.figures import SIZE, Results

# The labels of what a user may choose from; the tables have the rest.
SHOWN = {kind: kind for kind in (apps.OURS, apps.REDIS_STORE, apps.COOKIE, apps.REDIS, apps.MEMCACHED, apps.FILES)} | {
    apps.STASH: "Gunicorn's stash"
}

_STYLE = """
  text { font: 14px system-ui, sans-serif; fill: #1f2328; }
  .title { font-size: 16px; font-weight: 600; }
  .group { font-weight: 600; }
  .note, .head { fill: #57606a; font-size: 13px; }
  .paper { fill: #ffffff; }
  .bar { fill: #8c959f; }
  .ours { fill: #2da44e; }
  .axis { stroke: #d0d7de; }
  .whisker { stroke: #424a53; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; }
    .note, .head { fill: #9198a1; }
    .paper { fill: #0d1117; }
    .bar { fill: #656c76; }
    .ours { fill: #2ea043; }
    .axis { stroke: #3d444d; }
    .whisker { stroke: #d1d7e0; }
  }
"""

MARGIN, WIDTH, LABEL, VALUE, LINE = 12, 700, 214, 64, 21

# The median, the least and the most, by the names of a group of bars and of a bar.
Groups = Mapping[str, Mapping[str, Sequence[float]]]


class Panel(NamedTuple):
    """
    A column of bars.

    Attributes:
        head: The line above them.
        unit: What follows the numbers.
        groups: The figures.
        log: Whether the scale is logarithmic.
    """

    head: str
    unit: str
    groups: Groups
    log: bool = False

    def lengths(self, room: float) -> Callable[[float], float]:
        """Return the function from a value to the length of its bar, which is at most ``room``."""
        every = [figure for group in self.groups.values() for figure in group.values()]
        most = max((figure[2] for figure in every), default=1.0) or 1.0
        if not self.log:
            return lambda value: room * max(0.0, value) / most
        floor = 10.0 ** math.floor(math.log10(min((figure[0] for figure in every if figure[0] > 0), default=1.0)))
        return lambda value: (
            room * max(0.0, math.log10(max(value, floor) / floor)) / max(math.log10(most / floor), 1e-9)
        )


def chart(title: str, notes: list[str], panels: list[Panel], ours: str) -> str:
    """
    Return a chart with horizontal bars: the same groups and labels for all panels, which stand side by side.

    Args:
        title: The title of the chart.
        notes: The lines below the title.
        panels: The columns of bars; the first one has all groups and labels.
        ours: How the labels of shmstore's bars begin.
    """
    width = (WIDTH - LABEL) / len(panels)
    room = width - VALUE
    starts = [LABEL + width * at for at in range(len(panels))]
    lines, y = list[str](), 0

    def write(text: str, kind: str, x: float = 0, anchor: str = "start") -> None:
        lines.append(f'<text class="{kind}" x="{x:.1f}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>')

    y = 20
    write(title, "title")
    for note in notes:
        y += 20
        write(note, "note")
    if any(panel.head for panel in panels):
        y += 30
    for panel, start in zip(panels, starts, strict=True):
        write(panel.head, "head", start)
    for name, group in panels[0].groups.items():
        y += LINE + 7
        write(name, "group")
        top = y + 8
        for label in group:
            y += LINE
            write(label, "label", LABEL - 8, "end")
            for panel, start in zip(panels, starts, strict=True):
                if figure := panel.groups.get(name, {}).get(label):
                    median, low, high = map(panel.lengths(room), figure)
                    kind = "ours" if label.startswith(ours) else "bar"
                    lines += [
                        f'<rect class="{kind}" x="{start:.1f}" y="{y - 12}" height="15" width="{median:.1f}"/>',
                        f'<path class="whisker" d="M{start + low:.1f} {y - 4.5}H{start + high:.1f}"/>',
                    ]
                    write(f"{short(figure[0])} {panel.unit}", "value", start + max(median, high) + 6)
        lines += [f'<path class="axis" d="M{start:.1f} {top}V{y + 5}"/>' for start in starts]
    size = f'width="{WIDTH + 2 * MARGIN}" height="{y + 16 + 2 * MARGIN}"'
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" '
        f'viewBox="{-MARGIN} {-MARGIN} {WIDTH + 2 * MARGIN} {y + 16 + 2 * MARGIN}">',
        f"<title>{escape(title)}</title>",
        f"<style>{_STYLE}</style>",
        # A page may be light where the system is dark: the chart brings its own background.
        f'<rect class="paper" x="{-MARGIN}" y="{-MARGIN}" {size} rx="8"/>',
    ]
    return "\n".join([*head, *lines, "</svg>", ""])


def short(value: float) -> str:
    """Return a number with two digits, or more if it is larger."""
    return f"{value:.0f}" if abs(value) >= 10 else f"{value:.2g}"


def charts(results: Results) -> dict[str, str]:
    """Return the charts for which there are results, by file name."""
    found = {}
    when = results["about"]["date"][:10]
    if panels := _requests(results):
        found["session-cost.svg"] = chart(
            "What a session costs a Flask request",
            [
                f"Gunicorn with 2 sync workers, sessions of {SIZE} bytes. Bars: median of all rounds; lines: range.",
                f"Throughput: of a request without a session. CPU: of workers and store, beyond that request. {when}",
            ],
            panels, apps.OURS,
        )  # fmt: skip
    if groups := _operations(results):
        found["operations.svg"] = chart(
            "One operation on a session of 750 bytes",
            [f"Microseconds in one process, on a logarithmic scale. {when}"],
            [Panel("", "us", groups, log=True)], adapters.OURS,
        )  # fmt: skip
    return found


def _requests(results: Results) -> list[Panel]:
    """Return two columns by workload and kind of session: throughput, and the CPU time of the session."""
    workloads: dict[str, Any] = pick(results, "web", "servers", "gunicorn, sync") or {}
    rows = {
        name.capitalize(): {label: row[kind] for kind, label in SHOWN.items() if "cost" in row.get(kind, {})}
        for name, row in workloads.items()
        if name in ("read", "write", "login")
    }
    if not any(rows.values()):
        return []

    def figures(name: str, factor: float = 1) -> Groups:
        return {
            group: {label: [factor * value for value in row[name]] for label, row in group_rows.items()}
            for group, group_rows in rows.items()
        }

    return [Panel("Throughput (more is better)", "%", figures("of none", 100)),
            Panel("CPU per request (less is better)", "us", figures("cost"))]  # fmt: skip


def _operations(results: Results) -> Groups:
    table: dict[str, Any] = pick(results, "micro", "operations") or {}
    shown = ("get", "set", "touch", "create at capacity")
    return {
        name: {kind: table[name][kind] for kind in adapters.KINDS if kind in table[name]}
        for name in shown
        if name in table
    }


def write(results: Results, directory: Path) -> list[Path]:
    """Write the charts; return their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, svg in charts(results).items():
        paths.append(directory / name)
        paths[-1].write_text(svg)
    return paths
