"""Sessions of Django in a store, through Django's own middleware."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from browsing import Clock
from django.apps import apps
from django.conf import settings
from django.contrib.auth import get_user_model, login, logout, update_session_auth_hash
from django.contrib.sessions.backends.base import UpdateError
from django.contrib.sessions.exceptions import SessionInterrupted
from django.core.management import CommandError, call_command
from django.middleware.csrf import get_token
from django.test import AsyncClient, override_settings
from django_project import Browser, actions
from msgspec import Raw
from msgspec.msgpack import Ext, decode, encode
from redis_servers import RedisServer

from shmstore import ConfigError, RedisStore, SerializationError, Store
from shmstore.django import SessionStore
from shmstore.django import store as configured_store
from shmstore.policy import STALE_AFTER

DAY = 24 * 3600


@pytest.fixture(scope="session")
def database() -> None:
    call_command("migrate", verbosity=0)


@pytest.fixture
def ada(database: None) -> Iterator[Any]:
    user = get_user_model().objects.create_user("ada", password="secret")
    yield user
    user.delete()


@pytest.fixture(autouse=True)
def sessions(store: Store) -> Iterator[None]:
    """Let Django keep the sessions in this test's store."""
    with override_settings(SHMSTORE={"STORE": store}):
        yield


@pytest.fixture
def browser() -> Browser:
    return Browser()


def log_in(user: Any) -> Any:
    return lambda request: login(request, user)


def is_user(request: Any) -> bool:
    return bool(request.user.is_authenticated)


# -- one session -------------------------------------------------------------------------------------------------------


def test_values_come_back_as_they_were_put_in(store: Store, browser: Browser) -> None:
    """Django's own serializer, JSON, refuses some of these and changes others."""
    values = {"tuple": (1, 2), "set": {3}, "bytes": b"\0", "when": timedelta(1), "numbers": {1: "one"}}
    browser.put(**values)
    assert store.all() == {browser.key: values}
    assert browser.do(lambda request: request.session["numbers"][1]) == "one"


def test_a_value_that_cannot_be_stored_is_named_and_changes_nothing(store: Store, browser: Browser) -> None:
    browser.put(a=1)
    with pytest.raises(SerializationError, match=r"cart\[0\]"):
        browser.put(a=2, cart=[object()])
    assert store.get(browser.key) == {"a": 1}


def test_a_request_that_does_not_use_its_session_reads_nothing(store: Store, browser: Browser) -> None:
    browser.put(a=1)
    gets = store.stats().gets
    response = browser.visit(lambda request: None)
    assert (store.stats().gets, response.cookies, response.has_header("Vary")) == (gets, {}, False)


def test_a_key_fits_into_the_columns_that_django_and_its_extensions_have_for_it(browser: Browser) -> None:
    column = apps.get_model("sessions", "Session")._meta.get_field("session_key")
    browser.put(a=1)
    assert len(browser.key) == column.max_length == 40


@pytest.mark.parametrize("key", ["inventedbyaclient", "no:such:key", "é" * 40, "x" * 300])
def test_a_key_that_a_client_invents_is_never_used(store: Store, key: str) -> None:
    browser = Browser(key)
    assert browser.look() == {}
    browser.client.cookies["sessionid"] = key
    browser.put(a=1)
    assert store.ids() == [browser.key]
    assert browser.key != key
    Browser(key).visit(lambda request: [request.session.clear(), request.session.update({"a": 1})], 400)


def test_applications_that_share_a_store_are_kept_apart(store: Store, browser: Browser) -> None:
    with override_settings(SHMSTORE={"STORE": store, "KEY_PREFIX": "shop:"}):
        browser.put(a=1)
        assert store.ids() == [f"shop:{browser.key}"]
        assert browser.look() == {"a": 1}
    assert browser.twin().look() == {}
    assert Browser(f"shop:{browser.key}").look() == {}


def test_a_value_that_cannot_be_read_stays_stored(store: Store, browser: Browser) -> None:
    browser.put(b=2)
    store.update(browser.key, {"a": Raw(encode(Ext(10, b"no UUID")))})
    assert browser.look() == {"b": 2}
    browser.put(c=3)
    loaded = store.load(browser.key)
    assert loaded
    assert store.codec.fields(loaded.payload).keys() == {"a", "b", "c"}
    browser.put(a=4)
    assert store.get(browser.key) == {"a": 4, "b": 2, "c": 3}


class Legacy:
    """A serializer that still reads what it does not write any more: an integer."""

    def dumps(self, value: Any) -> bytes:
        if isinstance(value, int):
            raise TypeError("no integers")
        return encode(value)

    def loads(self, data: bytes) -> Any:
        return decode(data)


def test_a_value_that_is_only_read_keeps_its_bytes() -> None:
    with Store(memory=2**20, serializer=Legacy()) as store, override_settings(SHMSTORE={"STORE": store}):
        browser = Browser()
        browser.put(a="x")
        store.update(browser.key, {"n": Raw(encode(encode(1)))})
        browser.put(b="y")
        assert browser.look() == {"a": "x", "n": 1, "b": "y"}


class Sealed:
    """A serializer with a key. It reads nothing that was written with another key."""

    key = b"1"

    def dumps(self, value: Any) -> bytes:
        return self.key + encode(value)

    def loads(self, data: bytes) -> Any:
        if not data.startswith(self.key):
            raise ValueError("another key")
        return decode(data[1:])


@pytest.fixture
def sealed() -> Iterator[Store]:
    """A store whose values cannot be read while `Sealed.key` is not what it was."""
    with (
        pytest.MonkeyPatch.context() as patch,
        Store(memory=2**20, serializer=Sealed()) as store,
        override_settings(SHMSTORE={"STORE": store}),
    ):
        patch.setattr(Sealed, "key", b"1")
        yield store


def test_a_session_keeps_its_owner_while_the_owner_cannot_be_read(sealed: Store, browser: Browser, ada: Any) -> None:
    browser.visit(log_in(ada))
    Sealed.key = b"2"
    assert not browser.do(is_user)
    browser.put(a=1)
    browser.visit(lambda request: request.session.cycle_key())
    assert sealed.owned_by(str(ada.pk)) == [browser.key]
    Sealed.key = b"1"
    assert browser.do(is_user)


def test_values_that_cannot_be_read_do_not_become_another_user_s(sealed: Store, browser: Browser, ada: Any) -> None:
    browser.visit(log_in(ada))
    browser.put(address="12 High Street")
    Sealed.key = b"2"
    bob = get_user_model().objects.create_user("bob")
    browser.visit(log_in(bob))
    assert (sealed.owned_by(str(ada.pk)), sealed.owned_by(str(bob.pk))) == ([], [browser.key])
    loaded = sealed.load(browser.key)
    assert loaded
    assert "address" not in sealed.codec.fields(loaded.payload)
    bob.delete()


# -- requests that overlap ---------------------------------------------------------------------------------------------


def test_overlapping_requests_keep_each_others_keys(store: Store, browser: Browser) -> None:
    browser.put(old=0, both=0)

    def slow(request: Any) -> None:
        request.session.update({"one": 1, "both": 1})
        del request.session["old"]
        browser.twin().put(two=2, both=2)

    browser.visit(slow)
    assert store.get(browser.key) == {"both": 1, "one": 1, "two": 2}


def test_only_what_has_changed_is_written(store: Store, browser: Browser) -> None:
    browser.put(a=1)
    before = store.stats()
    browser.put(a=1)
    after = store.stats()
    assert (after.sets, after.touches) == (before.sets, before.touches + 1)


def test_several_saves_of_one_request_write_what_each_has_changed(store: Store, browser: Browser) -> None:
    def view(request: Any) -> None:
        for number in range(3):
            request.session[f"k{number}"] = number
            request.session.save()
            browser_key = request.session.session_key
            store.update(browser_key, {"other": number}, ["k0"])

    browser.visit(view)
    assert store.get(browser.key) == {"k1": 1, "k2": 2, "other": 2}


def test_clear_also_removes_what_others_have_set(store: Store, browser: Browser) -> None:
    browser.put(a=1)

    def clear(request: Any) -> None:
        assert request.session["a"] == 1
        browser.twin().put(b=2)
        request.session.clear()
        request.session["c"] = 3

    browser.visit(clear)
    assert store.get(browser.key) == {"c": 3}


def test_a_slow_request_does_not_undo_a_logout(store: Store, browser: Browser, ada: Any) -> None:
    browser.visit(log_in(ada))

    def slow(request: Any) -> None:
        request.session["a"] = 1
        browser.twin().visit(logout)

    response = browser.visit(slow, 400)
    assert "sessionid" not in response.cookies
    assert len(store) == 0


# -- login and logout --------------------------------------------------------------------------------------------------


def test_a_login_changes_the_key_and_keeps_the_data(store: Store, browser: Browser, ada: Any) -> None:
    browser.put(cart=["book"])
    before = browser.key

    def slow(request: Any) -> None:
        assert request.session["cart"] == ["book"]
        browser.twin().put(seen=1)
        login(request, ada)

    browser.visit(slow)
    assert store.owned_by(str(ada.pk)) == store.ids() == [browser.key] != [before]
    session = store.get(browser.key)
    assert session
    assert (session["cart"], session["seen"]) == (["book"], 1)


def test_a_user_is_logged_out_everywhere(store: Store, browser: Browser, ada: Any) -> None:
    phone = Browser()
    browser.visit(log_in(ada))
    phone.visit(log_in(ada))
    assert [each.do(is_user) for each in (browser, phone)] == [True, True]
    assert configured_store().destroy_owned(str(ada.pk)) == 2
    assert [each.do(is_user) for each in (browser, phone)] == [False, False]
    assert (browser.key, phone.key) == ("", ""), "the cookies are deleted"


def test_a_logout_ends_the_session_and_its_cookie(store: Store, browser: Browser, ada: Any) -> None:
    browser.visit(log_in(ada))
    browser.visit(logout)
    assert (len(store), browser.key, browser.look()) == (0, "", {})


def test_a_password_change_keeps_the_user_logged_in(store: Store, browser: Browser, ada: Any) -> None:
    browser.visit(log_in(ada))
    before = browser.key
    ada.set_password("other")
    ada.save()

    def change(request: Any) -> None:
        login(request, ada)
        update_session_auth_hash(request, ada)

    browser.visit(change)
    assert browser.do(is_user)
    assert store.ids() == store.owned_by(str(ada.pk)) == [browser.key] != [before]


@pytest.mark.parametrize("owner_key", ["_auth_user_id", None])
def test_a_session_that_was_logged_out_does_not_return_with_another_key(
    store: Store, browser: Browser, ada: Any, owner_key: str | None
) -> None:
    with override_settings(SHMSTORE={"STORE": store, "OWNER_KEY": owner_key}):
        browser.visit(log_in(ada))
        session = SessionStore(browser.key)
        assert session["_auth_user_id"] == str(ada.pk)
        browser.visit(logout)
        with pytest.raises(SessionInterrupted):
            session.cycle_key()
    assert len(store) == 0


def test_a_visitor_whose_session_is_gone_can_log_in(store: Store, browser: Browser, ada: Any) -> None:
    browser.put(cart=[1])

    def slow(request: Any) -> None:
        assert request.session["cart"]
        store.destroy(browser.key)
        login(request, ada)

    browser.visit(slow)
    assert store.owned_by(str(ada.pk)) == [browser.key]


def test_a_login_holds_although_requests_with_the_old_key_come_late(
    store: Store, clock: Clock, browser: Browser, ada: Any
) -> None:
    browser.put(cart=[1])
    late = browser.twin(), browser.twin(), browser.twin()
    browser.visit(log_in(ada))
    assert late[0].visit(lambda request: request.session.get("cart")).cookies == {}, "the cookie is not deleted"
    assert late[1].visit(lambda request: request.session.update({"a": 1}), 400).cookies == {}
    assert store.ids() == [browser.key]
    # The answer to the login was lost: a login with the old key works at once, anything else soon.
    late[0].visit(log_in(ada))
    assert late[0].do(is_user)
    clock.tick(STALE_AFTER + 1)
    late[2].put(a=1)
    assert late[2].look() == {"a": 1}


def test_a_late_request_does_not_delete_the_cookie_of_another_user_s_login(
    store: Store, clock: Clock, browser: Browser, ada: Any
) -> None:
    """A login over the session of another user deletes that session."""
    bob = get_user_model().objects.create_user("bob")
    browser.visit(log_in(ada))
    late = browser.twin(), browser.twin()
    browser.visit(log_in(bob))
    assert late[0].visit(lambda request: request.session.get("cart")).cookies == {}
    assert late[0].visit(lambda request: request.session.update({"a": 1}), 400).cookies == {}, "nor replace it"
    assert store.owned_by(str(bob.pk)) == store.ids() == [browser.key]
    clock.tick(STALE_AFTER + 1)
    assert late[1].visit(lambda request: request.session.get("cart")).cookies["sessionid"].value == ""
    bob.delete()


def test_a_second_click_on_logout_is_answered_as_the_first(store: Store, browser: Browser, ada: Any) -> None:
    browser.visit(log_in(ada))
    again = browser.twin()

    def log_out(request: Any) -> None:
        logout(request)
        request.session["message"] = "Good bye."

    browser.visit(log_out)
    again.visit(log_out)
    assert store.all() == {key: {"message": "Good bye."} for key in (browser.key, again.key)}
    again.visit(logout)
    assert again.key == ""
    again.put(token="x")
    again.visit(log_in(ada))
    assert again.do(is_user)


def test_a_late_request_does_not_replace_the_cookie_of_a_login_after_a_logout(
    store: Store, clock: Clock, browser: Browser, ada: Any
) -> None:
    browser.visit(log_in(ada))
    late = browser.twin()
    browser.visit(logout)
    browser.visit(log_in(ada))
    assert late.visit(lambda request: request.session.update({"a": 1}), 400).cookies == {}
    assert store.ids() == [browser.key]
    clock.tick(STALE_AFTER + 1)
    late.put(a=1)
    assert late.look() == {"a": 1}


@pytest.mark.parametrize("token_in_session", [False, True])
@pytest.mark.parametrize("is_lost", [False, True])
def test_after_a_double_click_on_logout_the_login_form_works(
    store: Store, clock: Clock, browser: Browser, ada: Any, token_in_session: bool, is_lost: bool
) -> None:
    csrf = "django.middleware.csrf.CsrfViewMiddleware"
    with override_settings(CSRF_USE_SESSIONS=token_in_session, MIDDLEWARE=[*settings.MIDDLEWARE, csrf]):
        browser.visit(log_in(ada))
        key = browser.key
        again = browser.twin()
        browser.visit(logout)
        again.visit(logout)
        again.client.handler.enforce_csrf_checks = True
        if is_lost:  # neither answer has reached the browser
            again.client.cookies["sessionid"] = key
            if token_in_session:  # the form sets a cookie, and may come after a login
                again.visit(get_token, 400)
                clock.tick(STALE_AFTER + 1)
        token = again.do(get_token)
        sent = {"test.action": log_in(ada), "HTTP_X_CSRFTOKEN": token}
        assert again.client.post("/", **sent).status_code == 200
        assert again.do(is_user)
        assert store.owned_by(str(ada.pk)) == [again.key]


def test_a_logout_that_meets_a_change_of_the_key_does_not_seem_to_succeed(
    store: Store, browser: Browser, ada: Any
) -> None:
    browser.visit(log_in(ada))
    other = browser.twin()

    def slow(request: Any) -> None:
        assert request.user.is_authenticated
        other.visit(lambda request: request.session.cycle_key())
        logout(request)

    assert browser.visit(slow, 400).cookies == {}
    assert store.ids() == [other.key]
    other.visit(logout)
    assert len(store) == 0


def test_a_key_that_changes_beside_a_login_does_not_replace_it(store: Store, browser: Browser, ada: Any) -> None:
    browser.put(cart=[1])
    other = browser.twin()

    def slow(request: Any) -> None:
        assert request.session["cart"] == [1]
        other.visit(log_in(ada))
        request.session.cycle_key()

    assert browser.visit(slow, 400).cookies == {}
    assert other.do(is_user)


@pytest.mark.parametrize("owner_key", ["_auth_user_id", None])
def test_two_logins_at_once_both_succeed(store: Store, browser: Browser, ada: Any, owner_key: str | None) -> None:
    def slow(request: Any) -> None:
        assert request.session["cart"] == [1]
        other.visit(log_in(ada))
        login(request, ada)

    with override_settings(SHMSTORE={"STORE": store, "OWNER_KEY": owner_key}):
        browser.put(cart=[1])
        other, late = browser.twin(), browser.twin()
        browser.visit(slow)
        assert [each.do(is_user) for each in (browser, other)] == [True, True]
        assert [each.look()["cart"] for each in (browser, other)] == [[1], [1]]
        late.visit(log_in(ada))
        assert late.do(is_user)


def test_with_save_every_request_a_late_request_does_not_replace_the_cookie(browser: Browser, ada: Any) -> None:
    browser.put(cart=[1])
    late = browser.twin()
    browser.visit(log_in(ada))
    with override_settings(SESSION_SAVE_EVERY_REQUEST=True):
        assert late.visit(lambda request: request.session.get("cart"), 400).cookies == {}
        browser.visit(logout)
        assert browser.look() == {}
    assert browser.key == ""


# -- lives -------------------------------------------------------------------------------------------------------------


def remaining(store: Store, browser: Browser) -> float:
    loaded = store.load(browser.key)
    assert loaded
    return loaded.remaining


def test_a_session_lives_as_long_as_django_says(store: Store, clock: Clock, browser: Browser) -> None:
    with override_settings(SESSION_COOKIE_AGE=100):
        browser.put(a=1)
        assert remaining(store, browser) == pytest.approx(100)
        browser.visit(lambda request: request.session.set_expiry(50))
        assert remaining(store, browser) == pytest.approx(50)
        browser.visit(lambda request: request.session.set_expiry(0))
        assert remaining(store, browser) == pytest.approx(100)
        assert browser.client.cookies["sessionid"]["max-age"] == "", "the cookie ends with the browser"
        browser.visit(lambda request: request.session.set_expiry(timedelta(hours=1)))
        assert remaining(store, browser) == pytest.approx(3600, abs=2)
        clock.tick(3602)
        assert browser.look() == {}


def test_a_life_is_renewed_by_each_save(store: Store, clock: Clock, browser: Browser) -> None:
    browser.put(a=1)
    clock.tick(60)
    browser.look()
    assert remaining(store, browser) == pytest.approx(14 * DAY - 60)
    with override_settings(SESSION_SAVE_EVERY_REQUEST=True):
        browser.visit(lambda request: None)
    assert remaining(store, browser) == pytest.approx(14 * DAY)
    assert store.get(browser.key) == {"a": 1}


def test_clearsessions_removes_what_has_expired(store: Store, clock: Clock, browser: Browser) -> None:
    browser.put(a=1)
    store.set("old", {}, ttl=1)
    clock.tick(2)
    assert store.length() == 2
    call_command("clearsessions")
    assert store.ids() == [browser.key]


# -- asynchronous views ------------------------------------------------------------------------------------------------


async def use(store: Store | RedisStore) -> set[int]:
    """Use a session in every way that is asynchronous; return the threads in which the store has answered."""
    threads = set()
    load = store.load

    def noting(sid: str) -> Any:
        loaded = load(sid)
        threads.add(threading.get_ident())
        return loaded

    session = SessionStore()
    await session.aset("a", 1)
    await session.asave()
    other = SessionStore(session.session_key)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "load", noting)
        assert await other.aget("a") == 1
    await session.aset("b", 2)
    await session.asave()
    await other.aset("c", 3)
    await other.asave()
    before = session.session_key
    await session.acycle_key()
    assert not await session.aexists(before)
    assert await session.aexists(session.session_key)
    assert store.get(session.session_key) == {"a": 1, "b": 2, "c": 3}
    await other.aset("c", 4)
    with pytest.raises(UpdateError):
        await other.asave()
    await session.aflush()
    assert len(store) == 0
    await SessionStore.aclear_expired()
    return threads


def test_a_store_in_memory_is_called_in_the_event_loop(store: Store) -> None:
    configured_store()
    assert asyncio.run(use(store)) == {threading.get_ident()}


def test_a_store_on_the_network_is_called_in_a_thread(redis_server: RedisServer) -> None:
    store = RedisStore.from_url(f"{redis_server.url}?prefix=django-async-")
    with store, override_settings(SHMSTORE={"STORE": store}):
        configured_store()
        threads = asyncio.run(use(store))
    assert threads
    assert threading.get_ident() not in threads


async def save(session: SessionStore) -> None:
    await session.aset("b", 2)
    await session.asave()


async def save_new(session: SessionStore) -> None:
    new = SessionStore()
    await save(new)
    assert new.session_key
    await session.adelete()


async def cycle_key_after_clear(session: SessionStore) -> None:
    session.clear()
    await session.acycle_key()


@pytest.mark.parametrize(
    ("call", "left"),
    [
        (save, {"a": 1, "b": 2}), (save_new, {"b": 2}), (SessionStore.acycle_key, {"a": 1}),
        (cycle_key_after_clear, {}), (SessionStore.aflush, None), (SessionStore.adelete, None),
        (SessionStore.acreate, {"a": 1}),
    ],
)  # fmt: skip
def test_no_call_stops_the_event_loop_while_the_lock_of_the_store_is_held(call: Any, left: Any) -> None:
    held, free = threading.Event(), threading.Event()

    def hold(store: Store) -> None:
        store.arena.lock(1)
        held.set()
        free.wait(60)
        store.arena.unlock()

    async def main(session: SessionStore) -> None:
        await session.aget("a")
        task = asyncio.ensure_future(call(session))
        for _ in range(10):
            await asyncio.sleep(0.002)
        assert not free.is_set()
        assert not task.done()
        free.set()
        await task

    with Store(memory=2**20, lock_timeout=100) as store, override_settings(SHMSTORE={"STORE": store}):
        session = SessionStore()
        session["a"] = 1
        session.save()
        key = session.session_key
        holder = threading.Thread(target=hold, args=[store])
        holder.start()
        held.wait(60)
        asyncio.run(main(SessionStore(key)))
        holder.join()
        if call is SessionStore.acreate:
            assert store.get(key) == left
        else:
            assert list(store.all().values()) == ([] if left is None else [left])


def test_asynchronous_views(store: Store) -> None:
    async def visit(client: AsyncClient, action: Any, status: int = 200) -> Any:
        actions[action.__name__] = action
        response = await client.get(f"/async/{action.__name__}")
        assert response.status_code == status
        return response

    async def put(request: Any) -> None:
        await request.session.aset("a", 1)

    async def look(request: Any) -> Any:
        return dict(await request.session.aitems())

    async def cycle(request: Any) -> None:
        await request.session.acycle_key()

    async def flush(request: Any) -> None:
        await request.session.aflush()

    async def tabs() -> None:
        client, other = AsyncClient(), AsyncClient()
        await visit(client, put)
        old = client.cookies["sessionid"].value
        other.cookies["sessionid"] = old

        async def slow(request: Any) -> None:
            assert await request.session.aget("a") == 1
            await visit(other, cycle)
            await request.session.aflush()

        assert (await visit(client, slow, 400)).cookies == {}
        new = other.cookies["sessionid"].value
        assert store.all() == {new: {"a": 1}}
        assert new != old
        assert (await visit(other, look)).json() == {"answer": {"a": 1}}
        assert (await visit(other, flush)).cookies["sessionid"].value == ""
        assert len(store) == 0

    asyncio.run(tabs())


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "SHMSTORE must be a dict such as"),
        ("shm://shop", "SHMSTORE must be a dict such as"),
        ({}, "STORE must be 'shm://<name>'"),
        ({"STORE": "memcached://a"}, "is not a store URL"),
        ({"STORE": "shm://a b"}, "not a valid store name"),
        ({"STORE": "shm://shop", "MAX": 0}, "max must be"),
        ({"STORE": "shm://shop", "max": 1, "MAX": 2}, "in lower and in upper case"),
        ({"STORE": "shm://shop", "maxx": 1}, "did you mean 'max'"),
        ({"STORE": "shm://shop", "ttl": 60}, "ttl has no effect here: .*SESSION_COOKIE_AGE"),
        ({"STORE": "shm://shop", "KEY_PREFIX": 1}, "KEY_PREFIX must be"),
        ({"STORE": "shm://shop", "KEY_PREFIX": "shop"}, "KEY_PREFIX must be a text whose last character is"),
        ({"STORE": "shm://shop", 5: 1}, "SHMSTORE must be a dict such as"),
        ({"STORE": "redis://localhost", "maxx": 1}, "maxx"),
    ],
)
def test_wrong_settings_are_named_at_the_first_use_and_by_check(given: Any, message: str) -> None:
    with override_settings(SHMSTORE=given):
        with pytest.raises(ConfigError, match=message):
            SessionStore("somebodyskey").load()
        with pytest.raises(CommandError, match=message):
            call_command("check")


def test_check_says_nothing_where_another_engine_is_used() -> None:
    with override_settings(SHMSTORE=None, SESSION_ENGINE="django.contrib.sessions.backends.signed_cookies"):
        call_command("check")


def test_options_of_a_store_that_is_open_are_an_error(store: Store) -> None:
    with override_settings(SHMSTORE={"STORE": store, "max": 1}), pytest.raises(ConfigError, match="max: pass the"):
        configured_store()


def test_right_settings_pass_check_which_opens_no_store() -> None:
    with override_settings(SHMSTORE={"STORE": "shm:///nowhere/shop", "MAX": 10, "OWNER_KEY": ["a", "b"]}):
        call_command("check")


def test_an_option_of_the_store_without_effect_is_reported(browser: Browser, caplog: pytest.LogCaptureFixture) -> None:
    with Store(memory=2**20, ttl=5) as store, override_settings(SHMSTORE={"STORE": store}):
        browser.put(a=1)
        loaded = store.load(browser.key)
    assert loaded
    assert loaded.remaining > DAY
    [line] = caplog.messages
    assert "its option ttl has no effect here: sessions of Django live for SESSION_COOKIE_AGE" in line


def test_a_serializer_of_django_has_no_effect_and_is_reported(
    store: Store, browser: Browser, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        override_settings(SESSION_SERIALIZER="django.core.signing.JSONSerializer", SHMSTORE={"STORE": store}),
        caplog.at_level(logging.WARNING),
    ):
        browser.put(a=(1, 2))
    assert caplog.messages == ["SESSION_SERIALIZER has no effect here: use SHMSTORE = {'serializer': ...}"]
    assert store.get(browser.key) == {"a": (1, 2)}
