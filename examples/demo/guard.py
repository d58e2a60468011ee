"""Access checks for the buttons of the demo."""

from __future__ import annotations

from contextlib import suppress
from ipaddress import ip_address
from urllib.parse import urlsplit

from flask import abort, request


def same_origin() -> None:
    """Refuse forms from other sites and other ports of this machine. All current browsers report the origin."""
    if request.method in ("GET", "HEAD", "OPTIONS"):
        return
    site, origin = request.headers.get("Sec-Fetch-Site"), request.headers.get("Origin")
    if site not in (None, "same-origin", "none") or (
        site is None and origin is not None and urlsplit(origin).netloc != request.host
    ):
        abort(403, "Another site has sent this form.")


def same_machine() -> None:
    """Refuse requests from other machines, and requests that use another name for this machine."""
    host = urlsplit(f"//{request.host}").hostname or ""
    with suppress(ValueError):
        if ip_address(request.remote_addr or "").is_loopback and (host == "localhost" or ip_address(host).is_loopback):
            return
    abort(403, "The demo's processes can be killed only from the same machine.")
