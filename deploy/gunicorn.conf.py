"""Gunicorn configuration for the demo. Copy it: your application needs only the lines about `hooks`.

gunicorn -c deploy/gunicorn.conf.py --chdir examples/demo app:app
"""

import os

import shmstore.gunicorn

bind = f"{os.environ.get('HOST', '127.0.0.1')}:{os.environ.get('PORT', '8000')}"
workers = 4
preload_app = True  # import the application once, in the master: workers start faster and share its memory

# Log lines of the application and its libraries in the format of Gunicorn's own lines. Without this, Python prints
# their warnings without time and level.
logconfig_dict = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {
        "line": {
            "format": "[%(asctime)s] [%(process)d] [%(levelname)s] %(name)s: %(message)s",
            "datefmt": "%Y-%m-%d %H:%M:%S %z",
        }
    },
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
    "root": {"level": "WARNING", "handlers": ["stderr"]},
    "loggers": {"shmstore": {"level": "DEBUG" if "shmstore" in os.environ.get("DEBUG", "") else "INFO"}},
}

# One store for all workers, in /dev/shm/shmstore-<uid>/demo. Its options are in docs/reference/options.md; functions
# can be defined here. Sessions survive restarts of Gunicorn; persist=False removes them with the last worker.
hooks = shmstore.gunicorn.Hooks("demo", max=100_000, check_period=60)
on_starting = hooks.on_starting  # start the store's server, or attach to a running one
on_reload = hooks.on_reload  # HUP: options changed in this file take effect
on_exit = hooks.on_exit  # let the server exit at once, unless other processes use it
