"""The module that Gunicorn and uWSGI load; the environment names the kind of sessions and the address."""

import os

from benchmarks.applications import make_app

app = make_app(os.environ["BENCH_KIND"], os.environ["BENCH_PLACE"])
