"""The views of the admin page, and the access check."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote
from weakref import WeakKeyDictionary

from flask import (
    Blueprint,
    Response,
    abort,
    current_app,
    g,
    jsonify,
    redirect,
    render_template,
    request,
    session,
    url_for,
)
from flask.typing import ResponseReturnValue
from werkzeug.wrappers import Response as AnyResponse

from shmstore.client.attachment import LATE
from shmstore.engine.header import HEARTBEAT
from shmstore.errors import ConfigError, StoreFull, StoreUnavailable
from shmstore.flask.admin.forgery import application_fields, check_token, fields
from shmstore.flask.admin.table import Describe, View, table
from shmstore.flask.interface import StoreSessionInterface
from shmstore.listing import Listing, digest, has_arena, sessions_of
from shmstore.options import format_duration, format_size
from shmstore.system.clock import NS, boottime_ns, past

if TYPE_CHECKING:
    from shmstore.contract import AnyStore, Stats

Allowed = bool | AnyResponse | None
Authorize = Callable[[], Allowed] | Callable[[], Awaitable[Allowed]]

_MESSAGE: Final = "_shmstore_said"  # the session's key of a message that the page shows once
_SHARE: Final = 0.05  # of the time may be spent on looking at all keys of a server for polls
_SHORT: Final = 12  # digits of a digest that are shown, as by `shmstore ls`

# Only the page's own files. `Referrer-Policy: no-referrer` would make browsers hide the origin of its own forms.
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def admin_blueprint(
    authorize: Authorize | None = None,
    *,
    store: AnyStore | Callable[[], AnyStore] | None = None,
    describe: Describe | None = None,
    home: str | None = None,
    logout: str | None = None,
    name: str = "shmstore_admin",
) -> Blueprint:
    """
    Create the admin page. It shows the state of the store and the sessions of all users, and can end sessions::

        admin = admin_blueprint(authorize=lambda: current_user.is_authenticated and current_user.is_admin)
        app.register_blueprint(admin, url_prefix="/sessions")

    Anyone whom it admits can log out every user. It shows no ids of sessions, and of their data only what ``describe``
    returns.

    Args:
        authorize: Called before each request for the page, without arguments. True admits the request; False or None
            is a 403; a response, such as a redirect to your login, is sent instead. May be a coroutine function.
        store: The store, or a function that returns it, called for each request; None: the store of the application's
            sessions.
        describe: Returns columns of your own for each session that is shown: called with its data, returns a mapping
            of names to texts, such as ``{"Address": data.get("address", "")}``. If it fails, the error is logged and
            the columns of that session stay empty.
        home: Where the page's link back to your application leads: an endpoint such as ``"index"``, or a URL, which
            contains a slash. None: there is no link.
        logout: Your logout, an endpoint or a URL in the same way. The page has a link to it, or a button if the
            endpoint accepts POST; the form then has the token of Flask-WTF's ``CSRFProtect`` if you use that.
            Browsers refuse a redirect of such a form to another origin: for a logout that ends elsewhere, give the URL.
        name: The blueprint's name, for an application with several.

    Raises:
        ConfigError: ``authorize`` is missing, an argument is not callable, or the store is of a kind whose sessions
            cannot be listed. If the application's own store is of such a kind, each request for the page raises it.
    """
    if not callable(authorize):
        raise ConfigError(
            "admin_blueprint() needs authorize=..., a function that returns True for users who may see and end "
            "all sessions, such as "
            "authorize=lambda: current_user.is_authenticated and current_user.is_admin"
        )
    if describe is not None and not callable(describe):
        raise ConfigError(f"describe must be a function of a session's data, not {describe!r}")
    if isinstance(store, str):
        raise ConfigError(
            "store must be a store or a function that returns one, such as "
            f"functools.cache(lambda: shmstore.connect({store!r}))"
        )
    if store is not None and not callable(store):
        sessions_of(store)
    for argument, target in (("home", home), ("logout", logout)):
        if target is not None and not (isinstance(target, str) and target):
            raise ConfigError(f"{argument} must be an endpoint or a URL of your application, not {target!r}")
        if target is not None and target.startswith(".") and "/" not in target:
            raise ConfigError(f"{argument}={target!r} is relative to the admin page: name the endpoint in full")
    page = _Page(authorize, store, describe, home, logout)
    blueprint = Blueprint(
        name,
        __name__,
        url_prefix="/sessions",
        template_folder="templates",
        static_folder="static",
        static_url_path="/static",
    )
    blueprint.before_request(page.check)
    blueprint.after_request(_add_headers)
    blueprint.register_error_handler(StoreUnavailable, page.unavailable)
    blueprint.register_error_handler(StoreFull, page.unavailable)
    blueprint.add_url_rule("/", "page", page.show)
    blueprint.add_url_rule("/", "act", page.act, methods=["POST"])
    blueprint.add_url_rule("/end-all", "confirm", page.confirm)
    blueprint.add_url_rule("/figures", "figures", page.figures)
    return blueprint


class _Page:
    """The page of one blueprint."""

    def __init__(
        self,
        authorize: Authorize,
        store: AnyStore | Callable[[], AnyStore] | None,
        describe: Describe | None,
        home: str | None,
        logout: str | None,
    ) -> None:
        self._authorize = authorize
        self._source = store
        self._describe = describe
        self._home, self._logout = home, logout
        self._polled: WeakKeyDictionary[AnyStore, tuple[float, Stats]] = WeakKeyDictionary()

    @property
    def _store(self) -> AnyStore:
        source = self._source
        if source is not None:
            return source() if callable(source) else source
        interface = current_app.session_interface
        if not isinstance(interface, StoreSessionInterface):
            raise ConfigError("This application's sessions are not in a store: give admin_blueprint() a store=...")
        return interface.store

    def _stats(self, store: AnyStore) -> Stats:
        """Return the figures, of a server those of a moment ago: it looks at all its keys."""
        if has_arena(store):
            return store.stats()
        begun, known = time.monotonic(), self._polled.get(store)
        if known is not None and begun < known[0]:
            return known[1]
        stats, ended = store.stats(), time.monotonic()
        self._polled[store] = ended + (ended - begun) / _SHARE, stats
        return stats

    def check(self) -> AnyResponse | None:
        """Ask the application before each request. The page's static files contain no data and are not protected."""
        g.shmstore_admin = False
        if _is_file():
            return None
        allowed = current_app.ensure_sync(self._authorize)()
        if allowed is True:
            g.shmstore_admin = True
            return None
        if allowed is False or allowed is None:
            abort(403)
        if isinstance(allowed, AnyResponse):
            return allowed
        # A value that is merely true might be a coroutine, or the text "access denied".
        raise TypeError(f"authorize must return True, False or a response, not a {type(allowed).__name__}")

    def show(self) -> ResponseReturnValue:
        """Show the page."""
        store, view = self._store, View.of(request.args)
        stats, found = store.stats(), table(store, view, self._describe)
        message = session.pop(_MESSAGE, None) if _MESSAGE in session else None
        return self._page(
            "shmstore/sessions.html",
            label=store.label,
            shown=_shown(stats),
            running=_is_server_running(store, stats),
            has_expired=has_arena(store),
            expired_now=found.total if view.expired and not view.query else len(Listing(store, expired=True)),
            table=found,
            view=view._replace(number=found.number),
            short=_SHORT,
            own=_own_digest(),
            said=message,
            now=datetime.now(UTC),
        )

    def confirm(self) -> ResponseReturnValue:
        """Ask whether to end all sessions of an owner."""
        store, view, owner = self._store, View.of(request.args), request.args.get("owner", "")
        own = _own_digest()
        try:
            total, yours = len(Listing(store, owner=owner)), own and len(Listing(store, owner=owner, digest=own))
        except ValueError:  # an owner cannot have this name
            total, yours = 0, 0
        return self._page("shmstore/confirm.html", view=view, owner=owner, total=total, yours=yours)

    def figures(self) -> ResponseReturnValue:
        """Return the numbers for the page's script; in shared memory their cost does not depend on the store's size."""
        store = self._store
        stats = self._stats(store)
        counts = {name: getattr(stats, name) for name in ("sessions", "bytes", "memory", "hits", "gets", "evicted")}
        return _with_csp(jsonify(counts=counts, shown=_shown(stats), running=_is_server_running(store, stats)))

    def act(self) -> ResponseReturnValue:
        """Perform the action of a button, and redirect to the page."""
        check_token()
        form = request.form
        if end := form.get("end"):
            message = self._end(end)
        elif owner := unquote(form.get("end_owner", "")):
            message = f"Ended {_sessions(self._store.destroy_owned(owner))} of {owner}."
        elif "prune" in form:
            message = f"Removed {_sessions(self._store.prune())} that had expired."
        else:
            abort(400, "Nothing was done: the form names neither sessions to end nor a prune.")
        session[_MESSAGE] = message
        return redirect(url_for(".page", _anchor="said", **View.of(form).arguments()), 303)

    def _end(self, digest: str) -> str:
        store, short = self._store, digest[:_SHORT]
        try:
            row, record = Listing.one(store, digest)
        except LookupError:
            return f"Session {short} does not exist any more: it has ended, or got a new id at a login or logout."
        store.destroy(record.sid)
        return f"Ended session {short}{f' of {row.owner}' if row.owner else ''}."

    def unavailable(self, error: Exception) -> ResponseReturnValue:
        """Report that the store is unavailable. Only admins see the error: ``authorize`` itself may have failed."""
        current_app.logger.error("admin page: %s", error)
        if not g.get("shmstore_admin"):
            return _with_csp(current_app.make_response("The service is not available.")), 503
        if request.endpoint and request.endpoint.endswith(".figures"):
            return _with_csp(jsonify(error="The store cannot be reached.")), 503
        return self._page("shmstore/no_store.html", error=error), 503

    def _page(self, template: str, **facts: Any) -> Response:
        """Return a page. Without the store it may have no session: then it has no forms."""
        logout = None
        if "error" not in facts:
            logout = _link(self._logout)
            facts.update(fields=fields(), logout_fields=application_fields())
        page = render_template(template, home=_link(self._home), logout=logout, **facts)
        return _with_csp(current_app.make_response(page))


def _link(target: str | None) -> tuple[str, bool] | None:
    """Return the URL of an endpoint, and whether it accepts POST. A URL is a link."""
    if target is None:
        return None
    if "/" in target:
        return target, False
    url = url_for(target)  # raises for an unknown endpoint
    return url, any("POST" in (rule.methods or ()) for rule in current_app.url_map.iter_rules(target))


def _is_server_running(store: AnyStore, stats: Stats) -> bool:
    """Return whether the store has a server process whose heartbeat is recent. A private store has no heartbeat."""
    if not has_arena(store):
        return True
    beat = store.arena.cells[HEARTBEAT]
    return stats.server_pid > 0 and (not beat or boottime_ns() - past(beat) < LATE * NS)


def _shown(stats: Stats) -> dict[str, str]:
    """Return the figures as text."""
    rate = f"{stats.hits / stats.gets:.1%}" if stats.gets else "none yet"
    used, on_server = format_size(stats.bytes), stats.engine == "redis"
    room = f"{used} of {format_size(stats.memory)}" if stats.memory else "without a limit"
    return {
        "sessions": f"{stats.sessions:,}",
        "owned": f"{stats.owned:,} of them logged in",
        "memory": f"{stats.bytes / stats.memory:.1%}" if stats.memory else used,
        "bytes": f"{room}{', used by the whole server' if on_server else ''}",
        "hits": rate,
        "gets": f"of {stats.gets:,} reads found their session",
        "evicted": f"{stats.evicted:,}",
        "evicted_owned": "by the whole server, to make room"
        if on_server
        else f"to make room; {stats.evicted_owned:,} of them logged in",
        "server": f"{stats.server_pid}, for {format_duration(stats.server_uptime)}"
        if stats.server_pid
        else "not running",
    }


def _sessions(count: int) -> str:
    return "1 session" if count == 1 else f"{count:,} sessions"


def _own_digest() -> str | None:
    """Return the digest of the current session, or None if it is not in a store."""
    sid = getattr(session, "sid", None)
    return digest(current_app.config.get("SESSION_KEY_PREFIX", "") + sid) if isinstance(sid, str) else None


def _with_csp(response: Response) -> Response:
    """Restrict a response of the page, but not one that the application returns instead, to the page's own files."""
    response.headers["Content-Security-Policy"] = _POLICY
    return response


def _add_headers(response: Response) -> Response:
    for name, value in _HEADERS.items():
        response.headers.setdefault(name, value)
    if not _is_file():
        response.headers["Cache-Control"] = "no-store"
    return response


def _is_file() -> bool:
    return bool(request.endpoint and request.endpoint.endswith(".static"))
