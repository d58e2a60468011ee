"""A session is a dict: code gets the same as from Flask's own session, even if it is the first to read it."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from browsing import look, make_app, put, session, sid_of, visit
from flask import Flask, jsonify, render_template_string
from flask.sessions import SecureCookieSession
from flask.testing import FlaskClient

from shmstore import Store
from shmstore.flask.session import StoreSession
from shmstore.policy import Policy
from shmstore.system.lazy_dict import LazyDict

DATA: dict[str, Any] = {"a": 1, "b": [1, {"c": None}], "d": "text"}


def keywords(**values: Any) -> dict[str, Any]:
    return values


def matched(value: Any) -> Any:
    match value:
        case {"a": 1, **rest}:
            return rest
        case _:
            return None


def changed(action: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    """Return a function that uses a session and returns the result and the session's content afterwards."""
    return lambda current: (action(current), dict(current))


def ior(current: dict[str, Any]) -> None:
    current |= {"z": 1}


def delete(current: dict[str, Any]) -> None:
    del current["a"]


USES: dict[str, Callable[[Any], Any]] = {
    "isinstance": lambda s: isinstance(s, dict),
    "json": json.dumps,
    "json, indented": lambda s: json.dumps(s, indent=1),
    "json, inside something": lambda s: json.dumps([s]),
    "dict": dict,
    "list": list,
    "sorted": sorted,
    "reversed": lambda s: [*reversed(s)],
    "len": len,
    "bool": bool,
    "in": lambda s: ("a" in s, "x" in s),
    "keys": lambda s: [*s.keys()],
    "values": lambda s: [*s.values()],
    "items": lambda s: [*s.items()],
    "item": lambda s: s["a"],
    "get": lambda s: (s.get("a"), s.get("x"), s.get("x", 7)),
    "unpacked": lambda s: {**s},
    "keywords": lambda s: keywords(**s),
    "or": lambda s: s | {"x": 1},
    "or, on the right": lambda s: {"x": 1} | s,
    "equal": lambda s: (s == DATA, s == {}),
    "equal, on the right": lambda s: (DATA == s, {} == s),  # noqa: SIM300
    "not equal": lambda s: (s != DATA, s != {}),
    "copy": lambda s: s.copy(),
    "copy.copy": lambda s: dict(copy.copy(s)),
    "copy.deepcopy": lambda s: dict(copy.deepcopy(s)),
    "%": lambda s: "%(a)s" % s,  # noqa: UP031
    "format_map": "{a}".format_map,
    "update of another": lambda s: [current := {"x": 1}, current.update(s)],
    "a pattern": matched,
    "set": changed(lambda s: s.__setitem__("x", 1)),
    "del": changed(delete),
    "pop": changed(lambda s: s.pop("a")),
    "pop of what is missing": changed(lambda s: s.pop("x", 1)),
    "popitem": changed(lambda s: s.popitem()),
    "setdefault": changed(lambda s: (s.setdefault("a", 5), s.setdefault("x", 5))),
    "update": changed(lambda s: s.update({"x": 1}, y=2)),
    "|=": changed(ior),
    "clear": changed(lambda s: s.clear()),
}


@pytest.fixture
def stored(store: Store) -> str:
    sid = "s" * 43
    store.set(sid, DATA)
    return sid


@pytest.mark.parametrize("use", USES)
def test_the_first_use_has_the_same_result_as_with_flasks_own_session(store: Store, stored: str, use: str) -> None:
    expected = USES[use](SecureCookieSession(copy.deepcopy(DATA)))
    current = StoreSession(lambda: store, stored, Policy(ttl=60))
    gets = store.stats().gets
    assert USES[use](current) == expected
    assert store.stats().gets == gets + (use != "isinstance")
    assert current.accessed == (use != "isinstance")
    assert USES[use](StoreSession(lambda: store, stored, Policy(ttl=60))) == expected
    current.get("a")  # read by now: the same again, from a dict
    fresh = StoreSession(lambda: store, stored, Policy(ttl=60))
    assert fresh.get("d") == "text"
    assert USES[use](fresh) == expected


def test_a_session_is_pickled_as_a_dict(store: Store, stored: str) -> None:
    current = StoreSession(lambda: store, stored, Policy(ttl=60))
    assert pickle.loads(pickle.dumps(current)) == DATA
    assert type(pickle.loads(pickle.dumps(current))) is dict


@pytest.mark.parametrize(
    "answer",
    [
        lambda: jsonify(session._get_current_object()),  # type: ignore[attr-defined]
        lambda: session._get_current_object(),  # type: ignore[attr-defined]  # noqa: PLW0108
        lambda: {"session": session._get_current_object()},  # type: ignore[attr-defined]
        lambda: jsonify(dict(session)),
        lambda: jsonify({**session}),
        lambda: render_template_string("{{ session.a }} {{ session['b'] }} {{ session.nothing }}"),
        lambda: render_template_string("{% for key, value in session | dictsort %}{{ key }}={{ value }};{% endfor %}"),
    ],
)
def test_a_view_may_return_the_session(store: Store, stored: str, answer: Callable[[], Any]) -> None:
    own, answers = Flask(__name__), list[tuple[int, str]]()
    own.secret_key = "x"
    for app in (own, make_app(store)):
        app.add_url_rule("/answer", "answer", answer)
        client = app.test_client()
        if app is own:
            with client.session_transaction() as opened:
                opened.update(DATA)
        else:
            client.set_cookie("session", stored)
        response = client.get("/answer")
        answers.append((response.status_code, response.text))
    assert answers[0] == answers[1]
    assert answers[0][0] == 200


def test_repr_does_not_read(store: Store) -> None:
    class Mine(LazyDict):
        def _read(self) -> dict[str, Any]:
            return {"a": 1}

    mine = Mine()
    assert repr(mine) == "<Mine not read yet>"
    assert mine["a"] == 1
    assert repr(mine) == "<Mine {'a': 1}>"


def test_an_error_of_reading_propagates_and_the_next_access_reads_again() -> None:
    class Failing(LazyDict):
        attempts = 0

        def _read(self) -> dict[str, Any]:
            self.attempts += 1
            if self.attempts == 1:
                raise OSError("once")
            return {"a": 1}

    failing = Failing()
    with pytest.raises(OSError, match="once"):
        len(failing)
    assert json.dumps(failing) == '{"a": 1}'
    assert failing.attempts == 2


def test_a_subclass_may_override_methods() -> None:
    class Counting(LazyDict):
        looks = 0

        def _read(self) -> dict[str, Any]:
            return {"a": 1}

        def __getitem__(self, key: str) -> Any:
            self.looks += 1
            return super().__getitem__(key)

    class More(Counting):
        pass

    for kind in (Counting, More):
        counting = kind()
        assert (counting["a"], counting["a"], counting.looks) == (1, 1, 2)
        assert type(counting) is kind


def test_a_method_that_is_replaced_on_the_class_is_called_by_the_first_access() -> None:
    class Mine(LazyDict):
        def _read(self) -> dict[str, Any]:
            return {"a": 1}

    def double(self: Mine, key: str) -> Any:
        return 2 * dict.__getitem__(self, key)

    mine = Mine()
    setattr(Mine, "__getitem__", double)  # noqa: B010 # as a profiler or a test does
    assert (mine["a"], mine["a"], Mine()["a"]) == (2, 2, 2)


@pytest.mark.parametrize("size", [1, 1000])
def test_a_change_of_only_the_type_of_a_value_is_saved(store: Store, client: FlaskClient, size: int) -> None:
    visit(client, put(value=["x"] * size))

    def view() -> None:
        session["value"] = tuple(session["value"])

    visit(client, view)
    assert store.get(sid_of(client)) == {"value": ("x",) * size}
    assert visit(client, look).status_code == 200


def test_c_code_of_another_thread_never_sees_an_empty_session() -> None:
    sizes = []

    class Content(dict[str, Any]):
        def __iter__(self) -> Any:  # makes `dict.update` call `keys`, which runs while the content is being set
            raise NotImplementedError

        def keys(self) -> Any:
            sizes.append(dict.__len__(mine))
            return super().keys()

    class Mine(LazyDict):
        def _read(self) -> dict[str, Any]:
            return Content(a=1)

    mine = Mine()
    assert (mine["a"], mine) == (1, {"a": 1})
    assert sizes
    assert 0 not in sizes
