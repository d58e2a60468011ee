"""Sessions of each framework under each server, with several workers."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from asgi_servers import COMMANDS, AsgiServer
from processes import marked, wait_for
from sampling import sample

FRAMEWORKS = ("starlette", "fastapi", "litestar", "quart")

frameworks = pytest.mark.parametrize("framework", FRAMEWORKS)


@pytest.fixture(scope="module", params=sample(COMMANDS, 1, __name__))
def server(request: pytest.FixtureRequest) -> Iterator[AsgiServer]:
    server = AsgiServer(COMMANDS[request.param])
    try:
        server.wait()
        yield server
        server.end()
        assert "Traceback" not in server.text
    finally:
        server.kill()


@frameworks
def test_each_worker_sees_the_session(server: AsgiServer, framework: str) -> None:
    _, answer, cookie = server.get(framework, a=1)
    assert answer["session"] == {"a": "1"}
    pids = {answer["pid"]}

    def another_worker_answers() -> bool:
        with ThreadPoolExecutor(8) as pool:
            for _, answer, sent in pool.map(lambda _: server.get(framework, cookie), range(8)):
                assert (answer["session"], sent) == ({"a": "1"}, cookie)
                pids.add(answer["pid"])
        return len(pids) > 1

    wait_for(another_worker_answers)


@frameworks
def test_a_login_changes_the_id_and_a_logout_is_final(server: AsgiServer, framework: str) -> None:
    _, _, before = server.get(framework, a=1)
    _, answer, cookie = server.get(framework, before, _user_id="ann")
    assert answer["session"] == {"a": "1", "_user_id": "ann"}
    assert cookie not in ("", before)
    assert server.get(framework, before)[1]["session"] == {}
    assert server.get(framework, cookie, do="log out")[2] == ""
    assert server.get(framework, cookie)[1]["session"] == {}


@frameworks
def test_overlapping_requests_keep_each_others_keys(server: AsgiServer, framework: str, tmp_path: Path) -> None:
    """In one worker or in several, as it happens."""
    _, _, cookie = server.get(framework, a=1)

    def meet(number: int) -> None:
        _, answer, _ = server.get(framework, cookie, do="meet", place=tmp_path, own=f"own{number}", number=5)
        assert answer["before"] == {"a": "1"}, "none has seen what another one wrote"

    with ThreadPoolExecutor(5) as pool:
        list(pool.map(meet, range(5)))
    stored = server.get(framework, cookie)[1]["session"]
    assert {key for key in stored if key.startswith("own") and key != "own"} == {f"own{number}" for number in range(5)}


@frameworks
def test_a_lock_serialises_workers(server: AsgiServer, framework: str) -> None:
    _, _, cookie = server.get(framework, a=1)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: server.get(framework, cookie, do="count"), range(16)))
    assert server.get(framework, cookie)[1]["session"]["n"] == 16


def test_litestar_replaces_a_session(server: AsgiServer) -> None:
    _, _, cookie = server.get("litestar", a=1)
    server.get("litestar", cookie, do="replace")
    assert server.get("litestar", cookie)[1]["session"] == {"replaced": True}


@pytest.mark.parametrize("framework", ["starlette", "fastapi"])
def test_a_websocket(server: AsgiServer, framework: str) -> None:
    _, _, cookie = server.get(framework, a=1)
    assert server.talk(framework, cookie, b=2)["session"] == {"a": "1", "b": "2"}
    wait_for(lambda: server.get(framework, cookie)[1]["session"] == {"a": "1", "b": "2"})


# -- what is left ---------------------------------------------------------------------------------------------

APP = """
import os
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
from shmstore.asgi import SessionMiddleware

async def view(request):
    request.session.update(request.query_params)
    return JSONResponse({"pid": os.getpid(), "session": request.session})

app = Starlette(routes=[Route("/starlette", view)])
app.add_middleware(SessionMiddleware, store=os.environ["STORE"], store_options={"memory": 2**20})
"""


@pytest.fixture
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[AsgiServer]:
    (tmp_path / "small.py").write_text(APP)
    server = AsgiServer(request.param, "small:app", str(tmp_path))
    try:
        server.wait()
        yield server
    finally:
        server.kill()


@pytest.mark.parametrize("small", ["uvicorn --reload --reload-delay 0.05 --uds {socket} {app}"], indirect=True)
def test_uvicorn_reloads_and_leaves_nothing_behind(small: AsgiServer, tmp_path: Path) -> None:
    _, answer, cookie = small.get("starlette", a=1)
    first = answer["pid"]

    def reloaded() -> bool:
        if "Reloading" not in small.text:  # it overlooks a change before its first look
            (tmp_path / "small.py").touch()
            return False
        try:
            _, answer, _ = small.get("starlette", cookie)
        except OSError:
            return False  # between the two
        assert answer["session"] == {"a": "1"}
        return bool(answer["pid"] != first)

    wait_for(reloaded, "another worker")
    small.end(signal.SIGINT)


@pytest.mark.parametrize("small", ["uvicorn --workers 2 --uds {socket} {app}"], indirect=True)
def test_a_killed_worker_takes_nothing_along(small: AsgiServer) -> None:
    _, answer, cookie = small.get("starlette", a=1)
    os.kill(answer["pid"], signal.SIGKILL)

    def others_answer() -> bool:
        try:
            _, another, _ = small.get("starlette", cookie)
        except OSError:
            return False
        assert another["session"] == {"a": "1"}
        return bool(another["pid"] != answer["pid"])

    wait_for(others_answer)
    small.end()


@pytest.mark.parametrize("small", ["uvicorn --workers 2 --uds {socket} {app}"], indirect=True)
def test_a_killed_supervisor_takes_nothing_along(small: AsgiServer) -> None:
    """Uvicorn's workers go on when their supervisor was killed. When they end, the server of the store does."""
    cookie = small.get("starlette", a=1)[2]
    small.process.kill()
    small.process.wait()
    _, another, _ = small.get("starlette", cookie)
    assert another["session"] == {"a": "1"}
    for pid in marked(small.mark):
        if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not marked(small.mark), f"the end of all\n{small.text}")
