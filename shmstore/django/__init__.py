"""
Sessions of Django in a store (extra ``django``).

In the settings::

    SESSION_ENGINE = "shmstore.django"
    SHMSTORE = {"STORE": "shm://shop"}
    INSTALLED_APPS = [..., "shmstore.django"]  # optional: `manage.py check` checks SHMSTORE

Keys of ``SHMSTORE``:

- ``STORE``: a store, or its URL: ``shm://name``, ``shm:///path``, or a URL of `RedisStore.from_url`. A URL's store is
  opened, and its server started if necessary, when a session is first accessed: once in each process.
- ``KEY_PREFIX`` (""): the prefix of ids in the store, if applications share it; it should end in a colon.
- ``OWNER_KEY`` ("_auth_user_id"): the key of the user's id; several keys; or a function of the session.
- The options for opening a URL's store, such as ``max``, in lower or upper case.
"""

from shmstore.django.session_store import SessionStore, store

__all__ = ["SessionStore", "store"]
