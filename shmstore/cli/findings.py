"""What `doctor` has found: whether something is well, and what to do about it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

import click

from shmstore.cli.output import plain, print_json

OK, NOTE, BROKEN = "ok", "warning", "broken"


class Finding(NamedTuple):
    """A finding, its level (`OK`, `NOTE`, `BROKEN`), and advice."""

    about: str
    level: str
    text: str
    advice: str = ""


def report(findings: Sequence[Finding], as_json: bool) -> None:
    """Print findings; end with 1 if something is broken."""
    broken = any(each.level == BROKEN for each in findings)
    if as_json:
        print_json({"broken": broken, "findings": [each._asdict() for each in findings]})
    else:
        for each in findings:
            click.echo(f"{each.level:<7}  {each.about}: {plain(each.text)}")
            if each.advice:
                click.echo(f"{'':7}    {plain(each.advice)}")
    if broken:
        sys.exit(1)
