"""The C core is optional: installing succeeds without a compiler and without Python's headers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import built_core
import hidden
import pytest
from engines import needs_core
from processes import ROOT

from shmstore import ConfigError, Store
from shmstore.engine import core


def build(place: Path, *before: str, code: str = "", **environ: str) -> tuple[str, list[str]]:
    """Build a wheel; return its name, and the files of the core in it. ``code`` runs before setup.py."""
    script = f"{code}\nimport runpy; runpy.run_path('setup.py', run_name='__main__')"
    options = [
        "egg_info", f"--egg-base={place}", "build", f"--build-base={place}/build",
        "bdist_wheel", f"--bdist-dir={place}/tree", f"--dist-dir={place}/dist",
    ]  # fmt: skip
    clean = {key: value for key, value in os.environ.items() if key not in ("CC", "LDSHARED", "CFLAGS", "LDFLAGS")}
    done = subprocess.run(
        [*before, sys.executable, "-c", script, *options], cwd=ROOT,
        env=clean | {"CFLAGS": "-O0"} | environ, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (place / "dist").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "shmstore/engine/core.py" in names
    return wheel.name.removeprefix("shmstore-0.1.0-"), [name for name in names if name.endswith(".so")]


FOR_ANY_MACHINE: tuple[str, list[str]] = ("py3-none-any.whl", [])

can_build = pytest.mark.skipif(not built_core.can_build(), reason="no C compiler, or no headers of Python")


def test_building_without_a_compiler(tmp_path: Path) -> None:
    assert build(tmp_path, PATH=hidden.path_without_compilers(tmp_path / "bin")) == FOR_ANY_MACHINE


@pytest.mark.skipif(not hidden.can_hide_headers(), reason="this user may not hide a directory from a command")
def test_building_without_the_headers(tmp_path: Path) -> None:
    assert build(tmp_path, *hidden.without_headers(tmp_path / "empty")) == FOR_ANY_MACHINE


@can_build
def test_with_both_and_after_that_no_stale_core(tmp_path: Path) -> None:
    tag, core_files = build(tmp_path)
    assert re.fullmatch(r"cp311-abi3-linux_\w+\.whl", tag)
    assert core_files == ["shmstore/engine/_core.abi3.so"]
    shutil.rmtree(tmp_path / "dist")
    assert build(tmp_path, CC="/nonexistent/cc") == FOR_ANY_MACHINE


def test_free_threaded_python_gets_no_core(tmp_path: Path) -> None:
    """setuptools refuses py_limited_api there. No such Python is needed to see that: it asks sysconfig, too."""
    free_threaded = "import sysconfig; sysconfig.get_config_vars()['Py_GIL_DISABLED'] = 1"
    assert build(tmp_path, code=free_threaded) == FOR_ANY_MACHINE


def test_another_platform_gets_no_core(tmp_path: Path) -> None:
    assert build(tmp_path, code="import sys, setuptools.command.build_ext; sys.platform = 'darwin'") == FOR_ANY_MACHINE


# As if it had not been built: None in `sys.modules` makes an import fail.
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


def test_free_threaded_python_is_told_that_there_is_no_core() -> None:
    script = "import sysconfig; sysconfig.get_config_vars()['Py_GIL_DISABLED'] = 1" + WITHOUT
    without = {key: value for key, value in os.environ.items() if key != "SHMSTORE_ENGINE"}
    done = subprocess.run([sys.executable, "-c", script], env=without, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("there is none for free-threaded Python)\n")


OTHER = """
import sys
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
loader = ExtensionFileLoader("shmstore.engine._core", sys.argv[1])
sys.modules["shmstore.engine._core"] = module = module_from_spec(spec_from_loader("shmstore.engine._core", loader))
loader.exec_module(module)
from shmstore.codec import serializers
assert serializers.is_plain is None
"""


@pytest.mark.skipif(not built_core.can_build(), reason="no C compiler, or no headers of Python")
@pytest.mark.parametrize(
    "change",
    [
        ("    CORE_VERSION, SLOT,", "    CORE_VERSION + 1, SLOT,"),
        ("PENDING, STRUCTURE, TICK,", "STRUCTURE, PENDING, TICK,"),
    ],
    ids=["calls", "layout"],
)
def test_a_core_of_other_sources_is_not_used(change: tuple[str, str], tmp_path: Path) -> None:
    old, new = change
    source = (built_core.SOURCES / "core.c").read_text()
    numbers = source[source.index("core_interface[CORE_NUMBERS]") :]
    assert numbers.count(old) == 1
    path = built_core.build(tmp_path, replace=((numbers, numbers.replace(old, new)),))
    without = {key: value for key, value in os.environ.items() if key != "SHMSTORE_ENGINE"}
    script = OTHER + WITHOUT.replace('sys.modules["shmstore.engine._core"] = None\n', "")
    done = subprocess.run([sys.executable, "-c", script, path], env=without, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("python\npython (the C core was built from other sources"), done.stdout
    assert f"remove {path} and install shmstore again" in done.stdout


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
