"""`pgdpo-fast doctor`: what this machine can do, and the exact fix for what it cannot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Row(NamedTuple):
    """One finding: `state` is ok, optional (works without it) or missing (training does not work)."""

    area: str
    state: str
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Doctor:
    """Check the installation: versions, devices, loss backends, compilers, video codecs, disk.

    Every row that is not fine says what to run. Exit code 0 when training works here, 2 when it does not.
    """

    build: bool = False
    """Build the native libraries now, which their first use would do otherwise, and say how long it took."""
    json: bool = False
    """Print the rows as JSON instead of a table."""

    def run(self) -> int:
        import json

        from pgdpo_fast.errors import ConfigError

        rows = checks(self.build)
        if self.json:
            print(json.dumps([row._asdict() for row in rows], indent=2))
        else:
            _print(rows)
        return ConfigError.exit_code if any(row.state == "missing" for row in rows) else 0


def checks(build: bool = False) -> list[Row]:
    """All findings, in the order they are printed; with `build` after building what native libraries are not there."""
    return [*_packages(), *_devices(), *_libraries(build), *_backends(), *_tools(), _video(), _disk()]


def _packages() -> list[Row]:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import pgdpo_fast

    rows = [Row("pgdpo-fast", "ok", f"{pgdpo_fast.__version__}, Python {platform.python_version()}")]
    needed = {
        "torch": ("missing", "pip install 'torch>=2.11'"),
        "diffusers": ("missing", "pip install 'pgdpo-fast[train]'"),
        "peft": ("missing", "pip install 'pgdpo-fast[train]'"),
        "transformers": ("missing", "pip install 'pgdpo-fast[train]'"),
        "triton": ("optional", "pip install 'triton>=3.6'  (fused loss on NVIDIA GPUs)"),
        "flash-attn": ("optional", "pip install 'pgdpo-fast[gpu]'  (attention; SDPA is used without it)"),
        "xformers": ("optional", "pip install 'pgdpo-fast[gpu]'  (attention; SDPA is used without it)"),
        "tensorboard": ("optional", "pip install tensorboard  (metrics.jsonl is written either way)"),
    }
    for name, (state, fix) in needed.items():
        try:
            rows.append(Row(name, "ok", version(name)))
        except PackageNotFoundError:
            rows.append(Row(name, state, "not installed", fix))
    return rows


def _devices() -> list[Row]:
    import torch

    if not torch.cuda.is_available():
        return [Row("device", "ok", f"CPU, {torch.get_num_threads()} threads; no CUDA device")]
    rows = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        rows.append(
            Row(
                f"device {index}",
                "ok",
                f"{device.name}, {device.total_memory / 2**30:.0f} GiB, "
                f"compute capability {device.major}.{device.minor}",
            )
        )
    return rows


def _device():
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _split(found: str) -> tuple[str, str]:
    """A reason, and what its last part says to do about it."""
    what, _, fix = found.partition("; ")
    return what, fix


def _libraries(build: bool) -> list[Row]:
    import time

    import torch

    from pgdpo_fast.backends import native

    rows = []
    for device in dict.fromkeys((torch.device("cpu"), _device())):
        area, expected = f"native library {device.type}", native.seconds_to_build(device)
        if expected is not None and not build:
            rows.append(Row(area, "optional", _unbuilt(expected), "pgdpo-fast doctor --build"))
            continue
        began = time.monotonic()
        path, reason = native.load(device)
        if reason is not None:
            rows.append(Row(area, "optional", *_split(reason)))
        else:
            took = "is there" if expected is None else f"built in {time.monotonic() - began:.1f} s"
            rows.append(Row(area, "ok", f"{took}: {path}"))
    return rows


def _unbuilt(seconds: float) -> str:
    return f"not built yet, its first use takes about {seconds:.0f} s for that"


def _backends() -> list[Row]:
    from pgdpo_fast import backends
    from pgdpo_fast.backends import native

    device = _device()
    seconds = native.seconds_to_build(device)  # asking for what is not built would build it
    waits = None if seconds is None else Row("", "optional", _unbuilt(seconds), "pgdpo-fast doctor --build")
    rows = []
    for name in backends.NAMES:
        area = f"loss backend {name}"
        if waits and name == "native" and device.type == "cpu":
            rows.append(waits._replace(area=area))
            continue
        reason = backends.unavailable(name, device)
        rows.append(Row(area, *(("ok", f"runs on {device.type}") if reason is None else ("optional", *_split(reason)))))
    if waits:
        rows.append(waits._replace(area="reference cache"))
    else:
        reason = native.rows_unavailable(device)
        found = f"rows are packed in one pass on {device.type}"
        rows.append(Row("reference cache", *(("ok", found) if reason is None else ("optional", *_split(reason)))))
    auto = "native, once it is built," if waits and device.type == "cpu" else backends.select("auto", device)
    rows.append(Row("loss backend auto", "ok", f"picks {auto} on {device.type}"))
    return rows


def _tools() -> list[Row]:
    from shutil import which

    tools = {
        "g++": "install a C++17 compiler  (native extension)",
        "nvcc": "install the CUDA toolkit  (kernels of the reference cache)",
    }
    return [
        Row(tool, "ok" if which(tool) else "optional", which(tool) or "not found", "" if which(tool) else fix)
        for tool, fix in tools.items()
    ]


def _video() -> Row:
    try:
        import av
    except ImportError:
        return Row("video", "missing", "PyAV not installed", "pip install 'pgdpo-fast[train]'")
    if "libx264" in av.codecs_available:
        return Row("video", "ok", f"PyAV {av.__version__} decodes video and writes H.264")
    return Row("video", "optional", f"PyAV {av.__version__} without libx264", "pip install --force-reinstall av")


def _disk() -> Row:
    from shutil import disk_usage

    free = disk_usage(".").free / 2**30
    return Row(
        "disk",
        "ok" if free > 10 else "optional",
        f"{free:.0f} GiB free here",
        "" if free > 10 else "latents of 1,000 pairs at 480p take about 8 GiB; free some space",
    )


def _print(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    marks = {"ok": "[green]ok[/]", "optional": "[yellow]optional[/]", "missing": "[red]missing[/]"}
    table = Table("", "", "found", "fix", box=None, pad_edge=False)
    for row in rows:
        table.add_row(row.area, marks[row.state], escape(row.found), escape(row.fix))
    Console().print(table)
