"""The views of the example: a visit counter, logout on all devices, and Django's own admin site to log in."""

from __future__ import annotations

import os

from django.contrib import admin
from django.contrib.auth.decorators import login_required
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import redirect
from django.urls import path
from django.views.decorators.http import require_POST

from shmstore.django import store


def index(request: HttpRequest) -> HttpResponse:
    """Count the visits of a visitor; whichever worker answers, the count continues."""
    visits = request.session["visits"] = request.session.get("visits", 0) + 1
    return JsonResponse({"visits": visits, "user": request.user.get_username(), "pid": os.getpid()})


def logout_everywhere(request: HttpRequest) -> HttpResponse:
    """Log the user out on all devices: the owner of a session is the user's primary key."""
    store().destroy_owned(str(request.user.pk))
    return redirect("index")


urlpatterns = [
    path("", index, name="index"),
    path("logout-everywhere/", require_POST(login_required(logout_everywhere))),
    path("admin/", admin.site.urls),
]
