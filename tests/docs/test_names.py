"""The documents name nothing that does not exist, and describe the product, not how it came about."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from documents import DOCUMENTS, blocks, commands
from gunicorn.config import Config as GunicornConfig
from markdown_it import MarkdownIt
from processes import ROOT

from benchmarks.__main__ import parser as benchmark_options
from shmstore import RedisStore, Store, StoreManager, StoreProxy
from shmstore.cli import main
from shmstore.contract import AnyStore, Stats
from shmstore.session import Session

# Where the files of the project are; what else is in its directory belongs to tools.
FOLDERS = (".ci", "benchmarks", "deploy", "docs", "examples", "shmstore", "tests")
FILES = re.compile(r"(?:[\w.*-]+/)*[\w*-][\w.*-]*\.(?:c|h|html|ini|json|md|py|service|svg|toml)")
# Files of an application, of another project, or that a command makes.
OTHERS = {"settings.py", "shop.service", "benchmarks/results", "gunicorn/app", "gunicorn/http"}
# What commands of the project make.
MADE = ("benchmarks/results/", "site/", "dist/")
# Options of other programs: Docker, Podman, pip, pytest of this project, Uvicorn, uWSGI, Flask.
OPTIONS = {
    "--ipc", "--init", "--pid", "--shm-size", "--no-cache-dir", "--shuffle", "--shuffle-seed", "--host", "--port",
    "--forwarded-allow-ips", "--proxy-headers", "--factory", "--lazy-apps", "--enable-threads", "--all", "--native",
    "--group", "--privileged",
}  # fmt: skip
PAGES = [document for document in DOCUMENTS if document.name != "CHANGELOG.md"]


def ids(document: Path) -> str:
    return str(document.relative_to(ROOT))


@cache
def spans(document: Path) -> list[tuple[str, str]]:
    """Return the code within the text of a document, with its place; and the commands of its blocks."""
    found = [(each.place, each.text) for each in commands(document)]
    for token in MarkdownIt().enable("table").parse(document.read_text()):
        place = f"{ids(document)}:{(token.map or [0])[0] + 1}"
        found += [(place, part.content) for part in token.children or () if part.type == "code_inline"]
    return found


@cache
def endings() -> set[str]:
    """Return each file and folder of the project, by each of the paths that may name it: `core.c`, `engine/core.c`."""
    paths = [Path(name) for name in ("README.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml", "setup.py")]
    for folder in FOLDERS:
        found = [path.relative_to(ROOT) for path in Path(ROOT, folder).rglob("*") if "__pycache__" not in path.parts]
        paths += [Path(folder), *found]
    return {"/".join(path.parts[at:]) for path in paths for at in range(len(path.parts))}


@cache
def written() -> set[str]:
    """Return the files that a reader of the documents writes."""
    return {block.name for document in DOCUMENTS for block in blocks(document)}


def missing_file(code: str) -> str:
    """Return the file or folder that code names and that does not exist; an empty string if there is none."""
    name = code.partition("::")[0].rstrip("/")
    ours = name.partition("/")[0] in FOLDERS and re.fullmatch(r"[\w./*-]+", name)
    if not ours and not FILES.fullmatch(name):
        return ""
    if "*" in name:
        return "" if any(Path(ROOT).glob(name)) else name
    return "" if name in endings() | written() | OTHERS or name.startswith(MADE) else name


def missing_test(code: str) -> str:
    found = re.fullmatch(r"(?:tests/)?(\w+/test_\w+\.py)::(test_\w+)", code)
    if not found:
        return ""
    file = Path(ROOT, "tests", found[1])
    return "" if file.exists() and f"def {found[2]}(" in file.read_text() else code


def missing_target(code: str) -> str:
    targets = re.findall(r"^([\w-]+):", Path(ROOT, "Makefile").read_text(), re.MULTILINE)
    return next((f"make {name}" for name in re.findall(r"^make ([a-z][\w-]*)", code) if name not in targets), "")


def missing_module(code: str) -> str:
    """Return the name within the package that code uses and that does not exist."""
    for name in re.findall(r"(?<![\w./-])shmstore(?:\.\w+)+(?!\w|\.?/)", code):
        if name in endings():
            continue
        parts = name.split(".")
        found: object = importlib.import_module(parts[0])
        for at, part in enumerate(parts[1:], 2):
            if inspect.ismodule(found) and not hasattr(found, part):
                try:
                    importlib.import_module(".".join(parts[:at]))
                except ImportError:
                    return str(name)
            if not hasattr(found, part):
                return str(name)
            found = getattr(found, part)
    return next((name for name in re.findall(r"-m (benchmarks\.\w+)", code) if missing_program(name)), "")


def missing_program(name: str) -> bool:
    """Return whether a module of the benchmarks does not exist, or does nothing when it is run."""
    file = Path(ROOT, name.replace(".", "/") + ".py")
    return not (file.exists() and "__main__" in file.read_text())


MEMBERS: dict[str, type] = {
    "store": AnyStore, "session": Session, "stats()": Stats, "Store": Store, "StoreManager": StoreManager,
    "StoreProxy": StoreProxy, "RedisStore": RedisStore,
}  # fmt: skip


def missing_member(code: str) -> str:
    """Return the attribute of a store, a session or the like that code uses and that does not exist."""
    found = re.match(r"([\w()]+)\.([a-z]\w*)", code)
    if not found or found[1] not in MEMBERS or found[0] in endings():
        return ""
    owner = MEMBERS[found[1]]
    return "" if hasattr(owner, found[2]) or found[2] in owner.__annotations__ else found[0]


@cache
def options(name: str) -> set[str]:
    return {option for parameter in main.commands[name].params for option in parameter.opts + parameter.secondary_opts}


def missing_command(code: str) -> str:
    """Return the command or option of the command line that code uses and that does not exist."""
    found = re.match(r"(?:flask )?shmstore ([a-z]\S*)(.*)", code, re.DOTALL)
    if not found:
        return ""
    if found[1] not in main.commands:
        return f"shmstore {found[1]}"
    used = re.findall(r"(?<=\s)--[a-z][\w-]*", found[2].partition("#")[0].partition("|")[0])
    return next((each for each in used if each not in options(found[1]) | {"--help"}), "")


@cache
def known_options() -> set[str]:
    gunicorn = {option for action in GunicornConfig().parser()._actions for option in action.option_strings}
    benchmarks = {option for action in benchmark_options()._actions for option in action.option_strings}
    return OPTIONS | gunicorn | benchmarks | {"--help", "--version"}.union(*map(options, main.commands))


def missing_option(code: str) -> str:
    found = re.match(r"--[a-z][\w-]*", code)
    return found[0] if found and found[0] not in known_options() else ""


CHECKS: tuple[Callable[[str], str], ...] = (
    missing_file, missing_test, missing_target, missing_module, missing_member, missing_command, missing_option,
)  # fmt: skip


def missing(code: str) -> Iterator[str]:
    return filter(None, (check(code) for check in CHECKS))


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_what_a_page_names_exists(document: Path) -> None:
    assert not [f"{place}: {name} does not exist" for place, code in spans(document) for name in missing(code)]


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("shmstore/engine/kernel.c", "shmstore/engine/kernel.c"),
        ("kernel.py", "kernel.py"),
        ("tests/support/*_kernel.py", "tests/support/*_kernel.py"),
        ("docs/deploy/", ""),
        ("docs/launch/", "docs/launch"),
        ("core.c", ""),
        ("engine/test_arena.py::test_of_nothing", "engine/test_arena.py::test_of_nothing"),
        ("make launch", "make launch"),
        ("make bench-quick", ""),
        ("shmstore.flask.Session", "shmstore.flask.Session"),
        ("shmstore.kernel.Store", "shmstore.kernel.Store"),
        ("shmstore.metrics.StoreCollector", ""),
        ('shmstore.connect("shop")', ""),
        ("shmstore.service", ""),
        ("python -m benchmarks.owners", ""),
        ("python -m benchmarks.kernel", "benchmarks.kernel"),
        ("store.fetch(sid)", "store.fetch"),
        ("store.destroy(sid)", ""),
        ("session.logout()", "session.logout"),
        ("stats().sizes", "stats().sizes"),
        ("stats().evicted", ""),
        ("StoreManager.launch()", "StoreManager.launch"),
        ("session.destroy_others()", ""),
        ("session.pop(\"cart\", None)", ""),
        ("shmstore launch shop", "shmstore launch"),
        ("shmstore ls shop --sorted", "--sorted"),
        ("shmstore ls shop --owner ada  # with --sorted", ""),
        ("--sorted", "--sorted"),
        ("--preload", ""),
        ("--owner NAME", ""),
    ],
)  # fmt: skip
def test_a_name_that_does_not_exist_is_found(code: str, name: str) -> None:
    assert [*missing(code)] == ([name] if name else [])


# Words about an earlier state of the project, which no page needs: each describes what is.
HISTORY = re.compile(
    r"\b(no longer|formerly|previously|newly|nowadays|deprecated|obsolete|new in|used to be|"
    r"(?<!least )(?<!less )(?<!more )(?<!most )recently|(?:from|until|up to|for|by|as of) now|"
    r"can now|now (?:accepts?|ha(?:s|ve)|supports?|uses?|works?)|"
    r"(?:earlier|older|former|previous) (?:versions?|releases?) of (?:shmstore|this)|since (?:version|v?\d+\.\d+)|"
    r"(?:was|were|been) (?:reworked|rewritten|refactored)|"
    r"not yet (?:implemented|supported|done)|todo|fixme)\b",
    re.IGNORECASE,
)


def told(text: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the words of each part of a document's text that is about an earlier state."""
    for token in MarkdownIt().enable("table").parse(text):
        if token.type == "inline":
            words = "".join(part.content if part.type == "text" else " " for part in token.children or ())
            for found in HISTORY.finditer(words):
                yield (token.map or [0])[0] + 1, found[0]


@pytest.mark.parametrize("document", PAGES, ids=ids)
def test_a_page_describes_what_is(document: Path) -> None:
    assert not [f"{ids(document)}:{line}: {words}" for line, words in told(document.read_text())]


@pytest.mark.parametrize(
    "text",
    [
        "A read no\nlonger takes the lock.",
        "- Formerly a dict.",
        "| new in 0.2 |\n|---|\n| x |",
        "The option was reworked.",
        "Since version 0.3 it is faster.",
        "This is not yet implemented.",
    ],
)
def test_a_page_that_tells_of_an_earlier_state_is_found(text: str) -> None:
    assert [*told(text)]


@pytest.mark.parametrize(
    "text",
    [
        "What is stored now is merged.",
        "A new id is sent; the old one is gone.",
        "`no longer`",
        "```\nno longer\n```",
        "The session that was used least recently, since the boot.",
    ],
)
def test_words_about_what_the_program_does_are_no_history(text: str) -> None:
    assert not [*told(text)]
