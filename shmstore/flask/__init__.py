"""Sessions in a store, for Flask."""

from shmstore.flask.extension import Sessions
from shmstore.flask.interface import StoreSessionInterface
from shmstore.flask.migration import FlaskSession

__all__ = ["FlaskSession", "Sessions", "StoreSessionInterface"]
