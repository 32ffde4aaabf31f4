"""Builds the native libraries: on first use into a per-user cache, or ahead of time into a wheel (see setup.py).

The CUDA operators are a library of their own beside the CPU one, so that one can fail without the other. A cached build
is keyed by sources, flags, compiler, torch version and instruction set or device architecture, made under a file lock,
put in place atomically and checked against the digest in its name before it is loaded. Needs the standard library
alone; torch is imported when a build starts.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parents[1]
PREBUILT = PACKAGE / "_native.so"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast")
# LibTorch's stable ABI as of torch 2.11: the library also runs on every later version.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
# One copy of the passes per instruction set; names and flags are those of csrc/cpu/native.cpp.
INSTRUCTION_SETS = {
    "generic": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
}
NVCC_FLAGS = ("-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-cudart=static")
CPU_OPERATORS = "cpu/native.cpp"
CPU_PASSES = ("cpu/elements.cpp", "cpu/groups.cpp", "cpu/cache.cpp")  # once per instruction set
CUDA_KERNELS = ("cuda/cache.cu",)
CUDA_HOST = ("cuda/operators.cpp", "cuda/device.cpp")
# Seconds a compiler call takes, and linking, measured on a core of an AMD EPYC at 2.2 GHz with gcc 12 and nvcc 13.0.
SECONDS = {
    "cpu/native.cpp": 3.6,
    "cpu/elements.cpp": 5.5,
    "cpu/groups.cpp": 3.7,
    "cpu/cache.cpp": 1.5,
    "cuda/cache.cu": 4.5,
    "cuda/operators.cpp": 3,
    "cuda/device.cpp": 1,
    "link": 0.5,
}
TIMEOUT_SECONDS = 600
REMEMBERED_SECONDS = 86_400  # for which a compilation that failed for good is not tried again
TRANSIENT = (
    "no space|cannot allocate|out of memory|memory exhausted|killed|signal|internal compiler error|i/o error|quota"
)


class BuildError(RuntimeError):
    """The library cannot be built here; the message is one line that says why.

    `lasting` where the same sources, flags and compiler would fail the same way again.
    """

    def __init__(self, message: str, lasting: bool = False):
        super().__init__(message)
        self.lasting = lasting


def sources() -> Path:
    """The C++ sources, `cpu/`, `cuda/` and what both include: in an installed package, or beside it in a checkout."""
    return next(path for path in (PACKAGE / "_csrc", PACKAGE.parent / "csrc") if (path / "cpu").is_dir())


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
    raise BuildError(
        f"CXX={named[0]} is not an executable"
        if named
        else "no C++ compiler found (tried c++, g++, clang++); install one or set CXX"
    )


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
    """Compile the CPU sources for `instruction_sets` and put the library at `target`, replacing it atomically.

    Raises:
        BuildError: a compiler call failed; the message holds its first error.
    """
    command = [*compiler(), *FLAGS, f"-I{sources()}"]
    have = [f"-DPGDPO_HAVE_{name.upper()}" for name in instruction_sets]
    # A thin layer over torch's headers, nothing in it loops over latents: -O3 costs more than it brings.
    calls = [(CPU_OPERATORS, [*command, "-O2", *_torch_flags(), *have])]
    for name in instruction_sets:
        own = [*command, *INSTRUCTION_SETS[name], f"-DPGDPO_ISA={name}"]
        for source in CPU_PASSES:  # bytes of the reference cache are defined exactly
            calls.append((source, [*own, "-ffp-contract=off"] if source == "cpu/cache.cpp" else own))
    _compile_and_link(target, calls, command)


def nvcc() -> str:
    """The CUDA compiler: from CUDACXX, CUDA_HOME or CUDA_PATH, the PATH, or /usr/local/cuda.

    Raises:
        BuildError: there is none.
    """
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = *(f"{home}/bin/nvcc" for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"
    for command in filter(None, (os.environ.get("CUDACXX"), *places)):
        if found := shutil.which(command):
            return found
    raise BuildError("no nvcc found; install the CUDA toolkit of torch's CUDA version and set CUDA_HOME to it")


def nvcc_command(architectures: tuple[str, ...]) -> list[str]:
    """The start of a call that compiles for `architectures` such as "90" or links; needs no GPU."""
    return [
        nvcc(),
        *NVCC_FLAGS,
        f"-I{sources()}",
        f"-ccbin={compiler()[0]}",
        *(f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures),
    ]


def compile_cuda_library(target: Path, architectures: tuple[str, ...]) -> None:
    """Compile the CUDA sources for `architectures` such as ("90",) and put the library at `target`. Needs no GPU.

    Raises:
        BuildError: as `compile_library`, or the toolkit does not fit torch.
    """
    _check_toolkit()
    command = nvcc_command(architectures)
    calls = [(name, command) for name in CUDA_KERNELS]
    calls += [(name, [*command, *_torch_flags(), "-DUSE_CUDA"]) for name in CUDA_HOST]
    _compile_and_link(target, calls, command)


def _check_toolkit() -> None:
    """A library holds the runtime of its toolkit, which needs a driver of the same major version as torch's."""
    import torch

    found = re.search(r"release (\d+)\.(\d+)", _call([nvcc(), "--version"]))
    if found is None:
        raise BuildError(f"{nvcc()} --version printed no release")
    if torch.version.cuda and torch.version.cuda.split(".")[0] != found[1]:
        raise BuildError(
            f"{nvcc()} is of CUDA {found[1]}.{found[2]}, torch of CUDA {torch.version.cuda}; "
            f"install a CUDA {torch.version.cuda.split('.')[0]} toolkit and set CUDA_HOME to it"
        )


def _torch_flags() -> list[str]:
    import torch

    return [TORCH_TARGET, f"-I{Path(torch.__file__).parent / 'include'}"]


def _cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def expected_seconds(names: Iterable[str]) -> float:
    """How long compiling these sources takes on this machine's cores, the longest first, and linking, beside what else
    is running now."""
    cores = [0.0] * _cores()
    for seconds in sorted((SECONDS[name] for name in names), reverse=True):
        cores[cores.index(min(cores))] += seconds
    return (max(cores) + SECONDS["link"]) * (1 + os.getloadavg()[0] / len(cores))


def _compile_and_link(target: Path, calls: list[tuple[str, list[str]]], linker: list[str]) -> None:
    """Compile each source with its command side by side, the longest first, link the objects with torch, and replace
    `target`."""
    import torch

    if sys.platform == "win32":
        raise BuildError("the native library is not supported on Windows")
    folder = Path(torch.__file__).parent / "lib"
    link = (
        ["-undefined", "dynamic_lookup"]
        if sys.platform == "darwin"
        else [f"-L{folder}", "-ltorch_cpu", *(["-ltorch_cuda"] if (folder / "libtorch_cuda.so").exists() else [])]
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        calls = sorted(calls, key=lambda call: -SECONDS[call[0]])
        objects = [f"{scratch}/{i}.o" for i in range(len(calls))]
        with ThreadPoolExecutor(_cores()) as pool:
            whole = (
                [*call, "-c", str(sources() / name), "-o", o] for (name, call), o in zip(calls, objects, strict=True)
            )
            list(pool.map(_call, whole))
        _call([*linker, "-shared", *objects, *link, "-o", f"{scratch}/library.so"])
        os.replace(f"{scratch}/library.so", target)


def _call(command: list[str]) -> str:
    """What the command printed.

    Raises:
        BuildError: it failed; the message holds its first error.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]}: {error}") from error
    if done.returncode:
        lines = done.stderr.splitlines() or ["no output"]
        first = next((line for line in lines if "error:" in line or "fatal" in line), lines[-1])
        # a compiler that was killed, had no room or crashed may well succeed the next time
        lasting = done.returncode > 0 and "error:" in done.stderr and not re.search(TRANSIENT, done.stderr, re.I)
        raise BuildError(f"{command[0]} exited with {done.returncode}: {first.strip()}", lasting)
    return done.stdout


def cache_directory() -> Path:
    """PGDPO_FAST_CACHE, or pgdpo_fast under XDG_CACHE_HOME (~/.cache)."""
    named = os.environ.get("PGDPO_FAST_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pgdpo_fast"


class Library(NamedTuple):
    """A library of this machine: what it is named by in the cache, and how it is made."""

    kind: str
    what: str
    files: list[Path]
    identity: list[str]
    sources: tuple[str, ...]
    compile: Callable[[Path], None]

    @property
    def seconds(self) -> float:
        """How long building it takes here."""
        return expected_seconds(self.sources)

    def directory(self) -> Path:
        """The folder named by the contents of `files` and by `identity`."""
        import torch

        digest = hashlib.sha256(
            "\0".join([torch.__version__, platform.machine(), TORCH_TARGET, *self.identity]).encode()
        )
        for path in sorted(self.files):
            digest.update(str(path.relative_to(sources())).encode() + b"\0" + path.read_bytes())
        return cache_directory() / self.kind / digest.hexdigest()[:16]

    def get(self) -> Path:
        """The library, built now if no build of exactly these sources is in the cache.

        Raises:
            BuildError: it cannot be built; a failed compilation is remembered until a source, flag or the compiler
                changes.
        """
        directory = self.directory()
        try:
            _make_private(directory)
            with _locked(directory / "lock"):
                return _find(directory) or _build(directory, self)
        except OSError as error:
            raise BuildError(
                f"cannot use the cache directory {directory} ({error}); set PGDPO_FAST_CACHE to a writable one"
            ) from error

    def is_to_be_built(self) -> bool:
        """Whether `get` would start the compiler."""
        directory = self.directory()
        return not any(directory.glob("native.*.so")) and _remembered(directory) is None


def cpu_library() -> Library:
    """The CPU library for this machine.

    Raises:
        BuildError: there is no compiler.
    """
    name = host_instruction_set()
    return Library(
        kind="native",
        what=f"CPU kernels for {name}",
        files=[*sources().glob("*.h"), *sources().glob("cpu/*")],
        identity=[name, *FLAGS, *compiler(), *_stamp(compiler()[0])],
        sources=(CPU_OPERATORS, *CPU_PASSES),
        compile=lambda target: compile_library(target, (name,)),
    )


def cuda_library(architectures: tuple[str, ...]) -> Library:
    """The CUDA library for devices of `architectures` such as ("90",), otherwise as `cpu_library`."""
    name = ",".join(architectures)
    return Library(
        kind="cuda",
        what=f"CUDA kernels for sm_{name}",
        files=[path for path in sources().rglob("*") if path.suffix in (".h", ".cuh", ".cu", ".cpp")],
        identity=[name, *FLAGS, *NVCC_FLAGS, *compiler(), *_stamp(compiler()[0]), *_stamp(nvcc())],
        sources=(*CUDA_KERNELS, *CUDA_HOST),
        compile=lambda target: compile_cuda_library(target, architectures),
    )


def _stamp(executable: str) -> tuple[str, str, str]:
    binary = Path(executable).resolve()
    return str(binary), str(binary.stat().st_size), str(binary.stat().st_mtime_ns)


def _make_private(directory: Path) -> None:
    """Make the folder and its missing parents for this user alone, and see that nobody else can put a library there.

    Raises:
        BuildError: another user owns a folder on the way, or may write into it (a folder with the sticky bit aside,
            such as /tmp, whose entries only their owners can replace).
    """
    for folder in reversed((directory.absolute(), *directory.absolute().parents)):
        if not folder.exists():
            folder.mkdir(mode=0o700, exist_ok=True)
        _check_owner(folder)
    for folder in directory.resolve().parents:
        _check_owner(folder)


def _check_owner(path: Path) -> None:
    for found in (path.lstat(), path.stat()):
        shared = found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX and not stat.S_ISLNK(found.st_mode)
        if found.st_uid not in (0, os.geteuid()) or shared:
            raise BuildError(
                f"the cache of native libraries is not used: {path} can be changed by other users (owner "
                f"{found.st_uid}, mode {stat.S_IMODE(found.st_mode):o}); run: chmod go-w {path}, or set "
                "PGDPO_FAST_CACHE to a folder of your own"
            )


def _find(directory: Path) -> Path | None:
    """The library in `directory` if its content is what its name says; a damaged one is deleted."""
    for path in directory.glob("native.*.so"):
        _check_owner(path)
        if path.name == _library_name(path):
            return path
        path.unlink()
    return None


def _library_name(path: Path) -> str:
    return f"native.{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}.so"


def _failure(directory: Path) -> Path:
    return directory / "failure.txt"


def _remembered(directory: Path) -> str | None:
    """Why the last attempt failed, where that was for good and not long ago."""
    failure = _failure(directory)
    recent = failure.exists() and time.time() - failure.stat().st_mtime < REMEMBERED_SECONDS
    return failure.read_text() if recent else None


def _build(directory: Path, library: Library) -> Path:
    if reason := _remembered(directory):
        raise BuildError(reason)
    logger, began = logging.getLogger("pgdpo_fast"), time.monotonic()
    cores = f"{_cores()} core{'s' if _cores() > 1 else ''}"
    logger.warning(
        "building the native %s, once, about %.0f s on %s: %s", library.what, library.seconds, cores, directory
    )
    target, failure = directory / "unnamed.so", _failure(directory)
    try:
        library.compile(target)
    except BuildError as error:
        if not error.lasting:
            raise
        told = BuildError(f"{error} (remembered for a day; to try again at once, delete {failure})")
        failure.write_text(str(told))
        raise told from error
    failure.unlink(missing_ok=True)
    logger.warning("built in %.0f s", time.monotonic() - began)
    target.chmod(0o600)
    path = directory / _library_name(target)
    os.replace(target, path)
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
