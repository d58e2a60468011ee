"""Settings and views for tests of the Django side; the module is the project's URL configuration, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import django
from django.conf import settings

PROJECT = {
    "SESSION_ENGINE": "shmstore.django",
    "SHMSTORE": {"STORE": "shm://shop"},  # each test has a store of its own
    "INSTALLED_APPS": [
        "django.contrib.auth", "django.contrib.contenttypes", "django.contrib.messages", "django.contrib.sessions",
        "shmstore.django",
    ],
    "MIDDLEWARE": [
        "django.contrib.sessions.middleware.SessionMiddleware",
        "django.contrib.auth.middleware.AuthenticationMiddleware",
        "django.contrib.messages.middleware.MessageMiddleware",
    ],
    "DATABASES": {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    "PASSWORD_HASHERS": ["django.contrib.auth.hashers.MD5PasswordHasher"],
    "ROOT_URLCONF": "django_project",
    "SECRET_KEY": "for tests",
    "USE_TZ": True,
}  # fmt: skip

if not settings.configured:
    settings.configure(**PROJECT)
    django.setup()

from django.http import HttpRequest, HttpResponse, JsonResponse  # noqa: E402
from django.test import Client  # noqa: E402
from django.urls import path  # noqa: E402

Action = Callable[[HttpRequest], Any]


def act(request: HttpRequest) -> HttpResponse:
    """Do what the test wants; what that returns is the answer."""
    return JsonResponse({"answer": request.META["test.action"](request)})


actions: dict[str, Action] = {}


async def aact(request: HttpRequest, name: str) -> HttpResponse:
    """Do one of `actions`, in the event loop."""
    return JsonResponse({"answer": await actions[name](request)})


urlpatterns = [path("", act), path("async/<name>", aact)]


class Browser:
    """
    A browser that keeps its cookies.

    Attributes:
        client: Django's test client.
    """

    def __init__(self, cookie: str = "") -> None:
        self.client = Client()
        if cookie:
            self.client.cookies["sessionid"] = cookie

    def visit(self, action: Action, status: int = 200) -> Any:
        """Make a request whose view is `action`; return the response."""
        response = self.client.get("/", **{"test.action": action})
        assert response.status_code == status, response.content
        return response

    def do(self, action: Action) -> Any:
        """Make a request whose view is `action`; return what that returns."""
        return self.visit(action).json()["answer"]

    def put(self, **values: Any) -> Any:
        return self.visit(lambda request: request.session.update(values))

    def look(self) -> Any:
        return self.do(lambda request: dict(request.session.items()))

    @property
    def key(self) -> str:
        """The key of its session."""
        cookie = self.client.cookies.get("sessionid")
        return cookie.value if cookie else ""

    def twin(self) -> Browser:
        """Return another tab, as far as the server can tell; cookies it gets stay its own."""
        return Browser(self.key)
