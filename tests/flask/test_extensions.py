"""Flask-Login, Flask-WTF and Flask-SocketIO, unchanged, on sessions kept in a store."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import flask_login
import pytest
from browsing import HOUR, Clock, cookies, look, make_app, meanwhile, put, session, sid_of, twin, visit
from flask import Flask, flash, redirect, request, stream_with_context
from flask.testing import FlaskClient
from flask_login import LoginManager, UserMixin, confirm_login, current_user, login_fresh, login_required
from flask_socketio import SocketIO, SocketIOTestClient
from flask_wtf import FlaskForm
from flask_wtf.csrf import CSRFProtect
from wtforms import StringField

from shmstore import ConfigError, Store, StoreUnavailable
from shmstore.system.throttle import Throttle

# Flask-Login 0.6.3 asks for the time in a way that Python 3.12 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning")


class User(UserMixin):  # type: ignore[misc]
    def __init__(self, name: str) -> None:
        self.id = name


@pytest.fixture
def app(store: Store) -> Flask:
    app = make_app(store, SECRET_KEY="for the remember me cookie and the CSRF tokens")
    LoginManager(app).user_loader(User)
    return app


def log_in(name: str = "ada", **options: Any) -> Callable[[], None]:
    def view() -> None:
        assert flask_login.login_user(User(name), **options)

    return view


def log_out() -> None:
    flask_login.logout_user()


def who() -> dict[str, Any]:
    """A view that returns the user, and whether the login is fresh."""
    return {"user": current_user.get_id(), "fresh": login_fresh()}


ADA, TOMBSTONE_TTL, NOBODY = ({"user": "ada", "fresh": True}, {"user": "ada", "fresh": False}, None)


def seen(client: FlaskClient) -> dict[str, Any] | None:
    answer: dict[str, Any] = visit(client, who).json or {}
    return answer if answer["user"] else NOBODY


def restart_browser(client: FlaskClient) -> None:
    client.delete_cookie("session")


# -- Flask-Login: login and logout ----------------------------------------------------------------------------


def test_a_login_and_a_logout_change_the_id_and_the_owner(store: Store, client: FlaskClient) -> None:
    visit(client, put(cart=[1]))
    ids = [sid_of(client)]
    visit(client, log_in())
    ids.append(sid_of(client))
    assert seen(client) == ADA
    assert store.owned_by("ada") == [sid_of(client)]
    visit(client, log_out)
    ids.append(sid_of(client))
    assert seen(client) is NOBODY
    assert store.owned_by("ada") == []
    assert len(set(ids)) == 3
    assert store.ids() == ids[2:]
    assert visit(client, look).json == {"cart": "[1]", "_fresh": "False"}  # the latter is Flask-Login's


def test_a_logout_that_leaves_no_data_ends_the_session(store: Store, client: FlaskClient) -> None:
    visit(client, log_in())
    assert cookies(visit(client, log_out))[0].startswith("session=;")
    assert len(store) == 0


def test_a_session_fixed_before_the_login_is_worthless_after_it(client: FlaskClient) -> None:
    attacker = client.application.test_client()
    visit(attacker, put(planted=1))
    client.set_cookie("session", sid_of(attacker))
    visit(client, log_in())
    assert seen(client) == ADA
    assert seen(attacker) is NOBODY


def test_a_request_under_way_during_the_logout_does_not_log_in_again(store: Store, client: FlaskClient) -> None:
    visit(client, log_in())
    other = twin(client)

    def slow() -> str:
        name = current_user.get_id()
        meanwhile(lambda: visit(other, log_out))
        session["seen"] = name
        return str(name)

    response = visit(client, slow)
    assert (response.text, cookies(response)) == ("ada", [])
    assert len(store) == 0


def test_a_protected_view_is_refused_without_a_login(client: FlaskClient) -> None:
    secret = login_required(lambda: "secret")
    assert visit(client, secret).status_code == 401
    visit(client, log_in())
    assert visit(client, secret).text == "secret"


# -- Flask-Login: remember me ---------------------------------------------------------------------------------


def test_a_remembered_user_is_logged_in_again_without_a_fresh_login(store: Store, client: FlaskClient) -> None:
    visit(client, log_in(remember=True))
    first = sid_of(client)
    assert seen(client) == ADA
    restart_browser(client)
    assert seen(client) == TOMBSTONE_TTL
    assert store.owned_by("ada") == [sid_of(client), first]
    refuses = flask_login.fresh_login_required(lambda: "secret")
    assert visit(client, refuses).status_code == 401
    visit(client, confirm_login)
    assert seen(client) == ADA
    assert visit(client, refuses).text == "secret"


def test_a_remembered_user_survives_the_end_of_the_session(store: Store, clock: Clock, client: FlaskClient) -> None:
    visit(client, log_in(remember=True))
    expired = sid_of(client)
    clock.tick(2 * HOUR)
    assert seen(client) == TOMBSTONE_TTL
    assert sid_of(client) != expired
    assert store.owned_by("ada") == [sid_of(client)]


def test_a_logout_forgets_a_remembered_user(store: Store, client: FlaskClient) -> None:
    visit(client, log_in(remember=True))
    visit(client, log_out)
    assert client.get_cookie("remember_token") is None
    restart_browser(client)
    assert seen(client) is NOBODY
    assert len(store) == 0


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("end", ["destroy", "regenerate", "clear", "rotate", "save", "lock"])
@pytest.mark.parametrize("order", ["after", "before"])
def test_a_logout_forgets_a_remembered_user_however_the_session_ends(
    store: Store, client: FlaskClient, order: str, end: str, keeps: bool
) -> None:
    """Flask-Login removes its cookie at the end of the request, when it finds a mark of the logout in the session."""

    def view() -> None:
        steps = [flask_login.logout_user, lambda: end_of_session(end)]
        for step in steps if order == "after" else reversed(steps):
            step()
        assert not session or end in ("rotate", "save", "lock")
        if keeps:
            flash("good bye")

    visit(client, log_in(remember=True))
    sent = cookies(visit(client, view))
    assert client.get_cookie("remember_token") is None
    assert sum(each.startswith("session=") for each in sent) == 1
    assert seen(client) is NOBODY
    assert len(store) == keeps


def end_of_session(how: str) -> None:
    if how == "lock":
        with session.lock():
            pass
    else:
        getattr(session, how)()


def test_the_mark_of_a_logout_starts_no_session(store: Store, client: FlaskClient) -> None:
    """The mark is still there when the session is saved before the end of the request, or without its hook."""
    client.application.after_request_funcs.clear()
    visit(client, log_in())
    client.set_cookie("remember_token", "ada|whatever")
    for _ in range(2):
        visit(client, log_out)
        assert (len(store), client.get_cookie("session")) == (0, None)
    visit(client, lambda: session.update(_remember="set"))  # this key is not the mark
    assert len(store) == 1


def test_a_login_after_a_logout_is_remembered_only_if_it_asks_for_that(client: FlaskClient) -> None:
    def view(first: bool, remember: bool) -> Callable[[], None]:
        def act() -> None:
            flask_login.login_user(User("eve"), remember=True) if first else flask_login.logout_user()
            session.regenerate()
            flask_login.login_user(User("bob"), remember=remember)

        return act

    for first, remember in ((True, False), (False, False), (True, True), (False, True)):
        visit(client, log_in(remember=True))
        visit(client, view(first, remember))
        restart_browser(client)
        token = client.get_cookie("remember_token")
        remembered = token and token.value.partition("|")[0]
        assert remembered == ("bob" if remember else "ada" if first else None)  # with `first` no user has logged out


def test_the_cookie_of_flask_security_too_is_removed(store: Store, client: FlaskClient) -> None:
    """Flask-Security marks a logout in the same way, with its own key, and removes its cookie with the CSRF token."""

    def view() -> dict[str, str]:
        session["fs_cc"] = "clear"
        session.destroy()
        return look()

    visit(client, put(fs_cc="sent"))
    assert visit(client, view).json == {"fs_cc": "clear"}
    assert len(store) == 0


def log_out_and_clear() -> None:
    log_out()
    session.clear()


def log_out_and_destroy() -> None:
    log_out()
    session.destroy()


@pytest.mark.parametrize("remember", [False, True])
@pytest.mark.parametrize("headers", [{}, {"Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "document"}])
@pytest.mark.parametrize("ends", [log_out, log_out_and_clear, log_out_and_destroy])
def test_a_logout_is_not_undone_by_a_request_that_was_sent_before_it(
    store: Store, client: FlaskClient, remember: bool, headers: dict[str, str], ends: Callable[[], None]
) -> None:
    """The request still carries the earlier cookies: the session cookie and the remember cookie."""
    visit(client, log_in(remember=remember))
    late = twin(client)
    if token := client.get_cookie("remember_token"):
        late.set_cookie("remember_token", token.value)
    visit(client, ends, **headers)
    assert cookies(visit(late, who, **headers)) == []
    assert len(store) == 0


def test_a_remembered_user_gets_a_session_if_the_answer_with_a_new_id_was_lost(
    store: Store, clock: Clock, client: FlaskClient
) -> None:
    """As anyone who loads a page after one second; only a logout makes the user wait longer."""
    visit(client, log_in(remember=True))
    lost = twin(client)
    lost.set_cookie("remember_token", client.get_cookie("remember_token").value)  # type: ignore[union-attr]
    visit(client, lambda: session.rotate())  # noqa: PLW0108
    clock.tick(1.5)
    visit(lost, who, Sec_Fetch_Mode="navigate", Sec_Fetch_Dest="document")
    assert sid_of(lost) in store.owned_by("ada")


def test_a_remembered_user_keeps_a_session_that_its_own_request_has_begun_anew(
    store: Store, client: FlaskClient
) -> None:
    visit(client, log_in(remember=True))
    client.delete_cookie("session")
    visit(client, who)  # logged in again, by the remember cookie

    def begin_anew() -> None:
        kept = session.copy()
        session.regenerate()
        session.update(kept)

    visit(client, begin_anew)
    assert sid_of(client) in store.owned_by("ada")


# -- Flask-Login: session protection --------------------------------------------------------------------------


def with_agent(client: FlaskClient, agent: str) -> FlaskClient:
    other = twin(client)
    other.environ_base["HTTP_USER_AGENT"] = agent
    return other


def test_basic_protection_makes_a_stolen_session_stale(store: Store, client: FlaskClient) -> None:
    visit(client, log_in())
    thief = with_agent(client, "thief")
    assert seen(thief) == TOMBSTONE_TTL
    assert seen(client) == TOMBSTONE_TTL
    assert store.owned_by("ada") == [sid_of(client)]


def test_strong_protection_ends_a_stolen_session(store: Store, client: FlaskClient) -> None:
    client.application.config["SESSION_PROTECTION"] = "strong"
    visit(client, log_in())
    assert seen(client) == ADA
    thief = with_agent(client, "thief")
    assert seen(thief) is NOBODY
    assert store.owned_by("ada") == []
    assert seen(client) is NOBODY


def test_strong_protection_removes_the_owner_and_keeps_the_cart(store: Store, client: FlaskClient) -> None:
    client.application.config["SESSION_PROTECTION"] = "strong"
    visit(client, log_in())
    visit(client, put(cart=[1]))
    stolen = sid_of(client)
    thief = with_agent(client, "thief")
    assert seen(thief) is NOBODY
    assert store.ids() == [sid_of(thief)] != [stolen]
    assert store.owned_by("ada") == []


# -- Flask-Login: all devices of a user -----------------------------------------------------------------------


def others() -> str:
    return str(session.destroy_others())


@pytest.mark.parametrize("prefix", ["", "shop:"])
def test_other_devices_can_be_logged_out(store: Store, app: Flask, client: FlaskClient, prefix: str) -> None:
    app.config["SESSION_KEY_PREFIX"] = prefix
    phone, tablet, bob = (app.test_client() for _ in range(3))
    for device in (client, phone, tablet):
        visit(device, log_in())
    visit(bob, log_in("bob"))
    assert store.owned_by("ada") == [prefix + sid_of(each) for each in (tablet, phone, client)]

    assert visit(client, others).text == "2"
    assert [seen(each) for each in (client, phone, tablet)] == [ADA, NOBODY, NOBODY]
    assert seen(bob) == {"user": "bob", "fresh": True}
    assert visit(client, others).text == "0"
    visit(phone, log_in())
    assert seen(phone) == ADA


@pytest.mark.parametrize("prefix", ["", "shop:"])
@pytest.mark.parametrize("when", ["a rotation is due", "a rotation was put off", "in the login", "after its save"])
def test_destroy_others_keeps_the_current_session(store: Store, app: Flask, prefix: str, when: str) -> None:
    app.config["SESSION_KEY_PREFIX"] = prefix
    client, phone = app.test_client(), app.test_client()
    visit(phone, log_in())
    visit(client, log_in() if "rotation" in when else put(cart=1))

    def view() -> str:
        if when == "a rotation is due":
            session.rotate()
        elif when != "a rotation was put off":
            log_in()()
        if when == "after its save":
            session.save()
        return others()

    if when == "a rotation was put off":
        in_a_stream(app, client, lambda: session.rotate())  # noqa: PLW0108
    assert visit(client, view).text == "1"
    assert seen(client) == ADA
    assert visit(client, others).text == "0"
    assert seen(client) == ADA
    assert seen(phone) is NOBODY
    assert store.owned_by("ada") == [prefix + sid_of(client)]


def test_destroy_others_after_a_login_that_is_not_stored(app: Flask) -> None:
    client, phone = app.test_client(), app.test_client()
    visit(phone, log_in())
    visit(client, put(cart=1))

    def view() -> str:
        log_in()()
        ended = others()
        session.pop("_user_id")
        return ended

    assert in_a_stream(app, client, view) == "0"
    assert seen(phone) == ADA


def in_a_stream(app: Flask, client: FlaskClient, action: Callable[[], Any]) -> Any:
    """Run an action in a request of a client after its response was sent."""
    results: list[Any] = []

    def parts() -> Iterator[str]:
        results.append(action())
        assert session.save()
        yield ""

    assert visit(client, lambda: app.response_class(stream_with_context(parts()))).status_code == 200
    return results[0]


def test_destroy_others_of_a_destroyed_session_does_nothing(store: Store, app: Flask, client: FlaskClient) -> None:
    phone = app.test_client()
    for device in (client, phone):
        visit(device, log_in())

    def slow() -> str:
        assert current_user.get_id() == "ada"
        meanwhile(lambda: visit(phone, others))
        return others()

    assert visit(client, slow).text == "0"
    assert seen(phone) == ADA
    assert seen(client) is NOBODY


def test_destroy_others_without_an_owner_does_nothing_and_is_logged(
    client: FlaskClient, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shmstore.session._ownerless", Throttle())
    visit(client, put(cart=1))
    assert visit(client, others).text == "0"
    assert "ended nothing: 1; OWNER_KEY finds no user in the session" in caplog.text


def test_destroy_others_without_an_owner_key_is_an_error(store: Store) -> None:
    client = make_app(store, SESSION_OWNER_KEY=None).test_client()
    with pytest.raises(ConfigError, match="OWNER_KEY is None"):
        visit(client, others)


def test_destroy_others_during_an_outage_is_an_error(store: Store, app: Flask, client: FlaskClient) -> None:
    app.config["SESSION_ON_ERROR"] = "anonymous"
    visit(client, log_in())

    def view() -> str:
        assert session["_user_id"] == "ada"
        store.close()
        with pytest.raises(StoreUnavailable):
            session.destroy_others()
        return ""

    assert visit(client, view).status_code == 200


def test_the_least_recently_used_device_of_a_user_is_logged_out_beyond_the_limit(clock: Clock) -> None:
    disposed = []
    with Store(
        memory=2**20, clock=clock, check_period=None, recency=0, max_per_owner=2,
        dispose=lambda sid, session, reason: disposed.append((sid, session["_user_id"], reason)),
    ) as store:  # fmt: skip
        app = make_app(store, SECRET_KEY="x")
        LoginManager(app).user_loader(User)
        first, second, third, bob = (app.test_client() for _ in range(4))
        for client, name in ((bob, "bob"), (first, "ada"), (second, "ada")):
            visit(client, log_in(name))
        assert seen(first) == ADA
        visit(third, log_in())
        assert disposed == [(sid_of(second), "ada", "evict")]
        assert [seen(each) for each in (first, second, third)] == [ADA, NOBODY, ADA]
        assert seen(bob) == {"user": "bob", "fresh": True}


# -- Flask-WTF ------------------------------------------------------------------------------------------------


class Form(FlaskForm):  # type: ignore[misc]
    name = StringField()


class Tab:
    """A page with a form in one tab of a browser."""

    def __init__(self, client: FlaskClient, headers: dict[str, str] = {}) -> None:  # noqa: B006
        self.client, self.headers = client, headers

    def load(self) -> Tab:
        self.token = re.findall(r'value="([^"]+)"', self.client.get("/form", headers=self.headers).text)[0]
        return self

    def send(self, name: str) -> int:
        data = {"csrf_token": self.token, "name": name}
        return self.client.post("/form", data=data, headers=self.headers).status_code


@pytest.fixture
def browser(app: Flask) -> FlaskClient:
    CSRFProtect(app)

    @app.route("/form", methods=["GET", "POST"])
    def form() -> str:
        form = Form()
        if request.method == "POST":
            session.setdefault("names", []).append(form.name.data)
        return str(form.csrf_token())

    return app.test_client()


def test_forms_in_parallel_tabs_can_all_be_sent(store: Store, browser: FlaskClient) -> None:
    tabs = [Tab(browser).load() for _ in range(3)]
    assert [tab.send(name) for tab, name in zip(tabs, "abc", strict=True)] == [200, 200, 200]
    assert visit(browser, lambda: session["names"]).json == ["a", "b", "c"]
    assert len(store) == 1


@pytest.mark.parametrize("change", [log_in(), lambda: session.rotate()])  # noqa: PLW0108 - a proxy has no such method
def test_a_form_can_be_sent_after_the_id_has_changed_in_another_tab(
    store: Store, browser: FlaskClient, change: Callable[[], None]
) -> None:
    tab = Tab(browser).load()
    before = sid_of(browser)
    visit(browser, change)
    assert sid_of(browser) != before
    assert tab.send("a") == 200
    assert len(store) == 1


def test_a_form_loaded_before_the_logout_is_refused_after_it(store: Store, browser: FlaskClient) -> None:
    visit(browser, log_in())
    tab = Tab(browser).load()
    visit(browser, lambda: session.clear())  # noqa: PLW0108
    assert tab.send("a") == 400
    assert Tab(browser).load().send("a") == 200
    assert len(store) == 1


LOST: dict[str, Callable[[], Any]] = {
    "login": log_in(),
    "logout": lambda: session.clear(),  # noqa: PLW0108 - a proxy has no such method
    "regenerate": lambda: session.regenerate(),  # noqa: PLW0108
}


@pytest.mark.parametrize("what", LOST)
@pytest.mark.parametrize(("headers", "seconds"), [({}, 4.1), ({"Sec-Fetch-Mode": "navigate"}, 1.1)])
def test_after_a_lost_answer_or_a_double_click_a_form_works_again_within_five_seconds(
    store: Store, clock: Clock, browser: FlaskClient, what: str, headers: dict[str, str], seconds: float
) -> None:
    """The browser never gets the answer, or cancels it, so it continues with the old cookie."""
    visit(browser, put(cart=[1]))
    visit(twin(browser), LOST[what])
    clock.tick(seconds)
    assert Tab(browser, headers).load().send("a") == 200
    visit(browser, put(cart=[2]))
    assert visit(browser, lambda: session["cart"]).json == [2]


def test_after_a_double_click_on_log_out_the_login_form_can_be_sent(clock: Clock, browser: FlaskClient) -> None:
    """The second click cancels the answer to the first, and the redirect that it gets shows the form at once."""
    navigates = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}

    @browser.application.get("/logout")
    def logout() -> Any:
        session.clear()
        return redirect("/form")

    visit(browser, log_in())
    twin(browser).get("/logout", headers=navigates)
    clock.tick(0.2)
    assert browser.get("/logout", headers=navigates).location == "/form"
    form = Tab(browser, navigates).load()
    clock.tick(15)
    assert form.send("a") == 200


@pytest.mark.parametrize("how", ["destroy", "destroy_owned", "rename"])
def test_a_form_works_at_once_when_the_session_was_ended_from_elsewhere(
    store: Store, browser: FlaskClient, how: str
) -> None:
    visit(browser, log_in())
    for _ in range(2):
        arguments = {"destroy": [sid_of(browser)], "destroy_owned": ["ada"], "rename": [sid_of(browser), "other"]}
        getattr(store, how)(*arguments[how])
        assert Tab(browser).load().send("a") == 200
        visit(browser, log_in())
        assert seen(browser) == ADA


def test_the_last_cookie_of_parallel_first_requests_counts(app: Flask, browser: FlaskClient) -> None:
    """As with any session: each request starts one, and the browser keeps the last cookie."""
    other = app.test_client()
    lost = Tab(browser).load()
    kept = Tab(other).load()
    browser.set_cookie("session", sid_of(other))
    assert lost.send("a") == 400
    kept.client = browser
    assert kept.send("a") == 200
    assert lost.load().send("b") == 200


def test_sending_a_form_without_its_token_is_refused(browser: FlaskClient) -> None:
    Tab(browser).load()
    assert browser.post("/form", data={"name": "a"}).status_code == 400


# -- Flask-SocketIO -------------------------------------------------------------------------------------------

Connect = Callable[[FlaskClient], SocketIOTestClient]


@pytest.fixture(params=[False, True], ids=["shared", "managed"])
def managed(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def connect(app: Flask, managed: bool) -> Iterator[Connect]:
    socketio = SocketIO(app, manage_session=managed, async_mode="threading")
    socketio.on_event("do", lambda name: EVENTS[name]())
    sockets: list[SocketIOTestClient] = []

    def connect(client: FlaskClient) -> SocketIOTestClient:
        sockets.append(socketio.test_client(app, flask_test_client=client))
        assert sockets[-1].is_connected()
        return sockets[-1]

    yield connect
    for socket in sockets:
        socket.disconnect()


EVENTS: dict[str, Callable[[], Any]] = {
    "look": look,
    "put": put(b=2),
    "append": lambda: session["cart"].append(2),
    "log in": log_in(),
    "log out": log_out,
    "who": who,
    "clear": lambda: session.clear(),  # noqa: PLW0108
    "rotate": lambda: session.rotate(),  # noqa: PLW0108
    "unstorable": lambda: session.update(wrong=object()),
}


def do(socket: SocketIOTestClient, event: str) -> Any:
    return socket.emit("do", event, callback=True)


def test_an_event_reads_what_the_page_has_stored(client: FlaskClient, connect: Connect) -> None:
    visit(client, put(cart=[1]))
    assert do(connect(client), "look") == {"cart": "[1]"}


def test_an_event_writes_into_the_shared_session(client: FlaskClient, connect: Connect, managed: bool) -> None:
    visit(client, put(cart=[1]))
    socket = connect(client)
    do(socket, "put")
    do(socket, "append")
    visit(client, put(a=1))
    ours = {"cart": "[1, 2]", "b": "2"}
    # A session of its own is a copy, made at its first event, that stays with the socket.
    assert do(socket, "look") == (ours if managed else {**ours, "a": "1"})
    assert visit(client, look).json == {**({"cart": "[1]"} if managed else ours), "a": "1"}


def test_an_event_overlaps_with_a_request(client: FlaskClient, connect: Connect, managed: bool) -> None:
    visit(client, put(cart=[1]))
    socket = connect(client)

    def slow() -> None:
        session["a"] = 1
        meanwhile(lambda: do(socket, "put"))

    visit(client, slow)
    assert visit(client, look).json == {"cart": "[1]", "a": "1", **({} if managed else {"b": "2"})}


@pytest.mark.parametrize("event", [name for name in EVENTS if name not in ("rotate", "unstorable")])
@pytest.mark.parametrize("known", [False, True])
def test_no_event_fails(client: FlaskClient, connect: Connect, event: str, known: bool) -> None:
    visit(client, put(cart=[1]))
    socket = connect(client if known else client.application.test_client())
    if event == "append" and not known:
        return
    for name in (event, "look", event if event != "append" else "put", "who"):
        do(socket, name)
    assert socket.is_connected()


def test_a_login_in_an_event_is_not_stored(store: Store, client: FlaskClient, connect: Connect, managed: bool) -> None:
    visit(client, put(cart=[1]))
    socket = connect(client)
    do(socket, "log in")
    assert store.all() == {sid_of(client): {"cart": [1]}}
    assert do(socket, "who") == (ADA if managed else {"user": None, "fresh": False})
    assert seen(client) is NOBODY


def test_a_logout_in_an_event_holds_for_the_page(store: Store, client: FlaskClient, connect: Connect) -> None:
    visit(client, put(cart=[1]))
    visit(client, log_in())
    socket = connect(client)
    do(socket, "log out")
    assert do(socket, "who")["user"] is None


@pytest.mark.parametrize("managed", [False], indirect=True)
def test_an_event_can_end_the_session(store: Store, client: FlaskClient, connect: Connect) -> None:
    visit(client, log_in())
    socket = connect(client)
    do(socket, "clear")
    assert len(store) == 0
    assert seen(client) is NOBODY
    visit(client, log_in())
    assert seen(client) == ADA


@pytest.mark.parametrize("managed", [False], indirect=True)
def test_a_logout_on_the_page_holds_for_the_socket(store: Store, client: FlaskClient, connect: Connect) -> None:
    visit(client, log_in())
    socket = connect(client)
    visit(client, log_out)
    assert do(socket, "who")["user"] is None
    do(socket, "put")
    assert len(store) == 0
