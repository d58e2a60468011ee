"""One page of the table of sessions, and the text of its cells."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from flask import current_app
from werkzeug.datastructures import MultiDict

from shmstore.codec.body import Record
from shmstore.errors import SerializationError
from shmstore.listing import LAST_USED_FIRST, ORDERS, Listing, Row
from shmstore.options import format_duration, format_size
from shmstore.system.signals import pass_on_interruption

if TYPE_CHECKING:
    from shmstore.contract import AnyStore

ROWS: Final = 50  # per page
_SEARCH_TIME: Final = 0.5  # seconds in which a search may read sessions

Describe = Callable[[Mapping[str, Any]], Mapping[str, object]]


class View(NamedTuple):
    """
    The sessions that a request asks for. Links and forms repeat it, so that it stays after an action.

    Attributes:
        query: An owner; or the first digits, four or more, of a digest; or a part of an owner's name. Empty: all.
        expired: Select only sessions that have expired.
        order: The order, one of `shmstore.listing.ORDERS`.
        number: The number of the page, from 1; if there are fewer pages, the last one is meant.
    """

    query: str = ""
    expired: bool = False
    order: str = LAST_USED_FIRST
    number: int = 1

    @classmethod
    def of(cls, given: MultiDict[str, str]) -> View:
        """Return what the arguments of an address, or the fields of a form, ask for."""
        order = given.get("sort", "")
        return cls(
            given.get("q", ""),
            "expired" in given,
            order if order in ORDERS else LAST_USED_FIRST,
            given.get("page", 1, type=int),
        )

    def arguments(self, **changes: Any) -> dict[str, Any]:
        """Return the arguments that ask for this view, with changes."""
        view = self._replace(**changes)
        order, number = "" if view.order == LAST_USED_FIRST else view.order, "" if view.number == 1 else view.number
        given = {"q": view.query, "expired": "1" if view.expired else "", "sort": order, "page": str(number)}
        return {name: value for name, value in given.items() if value}

    def sorted_by(self, field: str) -> str:
        """Return how the sessions are sorted by a field, for ``aria-sort``."""
        return {field: "ascending", f"-{field}": "descending"}.get(self.order, "none")

    def order_after_click(self, field: str) -> str:
        """Return the order that a click on a column's head selects: first the soonest end, latest or largest."""
        up, down = field, f"-{field}"
        first, second = (up, down) if field == "expires" else (down, up)
        return second if self.order == first else first


class Line(NamedTuple):
    """A session as text. ``details`` are the application's own columns."""

    digest: str
    owner: str | None
    created: str
    used: str
    expires: str
    expired: bool
    size: str
    details: Mapping[str, str]


class Table(NamedTuple):
    """
    The content of one page of the table.

    Attributes:
        lines: The sessions.
        total: The number of sessions on all pages.
        number: The number of the page, from 1.
        pages: The number of pages.
        owner: The owner of all these sessions; None: they were not selected by an owner.
        parts: The number of sessions read in a search for a part of an owner's name; 0: it was another search.
        complete: Whether that search has read all sessions, or found more than it can show.
    """

    lines: list[Line]
    total: int
    number: int
    pages: int
    owner: str | None = None
    parts: int = 0
    complete: bool = True

    @property
    def columns(self) -> list[str]:
        """The names of the application's own columns."""
        return list(dict.fromkeys(name for line in self.lines for name in line.details))


def table(store: AnyStore, view: View, describe: Describe | None) -> Table:
    """
    Return a page of the selected sessions.

    Only the records of that page are read, unless the search is for a part of an owner's name.

    Args:
        store: The store.
        view: What to show.
        describe: Returns the application's own columns for a session.
    """
    query = view.query

    def select(**how: Any) -> Listing:
        return Listing(store, **how, expired=True if view.expired else None, order=view.order)

    def page(listing: Listing, owner: str | None = None) -> Table:
        total = len(listing)
        pages = max(1, math.ceil(total / ROWS))
        number = min(max(view.number, 1), pages)
        lines = _lines(store, listing.records((number - 1) * ROWS, number * ROWS), describe)
        return Table(lines, total, number, pages, owner)

    if not query:
        return page(select())
    for owner in dict.fromkeys((query, query.strip())):
        with suppress(ValueError):  # an owner cannot have this name
            if owned := select(owner=owner):
                return page(owned, owner)
    if re.fullmatch("[0-9a-fA-F]{4,32}", query, re.ASCII) and (named := select(digest=query.lower())):
        return page(named)
    return _search(store, query.strip().casefold(), select(), describe)


def _search(store: AnyStore, part: str, listing: Listing, describe: Describe | None) -> Table:
    """Search the sessions for a part of their owners' names, for as long as a worker can be kept busy."""
    until, found, read = time.monotonic() + _SEARCH_TIME, list[tuple[Row, Record]](), 0
    for row, record in listing.records():
        read += 1
        if part in (row.owner or "").casefold():
            found.append((row, record))
        if len(found) > ROWS or time.monotonic() > until:
            break
    else:
        read = len(listing)
    complete = read >= len(listing) and len(found) <= ROWS
    lines = _lines(store, islice(found, ROWS), describe)
    return Table(lines, len(lines), 1, 1, None, max(read, 1), complete)


def _lines(store: AnyStore, records: Iterable[tuple[Row, Record]], describe: Describe | None) -> list[Line]:
    lines, failed = list[Line](), False
    for row, record in records:
        details: dict[str, str] = {}
        session = None if describe is None else _session(store, record)
        if describe is not None and session is not None:
            try:
                details = {_plain(name): _plain(text) for name, text in describe(session).items()}
            except Exception as error:  # one unusual session must not keep an admin from ending it or others
                pass_on_interruption(error)
                if not failed:
                    current_app.logger.exception("admin page: describe failed, of session %s first", row.digest[:12])
                failed = True
        lines.append(_line(row, details))
    return lines


def _line(row: Row, details: Mapping[str, str]) -> Line:
    expired = row.remaining <= 0
    expires = "expired" if expired else "never" if math.isinf(row.remaining) else f"in {format_duration(row.remaining)}"
    ages = f"{format_duration(row.created)} ago", f"{format_duration(row.idle)} ago"
    return Line(row.digest, row.owner, *ages, expires, expired, format_size(row.size), details)


def _session(store: AnyStore, record: Record) -> Mapping[str, Any] | None:
    """Return the data of a session; None: this application cannot decode it."""
    if record.codec_name != store.codec.name:
        return None
    try:
        return store.codec.readable(record.payload)
    except SerializationError:
        return None


def _plain(text: object) -> str:
    """Return a text that templates escape, even if it is ``Markup``: a client may have provided it."""
    return str.__str__(str(text))
