"""What `doctor` has found: whether something is well, and what to do about it."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import click

from shmstore.cli.output import is_terminal, plain, print_json

OK, NOTE, BROKEN = "ok", "warning", "broken"


class Finding(NamedTuple):
    """A finding, its level (`OK`, `NOTE`, `BROKEN`), and advice."""

    about: str
    level: str
    text: str
    advice: str = ""


def _print(indent: str, text: str) -> None:
    """Print a paragraph; on a terminal, wrap it."""
    if is_terminal(sys.stdout):
        width = max(shutil.get_terminal_size().columns, 40)
        lines = textwrap.wrap(text, width - 11, break_long_words=False, break_on_hyphens=False)
        text = f"\n{'':11}".join(lines)
    click.echo(indent + text)


def report(findings: Sequence[Finding], as_json: bool) -> None:
    """Print findings; end with 1 if something is broken."""
    broken = any(each.level == BROKEN for each in findings)
    if as_json:
        print_json({"broken": broken, "findings": [each._asdict() for each in findings]})
    else:
        for each in findings:
            _print(f"{each.level:<9}", f"{each.about}: {plain(each.text)}")
            if each.advice:
                _print(" " * 11, plain(each.advice))
    if broken:
        sys.exit(1)
