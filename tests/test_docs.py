"""The code in the documents: each document's is one program."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import cookies
from flask.testing import FlaskClient
from jinja2 import DictLoader
from processes import ROOT, Run

from shmstore import Store
from shmstore.flask import StoreSessionInterface

DOCUMENTS = [
    *(Path(ROOT, name) for name in ("README.md", "CONTRIBUTING.md", "examples/README.md")),
    *sorted(Path(ROOT, "docs").glob("*.md")),
]


def program(document: Path) -> str:
    """Return the Python blocks of a document, each on the lines where it stands there."""
    lines = [""] * len(document.read_text().splitlines())
    for block in re.finditer(r"^```python\n(.*?)^```$", document.read_text(), re.DOTALL | re.MULTILINE):
        first = document.read_text().count("\n", 0, block.start(1))
        code = block[1].splitlines()
        lines[first : first + len(code)] = code
    return "\n".join(lines)


def executed(name: str) -> dict[str, Any]:
    document = Path(ROOT, name)
    namespace: dict[str, Any] = {"__name__": document.stem}
    exec(compile(program(document), document, "exec"), namespace)
    return namespace


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_the_code_runs(document: Path, store_dir: Path, run: Run) -> None:
    """With a small store of the test's own where the document says `"shop"`."""
    url = f"shm://{store_dir}/shop"
    code = (
        program(document)
        .replace('"shm://shop"', '"shop"')
        .replace('StoreManager("shop"', 'StoreManager("shop", memory=2**20')
    )
    process = run(code.replace('"shop"', repr(url)), stderr=subprocess.PIPE)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors


def test_there_is_code_to_run() -> None:
    assert sum(bool(program(document).strip()) for document in DOCUMENTS) >= 3


def test_a_failing_block_is_found_with_its_line(tmp_path: Path) -> None:
    document = tmp_path / "a.md"
    document.write_text("One.\n\n```python\nx = 1\n```\n\nTwo.\n\n```python\nassert x == 2\n```\n")
    done = subprocess.run([sys.executable, "-c", program(document)], capture_output=True, text=True)
    assert "line 10" in done.stderr
    assert "AssertionError" in done.stderr


def test_links_lead_somewhere() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


# -- what the views of the documents do ----------------------------------------------------------------------


@pytest.fixture
def sessions() -> Iterator[dict[str, Any]]:
    namespace = executed("docs/sessions.md")
    with namespace["store"]:
        yield namespace


def test_the_views_of_the_page_about_sessions(sessions: dict[str, Any]) -> None:
    app, store = sessions["app"], sessions["store"]
    laptop, phone = app.test_client(), app.test_client()
    assert [laptop.post(f"/cart/{item}").json for item in "ab"] == [["a"], ["a", "b"]]
    assert [laptop.post("/vote").json for _ in range(2)] == [{"votes": 1}, {"votes": 2}]
    assert laptop.get("/report").text == "the report"
    assert phone.post("/login/ada").json == {"devices": 0}
    assert laptop.post("/login/ada").json == {"devices": 1}
    [here] = [sid for sid in store.owned_by("ada") if "cart" in store.get(sid)]
    assert store.get(here)["report"] == "sent"
    assert laptop.post("/log-out-my-other-devices").json == {"ended": 1}
    assert store.owned_by("ada") == [here]


def old_cookie(client: FlaskClient, value: str) -> str:
    """Visit with another extension's cookie; return the one that replaces it."""
    client.set_cookie("session", value)
    [cookie] = cookies(client.post("/login/ada"))
    return cookie.partition(";")[0].partition("=")[2]


@pytest.mark.parametrize(
    "value", ["kDmvmhJ-xeY5tGk5EyB5yHcl9lmZ3BM1x9fmeaSCz7c", "kDmv.signature", "eyJhIjoxfQ.aX.sig"]
)
def test_cookies_of_flask_session_become_new_sessions(store: Store, value: str) -> None:
    app = executed("docs/flask-session.md")["app"]
    app.session_interface = StoreSessionInterface(store)
    client = app.test_client()
    new = old_cookie(client, value)
    assert new != value
    assert store.all() == {new: {"_permanent": True, "_user_id": "ada"}}
    sid = client.post("/login/ada").text  # rotates, as in Flask-Session, and keeps the data
    assert sid != new
    assert store.all() == {sid: {"_permanent": True, "_user_id": "ada"}}


@pytest.fixture
def devices() -> Iterator[dict[str, Any]]:
    """The recipe for a page of devices, with the template of its document."""
    namespace = executed("docs/devices.md")
    document = Path(ROOT, "docs", "devices.md").read_text()
    [template] = re.findall(r"^```html\n(.*?)^```$", document, re.DOTALL | re.MULTILINE)
    with Store(memory=2**20) as store:
        namespace["app"].session_interface = StoreSessionInterface(store)
        namespace["app"].config["SESSION_OWNER_KEY"] = "user"
        namespace["app"].jinja_loader = DictLoader({"devices.html": template})
        yield namespace | {"store": store}


def test_the_recipe_for_devices(devices: dict[str, Any]) -> None:
    app, store = devices["app"], devices["store"]
    laptop, phone, tablet, eve = (app.test_client() for _ in range(4))
    for client, name in ((laptop, "Firefox; Linux"), (phone, "Safari iPhone"), (tablet, "Safari iPad")):
        client.post("/login", data={"user": "ada"}, headers={"User-Agent": name})
    eve.post("/login", data={"user": "eve"})
    page = laptop.get("/devices/").text
    assert re.findall(r"\w+ on \w+(?=,)", page) == ["Safari on iPad", "Safari on iPhone", "Firefox on Linux"]
    assert page.count("this device") == 1
    assert not [sid for sid in store.ids() if sid in page]
    _, phones = re.findall(r'name="device" value="(\w+)"', page)
    eve.post("/devices/log-out", data={"device": phones})
    assert len(store.owned_by("ada")) == 3
    assert (
        "That device is logged out."
        in laptop.post("/devices/log-out", data={"device": phones}, follow_redirects=True).text
    )
    assert phone.get("/devices/").status_code == 403
    assert "1 other device logged out." in laptop.post("/devices/log-out-others", follow_redirects=True).text
    assert tablet.get("/devices/").status_code == 403
    assert len(store.owned_by("eve")) == 1


def test_the_recipe_for_devices_is_that_of_the_demo() -> None:
    assert Path(ROOT, "examples", "demo", "devices.py").read_text() in Path(ROOT, "docs", "devices.md").read_text()


def test_each_promise_names_a_test_that_is_there() -> None:
    rows = [line for line in Path(ROOT, "docs", "what-survives-what.md").read_text().splitlines() if line[:3] != "|--"]
    unproved = [row for row in rows if row.startswith("| ") and not re.search(r"`test_\w+\.py::test_\w+`", row)]
    assert not [row for row in unproved if "| proof |" not in row]
    named = {tuple(name.split("::")) for row in rows for name in re.findall(r"`(test_\w+\.py::test_\w+)`", row)}
    assert len(named) > 40
    missing = [each for each in named if f"def {each[1]}(" not in Path(ROOT, "tests", each[0]).read_text()]
    assert not missing
