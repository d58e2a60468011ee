"""How `make docs` makes a site of the Markdown pages. They are written for GitHub: nothing in them is for this."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

HOME = "docs/index"

project = "shmstore"
project_copyright = "The shmstore authors, MIT licence"
extensions = ["myst_parser"]
# The source is the whole tree, so that links work here as they do there; these are its pages.
include_patterns = ["docs/**.md", "examples/README.md", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"]
root_doc = HOME
myst_heading_anchors = 4
myst_links_external_new_tab = False
html_theme = "furo"
html_title = "shmstore"
html_copy_source = False
html_show_sphinx = False


def navigation(home: str, pages: set[str]) -> str:
    """Return the tables of contents for the home page: a caption and its pages for each of its lists of links."""
    listed: set[str] = set()
    trees = []
    for caption, section in re.findall(r"^## (.*)\n((?:(?!## ).*\n?)*)", home, re.MULTILINE):
        links = list(re.findall(r"^- \[.*?\]\((\S+?)\.md\)", section, re.MULTILINE))
        trees.append((caption, [f"/{page(link)}" for link in links]))
        listed |= {page(link) for link in links}
    trees.append(("More", [f"/{name}" for name in sorted(pages - listed - {HOME})]))
    return "\n".join(
        "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *names, "```", ""])
        for caption, names in trees
        if names
    )


def page(link: str) -> str:
    """Return the page that a link of the home page leads to."""
    parts: list[str] = []
    for part in ("docs/" + link).split("/"):
        if part == "..":
            parts.pop()
        else:
            parts.append(part)
    return "/".join(parts)


def add_navigation(app: Any, docname: str, source: list[str]) -> None:
    """Give the site the order of the home page."""
    if docname == HOME:
        source[0] += "\n" + navigation(source[0], set(app.env.found_docs))


def add_front_door(app: Any, exception: Exception | None) -> None:
    """Let the site be opened at its index.html."""
    if exception is None:
        target = f"{HOME}.html"
        door = f'<!doctype html><title>shmstore</title><meta http-equiv="refresh" content="0; url={target}">'
        Path(app.outdir, "index.html").write_text(f'{door}<a href="{target}">shmstore</a>\n')


def setup(app: Any) -> None:
    """Connect them."""
    app.connect("source-read", add_navigation)
    app.connect("build-finished", add_front_door)
