"""The result of importing the package; its metadata."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import oldest
from markdown_it import MarkdownIt
from processes import ROOT

import shmstore


def test_the_public_names() -> None:
    for name in shmstore.__all__:
        assert getattr(shmstore, name).__module__.startswith("shmstore")
        assert name in dir(shmstore)
    assert issubclass(shmstore.ConfigError, ValueError)
    assert issubclass(shmstore.StoreTimeout, shmstore.StoreUnavailable)
    for error in ("StoreUnavailable", "StoreFull", "RecordTooLarge", "SerializationError", "ConfigError"):
        assert issubclass(getattr(shmstore, error), shmstore.ShmStoreError)


def test_all_that_is_imported_is_declared() -> None:
    """Dependencies of Flask are declared too: Flask may drop them."""
    known = oldest.declared()
    imported = set()
    for path in Path(shmstore.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names.append(node.module or "")
            imported |= {name.partition(".")[0].replace("_", "-") for name in names}
    imported -= {"shmstore", *(name.replace("_", "-") for name in sys.stdlib_module_names)}
    assert imported == known.keys() - {"gunicorn", "tzdata"}, "one imports us, the other is data"


def test_importing_it_changes_no_logging() -> None:
    code = """
import logging
import shmstore, shmstore.flask, shmstore.gunicorn, shmstore.redis, shmstore.metrics
loggers = [logging.root, *(logging.getLogger(name) for name in logging.root.manager.loggerDict)]
print([each for each in loggers if each.handlers], logging.getLogger("shmstore").level)
"""
    for debug in ("", "shmstore"):
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"DEBUG": debug}, capture_output=True, text=True, check=True
        )
        assert done.stdout == "[] 0\n"


def test_the_description_for_a_package_index_has_absolute_links(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(Path(ROOT, name), tmp_path)
    (tmp_path / "metadata").mkdir()
    code = "import setuptools.build_meta as it; it.prepare_metadata_for_build_wheel('metadata')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=True)
    [path] = tmp_path.glob("metadata/*.dist-info/METADATA")
    readme = Path(ROOT, "README.md").read_text()
    head, _, description = path.read_text().partition("\n\n")
    assert "Description-Content-Type: text/markdown" in head

    project = tomllib.loads(Path(ROOT, "pyproject.toml").read_text())["project"]
    repository, version = project["urls"]["Repository"], project["version"]
    for text in (readme, description):
        assert {kind for kind, _ in links(text)} == {"a", "img"}
    for (kind, here), (_, there) in zip(links(readme), links(description), strict=True):
        if re.match(r"\w+:|#", here):
            assert there == here
        else:
            assert there == f"{repository}/{'raw' if kind == 'img' else 'blob'}/v{version}/{here}"
    assert re.findall(r"^```.*?^```$", description, re.DOTALL | re.MULTILINE) == re.findall(
        r"^```.*?^```$", readme, re.DOTALL | re.MULTILINE
    )


def links(text: str) -> list[tuple[str, str]]:
    """Return the links and pictures of a Markdown text."""
    parts = [part for token in MarkdownIt("commonmark").enable("table").parse(text) for part in token.children or ()]
    kinds = {"link_open": ("a", "href"), "image": ("img", "src")}
    return [(kind, str(part.attrs[key])) for part in parts if part.type in kinds for kind, key in [kinds[part.type]]]
