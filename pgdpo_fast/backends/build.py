"""Builds the native library: on first use into a per-user cache, or ahead of time into a wheel (see setup.py).

A cached build is keyed by sources, flags, compiler, torch version and instruction set, made under a file lock, put in
place atomically and checked against the digest in its name before it is loaded. Needs the standard library alone;
torch is imported when a build starts.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
PREBUILT = PACKAGE / "_native.so"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast")
# LibTorch's stable ABI as of torch 2.11: the library also runs on every later version.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
# One copy of the passes per instruction set; names and flags are those of csrc/native.cpp.
INSTRUCTION_SETS = {
    "generic": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
}
TIMEOUT_SECONDS = 600


class BuildError(RuntimeError):
    """The library cannot be built here; the message is one line that says why."""


def sources() -> Path:
    """The C++ sources: inside an installed package, or beside it in a checkout."""
    return next(path for path in (PACKAGE / "_csrc", PACKAGE.parent / "csrc") if (path / "native.cpp").exists())


def compiler() -> list[str]:
    """The C++ compiler's command, from CXX or the PATH.

    Raises:
        BuildError: there is none.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        path = shutil.which(command[0])
        if path:
            return [path, *command[1:]]
    raise BuildError(f"CXX={named[0]} is not an executable" if named else
                     "no C++ compiler found (tried c++, g++, clang++); install one or set CXX")


def host_instruction_set() -> str:
    """The widest instruction set of this machine that the passes are written for."""
    import torch

    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "generic"
    return {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "generic")


def all_instruction_sets() -> tuple[str, ...]:
    """What a library for other machines of this kind must contain."""
    return tuple(INSTRUCTION_SETS) if platform.machine().lower() in ("x86_64", "amd64") else ("generic",)


def compile_library(target: Path, instruction_sets: tuple[str, ...]) -> None:
    """Compile the sources for `instruction_sets` and put the library at `target`, replacing it atomically.

    Raises:
        BuildError: a compiler call failed; the message holds its first error.
    """
    import torch

    if sys.platform == "win32":
        raise BuildError("the native library is not supported on Windows")
    command, root, torch_root = [*compiler(), *FLAGS], sources(), Path(torch.__file__).parent
    link = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else [f"-L{torch_root / 'lib'}", "-ltorch_cpu"]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        have = [f"-DPGDPO_HAVE_{name.upper()}" for name in instruction_sets]
        calls = {f"{scratch}/native.o": [
            *command, TORCH_TARGET, f"-I{torch_root / 'include'}", *have, "-c", str(root / "native.cpp")]}
        for name in instruction_sets:
            calls[f"{scratch}/{name}.o"] = [
                *command, *INSTRUCTION_SETS[name], f"-DPGDPO_ISA={name}", "-c", str(root / "pair.cpp")]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda item: _call([*item[1], "-o", item[0]]), calls.items()))
        _call([*command, "-shared", *calls, *link, "-o", f"{scratch}/library.so"])
        os.replace(f"{scratch}/library.so", target)


def _call(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]}: {error}") from error
    if done.returncode:
        lines = done.stderr.splitlines()
        first = next((line for line in lines if "error:" in line or "fatal" in line), lines[-1] if lines else "no output")
        raise BuildError(f"{command[0]} exited with {done.returncode}: {first.strip()}")


def cache_directory() -> Path:
    """PGDPO_FAST_CACHE, or pgdpo_fast under XDG_CACHE_HOME (~/.cache)."""
    named = os.environ.get("PGDPO_FAST_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pgdpo_fast"


def cached_library() -> Path:
    """The library for this machine, built now if no build of exactly these sources is in the cache.

    Raises:
        BuildError: it cannot be built; a failed compilation is remembered until a source, flag or the compiler changes.
    """
    directory = cache_directory() / "native" / _key()
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(directory / "lock"):
            return _find(directory) or _build(directory)
    except OSError as error:
        raise BuildError(f"cannot use the cache directory {directory} ({error}); set PGDPO_FAST_CACHE to a writable one"
                         ) from error


def _key() -> str:
    import torch

    command = compiler()
    binary = Path(command[0]).resolve()
    identity = [torch.__version__, platform.machine(), host_instruction_set(), *FLAGS, TORCH_TARGET, *command,
                str(binary), str(binary.stat().st_size), str(binary.stat().st_mtime_ns)]
    digest = hashlib.sha256("\0".join(identity).encode())
    for path in sorted([*sources().glob("*.h"), *sources().glob("*.cpp")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _find(directory: Path) -> Path | None:
    """The library in `directory` if its content is what its name says; a damaged one is deleted."""
    for path in directory.glob("native.*.so"):
        if path.name == _library_name(path):
            return path
        path.unlink()
    return None


def _library_name(path: Path) -> str:
    return f"native.{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}.so"


def _build(directory: Path) -> Path:
    failure = directory / "failure.txt"
    if failure.exists():
        raise BuildError(f"{failure.read_text()} (to try again, delete {failure})")
    name = host_instruction_set()
    logging.getLogger("pgdpo_fast").warning("building the native CPU kernels for %s, once: %s", name, directory)
    try:
        compile_library(directory / "unnamed.so", (name,))
    except BuildError as error:
        failure.write_text(str(error))
        raise
    path = directory / _library_name(directory / "unnamed.so")
    os.replace(directory / "unnamed.so", path)
    return path


@contextmanager
def _locked(path: Path):
    """Exclusive among processes; released by the system even when its holder dies."""
    try:
        import fcntl
    except ImportError as error:
        raise BuildError("the native library is not supported on Windows") from error
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
