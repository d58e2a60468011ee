"""The contract: after any error the stored sessions are unchanged."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from decimal import Decimal
from functools import partial
from typing import Any

import pytest

from shmstore.contract import Capability
from shmstore.errors import RecordTooLarge, SerializationError
from shmstore.testing.base import Base, Make, can, needs
from shmstore.testing.sessions import IMPOSSIBLE_IDS

Errors = type[Exception] | tuple[type[Exception], ...]


def writes(store: Any) -> dict[str, Callable[..., object]]:
    """Return the methods that write, called with a session, and with ``ttl`` and ``owner`` where they take them."""
    return {
        "set": partial(store.set, "a"),
        "set a new one": partial(store.set, "new"),
        "add": partial(store.add, "new"),
        "replace": partial(store.replace, "a"),
        "update": partial(store.update, "a"),
        "rename": partial(store.rename, "a", "new"),
        "touch": lambda session, **options: store.touch("a", {"cookie": session}, **options),
    }


def refuse(store: Any, errors: Errors, match: str, calls: Mapping[str, Callable[[], object]]) -> None:
    """Make calls that must fail, and check that they change nothing."""

    def state() -> Any:
        stats = asdict(store.stats()) | {"server_uptime": 0, "refused": 0}
        if not can(store, Capability.SHARED_FIGURES):
            stats |= {"bytes": 0, "expired": 0, "evicted": 0}  # figures of an engine that serves other stores too
        return store.ids(), store.all(), store.owned_by("ada"), stats

    if not store.length():
        store.set("a", {"x": 1}, owner="ada", ttl=60)
        store.set("b", {"x": 2}, ttl=60)
    before = state()
    for name, call in calls.items():
        print(name)  # shown if it does not fail as expected
        with pytest.raises(errors, match=match):
            call()
        assert state() == before


def refuse_to_write(
    store: Any, errors: Errors, match: str, session: Any, but: tuple[str, ...] = (), **options: Any
) -> None:
    """Do the same with all methods that write except those in ``but``, and with this session."""
    calls = {name: partial(write, session, **options) for name, write in writes(store).items() if name not in but}
    refuse(store, errors, match, calls)


class ErrorContract(Base):
    """Each error, in each method that can raise it."""

    def test_a_value_that_cannot_be_stored(self, store: Any) -> None:
        class Plain:
            pass

        looped: list[Any] = []
        looped.append(looped)
        for value in (object(), Plain(), len, (n for n in "a"), 1j, {1: Plain()}):
            refuse_to_write(store, SerializationError, "cart", {"cart": [1, value]})
        refuse(store, SerializationError, "cart", {"set": partial(store.set, "a", {"cart": looped})})
        refuse_to_write(store, SerializationError, r"cart\[1\]\.price.*object", {"cart": [1, {"price": object()}]})

    def test_a_value_that_the_serializer_refuses(self, make: Make) -> None:
        class Fussy:
            def dumps(self, value: Any) -> bytes:
                if "bad" in str(value):
                    raise ZeroDivisionError("fussy")
                return str(value).encode()

            def loads(self, data: bytes) -> Any:
                return data.decode()

        store = make(serializer=Fussy())
        match = "(cart|cookie): .*Fussy cannot serialize .*fussy"
        refuse_to_write(store, SerializationError, match, {"good": 1, "cart": "bad"})

    def test_a_session_that_is_too_large(self, make: Make) -> None:
        store = make(max_session=1000)
        for size in (1001, 10**6):
            refuse_to_write(store, RecordTooLarge, "max_session", {"y": "y" * size})

    def test_a_session_that_is_not_a_mapping(self, store: Any) -> None:
        for session in (None, 1, "text", ["list"], b"", [("x", 1)], {"x"}):
            refuse_to_write(store, TypeError, "mapping", session, but=("touch",))
            if session is not None:
                refuse(store, TypeError, "mapping", {"touch": partial(store.touch, "a", session)})

    def test_a_ttl_that_is_not_a_duration(self, store: Any) -> None:
        for ttl in ("60", b"60", True, False, math.nan, [60], Decimal(60), 1j, object()):
            error = ValueError if isinstance(ttl, float) else TypeError
            refuse_to_write(store, error, "ttl", {"x": 3}, ttl=ttl)
            refuse(store, error, "ttl", {"touch without a session": partial(store.touch, "a", ttl=ttl)})

    def test_a_ttl_function_that_raises_or_returns_an_invalid_duration(self, make: Make) -> None:
        def life(options: Any, session: Any, sid: str) -> Any:
            result = session.get("cookie", session).get("life", 60)
            return {"nan": math.nan}.get(result, result) if result != "raise" else 1 // 0

        store = make(ttl=life)
        for result in (None, "60", True, "nan", (60,), "raise"):
            store.set("b", {"life": result}, ttl=60)
            store.set("a", {}, ttl=60)
            errors = ZeroDivisionError if result == "raise" else (TypeError, ValueError)
            match = "zero" if result == "raise" else "the result of ttl"
            refuse_to_write(
                store, errors, match, {"life": result}, but=("update", "rename")
            )  # they do not call the function
            refuse(store, errors, match, {"touch without a session": partial(store.touch, "b")})

    def test_an_invalid_owner(self, store: Any) -> None:
        for owner in (7, b"ada", ["ada"], True, ""):
            error = ValueError if isinstance(owner, str) else TypeError
            refuse_to_write(store, error, "owner must", {"x": 3}, but=("touch",), owner=owner)

    def test_an_invalid_id(self, store: Any) -> None:
        for sid in IMPOSSIBLE_IDS:
            calls = {
                "set": partial(store.set, sid, {}),
                "add": partial(store.add, sid, {}),
                "replace": partial(store.replace, sid, {}),
                "update": partial(store.update, sid, {}),
                "rename from": partial(store.rename, sid, "new"),
                "rename to": partial(store.rename, "a", sid),
                "rename missing": partial(store.rename, "missing", sid),
            }
            refuse(store, ValueError if isinstance(sid, str) else TypeError, "id must", calls)

    @needs(Capability.MAKES_ROOM)
    def test_a_length_function_that_raises_or_returns_an_invalid_weight(self, make: Make) -> None:
        def length(size: int, sid: str) -> Any:
            return (1, None, -1, 1.5, "1", True, 2**32, 8)[size // 100] if size < 800 else 1 // 0

        store = make(max=10, length=length)
        for hundreds in range(1, 7):
            session = {"y": "y" * (100 * hundreds + 40)}
            refuse_to_write(store, ValueError, "length must return a whole number", session)
        refuse_to_write(store, ZeroDivisionError, "zero", {"y": "y" * 840})
