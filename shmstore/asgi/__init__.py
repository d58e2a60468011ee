"""Sessions in a store, for Starlette, FastAPI, Litestar, Quart and any other ASGI application."""

from shmstore.asgi.middleware import SessionMiddleware

__all__ = ["SessionMiddleware"]
