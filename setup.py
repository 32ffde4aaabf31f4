"""All is declared in pyproject.toml, but for two things: a wheel takes of `bench/` only what `pgdpo-fast bench` runs,
and PGDPO_FAST_BUILD_NATIVE=1 adds the native CPU library to it.

Such a wheel fits one platform and any Python: the library uses LibTorch's stable ABI and picks its instruction set when
it is loaded. Building it needs a C++ compiler and torch, which is then fetched into pip's build environment.
"""

import importlib.util
import os
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

BENCH_MODULES = ("__init__", "contenders", "harness", "report", "shapes", "table")


class BuildPy(build_py):
    """Without the scripts and tests of `bench/`, which run from a clone."""

    def find_package_modules(self, package, package_dir):
        found = super().find_package_modules(package, package_dir)
        return [item for item in found if package != "pgdpo_fast.bench" or item[1] in BENCH_MODULES]


class BuildPyAndNative(BuildPy):
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
    setup(cmdclass={"build_py": BuildPy})
