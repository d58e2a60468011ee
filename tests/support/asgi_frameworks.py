"""The same application in four frameworks, below paths with their names, for tests with real servers."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi import Request as FastAPIRequest
from fastapi import WebSocket as FastAPIWebSocket
from litestar import Litestar
from litestar import Request as LitestarRequest
from litestar import get as litestar_get
from litestar.middleware import DefineMiddleware
from quart import Quart, request, session
from quart.sessions import SessionInterface
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from shmstore.asgi import SessionMiddleware

OPTIONS: dict[str, Any] = {"store": os.environ["STORE"], "store_options": {"memory": 2**20}}


async def act(session: Any, query: Any) -> dict[str, Any]:
    """Do what the query says, and return what is in the session then."""
    before = dict(session)
    session.update({key: value for key, value in query.items() if key not in ("do", "place", "number")})
    match query.get("do"):
        case "log out":
            session.clear()
        case "count":
            async with session.lock(timeout=60):
                n = session.get("n", 0)
                await asyncio.sleep(0)
                session["n"] = n + 1
        case "meet":  # wait for the other requests that have read the session
            place = Path(query["place"])
            (place / query["own"]).touch()
            while len(list(place.iterdir())) < int(query["number"]):
                await asyncio.sleep(0.002)
            session[query["own"]] = True
    return {"pid": os.getpid(), "before": before, "session": dict(session)}


# -- Starlette ------------------------------------------------------------------------------------------------


async def starlette_view(request: Request) -> JSONResponse:
    return JSONResponse(await act(request.session, request.query_params))


async def starlette_socket(socket: WebSocket) -> None:
    await socket.accept()
    await socket.send_json(await act(socket.session, socket.query_params))
    await socket.receive()  # that the browser has closed it


starlette = Starlette(
    routes=[Route("/starlette", starlette_view), WebSocketRoute("/starlette", starlette_socket)],
    middleware=[Middleware(SessionMiddleware, **OPTIONS)],
)

# -- FastAPI --------------------------------------------------------------------------------------------------

fastapi = FastAPI()
fastapi.add_middleware(SessionMiddleware, **OPTIONS)


@fastapi.get("/fastapi")
def fastapi_view(request: FastAPIRequest) -> dict[str, Any]:
    """FastAPI calls this in a thread, because it is not a coroutine."""
    return asyncio.run(act(request.session, request.query_params))


@fastapi.websocket("/fastapi")
async def fastapi_socket(socket: FastAPIWebSocket) -> None:
    await socket.accept()
    await socket.send_json(await act(socket.session, socket.query_params))
    await socket.receive()  # that the browser has closed it


# -- Litestar -------------------------------------------------------------------------------------------------


@litestar_get("/litestar")
async def litestar_view(request: LitestarRequest[Any, Any, Any]) -> dict[str, Any]:
    query = request.query_params
    if query.get("do") == "log out":
        request.clear_session()
        return {"pid": os.getpid(), "session": {}}
    if query.get("do") == "replace":
        request.set_session({"replaced": True})
        return {"pid": os.getpid(), "session": request.session}
    return await act(request.session, query)


litestar = Litestar([litestar_view], middleware=[DefineMiddleware(SessionMiddleware, **OPTIONS)])

# -- Quart ----------------------------------------------------------------------------------------------------


class ScopeSessions(SessionInterface):
    """Quart's `session` is the one in the scope."""

    async def open_session(self, app: Quart, request: Any) -> Any:
        return request.scope["session"]

    async def save_session(self, app: Quart, session: Any, response: Any) -> None:
        """The middleware does that."""


quart = Quart(__name__)
quart.session_interface = ScopeSessions()  # type: ignore[assignment]
quart.asgi_app = SessionMiddleware(quart.asgi_app, **OPTIONS)  # type: ignore[method-assign]


@quart.get("/quart")
async def quart_view() -> dict[str, Any]:
    return await act(session, request.args)


# -- all of them ----------------------------------------------------------------------------------------------

FRAMEWORKS: dict[str, Any] = {"starlette": starlette, "fastapi": fastapi, "litestar": litestar, "quart": quart}


async def app(scope: Any, receive: Any, send: Any) -> None:
    name = "starlette" if scope["type"] == "lifespan" else scope["path"].strip("/")
    await FRAMEWORKS[name](scope, receive, send)
