"""The C core is optional: installing succeeds without a compiler and without Python's headers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import built_core
import pytest
from engines import needs_core
from processes import ROOT

from shmstore import ConfigError, Store
from shmstore.engine import core


def build(directory: Path, **environ: str) -> tuple[list[str], str]:
    """Build as an installation does; return which files of the core are there, and what was said."""
    places = [f"--build-lib={directory}/lib", f"--build-temp={directory}/temp"]
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", *places], cwd=ROOT,
        env=os.environ | environ, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return [path.name for path in directory.rglob("_core*.so")], done.stdout + done.stderr


def test_without_a_compiler(tmp_path: Path) -> None:
    built, said = build(tmp_path, CC="/nonexistent/cc")
    assert not built
    assert "_core" in said


@pytest.mark.skipif(not built_core.can_build(), reason="no C compiler, or no headers of Python")
def test_without_the_headers(tmp_path: Path) -> None:
    built, said = build(tmp_path, CFLAGS="-nostdinc")
    assert not built
    assert "_core" in said


@pytest.mark.skipif(not built_core.can_build(), reason="no C compiler, or no headers of Python")
def test_with_both(tmp_path: Path) -> None:
    built, _ = build(tmp_path)
    assert built == ["_core.abi3.so"]


# As if it had not been built: imports find no module where None stands.
WITHOUT = """
import sys
sys.modules["shmstore.engine._core"] = None
from shmstore import Store
from shmstore.engine import core
with Store(memory=2**18) as store:
    store.set("a", {"n": 1})
    assert store.get("a") == {"n": 1}
    print(store.stats().engine)
print(core.describe())
"""


def test_without_the_core_the_python_engine_runs_and_says_how_to_get_it() -> None:
    without = {key: value for key, value in os.environ.items() if key != "SHMSTORE_ENGINE"}
    done = subprocess.run([sys.executable, "-c", WITHOUT], env=without, capture_output=True, text=True, check=True)
    engine, described = done.stdout.splitlines()
    assert engine == "python"
    assert "was not built" in described
    assert "install a C compiler" in described
    forced = subprocess.run(
        [sys.executable, "-c", WITHOUT], env=without | {"SHMSTORE_ENGINE": "c"}, capture_output=True
    )
    assert b"ConfigError: SHMSTORE_ENGINE=c, but the C core was not built" in forced.stderr


@needs_core
def test_a_core_of_other_sources_is_not_used() -> None:
    other = "import types" + WITHOUT.replace("] = None", "] = types.SimpleNamespace(LAYOUT=(12,))")
    without = {key: value for key, value in os.environ.items() if key != "SHMSTORE_ENGINE"}
    done = subprocess.run([sys.executable, "-c", other], env=without, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("python\npython (the C core was built from other sources")


def test_the_engine_is_chosen_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHMSTORE_ENGINE", "python")
    with Store(memory=2**18) as store:
        assert store.stats().engine == "python"
    assert core.describe().startswith("python (")
    monkeypatch.setenv("SHMSTORE_ENGINE", "fast")
    with pytest.raises(ConfigError, match="SHMSTORE_ENGINE=fast is neither python nor c"):
        Store(memory=2**18)


@needs_core
def test_the_core_runs_where_it_was_built(monkeypatch: pytest.MonkeyPatch) -> None:
    for chosen in ("", "c"):
        monkeypatch.setenv("SHMSTORE_ENGINE", chosen)
        with Store(memory=2**18) as store:
            assert store.stats().engine == "c"
        assert core.describe() == "c"
