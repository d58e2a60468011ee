"""
What pyproject.toml cannot say: the C core, and the description for a package index.

The C core is optional: without a compiler or Python's headers the Python engine does everything.
"""

import re
import sys
import sysconfig
import tomllib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Free-threaded Python has no Limited API (until 3.15), and the core relies on the GIL.
HAS_CORE = sys.platform == "linux" and not sysconfig.get_config_var("Py_GIL_DISABLED")

CORE = Extension(
    "shmstore.engine._core",
    [f"shmstore/engine/{name}.c" for name in ("core", "digest", "module")],
    depends=["shmstore/engine/core.h"],
    define_macros=[("Py_LIMITED_API", "0x030B0000")],
    extra_compile_args=["-std=c11", "-O3"],
    extra_link_args=["-pthread"],
    py_limited_api=True,
    optional=True,
)


class BuildCore(build_ext):
    """Builds the core. If that fails, an older build is not used instead, and the wheel is for any machine."""

    def run(self) -> None:
        outputs = [Path(path) for path in (*self.get_outputs(), *self.get_output_mapping().values())]
        for output in outputs:
            output.unlink(missing_ok=True)
        super().run()
        if not all(output.exists() for output in outputs):
            self.distribution.ext_modules = []
            self.get_finalized_command("bdist_wheel").root_is_pure = True  # the tag is py3-none-any


def description() -> str:
    """Return README.md with absolute links: a package index shows it without the files that they lead to."""
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    readme = Path("README.md").read_text(encoding="utf-8")
    repository = project.get("urls", {}).get("Repository")
    if repository is None:
        return readme

    def absolute(link: re.Match[str]) -> str:
        view = "raw" if link["image"] else "blob"
        return f"{link['image']}{link['text']}({repository}/{view}/v{project['version']}/{link['path']})"

    return re.sub(r"(?P<image>!?)(?P<text>\[[^]]*\])\((?!\w+:|#)(?P<path>[^)\s]+)\)", absolute, readme)


setup(
    long_description=description(),
    long_description_content_type="text/markdown",
    ext_modules=[CORE] if HAS_CORE else [],
    cmdclass={"build_ext": BuildCore},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if HAS_CORE else {},
)
