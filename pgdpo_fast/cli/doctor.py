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

    json: bool = False
    """Print the rows as JSON instead of a table."""

    def run(self) -> int:
        import json

        from pgdpo_fast.errors import ConfigError

        rows = checks()
        if self.json:
            print(json.dumps([row._asdict() for row in rows], indent=2))
        else:
            _print(rows)
        return ConfigError.exit_code if any(row.state == "missing" for row in rows) else 0


def checks() -> list[Row]:
    """All findings, in the order they are printed."""
    return [*_packages(), *_devices(), *_backends(), *_tools(), _video(), _disk()]


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


def _backends() -> list[Row]:
    import torch

    from pgdpo_fast import backends
    from pgdpo_fast.backends import native

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for name in backends.NAMES:
        reason = backends.unavailable(name, device)
        found = f"runs on {device.type}" if reason is None else reason
        what, _, fix = found.partition("; ")
        rows.append(Row(f"loss backend {name}", "ok" if reason is None else "optional", what, fix))
    reason = native.rows_unavailable(device)
    found, _, fix = (reason or f"rows are packed in one pass on {device.type}").partition("; ")
    rows.append(Row("reference cache", "optional" if reason else "ok", found, fix))
    rows.append(Row("loss backend auto", "ok", f"picks {backends.select('auto', device)} on {device.type}"))
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
