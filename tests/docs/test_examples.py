"""The examples of other servers: the commands of examples/README.md, with other addresses."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from http.cookiejar import CookieJar
from pathlib import Path
from urllib.parse import urlencode
from urllib.request import HTTPCookieProcessor, build_opener

import pytest
from example_servers import EXAMPLES, Example, commands
from forks import Forker
from processes import wait_for

from shmstore import connect


@pytest.fixture
def example(tmp_path: Path, store_dir: Path, forker: Forker) -> Iterator[Example]:
    example = Example(tmp_path, store_dir, forker)
    yield example
    example.kill()


def test_flask_run_starts_the_store_with_the_first_session(example: Example, store_dir: Path) -> None:
    first, second = (example.start(words) for words in commands("flask run"))
    assert example.files.server() is None, "nobody has looked at a session"
    here, cookie = example.ask("8081", user="ada")
    server = example.files.server()
    there, _ = example.ask("8082", cookie)
    assert (here, there) == ({"user": "ada", "pid": first.pid}, {"user": "ada", "pid": second.pid})
    assert server is not None
    assert example.files.server() == server, "there is one"
    first.kill()  # the server survives the process that started it
    assert example.ask("8082", cookie)[0]["user"] == "ada"
    assert example.files.server() == server
    first.wait()
    with connect("shop", directory=store_dir) as store:
        assert len(store.owned_by("ada")) == 1
    example.processes.remove(first)
    example.end()


class DjangoVisitor:
    """A browser that visits the project of Django, and goes on with its cookies at another port."""

    def __init__(self) -> None:
        self.jar = CookieJar()
        self.opener = build_opener(HTTPCookieProcessor(self.jar))

    def get(self, url: str) -> str:
        with self.opener.open(url, timeout=300) as response:
            return str(response.read().decode())

    def post(self, url: str, **fields: str) -> str:
        """Send a form of the admin site with its CSRF token."""
        [token] = [cookie.value for cookie in self.jar if cookie.name == "csrftoken"]
        data = urlencode({"csrfmiddlewaretoken": token or "", **fields}).encode()
        with self.opener.open(url, data, timeout=300) as response:
            return str(response.read().decode())


def test_django_under_gunicorn_and_its_development_server_share_sessions(example: Example, store_dir: Path) -> None:
    *prepare, gunicorn, runserver = commands("Django")
    for words in prepare:
        example.run(words)
    processes = [example.start(words) for words in (gunicorn, runserver)]
    here, there = (f"http://127.0.0.1:{example.command([port])[0]}" for port in ("8081", "8082"))
    browser = DjangoVisitor()
    assert [json.loads(browser.get(f"{url}/"))["visits"] for url in (here, there, here)] == [1, 2, 3]
    assert "Log in" in browser.get(f"{here}/admin/")
    browser.post(f"{here}/admin/login/", username="ada", password="secret", next="/")
    answers = [json.loads(browser.get(f"{url}/")) for url in (here, there) * 4]
    assert [(answer["user"], answer["visits"]) for answer in answers] == [("ada", 5 + n) for n in range(8)]
    assert not {process.pid for process in processes} & {answer["pid"] for answer in answers}, "children answer"
    with connect("shop", directory=store_dir) as store:
        assert len(store.owned_by("1")) == len(store) == 1
        browser.post(f"{there}/logout-everywhere/")
        assert store.owned_by("1") == []
    assert json.loads(browser.get(f"{here}/"))["user"] == ""
    example.end()


def test_waitress_with_a_separate_server(example: Example) -> None:
    serve, *servers = commands("waitress")
    example.start(serve)
    server = example.files.server()
    pids = [example.start(words).pid for words in servers]
    here, cookie = example.ask("8081", user="ada")
    answers = [example.ask(port, cookie)[0] for port in ("8082", "8081") * 4]
    assert here == {"user": "ada", "pid": pids[0]}
    assert answers == [{"user": "ada", "pid": pid} for pid in (pids[1], pids[0])] * 4
    assert example.ask("8082")[0]["user"] is None, "another browser"
    assert example.files.server() == server
    example.end()


def test_uwsgi_with_a_separate_server(example: Example, store_dir: Path) -> None:
    serve, uwsgi = commands("uWSGI")
    example.start(serve)
    example.start(uwsgi)
    _, cookie = example.ask("8081", user="ada")
    seen: set[int] = set()

    def several() -> bool:
        answer, _ = example.ask("8081", cookie)
        assert answer["user"] == "ada"
        seen.add(answer["pid"])
        return len(seen) >= 2

    wait_for(several, "the answer of another worker")
    server = example.files.server()
    assert server is not None
    with connect("shop", directory=store_dir) as store:
        assert (store.options.max, store.options.memory) == (100_000, 2**20)
    os.kill(server, signal.SIGKILL)  # `shmstore serve` starts another one; the workers' own threads find that
    assert example.ask("8081", cookie)[0]["user"] == "ada"
    wait_for(lambda: example.files.server() not in (None, server), "another server")
    assert example.ask("8081", user="eve")[0]["user"] == "eve"
    example.end()


def test_a_cron_job_prunes_and_reports(example: Example, store_dir: Path) -> None:
    (job,) = commands("cron")
    again = re.findall(r"^\d+ \d.*python \S*/(\S+ \S+) >>", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert again == [" ".join(job[1:])], "the crontab runs the same"

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            example.command(job), cwd=EXAMPLES, env=example.shell.environ, text=True, capture_output=True, timeout=300
        )

    nothing = run()
    assert (nothing.returncode, nothing.stdout, nothing.stderr.count("\n")) == (1, "", 1)
    assert "there is no store 'shop'" in nothing.stderr
    assert not Path(example.files.path).exists(), "it starts no store"
    serve, *_ = commands("waitress")
    example.start([*serve, "--check-period", "0"])
    with connect("shop", directory=store_dir) as store:
        for number in range(5):
            store.set(f"old {number}", {}, ttl=0)
        for number in range(3):
            store.set(f"new {number}", {}, owner="ada" if number else None)
        done = run()
        assert (done.returncode, done.stderr) == (0, "")
        assert re.fullmatch(
            rf"\S+ \S+ store {example.store}: 5 pruned, 3 sessions, 2 logged in, \d+% of its memory, "
            "0 ever logged out for want of room\n", done.stdout,
        )  # fmt: skip
        assert store.length() == 3
    example.end()
