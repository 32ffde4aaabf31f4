"""Where no terminal draws a bar, long commands print lines with count, rate, what was dropped, and time left."""

from __future__ import annotations

import io
import re

from rich.console import Console

from pgdpo_fast.cli import main
from pgdpo_fast.cli.progress import SECONDS, PlainProgress, rows_progress
from pgdpo_fast.data.synthetic import render_pairs

SMALL = ["--codec", "pixel-unshuffle", "--frames", "3", "--height", "16", "--width", "16"]


def test_a_line_now_and_then_tells_count_rate_drops_and_time_left():
    lines, now = [], [100.0]
    progress = PlainProgress("encoding pairs", lines.append, lambda: now[0])
    for done in range(10, 1001, 10):  # ten were there before
        progress(done, 1000)
        progress.dropped = 2 if done >= 500 else 0
        now[0] += 5.0
    assert len(lines) == 2 + 99 * 5 // SECONDS - 1
    assert lines[0] == "encoding pairs: 10 of 1000 (1%)"
    assert lines[1] == "encoding pairs: 40 of 1000 (4%), 2 per second, 0:08:00 left"
    assert lines[-1] == "encoding pairs: 1000 of 1000 (100%), 2 per second, 0:00:00 left, 2 dropped"


def test_slow_items_are_told_in_seconds_each():
    lines, now = [], [0.0]
    progress = PlainProgress("reference forwards", lines.append, lambda: now[0])
    progress(0, 4)
    now[0] = 60.0
    progress(1, 4)
    assert lines[-1] == "reference forwards: 1 of 4 (25%), 60 s each, 0:03:00 left"


def test_other_processes_than_the_first_print_nothing():
    written = io.StringIO()
    with rows_progress(Console(file=written), "reference forwards", shown=False) as progress:
        progress(1, 1)
    assert written.getvalue() == ""


def test_encode_and_cache_reference_tell_their_progress_without_a_terminal(tmp_path, tiny_config, capfd):
    manifest = render_pairs(tmp_path / "clips", pairs=4, frames=3, height=16, width=16)
    clip = next((tmp_path / "clips").rglob("*.mp4"))
    clip.write_bytes(b"no video")
    flags = ["-m", str(manifest), "-o", str(tmp_path / "store"), *SMALL, "--max-dropped", "0.5"]
    assert main(["encode", *flags]) == 0
    said = capfd.readouterr().err
    told = ["hashing clips: 8 of 8 (100%)", "reading headers of pairs: 4 of 4 (100%)", "encoding pairs: 4 of 4 (100%)"]
    places = [said.index(line) for line in told]
    assert places == sorted(places)
    assert re.search(r"^encoding pairs: 4 of 4 \(100%\), .*left, 1 dropped$", said, re.MULTILINE), said
    (tmp_path / "settings.yaml").write_text(tiny_config().to_yaml())
    assert main(["cache-reference", str(tmp_path / "settings.yaml"), "-o", str(tmp_path / "cache")]) == 0
    said = capfd.readouterr().err
    assert re.search(r"^reference forwards: (\d+) of \1 \(100%\), .*left$", said, re.MULTILINE), said
