"""The C core, which is optional: without a compiler or Python's headers the Python engine does everything."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "shmstore.engine._core",
            ["shmstore/engine/core.c", "shmstore/engine/module.c"],
            depends=["shmstore/engine/core.h"],
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            extra_compile_args=["-std=c11", "-O3"],
            libraries=["pthread"],
            py_limited_api=True,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
