"""Sessions of Django under a real Gunicorn: logins, requests that overlap, workers that are killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path

import pytest
from gunicorns import StartGunicorn
from overlap import Browser
from processes import alive, wait_for
from sampling import sample

from shmstore import connect
from shmstore.contract import AnyStore

APP = """
import fcntl, os, time
from pathlib import Path

import django
from django.conf import settings

settings.configure(
    SESSION_ENGINE="shmstore.django", SHMSTORE={"STORE": "shm://shop"}, SESSION_COOKIE_NAME="session",
    INSTALLED_APPS=["django.contrib.auth", "django.contrib.contenttypes"],
    MIDDLEWARE=[
        "django.contrib.sessions.middleware.SessionMiddleware",
        "django.contrib.auth.middleware.AuthenticationMiddleware",
    ],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "users.sqlite3"}},
    PASSWORD_HASHERS=["django.contrib.auth.hashers.MD5PasswordHasher"],
    ROOT_URLCONF="app", SECRET_KEY="for tests", ALLOWED_HOSTS=["*"],
)
django.setup()

from django.contrib.auth import authenticate, login, logout
from django.contrib.auth.models import User
from django.core.management import call_command
from django.core.wsgi import get_wsgi_application
from django.http import JsonResponse
from django.urls import path
from shmstore.django import store

def count(request):
    request.session["count"] = request.session.get("count", 0) + 1
    return {"count": request.session["count"], "pid": os.getpid()}

def put(request, key, value):
    request.session[key] = value

def add(request, key, value):
    request.session[key] = [*request.session.get(key, []), value]
    time.sleep(0.001)  # others come and go

def log_in(request):
    login(request, authenticate(request, username="ada", password="secret"))

def log_out(request):
    logout(request)

def everywhere(request):
    return {"ended": store().destroy_owned(str(request.user.pk))}

def user(request):
    return {"user": request.user.get_username()}

def slow(request, name, action):
    before = look(request)
    Path(f"{name} looked").touch()
    while not Path(f"{name} go").exists():
        time.sleep(0.002)
    globals()[action](request)
    return before

def late(request):
    request.session["late"] = True

def view(function):
    return lambda request, **arguments: JsonResponse(function(request, **arguments) or {})

def look(request):
    return dict(request.session.items())

urlpatterns = [
    path("put/<key>/<int:value>", view(put)), path("add/<key>/<int:value>", view(add)),
    path("slow/<name>/<action>", view(slow)),
    *(path(each.__name__, view(each)) for each in (look, count, log_in, log_out, everywhere, user)),
]

with open("migrating", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)  # one worker makes the database
    call_command("migrate", verbosity=0)
    if not User.objects.exists():
        User.objects.create_user("ada", password="secret")
from django.db import connections
connections.close_all()
if os.environ.get("OPEN_BEFORE_FORK"):
    store()

app = get_wsgi_application()
"""

CLIENTS, REQUESTS = 6, 12

KINDS = {
    "opened after the fork": (),
    "opened before the fork": ("--preload",),
    "threads": ("-k", "gthread", "--threads", "4"),
    "gevent": ("-k", "gevent"),
}


@pytest.fixture(params=sample(KINDS, 1, __name__))
def browser(gunicorn: StartGunicorn, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Browser:
    arguments = KINDS[request.param]
    if "--preload" in arguments:
        monkeypatch.setenv("OPEN_BEFORE_FORK", "1")
    return Browser(gunicorn(*arguments).booted())


@pytest.fixture
def store(browser: Browser) -> Iterator[AnyStore]:
    with connect("shop", directory=browser.gunicorn.store_dir) as store:
        yield store


def twin(browser: Browser) -> Browser:
    other = Browser(browser.gunicorn)
    other.cookie = browser.cookie
    return other


def test_every_worker_sees_every_login_and_every_logout(browser: Browser, store: AnyStore) -> None:
    phone = Browser(browser.gunicorn)
    browser.get("/put/cart/1")
    anonymous = browser.cookie
    for each in browser, phone:
        each.get("/log_in")
        assert [each.get("/user") for _ in range(8)] == [{"user": "ada"}] * 8
    assert browser.cookie != anonymous
    assert browser.get("/look")["cart"] == 1
    assert sorted(store.owned_by("1")) == sorted([browser.cookie, phone.cookie]) == sorted(store.ids())
    old = browser.cookie
    browser.get("/log_out")
    assert browser.cookie in ("", '""')
    browser.cookie = old
    assert [browser.get("/user") for _ in range(8)] == [{"user": ""}] * 8
    browser.get("/log_in")
    assert browser.get("/everywhere") == {"ended": 2}
    assert [each.get("/user") for each in (browser, phone)] == [{"user": ""}] * 2
    assert browser.gunicorn.complaints() == []


def test_overlapping_requests_keep_each_others_keys(browser: Browser) -> None:
    browser.get("/put/start/0")
    with browser.slow("one", "late") as slow:
        assert not slow.done(), slow.result()
        twin(browser).get("/put/other/1")
    assert slow.result().status == 200
    assert browser.get("/look") == {"start": 0, "other": 1, "late": True}
    tabs = [[f"/add/{tab}/{n}" for n in range(REQUESTS)] for tab in range(CLIENTS)]
    browser.tabs(tabs)
    found = browser.get("/look")
    assert {str(tab): found.get(str(tab)) for tab in range(CLIENTS)} == {
        str(tab): list(range(REQUESTS)) for tab in range(CLIENTS)
    }
    assert browser.gunicorn.complaints() == []


def test_a_slow_request_does_not_undo_a_logout(browser: Browser, store: AnyStore) -> None:
    browser.get("/log_in")
    with browser.slow("one", "late") as slow:
        assert not slow.done(), slow.result()
        twin(browser).get("/log_out")
    assert (slow.result().status, slow.result().cookies) == (400, [])
    assert len(store) == 0


def test_a_killed_worker_takes_no_session_along(browser: Browser, store: AnyStore) -> None:
    g = browser.gunicorn
    counts = 0

    def count() -> int:
        nonlocal counts
        counts += 1
        answer = browser.get("/count")
        assert answer["count"] == counts
        return int(answer["pid"])

    killed = {count()}
    with browser.slow("doomed", "late") as slow:
        for pid in g.hearing():
            killed.add(pid)
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda pid=pid: not alive(pid), "the end of a worker")  # type: ignore[misc]
        with pytest.raises((HTTPException, OSError)):
            slow.result(60)
    wait_for(lambda: len(g.hearing()) == 3, "the workers that replace them")
    for _ in range(8):
        assert count() not in killed
    assert store.get(browser.cookie) == {"count": counts}
    assert Path(g.files.arena).exists()
    assert g.server is not None
