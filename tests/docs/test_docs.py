"""The documents: their code, commands and links. `documents` describes how each kind of block is checked."""

from __future__ import annotations

import configparser
import importlib
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import fields
from hashlib import blake2b
from inspect import signature
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from types import NoneType
from typing import Any
from urllib.parse import unquote

import pytest
import trustme
import yaml
from browsing import cookies
from documents import DOCUMENTS, REDIS, Command, Place, blocks, check_unrun, commands, differs, program, why_not_run
from flask import Flask
from flask.testing import FlaskClient
from forks import Forker
from gunicorn.config import Config as GunicornConfig
from markdown_it import MarkdownIt
from processes import ROOT
from redis_servers import RedisServer, StartRedis

import shmstore.django
from shmstore import Store, StoreManager, snapshot
from shmstore.asgi import SessionMiddleware
from shmstore.cli.serve import serve
from shmstore.contract import AnyStore
from shmstore.flask import Sessions, StoreSessionInterface
from shmstore.options import Options, parse_size
from shmstore.policy import Policy
from shmstore.session import Session

# Run by test_examples.py, which also checks the answers.
EXAMPLES = Path(ROOT, "examples", "README.md")
# Run by test_cli.py at a terminal.
COMPLETION = 'eval "$(_SHMSTORE_COMPLETE='
# Blocks that are not code, by their first words.
TEXTS = {
    "ACL SETUSER shop ": "test_redis_faults.py gives a user these rights",
    "shmstore_up == 0": "alerts of Prometheus: test_metrics.py compares their names",
    "0 4 * * *": "a line of a crontab: test_examples.py compares it with the command that it runs",
}


@pytest.fixture
def place(
    tmp_path: Path, store_dir: Path, forker: Forker, request: pytest.FixtureRequest, start_redis: StartRedis
) -> Iterator[Place]:
    path = tmp_path / "place"
    path.mkdir()
    place = Place(path, store_dir, forker)
    document = getattr(request.node, "callspec", None) and request.node.callspec.params.get("document")
    if document and any(REDIS in block.text for block in blocks(document)):
        place.redis = start_redis().url
    yield place
    place.kill()


def ids(document: Path) -> str:
    return str(document.relative_to(ROOT))


def executed(name: str) -> dict[str, Any]:
    document = Path(ROOT, name)
    namespace: dict[str, Any] = {"__name__": document.stem}
    exec(compile(program(document), document, "exec"), namespace)
    return namespace


@pytest.mark.parametrize("document", [each for each in DOCUMENTS if program(each).strip()], ids=ids)
def test_the_code_runs(document: Path, place: Place, forker: Forker, tmp_path: Path) -> None:
    """Each document runs with a small store of the test in place of `"shop"`."""
    place.write(document)
    script, log = tmp_path / "script.py", tmp_path / "log"
    script.write_text(place.ours(program(document)))
    with log.open("wb") as output:
        process = forker.script([str(script)], output, place.path, os.environ | {"PYTHONPATH": ROOT})
    with process:
        assert process.wait() == 0, log.read_text()


@pytest.mark.usefixtures("forked_servers")
@pytest.mark.parametrize("document", [each for each in DOCUMENTS if commands(each) and each != EXAMPLES], ids=ids)
def test_the_commands_run(document: Path, place: Place) -> None:
    """All commands run in order, even if one fails; those that are not run are checked as far as possible."""
    place.write(document)
    prepared = PREPARED.get(document.name)
    wrong: list[str] = []
    for command in commands(document):
        if why_not_run(command.text):
            check_unrun(command.text)
            continue
        with prepared(place, command) if prepared else nullcontext(command) as ours:
            if fault := place.run(ours):
                wrong.append(fault)
    place.end(wrong.append)
    assert not wrong, "\n\n".join(wrong)


def test_each_block_is_executed_or_checked() -> None:
    """The kinds: python and console, by the tests above; the files that they use; what is checked below; texts."""
    for document in DOCUMENTS:
        typed = " ".join(command.text for command in commands(document))
        if "docker run" in typed:  # its CMD is run here, with the files that are copied into the image
            typed += " ".join(block.text for block in blocks(document) if block.language == "dockerfile")
        if "kubectl apply" in typed:
            typed += " ".join(block.text for block in blocks(document) if block.language == "yaml")
            check_hooks(document)
        for block in blocks(document):
            if block.language == "text":
                assert block.text.startswith(tuple(TEXTS)), f"{block.place}: say in TEXTS why it is no code"
            elif block.language in CHECKED:
                CHECKED[block.language](block.text)
            elif block.name:
                assert re.split("[/.]", block.name)[0] in typed, f"{block.place}: no command uses {block.name}"
            elif block.language == "sh":
                assert document == EXAMPLES or block.text.startswith(COMPLETION), block.place
            else:
                assert block.language in ("python", "console"), f"{block.place}: {block.language!r} is not executed"


def test_a_failing_block_is_found_with_its_line(tmp_path: Path) -> None:
    document = tmp_path / "a.md"
    document.write_text("One.\n\n```python\nx = 1\n```\n\n- Two.\n\n  ```python\n  assert x == 2\n  ```\n")
    done = subprocess.run([sys.executable, "-c", program(document)], capture_output=True, text=True)
    assert "line 10" in done.stderr
    assert "AssertionError" in done.stderr


@pytest.mark.parametrize(
    ("output", "printed", "same"),
    [
        (["2 sessions, 1.2 MiB"], "31 sessions, 4 B\n", True),
        (["2 sessions"], "no sessions\n", False),
        (["2 sessions"], "2 sessions\nand an error\n", False),
        (["one", "...", "three"], "one\ntwo\n2\nthree\n", True),
        (["4dce1cb1a1d1  ada"], "ccdab4b2fc90    ada\n", True),
        (["4dce1cb1a1d1  ada"], "ccdab4b2fc90    eve\n", False),
    ],
)
def test_output_is_compared_except_for_numbers(output: list[str], printed: str, same: bool) -> None:
    assert bool(differs(Command("a.md:1", "it", output), printed)) is not same


def slug(heading: str) -> str:
    """Return the anchor of a heading, as on GitHub and on the site."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def headings(document: Path) -> set[str]:
    tokens = MarkdownIt().parse(document.read_text())
    texts = [text for token, text in pairwise(tokens) if token.type == "heading_open"]
    return {slug("".join(part.content for part in text.children or ())) for text in texts}


def test_links_are_valid() -> None:
    for document in DOCUMENTS:
        inline = [token for token in MarkdownIt().parse(document.read_text()) if token.type == "inline"]
        parts = [part for token in inline for part in token.children or ()]
        targets = [str(part.attrs[key]) for part in parts for key in ("href", "src") if key in part.attrs]
        for target in targets:
            if re.match(r"\w+:", target):
                continue
            path, _, anchor = unquote(target).partition("#")
            file = (document.parent / path) if path else document
            assert file.exists(), f"{ids(document)}: {target}"
            assert not anchor or anchor in headings(file), f"{ids(document)}: {target}"


# -- sessions that the commands of a document find ------------------------------------------------------------


@contextmanager
def command_line(place: Place, command: Command) -> Iterator[Command]:
    """Restore the sessions that a document shows before each command, and use their real ids."""
    saved = {"snapshot": place.path / "sessions.snapshot"} if command.text == "shmstore doctor shop" else {}
    with StoreManager(place.url, memory=2**20, **saved) as manager:
        with manager.store() as store:
            for path in saved.values():
                snapshot.save(store, path)
            for number in range(3):
                store.set(f"old {number}", {}, ttl=-1)
            live = re.search("logout|copy|save|load", command.text)
            store.set("two", {"cart": []}, ttl=60 if live else -1, owner="ada")
            store.set("one", {"cart": [1, 2], "secret": "xyzzy"}, owner="ada")
            store.get("one")
        if re.match(r"shmstore (rm shop(?! \w)|serve)", command.text):
            manager.shutdown()
        text = re.sub("/var/(backups|lib/shop)", str(place.path), command.text)
        for shown, sid in (("4dce", "one"), ("ccda", "two")):
            digest = blake2b(sid.encode(), digest_size=16).hexdigest()
            for found in re.findall(rf"\b{shown}[0-9a-f]*", text):
                text = text.replace(found, digest[: len(found)])
        output = [re.sub("/var/(backups|lib/shop)", str(place.path), line) for line in command.output]
        with ExitStack() as stack:
            if "redis://" in text:
                server = RedisServer(Path(stack.enter_context(TemporaryDirectory())))
                stack.callback(server.end)
                text = text.replace("redis://localhost:6379/0", server.url)
            yield Command(command.place, text, output)


PREPARED: dict[str, Callable[[Place, Command], AbstractContextManager[Command]]] = dict.fromkeys(
    ("command-line.md", "snapshots.md", "troubleshooting.md"), command_line
)


# -- configurations -------------------------------------------------------------------------------------------


def check_ini(text: str) -> None:
    """A unit of systemd: its command is valid, and systemd finds no error; or another file with sections."""
    config = configparser.ConfigParser(strict=False, interpolation=None, default_section="")
    config.optionxform = str  # type: ignore[assignment,method-assign]
    config.read_string(text)
    assert config.sections()
    if "Service" not in config:
        return
    assert set(config.sections()) <= {"Unit", "Service", "Install"}
    words = shlex.split(config["Service"]["ExecStart"])
    match Path(words[0]).name, words[1:]:
        case "shmstore", ["serve", *arguments]:
            serve.make_context("serve", arguments)
        case "gunicorn", arguments:
            create_parser(arguments)
        case other:
            raise AssertionError(f"what does {other} do?")


def create_parser(arguments: list[str]) -> None:
    """Check options of Gunicorn as it does."""
    GunicornConfig().parser().parse_args(arguments)


def check_unit(text: str, directory: Path) -> None:
    """Let systemd verify a unit, with programs that exist here."""
    unit = directory / "a.service"
    unit.write_text(re.sub(r"^(Exec\w+=)\S+", rf"\1{sys.executable}", text, flags=re.MULTILINE))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=300)
    faults = [line for line in done.stderr.splitlines() if unit.name in line]
    assert not faults


UNITS = [
    *((block.place, block.text) for each in DOCUMENTS for block in blocks(each) if "[Service]" in block.text),
    *((each.name, each.read_text()) for each in sorted(Path(ROOT, "deploy").glob("*.service"))),
]


@pytest.mark.parametrize("unit", [text for _, text in UNITS], ids=[name for name, _ in UNITS])
def test_units_of_systemd(unit: str, tmp_path: Path) -> None:
    """The first check needs nothing; the second one needs systemd, which most containers do not have."""
    check_ini(unit)
    if shutil.which("systemd-analyze"):
        check_unit(unit, tmp_path)


def check_dockerfile(text: str) -> None:
    """Without Docker: each line is an instruction, each copied file is named, and the command is an array."""
    lines = [line for line in re.sub(r"\\\n", " ", text).splitlines() if line and line[0] != "#"]
    instructions = [line.partition(" ")[::2] for line in lines]
    assert instructions[0][0] == "FROM"
    for name, rest in instructions:
        assert name in {"FROM", "RUN", "COPY", "WORKDIR", "USER", "ENV", "EXPOSE", "CMD", "VOLUME", "STOPSIGNAL"}, name
        assert rest.strip(), name
        if name == "RUN":
            assert subprocess.run(["bash", "-n", "-c", rest]).returncode == 0
        elif name == "CMD":
            create_parser(json.loads(rest)[1:])


# What a manifest may have; the keys of each kind that its specification must have.
KINDS = {
    ("apps/v1", "Deployment"): {"selector", "template"},
    ("v1", "PersistentVolumeClaim"): {"accessModes", "resources"},
    ("v1", "Service"): {"selector", "ports"},
}


def check_yaml(text: str) -> None:
    """Manifests of Kubernetes: known kinds, whose labels, volumes, claims and sizes match each other."""
    found = {(each["apiVersion"], each["kind"]): each for each in yaml.safe_load_all(text)}
    for kind, each in found.items():
        assert each["metadata"]["name"]
        assert each["spec"].keys() >= KINDS[kind], kind
    deployment = found["apps/v1", "Deployment"]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert labels == deployment["selector"]["matchLabels"] == found["v1", "Service"]["spec"]["selector"]
    pod = deployment["template"]["spec"]
    volumes = {each["name"]: each for each in pod["volumes"]}
    claims = {
        each["persistentVolumeClaim"]["claimName"] for each in volumes.values() if len(each) and "emptyDir" not in each
    }
    assert claims == {found["v1", "PersistentVolumeClaim"]["metadata"]["name"]}
    [container] = pod["containers"]
    program, *arguments = container["command"]
    assert program == "gunicorn"
    create_parser(arguments)
    assert {each["name"] for each in container["volumeMounts"]} == volumes.keys()
    [memory] = [each["emptyDir"] for each in volumes.values() if "emptyDir" in each]
    assert memory["medium"] == "Memory"
    sizes = [memory["sizeLimit"], container["resources"]["limits"]["memory"]]
    assert parse_size(f"{sizes[0]}B") < parse_size(f"{sizes[1]}B")


NGINX = Path(ROOT, "docs", "deploy", "proxies.md")


def check_nginx(text: str) -> None:
    """Each line is a comment, a directive, or begins or ends a block. The next test lets nginx read it."""
    depth = 0
    for line in map(str.strip, text.splitlines()):
        depth += line.endswith("{") - (line == "}")
        assert not line or line[0] == "#" or line == "}" or line[-1] in "{;", line
        assert depth >= 0
    assert depth == 0


def test_nginx_accepts_its_configuration(tmp_path: Path) -> None:
    nginx = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if nginx is None:
        pytest.skip("nginx is not installed: check_nginx is all that is checked")
    [text] = [block.text for block in blocks(NGINX) if block.language == "nginx"]
    certificate = trustme.CA().issue_cert("shop.example.org")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "fullchain.pem")
    certificate.private_key_pem.write_to_path(tmp_path / "privkey.pem")
    text = text.replace("/etc/ssl/shop", str(tmp_path))
    conf = tmp_path / "nginx.conf"
    paths = "".join(f"{each}_temp_path {tmp_path};" for each in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    conf.write_text(f"pid {tmp_path}/pid; error_log stderr; events {{}} http {{ access_log off; {paths}\n{text}}}")
    done = subprocess.run([nginx, "-t", "-e", "stderr", "-c", conf], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr


def check_hooks(document: Path) -> None:
    """Execute a configuration of Gunicorn for an image, in a process of its own: its hooks check their options."""
    [conf] = [block.text for block in blocks(document) if block.name == "gunicorn.conf.py"]
    subprocess.run([sys.executable, "-c", conf], check=True)


CHECKED: dict[str, Callable[[str], None]] = {
    "ini": check_ini,
    "dockerfile": check_dockerfile,
    "yaml": check_yaml,
    "nginx": check_nginx,
}


# -- the views of the documents ------------------------------------------------------------------------------


@pytest.fixture
def overlapping() -> Iterator[dict[str, Any]]:
    namespace = executed("docs/guides/overlapping-requests.md")
    with namespace["store"]:
        yield namespace


@pytest.fixture
def logins() -> Iterator[dict[str, Any]]:
    namespace = executed("docs/guides/login-and-logout.md")
    with namespace["store"]:
        yield namespace


def test_the_views_in_the_page_on_overlapping_requests(overlapping: dict[str, Any]) -> None:
    app, store = overlapping["app"], overlapping["store"]
    store.clear()
    browser = app.test_client()
    assert [browser.post(f"/cart/{item}").json for item in "ab"] == [["a"], ["a", "b"]]
    assert [browser.post("/vote").json for _ in range(2)] == [{"votes": 1}, {"votes": 2}]
    assert [browser.post(f"/wishlist/{item}").json for item in "ab"] == [{"wishes": 1}, {"wishes": 2}]
    assert browser.get("/report").text == "the report"
    [session] = store.all().values()
    assert session["report"] == "sent"


def test_the_views_in_the_page_on_logins(logins: dict[str, Any]) -> None:
    app, store = logins["app"], logins["store"]
    laptop, phone = app.test_client(), app.test_client()
    assert phone.post("/login/ada").json == {"devices": 0}
    assert laptop.post("/login/ada").json == {"devices": 1}
    [other, here] = reversed(store.owned_by("ada"))
    assert laptop.post("/log-out-my-other-devices").json == {"ended": 1}
    assert store.owned_by("ada") == [here] != [other]
    laptop.post("/logout")
    assert store.owned_by("ada") == []


def test_changed_cookie_settings_are_sent_to_a_browser_once(logins: dict[str, Any]) -> None:
    app = logins["app"]
    browser = app.test_client()
    assert cookies(browser.post("/login/ada"))
    app.config["SESSION_COOKIE_SAMESITE"] = "Strict"
    [cookie] = cookies(browser.post("/login/ada"))
    assert cookie.endswith("SameSite=Strict")
    assert not cookies(browser.post("/login/ada"))


def test_concurrent_requests_to_the_documented_cart_lose_nothing(overlapping: dict[str, Any]) -> None:
    app, store = overlapping["app"], overlapping["store"]
    browser = app.test_client()
    browser.post("/cart/first")
    sid = browser.get_cookie("session").value

    def fill(name: int) -> None:
        other = app.test_client()
        other.set_cookie("session", sid)
        for number in range(15):
            other.post(f"/cart/{name}-{number}")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(fill, range(4)))
    finally:
        sys.setswitchinterval(interval)
    assert sorted(store.get(sid)["cart"]) == sorted(["first", *(f"{n}-{m}" for n in range(4) for m in range(15))])


def old_cookie(client: FlaskClient, value: str) -> str:
    """Visit with another extension's cookie; return the one that replaces it."""
    client.set_cookie("session", value)
    [cookie] = cookies(client.post("/login/ada"))
    return cookie.partition(";")[0].partition("=")[2]


@pytest.mark.parametrize(
    "value", ["kDmvmhJ-xeY5tGk5EyB5yHcl9lmZ3BM1x9fmeaSCz7c", "kDmv.signature", "eyJhIjoxfQ.aX.sig"]
)
def test_a_cookie_of_flask_session_becomes_a_new_session(store: Store, value: str) -> None:
    namespace: dict[str, Any] = {"__name__": "flask-session"}
    exec(blocks(Path(ROOT, "docs/guides/flask-session.md"))[0].text, namespace)  # without migrate_from
    app = namespace["app"]
    app.session_interface = StoreSessionInterface(store)
    client = app.test_client()
    new = old_cookie(client, value)
    assert new != value
    assert store.all() == {new: {"_permanent": True, "_user_id": "ada"}}
    sid = client.post("/login/ada").text  # rotates, as in Flask-Session, and keeps the data
    assert sid != new
    assert store.all() == {sid: {"_permanent": True, "_user_id": "ada"}}


# -- the reference pages are complete -------------------------------------------------------------------------


def table(name: str) -> dict[str, str]:
    """Return the rows of a page's tables: the second column by the name in the first one."""
    rows: dict[str, str] = {}
    for line in Path(ROOT, "docs", name).read_text().splitlines():
        if line.startswith("| `"):
            first, second = re.split(r"(?<!\\)\|", line)[1:3]
            rows |= dict.fromkeys(re.findall(r"`(\w+)", first), second.strip().strip("`"))
    return rows


def shown(value: object) -> str:
    """Return a default as the tables show it."""
    if isinstance(value, int) and not isinstance(value, bool) and value and value % 2**20 == 0:
        return f"{value // 2**20} MiB"
    return f'"{value}"' if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)


def test_each_option_is_documented_with_its_default() -> None:
    defaults = {entry.name: entry.default for entry in fields(Options) if entry.name != "given"}
    documented = {name: row for name, row in table("reference/options.md").items() if name in defaults}
    assert documented.keys() == defaults.keys()
    plain = {name: shown(value) for name, value in defaults.items() if value is not None and not callable(value)}
    assert {name: documented[name] for name in plain} == plain


def test_each_key_of_the_configuration_is_documented_with_its_default() -> None:
    documented = table("reference/flask.md")
    policy = {f"SESSION_{name.upper()}": entry.default for name, entry in signature(Policy).parameters.items()}
    del policy["SESSION_TTL"]  # PERMANENT_SESSION_LIFETIME
    flask = {key: value for key, value in Flask.default_config.items() if "SESSION" in key}
    named = set(re.findall(r"\b[A-Z_]*SESSION_[A-Z_]+\b", inspect.getdoc(Sessions.init_app) or ""))
    assert documented.keys() >= policy.keys() | flask.keys() | named
    plain = {key: shown(value) for key, value in (policy | flask).items() if isinstance(value, (bool, int, str))}
    assert {key: documented[key] for key in plain} == plain


def test_each_option_for_asgi_is_documented_with_its_default() -> None:
    documented = table("reference/asgi.md")
    options = {name: entry.default for name, entry in signature(SessionMiddleware).parameters.items() if name != "app"}
    assert documented.keys() >= options.keys()
    plain = {name: shown(value) for name, value in options.items() if isinstance(value, (bool, int, str, NoneType))}
    assert {name: documented[name] for name in plain} == plain


def test_each_key_for_django_is_documented_with_its_default() -> None:
    documented = table("reference/django.md")
    keys = dict(re.findall(r"^- ``([A-Z_]+)``(?: \((.*?)\))?:", shmstore.django.__doc__ or "", re.MULTILINE))
    assert keys.keys() == {"STORE", "KEY_PREFIX", "OWNER_KEY"} == documented.keys()
    assert {key: documented[key].replace('"', "") for key in keys} == {key: keys[key].strip('"') for key in keys}


def test_each_method_attribute_and_error_is_documented() -> None:
    methods = {name for name in dir(AnyStore) if name[0] != "_"} - {"codec", "label"}
    page = Path(ROOT, "docs", "reference", "store.md").read_text()
    assert not {name for name in methods if not re.search(rf"`{name}\b|`{name}\(", page)}
    assert not {name for name in shmstore.__all__ if name not in page}
    attributes = {name for name in dir(Session) if name[0] != "_"} - set(dir(dict))
    assert table("reference/flask.md").keys() >= attributes | {"clear"}


def test_the_api_lists_what_the_modules_export() -> None:
    page = Path(ROOT, "docs", "reference", "api.md").read_text()
    rows = re.findall(r"^\| \[`([\w.]+)`\]\(\S+\) \| (.*) \|$", page, re.MULTILINE)
    listed = {module: re.findall(r"`(\w+)`", names) for module, names in rows}
    modules = {name: importlib.import_module(name) for name in listed}
    assert not [(name, each) for name, found in listed.items() for each in set(found) - set(modules[name].__all__)]
    shown = [getattr(modules[name], each) for name, names in listed.items() for each in names]
    exported = [(name, each) for name, module in modules.items() for each in module.__all__]
    assert not [each for each in exported if getattr(modules[each[0]], each[1]) not in shown]
    elsewhere = {"shmstore.errors", "shmstore.manager", "shmstore.urls"}  # their public names are those of shmstore
    assert {f"shmstore.{path.stem}" for path in Path(ROOT, "shmstore").glob("[a-z]*.py")} - elsewhere < listed.keys()


def test_the_map_lists_each_module() -> None:
    page = Path(ROOT, "CONTRIBUTING.md").read_text()
    modules = [path.name for path in Path(ROOT, "shmstore").glob("*.py") if path.name[0] != "_"]
    packages = [f"{path.parent.name}/" for path in Path(ROOT, "shmstore").glob("*/__init__.py")]
    assert not [name for name in modules + packages if f"`{name}`" not in page]


@pytest.mark.parametrize("name", ["what-survives-what.md", "security.md"])
def test_each_promise_names_a_test(name: str) -> None:
    """That the tests exist is checked by test_names.py."""
    page = Path(ROOT, "docs", "understand", name).read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.endswith("| proof |")]
    assert len(rows) > 10
    assert not [row for row in rows if not re.search(r"`\w+/test_\w+\.py::test_\w+`", row)]
