"""All is declared in pyproject.toml, but for the native CPU library that PGDPO_FAST_BUILD_NATIVE=1 adds to a wheel.

Such a wheel fits one platform and any Python: the library uses LibTorch's stable ABI and picks its instruction set when
it is loaded. Building it needs a C++ compiler and torch, which is then fetched into pip's build environment.
"""

import importlib.util
import os
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py


class BuildPyAndNative(build_py):
    def run(self):
        super().run()
        if self.editable_mode:
            return  # built on first use instead
        path = Path(__file__).resolve().parent / "pgdpo_fast" / "backends" / "build.py"
        spec = importlib.util.spec_from_file_location("pgdpo_fast_build", path)
        build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
        target = Path(self.build_lib).resolve() / "pgdpo_fast" / build.PREBUILT.name
        build.compile_library(target, build.all_instruction_sets())


class PlatformDistribution(Distribution):
    def has_ext_modules(self):
        return True  # a platform wheel, and a build folder that one without the library does not share


class PlatformWheel(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


if os.environ.get("PGDPO_FAST_BUILD_NATIVE") == "1":
    setup(
        distclass=PlatformDistribution,
        cmdclass={"build_py": BuildPyAndNative, "bdist_wheel": PlatformWheel},
        setup_requires=["torch>=2.11"],
    )
else:
    setup()
