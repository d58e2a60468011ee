"""Sessions in a store, for Flask."""

from shmstore.flask.extension import Sessions
from shmstore.flask.interface import StoreSessionInterface

__all__ = ["Sessions", "StoreSessionInterface"]
