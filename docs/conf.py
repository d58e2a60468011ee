"""How `make docs` makes a site of the Markdown pages. They are written for GitHub: nothing in them is for this."""

from __future__ import annotations

import re
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from sphinx.domains.python import PyClasslike
from sphinx.util.nodes import make_refnode

from shmstore import StoreProxy
from shmstore.contract import Row

HOME = "docs/index"
API = "docs/reference/api"
# Classes that are described without their members, which are those of the contract, or for this package.
WITHOUT_MEMBERS = ("Store", "StoreProxy", "Options", "RecordTooLarge")
# Classes whose objects users receive, beside dataclasses and protocols.
NOT_CREATED = (tuple, Enum, StoreProxy)
FIELDS = type(Row.digest)

project = "shmstore"
project_copyright = "The shmstore authors, MIT licence"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
# The source is the whole tree, so that links work here as they do there; these are its pages.
include_patterns = ["docs/**.md", "examples/README.md", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"]
root_doc = HOME
myst_heading_anchors = 4
myst_links_external_new_tab = False
# Docstrings: Google's sections, and names in single backticks.
default_role = "py:obj"
napoleon_use_ivar = True
napoleon_use_rtype = False
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_type_aliases = {name: name for name in ("Data", "Duration", "NewOwner", "Owner", "OwnerKey", "Progress")}
autodoc_typehints_format = "short"
maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"
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


def add_api(app: Any, docname: str, source: list[str]) -> None:
    """Describe the names in the table of the page, module by module, with their docstrings; link them."""
    if docname == API:
        for module, names in re.findall(r"^\| \[`([\w.]+)`\].*?\| (.*) \|$", source[0], re.MULTILINE):
            members = ", ".join(re.findall(r"`(\w+)`", names))
            linked = re.sub(r"`(\w+)`", rf"{{py:obj}}`\1 <{module}.\1>`", names)
            source[0] = source[0].replace(f"| {names} |", f"| {linked} |")
            source[0] += f"\n## {module}\n\n```{{eval-rst}}\n.. automodule:: {module}\n   :members: {members}\n```\n"


def skip_member(app: Any, what: str, name: str, member: Any, skip: bool, options: Any) -> bool | None:
    """Leave out the fields of tuples, which the docstring of their class describes, and what is not public."""
    owner, inside, _ = getattr(getattr(member, "fget", member), "__qualname__", "").partition(".")
    return True if isinstance(member, FIELDS) or (inside and owner in WITHOUT_MEMBERS) else None


def edit_signature(
    app: Any, what: str, name: str, described: Any, options: Any, signature: str | None, returned: str | None
) -> tuple[str | None, str | None]:
    """Leave out the arguments of classes that users do not create; name aliases of types as the code does."""
    if what == "class" and (
        is_dataclass(described) or issubclass(described, NOT_CREATED) or getattr(described, "_is_protocol", False)
    ):
        return "", None
    return signature and re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", signature), returned


def resolve(app: Any, env: Any, node: Any, text: Any) -> Any:
    """Link a name in a docstring to its description, whatever its module; leave other names as text."""
    if node["refdomain"] != "py":
        return None
    target = node["reftarget"]
    found = [each for each in env.domains["py"].objects.items() if f".{each[0]}".endswith(f".{target}")]
    if not found:
        return text
    name, entry = min(found, key=lambda each: len(each[0]))
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, [text], name)


def add_front_door(app: Any, exception: Exception | None) -> None:
    """Let the site be opened at its index.html."""
    if exception is None:
        target = f"{HOME}.html"
        door = f'<!doctype html><title>shmstore</title><meta http-equiv="refresh" content="0; url={target}">'
        Path(app.outdir, "index.html").write_text(f'{door}<a href="{target}">shmstore</a>\n')


def setup(app: Any) -> None:
    """Connect them."""
    # Sphinx calls them variables.
    for field in PyClasslike.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
    app.connect("source-read", add_navigation)
    app.connect("source-read", add_api)
    app.connect("autodoc-process-signature", edit_signature)
    app.connect("autodoc-skip-member", skip_member)
    app.connect("missing-reference", resolve)
    app.connect("build-finished", add_front_door)
