"""A manifest row is used or dropped with a reason; faults of the whole file are one-line errors with the fix."""

from __future__ import annotations

import csv
import json

import pytest

from pgdpo_fast.data.manifest import read_manifest, used_dropped_table, write_manifest
from pgdpo_fast.errors import ConfigError, DataError
from pgdpo_fast.printable import printable


@pytest.fixture
def folder(tmp_path):
    for name in ("a", "b", "c", "d"):
        (tmp_path / f"{name}.mp4").write_bytes(name.encode())
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "same as a.mp4").write_bytes(b"a")
    return tmp_path


def row(**changes):
    return {"id": "one", "prompt": "a cat", "chosen": "a.mp4", "rejected": "b.mp4", **changes}


def jsonl(folder, *rows):
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(item) for item in rows))
    return path


def table(folder, *rows, name="pairs.csv"):
    path = folder / name
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def parquet(folder, *rows):
    import pyarrow
    import pyarrow.parquet

    path = folder / "pairs.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


@pytest.mark.parametrize("write", [jsonl, table, parquet])
def test_three_file_formats_give_the_same_pairs(folder, write):
    full = row(weight=2.5, chosen_score=0.75, rejected_score=0.25, negative_prompt="blurry", first_frame="c.mp4")
    other = row(id="two", chosen=str(folder / "c.mp4"), rejected="sub/../d.mp4", weight=None, chosen_score=None,
                rejected_score=None, negative_prompt=None, first_frame=None)  # fmt: skip
    first, second = read_manifest(write(folder, full, other)).pairs
    assert first.chosen == folder / "a.mp4" and first.first_frame == folder / "c.mp4"
    assert (first.weight, first.chosen_score, first.rejected_score) == (2.5, 0.75, 0.25)
    assert (first.prompt, first.negative_prompt) == ("a cat", "blurry")
    assert second.chosen == folder / "c.mp4" and second.rejected == folder / "d.mp4"
    assert (second.weight, second.chosen_score, second.negative_prompt) == (1.0, None, "")


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"chosen": "nowhere.mp4"}, "chosen file missing"),
        ({"rejected": "empty.mp4"}, "rejected file empty"),
        ({"rejected": "./a.mp4"}, "chosen and rejected are the same file"),
        ({"prompt": "  "}, "prompt empty"),
        ({"prompt": 7}, "prompt is not text"),
        ({"chosen_score": 1, "rejected_score": 1.0}, "tie: scores are equal"),
        ({"chosen_score": 1, "rejected_score": 2}, "rejected_score is higher than chosen_score"),
        ({"chosen_score": 1}, "only one of chosen_score and rejected_score given"),
        ({"weight": "heavy"}, "weight is not a finite number"),
        ({"weight": float("nan")}, "weight is not a finite number"),
        ({"weight": -1}, "weight is negative"),
        ({"first_frame": "nowhere.png"}, "first_frame file missing"),
        ({"rejected": "same as a.mp4"}, "chosen and rejected hold the same bytes"),
        ({"chosen": "x" * 5000}, "chosen file missing"),
        ({"chosen": "a\0b.mp4"}, "chosen file missing"),
        ({"chosen": "/".join(["d"] * 4000)}, "chosen file missing"),
        ({"prompt": "\ud800 cat"}, "prompt holds half a character"),
        ({"id": "\udfff"}, "id holds half a character"),
        ({"chosen": "\ud83d.mp4"}, "chosen holds half a character"),
        ({"id": 1.5}, "id is not text or a whole number"),
        ({"id": {"a": 1}}, "id is not text or a whole number"),
        ({"weight": 10**400}, "weight is not a finite number"),
        ({"chosen_score": 10**400, "rejected_score": 0}, "chosen_score is not a finite number"),
    ],
)
def test_a_faulty_row_is_dropped_with_its_reason_and_place(folder, change, reason):
    path = jsonl(folder, row(), {**row(id="two"), **change})
    manifest = read_manifest(path)
    assert [pair.id for pair in manifest.pairs] == ["one"]
    assert [(item.where, item.reason) for item in manifest.dropped] == [("pairs.jsonl:2", reason)]
    assert manifest.summary() == {"read": 2, "used": 1, "dropped": {reason: 1}}
    with pytest.raises(DataError, match="pairs.jsonl:2"):
        read_manifest(path, strict=True)


def test_the_table_shows_every_reason_and_count(folder):
    from rich.console import Console

    rows = [row(id=str(i), chosen=f"{i}.mp4") for i in range(5)] + [row(), row(id="tie", prompt="")]
    console = Console(width=160, record=True, file=open("/dev/null", "w"))
    console.print(used_dropped_table(read_manifest(jsonl(folder, *rows))))
    text = console.export_text()
    assert "1 of 7 pairs used" in text and "prompt empty" in text and "and 2 more" in text
    assert any("chosen file missing" in line and " 5 " in line for line in text.splitlines())


def test_unknown_columns_are_errors_with_a_suggestion(folder):
    misspelt = row(id="two")
    misspelt["choosen"] = misspelt.pop("chosen")
    with pytest.raises(DataError, match=r"'choosen'; did you mean 'chosen'\?"):
        read_manifest(jsonl(folder, row(), misspelt))
    with pytest.raises(DataError, match=r"unknown column 'choosen'; remove it\."):  # it has a "chosen" already
        read_manifest(jsonl(folder, {**row(), "choosen": "a.mp4"}))
    with pytest.raises(DataError, match=r"'caption'; rename it if it holds the prompt\."):
        read_manifest(table(folder, {"caption": "a", "chosen": "a.mp4", "rejected": "b.mp4"}))
    with pytest.raises(DataError, match="rejected missing"):
        read_manifest(table(folder, {"prompt": "a", "chosen": "a.mp4"}))


def test_one_id_for_two_different_pairs_is_an_error_and_a_repeated_row_is_dropped(folder):
    with pytest.raises(DataError, match=r"'one' names two different pairs \(pairs.jsonl:1 and pairs.jsonl:3\)"):
        read_manifest(jsonl(folder, row(), row(id="two", prompt="x"), row(prompt="a dog")))
    manifest = read_manifest(jsonl(folder, row(), row()))
    assert len(manifest) == 1 and manifest.dropped[0].reason == "same pair again"


def test_a_missing_id_is_a_hash_that_survives_moving_the_data(folder, tmp_path_factory):
    import shutil

    rows = [{key: value for key, value in row(prompt=prompt).items() if key != "id"} for prompt in ("a cat", "a dog")]
    here = read_manifest(jsonl(folder, *rows)).pairs
    moved = tmp_path_factory.mktemp("moved") / "data"
    shutil.copytree(folder, moved)
    there = read_manifest(moved / "pairs.jsonl").pairs
    assert [pair.id for pair in here] == [pair.id for pair in there]
    assert here[0].id != here[1].id and len(here[0].id) == 16


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("m.jsonl", b'{"prompt": "a"\n', "m.jsonl:1: not JSON"),
        ("m.jsonl", b"[1]\n", "m.jsonl:1: a list"),
        ("m.jsonl", b"", "no rows"),
        ("m.jsonl", b"\xff\xfe\x00", "not UTF-8"),
        ("m.csv", b"prompt,chosen,rejected\na,b,c,d\n", "m.csv:2: more values"),
        ("m.csv", b"prompt,chosen,rejected\na,b\n", "m.csv:2: fewer values (2) than the header has columns (3)"),
        ("m.csv", b"prompt,chosen,rejected,chosen\na,b,c,d\n", "column 'chosen' is given twice"),
        ("m.csv", b"prompt;chosen;rejected\na;b;c\n", "separated by semicolons"),
        ("m.csv", b"prompt\tchosen\trejected\na\tb\tc\n", "separated by tabs"),
        ("m.csv", b"A chosen cat on a mat\nA dog\n", "the first line names no column of a manifest"),
        ("m.csv", b"prompt\nA cat\nA dog\n", "column(s) chosen, rejected missing, found prompt"),
        ("m.jsonl", b'{"prompt": "a", "chosen": "a", "chosen": "b"}\n', "key 'chosen' is given twice"),
        ("m.jsonl", b"[" * 100_000, "m.jsonl:1: not JSON (nested too deeply)"),
        ("m.jsonl", b'{"weight": 1' + b"0" * 5000 + b"}", "m.jsonl:1: not JSON"),
        ("pair.json", b"[" * 100_000, "not JSON (nested too deeply)"),
        ("m.parquet", b"PAR1 not really", "not a readable parquet"),
        ("m.yaml", b"a: 1", "suffix .yaml"),
        ("pair.json", b"{", "not JSON"),
        ("pair.json", b"[]", "metadata.json: missing"),
    ],
)
def test_a_malformed_file_is_one_line_naming_it(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_manifest(tmp_path / name)
    assert message in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)


def test_no_usable_row_is_an_error_that_sums_up_the_reasons(folder):
    with pytest.raises(DataError, match="none of 2 rows.*2 x chosen file missing"):
        read_manifest(jsonl(folder, row(chosen="x.mp4"), row(id="two", chosen="y.mp4")))
    with pytest.raises(DataError, match="no such manifest"):
        read_manifest(folder / "other.jsonl")


def test_contradicting_rows_are_dropped_both_and_counted(folder):
    rows = [row(), row(id="two", chosen="c.mp4"), row(id="three", chosen="b.mp4", rejected="a.mp4"),
            row(id="four", prompt="a dog", chosen="b.mp4", rejected="a.mp4")]  # fmt: skip
    manifest = read_manifest(jsonl(folder, *rows))
    assert [pair.id for pair in manifest.pairs] == ["two", "four"]
    reason = "another row of the prompt prefers the same clips the other way round"
    assert manifest.summary()["dropped"] == {reason: 2}
    with pytest.raises(DataError, match="the other way round"):
        read_manifest(manifest.path, strict=True)


def test_weights_that_are_all_zero_are_an_error_and_some_are_noted(folder):
    with pytest.raises(DataError, match="every pair has weight 0"):
        read_manifest(jsonl(folder, row(weight=0), row(id="two", chosen="c.mp4", weight=0)))
    manifest = read_manifest(jsonl(folder, row(weight=0), row(id="two", chosen="c.mp4")))
    assert manifest.notes == ("1 pair(s) have weight 0 and teach nothing",) and len(manifest) == 2


def test_a_parquet_column_given_twice_is_an_error(folder):
    import pyarrow
    import pyarrow.parquet

    columns = pyarrow.table([["a"], ["a.mp4"], ["b.mp4"], ["c.mp4"]], names=["prompt", "chosen", "rejected", "chosen"])
    pyarrow.parquet.write_table(columns, folder / "twice.parquet")
    with pytest.raises(DataError, match="column 'chosen' is given twice"):
        read_manifest(folder / "twice.parquet")


def test_a_time_stamp_as_an_id_drops_its_row(folder):
    from datetime import datetime

    manifest = read_manifest(parquet(folder, row(id=datetime(2026, 1, 1)), row(id=None, chosen="c.mp4")))
    assert len(manifest) == 1 and manifest.dropped[0].reason == "id is not text or a whole number"


def test_a_criterion_is_refused_where_there_are_no_labels(folder):
    with pytest.raises(ConfigError, match="criterion='TA': only a VideoAlign table.*pairs.jsonl is plain"):
        read_manifest(jsonl(folder, row()), criterion="TA")


def test_clips_start_at_a_root_when_one_is_given(folder, tmp_path_factory, monkeypatch):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    lines = jsonl(folder, row()).read_text()
    (elsewhere / "pairs.jsonl").write_text(lines)
    with pytest.raises(DataError, match="chosen file missing"):
        read_manifest(elsewhere / "pairs.jsonl")
    assert read_manifest(elsewhere / "pairs.jsonl", root=folder).pairs == read_manifest(folder / "pairs.jsonl").pairs
    with pytest.raises(ConfigError, match="root=.*no such folder"):
        read_manifest(elsewhere / "pairs.jsonl", root=folder / "nowhere")
    monkeypatch.setenv("HOME", str(folder))
    assert read_manifest("~/pairs.jsonl", root="~").pairs[0].chosen == folder / "a.mp4"
    assert read_manifest(jsonl(folder, row(chosen="~/c.mp4"))).pairs[0].chosen == folder / "c.mp4"


def test_the_table_shows_text_from_outside_as_it_is_and_harmless(folder):
    from rich.console import Console

    names = ["x[/v2].mp4", "[bold]b.mp4", "\x1b[31mred.mp4", "\u202egpm.mp4"]
    manifest = read_manifest(jsonl(folder, row(), *(row(id=name, chosen=name) for name in names)))
    console = Console(width=200, record=True, file=open("/dev/null", "w"))
    console.print(used_dropped_table(manifest, examples=9))
    text = console.export_text()
    assert "x[/v2].mp4" in text and "[bold]b.mp4" in text and r"\x1b[31mred.mp4" in text and r"\u202egpm.mp4" in text
    assert "\x1b" not in text and "\u202e" not in text


def test_any_script_and_emoji_are_ordinary_text(folder):
    prompts = ["一只猫在草地上跑", "قطة تجري على العشب", "ねこ 👩‍👩‍👧‍👦 🇺🇳", "кошка ȩ́", "𝕮𝖆𝖙"]
    rows = [row(id=prompt, prompt=prompt) for prompt in prompts]
    pairs = read_manifest(jsonl(folder, *rows)).pairs
    assert [(pair.id, pair.prompt) for pair in pairs] == [(prompt, prompt) for prompt in prompts]
    assert [printable(prompt) for prompt in prompts] == prompts


def test_long_text_is_shown_by_both_ends():
    shown = printable("a" * 5000 + "b")
    assert len(shown) <= 1000 and shown.startswith("aaa") and shown.endswith("aab") and "[…" in shown


def videoalign(folder, *labels, name="pairs.csv"):
    rows = [
        {"path_A": "./a.mp4", "path_B": "./b.mp4", "prompt": f"p{i}", "VQ": vq, "MQ": mq, "TA": ta, "fps_A": 24.0}
        for i, (vq, mq, ta) in enumerate(labels)
    ]
    return table(folder, *rows, name=name)


def test_videoalign_is_recognised_and_the_majority_decides(folder):
    manifest = read_manifest(videoalign(folder, "BBA", ("A", "same", "same"), "AB" + "A"))
    assert manifest.format == "videoalign"
    assert [(pair.chosen.name, pair.rejected.name) for pair in manifest.pairs] == [
        ("b.mp4", "a.mp4"), ("a.mp4", "b.mp4"), ("a.mp4", "b.mp4")]  # fmt: skip
    assert "fps_A" in manifest.notes[0]


def test_videoalign_ties_and_unknown_labels_are_dropped_with_the_votes(folder):
    manifest = read_manifest(videoalign(folder, "AAA", ("A", "B", "same"), ("same",) * 3, ("A", "C", "A")))
    assert len(manifest) == 1
    assert manifest.summary()["dropped"] == {"tie: no preferred clip": 2, "label is not A, B or same": 1}
    assert manifest.dropped[0].detail == "VQ=A MQ=B TA=same"


def test_videoalign_by_one_named_criterion(folder):
    path = videoalign(folder, "BBA", ("A", "A", "same"))
    manifest = read_manifest(path, criterion="TA")
    assert [pair.chosen.name for pair in manifest.pairs] == ["a.mp4"] and manifest.dropped[0].detail == "TA=same"
    with pytest.raises(DataError, match="'Overall'"):
        read_manifest(path, criterion="Overall")
    with pytest.raises(ConfigError, match="majority, VQ"):
        read_manifest(path, criterion="vq")


def test_an_explicit_format_wins_over_the_columns(folder):
    with pytest.raises(DataError, match="unknown column 'path_A'"):
        read_manifest(videoalign(folder, "AAA"), format="plain")
    with pytest.raises(DataError, match="'path_A' missing"):
        read_manifest(jsonl(folder, row()), format="videoalign")
    with pytest.raises(ConfigError, match="plain, videoalign, videodpo"):
        read_manifest(jsonl(folder, row()), format="pickapic")


def test_videodpo_pairs_index_the_clips_and_old_paths_are_found_by_their_ends(folder):
    (folder / "winvideos").mkdir()
    (folder / "losevideos").mkdir()
    clips = []
    for number in range(2):
        for side, score in (("winvideos", 0.9), ("losevideos", 0.4)):
            (folder / side / f"{number:06d}.mp4").write_bytes(side.encode())
            base = "/home/author/vidpro" if number else "."
            basic = {"clip_path": f"{base}/{side}/{number:06d}.mp4", "score": score, "clip_duration": 1.6}
            clips.append({"basic": basic, "misc": {"frame_caption": ["unused"]}})
    pairs = [{"video1": 2 * n, "video2": 2 * n + 1, "label": 0, "frame_caption": f"prompt {n}", "score": 0.36}
             for n in range(2)] + [{"video1": 0, "video2": 9, "frame_caption": "broken"}]  # fmt: skip
    (folder / "metadata.json").write_text(json.dumps(clips))
    (folder / "pair.json").write_text(json.dumps(pairs))
    manifest = read_manifest(folder)
    assert manifest.format == "videodpo" and manifest == read_manifest(folder / "pair.json")
    assert [pair.prompt for pair in manifest.pairs] == ["prompt 0", "prompt 1"]
    assert manifest.pairs[1].chosen == folder / "winvideos/000001.mp4"
    assert manifest.pairs[1].rejected == folder / "losevideos/000001.mp4"
    assert (manifest.pairs[0].chosen_score, manifest.pairs[0].rejected_score) == (0.9, 0.4)
    assert manifest.dropped[0].reason == "video2 is not an index into metadata.json"
    assert any("score" in note for note in manifest.notes)


def test_written_manifests_read_back_equal_inside_and_outside_the_data_folder(folder, tmp_path_factory):
    extra = row(id="two", weight=0.5, chosen_score=2, rejected_score=-1, first_frame="c.mp4", negative_prompt="é")
    pairs = read_manifest(jsonl(folder, row(), extra)).pairs
    inside = write_manifest(folder / "copy.jsonl", pairs)
    outside = write_manifest(tmp_path_factory.mktemp("elsewhere") / "copy.jsonl", pairs)
    assert read_manifest(inside).pairs == read_manifest(outside).pairs == pairs
    assert '"a.mp4"' in inside.read_text() and str(folder) in outside.read_text()
