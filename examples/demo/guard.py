"""Who may press the buttons of the demo."""

from __future__ import annotations

from contextlib import suppress
from ipaddress import ip_address
from urllib.parse import urlsplit

from flask import abort, request


def same_origin() -> None:
    """Refuse forms that another site, or another port of this machine, has sent. All current browsers say so."""
    if request.method in ("GET", "HEAD", "OPTIONS"):
        return
    site, origin = request.headers.get("Sec-Fetch-Site"), request.headers.get("Origin")
    if site not in (None, "same-origin", "none") or (
        site is None and origin is not None and urlsplit(origin).netloc != request.host
    ):
        abort(403, "Another site has sent this form.")


def same_machine() -> None:
    """Refuse whoever is not on this machine, or has reached it by another name than its own."""
    host = urlsplit(f"//{request.host}").hostname or ""
    with suppress(ValueError):
        if ip_address(request.remote_addr or "").is_loopback and (host == "localhost" or ip_address(host).is_loopback):
            return
    abort(403, "Only who is on the machine of the demo may kill its processes.")
