"""`pgdpo-fast report`: one HTML page about a run, or several runs compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

__all__ = ["Report"]


@dataclass
class Report:
    """Write report.html and summary.json about one run directory, or several compared on one page."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """run directories, as written by `pgdpo-fast train`"""
    out: Path | None = None
    """folder for the report; unset means the run directory, or the current folder for several runs"""
    title: str = "Preference optimization report"
    """title of the page"""

    def run(self) -> int:
        from pgdpo_fast.analysis.report import render_report
        from pgdpo_fast.storage import make_folder

        if self.out is not None:
            make_folder(self.out)
        out = self.out or (self.runs[0] if len(self.runs) == 1 else Path("."))
        report = render_report(self.runs, out, title=self.title)
        print(f"report   {report.html}\nsummary  {report.summary}")
        return 0
