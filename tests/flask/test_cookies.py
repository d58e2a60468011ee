"""The cookies of a request: which of them are session cookies, and what other sites can do about that."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest
from browsing import Clock, cookies, look, make_app, put, session, visit
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.serving import make_server
from werkzeug.test import TestResponse

from shmstore import Store
from shmstore.web.cookie import values

GOOD, OTHER, STALE = "g" * 43, "o" * 43, "s" * 43
HOST = "__Host-session"


# -- cookies of the session's name ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("", []),
        ("s=1", ["1"]),
        ("a=b; s=1; c=d", ["1"]),
        ("s=1; s=2; s=1", ["1", "2", "1"]),
        ("s=", [""]),
        ("s=a=b", ["a=b"]),
        ("s", []),
        ("s; s=1", ["1"]),  # the first one has no name
        # semicolons and white space as proxies and scripts write them
        ("a=b;s=1;c=d", ["1"]),
        ("\ts =\t1 ", ["1"]),
        ("; =;;s=1", ["1"]),
        # the name is all of the name
        ("xs=1; sx=1; x-s=1; s.x=1", []),
        ("a b s=1", []),
        ("a s=1; s=2", ["2"]),
        ("a=s=1", []),
        ("a=b s=1", []),
        ("S=1; s=2", ["2"]),
        ("=s=1", []),
        # quotes are part of the form of a value; they protect nothing, and nothing in them is decoded
        ('s="1"', ["1"]),
        ('s="1', ['"1']),
        ('s="', ['"']),
        ('s=""', [""]),
        ('s="\\061"', ["\\061"]),
        ('"s"=1', []),
        ('a="b; s=1; c"; s=2', ["1", "2"]),
        ('a="; s=1', ["1"]),
        ("s=%31", ["%31"]),
        # several headers that a server has joined with commas
        ("a=b,s=1", ["1"]),
        ("a=b, s=1; c=d", ["1"]),
        ("s=1,a=b", ["1"]),
        ("s=1, s=2", ["1", "2"]),
        ('s="1", a=b', ["1"]),
        ("a=b,s=1; s=2", ["2", "1"]),  # it may be part of the value of a: tried last
        ("a=b,c s=1", []),
    ],
)
def test_the_cookies_of_a_name(header: str, expected: list[str]) -> None:
    assert list(values(header, "s")) == expected


# Other characters that Python or an application server treats as white space, as a line end, or drops.
BLANKS = [chr(code) for code in range(256) if chr(code).isspace() and chr(code) not in " \t"] + ["\0", "\x08", "\xad"]


@pytest.mark.parametrize("blank", BLANKS, ids=ascii)
def test_no_other_character_is_white_space(blank: str) -> None:
    assert list(values(f"{blank}s=1; s{blank}=1; s=2", "s")) == ["2"]
    assert list(values(f"a=b{blank}; s=2", "s")) == ["2"]
    assert list(values(f"s={blank}1{blank}", "s")) == [f"{blank}1{blank}"]
    assert list(values(f"a=b{blank}s=1", "s")) == []


def test_a_non_ascii_name_is_found_as_flask_sends_it(store: Store) -> None:
    app = make_app(store, SESSION_COOKIE_NAME="schlüssel")
    client = app.test_client(use_cookies=False)
    [sent] = cookies(visit(client, put(a=1)))
    assert ask(client, sent.partition(";")[0]).json == {"a": "1"}


# -- which cookie is used -------------------------------------------------------------------------------------


def ask(client: FlaskClient, header: str, action: Callable[[], Any] = look) -> TestResponse:
    return client.get("/", environ_overrides={"HTTP_COOKIE": header, "test.action": action})


@pytest.fixture
def visitor(app: Flask, store: Store) -> FlaskClient:
    """Return a client that sends the cookies it is given. GOOD and OTHER are stored."""
    store.set(GOOD, {"is": "good"})
    store.set(OTHER, {"is": "other"})
    return app.test_client(use_cookies=False)


def test_the_first_cookie_with_a_stored_session_is_used(visitor: FlaskClient) -> None:
    signed = "eyJ1IjoxfQ.aQ.sI-nature"  # left in the browser by Flask's own session
    for order in ((GOOD,), (STALE, GOOD), (GOOD, STALE), (signed, STALE, "", GOOD, OTHER), (GOOD, OTHER)):
        answer = ask(visitor, "; ".join(f"session={sid}" for sid in order))
        assert answer.json == {"is": "good"}
        assert cookies(answer) == []


def test_a_stale_cookie_in_front_starts_no_sessions(visitor: FlaskClient, store: Store) -> None:
    """A change of SESSION_COOKIE_DOMAIN or PATH leaves such a cookie, and browsers replace only the other one."""
    for number in range(1, 4):
        answer = ask(visitor, f"session={STALE}; session={GOOD}", lambda: session.update(n=session.get("n", 0) + 1))
        assert cookies(answer) == []
        assert store.peek(GOOD) == {"is": "good", "n": number}
    assert len(store) == 2

    [deleted] = cookies(ask(visitor, f"session={STALE}; session={GOOD}", lambda: str(session.destroy())))
    assert deleted.startswith("session=;")
    assert store.ids() == [OTHER]


def test_an_expired_session_in_front_is_skipped(visitor: FlaskClient, store: Store) -> None:
    store.set(STALE, {"is": "stale"}, ttl=0)
    assert ask(visitor, f"session={STALE}; session={GOOD}").json == {"is": "good"}


def test_a_request_cannot_make_many_reads(visitor: FlaskClient, store: Store) -> None:
    gets = store.stats().gets
    many = "; ".join(f"session={number:043}" for number in range(500))
    assert ask(visitor, f"{many}; session={GOOD}").json == {}
    assert store.stats().gets - gets == 8
    # a repeated id and an invalid id cost no read
    gets = store.stats().gets
    assert ask(visitor, f"{f'session={STALE}; session=a.b; ' * 100}session={GOOD}").json == {"is": "good"}
    assert store.stats().gets - gets == 2


def test_a_request_is_stale_with_any_of_several_cookies(visitor: FlaskClient, store: Store, clock: Clock) -> None:
    ask(visitor, f"session={GOOD}", lambda: str(session.destroy()))
    late = f"session={STALE}; session={GOOD}"
    assert cookies(ask(visitor, late, put(a=1))) == []
    assert ask(visitor, f"{late}; session={OTHER}").json == {"is": "other"}
    clock.tick(3600)
    assert len(cookies(ask(visitor, late, put(a=1)))) == 1


@pytest.mark.parametrize(
    "header",
    [
        f"\xa0{HOST}={OTHER}; {HOST}={GOOD}",
        f"\x85{HOST}={OTHER}; {HOST}={GOOD}",
        f"{HOST}\xa0={OTHER}; {HOST}={GOOD}",
        f'\xa0{HOST}={OTHER}; {HOST}={GOOD}; x="',
        f'x="; \xa0{HOST}={OTHER}"; {HOST}={GOOD}',
        f"__host-session={OTHER}; {HOST}={GOOD}",
        f"x {HOST}={OTHER}; {HOST}={GOOD}",
        f"x={HOST}={OTHER}; {HOST}={GOOD}",
        f"x=1,{HOST}={OTHER}; {HOST}={GOOD}",
        f'x="1, {HOST}={OTHER}"; {HOST}={GOOD}',
        f"{HOST}={GOOD},{HOST}={OTHER}",
    ],
)
def test_another_cookie_is_not_taken_for_one_with_a_prefix(visitor: FlaskClient, header: str) -> None:
    """A page of another subdomain can set such a cookie, in front of the real cookie or without one."""
    visitor.application.config["SESSION_COOKIE_NAME"] = HOST
    assert ask(visitor, header).json == {"is": "good"}
    assert ask(visitor, header.replace(GOOD, "")).json == {}


def test_a_cookie_that_may_be_part_of_another_value_is_tried_last(visitor: FlaskClient) -> None:
    assert ask(visitor, f"language=en,session={OTHER}; session={GOOD}").json == {"is": "good"}


@pytest.mark.parametrize("headers", [(f"a=b; session={GOOD}", "c=d"), ("c=d", f"session={GOOD}; a=b")])
def test_two_cookie_headers_joined_by_the_server(store: Store, app: Flask, headers: tuple[str, str]) -> None:
    store.set(GOOD, {"is": "good"})

    @app.get("/put")
    def view() -> dict[str, Any]:
        session["n"] = 1
        return look()

    server = make_server("127.0.0.1", 0, app)
    serving = threading.Thread(target=server.handle_request)
    serving.start()
    try:
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as connection:
            lines = ["GET /put HTTP/1.0", "Host: shop.test", *(f"Cookie: {header}" for header in headers), "", ""]
            connection.sendall("\r\n".join(lines).encode())
            answer = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    finally:
        serving.join()
        server.server_close()
    assert '"is":"good"' in answer.replace(" ", "")
    assert "Set-Cookie" not in answer
    assert store.peek(GOOD) == {"is": "good", "n": 1}
