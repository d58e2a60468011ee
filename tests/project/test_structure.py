"""The structure of the package, as the map in CONTRIBUTING.md draws it: a package of modules counts as one."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

from processes import ROOT

FLOORS = 10


def imports() -> dict[str, set[str]]:
    """Return what each part of the package imports of the others, anywhere in its code."""
    found: dict[str, set[str]] = {}
    for path in Path(ROOT, "shmstore").rglob("*.py"):
        part = path.relative_to(Path(ROOT, "shmstore")).parts[0].removesuffix(".py")
        if part == "__init__":
            continue  # it only hands names on
        names = found.setdefault(part, set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "shmstore":
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("shmstore."):
                names.add(str(node.module).split(".")[1])
            elif isinstance(node, ast.Import):
                names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("shmstore.")}
        names.discard(part)
    return {part: names & found.keys() for part, names in found.items()}


def test_imports_only_point_down_and_the_structure_has_few_floors() -> None:
    graph = imports()
    floor: dict[str, int] = {}
    for part in TopologicalSorter(graph).static_order():  # raises CycleError
        floor[part] = 1 + max((floor[below] for below in graph[part]), default=0)
    assert graph["server"] > {"store", "engine", "system"}
    assert "client" not in graph["server"], "a server is imported without its clients"
    assert max(floor.values()) <= FLOORS, sorted(floor.items(), key=lambda each: -each[1])


def test_all_that_happens_at_a_fork_is_listed_in_one_place() -> None:
    listed = str(ast.get_docstring(ast.parse(Path(ROOT, "shmstore/system/forks.py").read_text())))
    found: dict[str, list[str]] = {}
    for path in Path(ROOT, "shmstore").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and node.name != "ForkAware":
                methods = [each.name for each in node.body if isinstance(each, ast.FunctionDef)]
                if "after_fork_in_child" in methods:
                    found.setdefault(node.name, []).append(f"{path.parent.name}.{path.stem}.{node.name}")
    assert len(found) > 5
    for name, full in found.items():
        names = [name] if len(full) == 1 else full
        assert not [each for each in names if not re.search(rf"\b{re.escape(each)}`", listed)]


# In these, no exception of a signal handler is lost: no handler of the application runs in the server and in commands,
# or in threads; the TimeoutError in routes is the one of redis-py, which `exchange` has looked into.
NO_HANDLER = ("server/", "cli/", "client/watch.py", "store/pruner.py", "redis/routes.py", "system/signals.py")
BROAD = {"OSError", "TimeoutError", "Exception", "BaseException"}


def names(node: ast.AST | None) -> set[str]:
    return set() if node is None else {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}


def test_code_that_drops_or_converts_an_oserror_passes_on_that_of_a_signal_handler() -> None:
    """The usual handler of SIGALRM raises TimeoutError, which is an OSError."""
    lost = []
    for path in sorted(Path(ROOT, "shmstore").rglob("*.py")):
        name = str(path.relative_to(Path(ROOT, "shmstore")))
        for node in () if name.startswith(NO_HANDLER) else ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                within = [each for child in node.body for each in ast.walk(child)]
                again = any(isinstance(each, ast.Raise) and each.exc is None for each in within)
                passed = again or "pass_on_interruption" in set().union(*(names(each) for each in within))
                caught = names(node.type)
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
                passed, caught = False, set().union(*(names(each) for each in node.args))
            else:
                continue
            if caught & BROAD and not passed:
                lost.append(f"{name}:{node.lineno}")
    assert not lost
