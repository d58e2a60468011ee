"""An admin page for the sessions of a store: a blueprint that exists only where an application registers it."""

from shmstore.flask.admin.blueprint import admin_blueprint

__all__ = ["admin_blueprint"]
