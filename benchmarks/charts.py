"""Bar charts as SVG, readable on light and on dark pages."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path
from typing import Any

from benchmarks import adapters
from benchmarks import applications as apps
from benchmarks.bars import pick
from benchmarks.figures import Results

_STYLE = """
  text { font: 12px system-ui, sans-serif; fill: #24292f; }
  .title { font-size: 14px; font-weight: 600; }
  .paper { fill: #ffffff; }
  .note { fill: #57606a; font-size: 11px; }
  .bar { fill: #8c959f; }
  .ours { fill: #2da44e; }
  .whisker { stroke: #57606a; stroke-width: 1; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; }
    .paper { fill: #0d1117; }
    .note { fill: #8b949e; }
    .bar { fill: #6e7681; }
    .ours { fill: #3fb950; }
    .whisker { stroke: #b1bac4; }
  }
"""

WIDTH, LABEL, VALUE, LINE, GROUP = 720, 210, 110, 18, 24

Groups = dict[str, dict[str, list[float]]]


def chart(title: str, note: str, groups: Groups, unit: str, ours: str, *, log: bool = False) -> str:
    """
    Return a chart with horizontal bars.

    Args:
        title: The title of the chart.
        note: The line below the title.
        groups: Figures (median, least, most) by the names of their group and bar.
        unit: The unit after the numbers.
        ours: How the labels of shmstore's bars begin.
        log: Whether the scale is logarithmic.
    """
    most = max((figure[2] for group in groups.values() for figure in group.values()), default=1.0) or 1.0
    least = min((figure[0] for group in groups.values() for figure in group.values() if figure[0] > 0), default=1.0)
    floor = 10.0 ** math.floor(math.log10(least)) if log else 0.0
    room = WIDTH - LABEL - VALUE

    def length(value: float) -> float:
        if log:
            return room * max(0.0, math.log10(max(value, floor) / floor)) / max(math.log10(most / floor), 1e-9)
        return room * max(0.0, value) / most

    lines, y = list[str](), 52
    for name, group in groups.items():
        lines.append(f'<text x="0" y="{y + 12}" class="title">{escape(name)}</text>')
        y += GROUP
        for label, (median, low, high) in group.items():
            kind = "ours" if label.startswith(ours) else "bar"
            middle = y + LINE / 2 - 1
            lines += [
                f'<text x="{LABEL - 8}" y="{y + 12}" text-anchor="end">{escape(label)}</text>',
                f'<rect class="{kind}" x="{LABEL}" y="{y}" height="{LINE - 4}" width="{length(median) + 1:.1f}"/>',
                f'<line class="whisker" x1="{LABEL + length(low):.1f}" x2="{LABEL + length(high):.1f}" '
                f'y1="{middle}" y2="{middle}"/>',
                f'<text x="{LABEL + length(high) + 6:.1f}" y="{y + 12}">{short(median)} {escape(unit)}</text>',
            ]
            y += LINE
        y += 8
    width, height = WIDTH + 24, y + 8
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-12 -8 {width} {height}" width="{width}" height="{height}" '
        'role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{_STYLE}</style>",
        # A page may be light where the system is dark: the chart brings its own background.
        f'<rect class="paper" x="-12" y="-8" width="{width}" height="{height}" rx="8"/>',
        f'<text x="0" y="16" class="title">{escape(title)}</text>',
        f'<text x="0" y="34" class="note">{escape(note)}</text>',
    ]
    return "\n".join([*head, *lines, "</svg>", ""])


def short(value: float) -> str:
    """Return a number with three digits, or more if it is larger."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def charts(results: Results) -> dict[str, str]:
    """Return the charts for which there are results, by file name."""
    found = {}
    when = results["about"]["date"][:10]
    if groups := _session_costs(results):
        found["session-cost.svg"] = chart(
            "What a session costs of a Flask request",
            f"CPU microseconds beyond the same request without a session, of all processes; 2 sync workers; {when}",
            groups, "us", apps.OURS,
        )  # fmt: skip
    if groups := _operations(results):
        found["operations.svg"] = chart(
            "One operation on a session of 750 bytes",
            f"Microseconds, one process; logarithmic; {when}",
            groups, "us", adapters.OURS, log=True,
        )  # fmt: skip
    return found


def _session_costs(results: Results) -> Groups:
    workloads: dict[str, Any] = pick(results, "web", "servers", "gunicorn, sync") or {}
    return {
        workload: {kind: row[kind]["cost"] for kind in apps.UNDER_GUNICORN[1:] if "cost" in row.get(kind, {})}
        for workload, row in workloads.items()
    }


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
