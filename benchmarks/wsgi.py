"""What Gunicorn and uWSGI load; the environment says which kind of sessions, and where these are."""

import os

from benchmarks.applications import make_app

app = make_app(os.environ["BENCH_KIND"], os.environ["BENCH_PLACE"])
