"""Gunicorn for the example: the server of the store starts with the master; its options stand here."""

import os

import shmstore.gunicorn

wsgi_app = "django.core.wsgi:get_wsgi_application()"
raw_env = ["DJANGO_SETTINGS_MODULE=mysite.settings"]
workers = 4

hooks = shmstore.gunicorn.Hooks(os.environ.get("SHOP_STORE", "shm://shop"), memory="64M", max=100_000)
on_starting = hooks.on_starting
on_reload = hooks.on_reload
on_exit = hooks.on_exit
