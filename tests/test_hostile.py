"""Hostile inputs made by a seeded generator: each ends with exit 2, 3, 4 or 5 and one line that names the file or key.

A generator is a function of a random source, a folder and the valid things in `World`; it damages one of them in a way
that leaves nothing to be run, and returns the command line and the words one of which the line must hold. `make test`
takes a few of every kind, `make test-all` the whole sweep.
"""

import json
import random
import shutil
import string
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from pgdpo_fast.cli import main
from pgdpo_fast.training.config import _KEYS, load_config
from pgdpo_fast.training.reference_pass import cache_reference
from pgdpo_fast.training.trainer import train

FEW, MANY = 3, 40  # of every kind
HALF = ["\\ud800", "\\udfff", "\\0"]  # of characters, and a byte that ends names
NEVER = ["[[[0]]]", "2001-02-20", "!!binary AAAA", "!!set {a, b}", "[{a: 1}, 2]"]  # what no setting is


@dataclass
class World:
    """Valid files: a configuration, a manifest, a store, a cache and a run that has a checkpoint."""

    settings: Path
    manifest: Path
    store: Path
    cache: Path
    run: Path


@pytest.fixture
def world(tiny_config, tiny_store, tmp_path, pristine):
    settings = tmp_path / "settings.yaml"
    settings.write_text(tiny_config("out").to_yaml())
    manifest = next((tiny_store.parent / "clips").glob("*.jsonl"))
    return World(settings, manifest, tiny_store, pristine / "cache", pristine / "run")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """Where the first test that needs them makes a cache and a run."""
    return tmp_path_factory.mktemp("pristine")


def make(pristine, config):
    if not (pristine / "run").exists():
        cache_reference(config, pristine / "cache")
        train(replace(config, output=replace(config.output, dir=str(pristine / "run"))), display="none")


# -- damage


def flipped(rng, path):
    """One bit of a byte that is no white space."""
    content = bytearray(path.read_bytes())
    places = [place for place in rng.sample(range(len(content)), min(50, len(content))) if content[place] > 32]
    content[places[0]] ^= 1 << rng.randrange(7)
    path.write_bytes(content)


def cut(rng, path):
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def noise(rng, path):
    path.write_bytes(rng.randbytes(rng.choice([0, 1, 7, 300, 5000])))


def brackets(rng, path):
    path.write_text(rng.choice(["[", '{"a":']) * rng.choice([200, 100_000]))


def other_json(rng, path):
    path.write_text(
        rng.choice(["null", "[]", "{}", "3", '"text"', "NaN", "9" * 5000, '{"a": 1e999}', '{"\\ud800": []}'])
    )


def folder(rng, path):
    path.unlink()
    path.mkdir()


def gone(rng, path):
    path.unlink()


def damage(rng, root, pattern, kinds):
    """Damage a file of `root` and return what names it."""
    path = rng.choice(sorted(path for path in root.rglob(pattern) if path.is_file()))
    rng.choice(kinds)(rng, path)
    return [path.name, root.name]


def word(rng):
    return "".join(rng.choices(string.ascii_lowercase, k=rng.randrange(3, 12)))


# -- generators


def settings_of_a_wrong_type(rng, here, world):
    key = rng.choice([key for key in _KEYS if key != "model.architecture"])
    return ["plan", world.settings, "--set", f"{key}={rng.choice(NEVER)}"], [key]


def settings_out_of_bounds(rng, here, world):
    values = [f"-{rng.randrange(1, 10**9)}", "9" * rng.randrange(20, 400), "-.inf", ".nan", "0x" + "f" * 5000]
    keys = ["steps", "pairs_per_step", "accumulation", "checkpoint_keep", "evaluation_every", "warmup_steps"]
    key = f"training.{rng.choice(keys)}"
    return ["plan", world.settings, "--set", f"{key}={rng.choice(values)}"], [key]


def settings_nobody_knows(rng, here, world):
    key = f"{rng.choice(['', 'model.', 'data.', 'training.', 'output.', 'objective.', 'process.'])}zz{word(rng)}"
    return ["train", world.settings, "--set", f"{key}={rng.choice(['1', 'x', '[]', '{a: 1}'])}"], [key]


def settings_that_are_no_yaml(rng, here, world):
    text = world.settings.read_text()
    whole = [
        lambda: "[" * rng.choice([60, 1000, 100_000]),
        lambda: "x: " + "{a: " * rng.randrange(60, 3000),
        lambda: rng.choice(["- a\n- b\n", "3\n", "text\n", "2001-02-30\n", "!!python/object:os.system ls\n"]),
        lambda: text + "\x01",
        lambda: text + '\nmodel: {family: "wan"\n',
        lambda: text + "---\n" + text,
        lambda: text + text,
        lambda: "\tmodel: 1\n" + text,
        lambda: "a: *nothing\n" + text,
        lambda: "%YAML 9.9\n---\n" + text,
        lambda: f'data: {{store: "{rng.choice(HALF)}"}}\n',
        lambda: "model: &m {architecture: *m}\n",
        lambda: f"training: {{steps: {'7' * rng.randrange(4301, 9000)}}}\n",
    ]
    path = here / f"{word(rng)}.yaml"
    path.write_text(rng.choice(whole)())
    return ["train", path], [path.name]


def settings_in_other_bytes(rng, here, world):
    path = here / f"{word(rng)}.yaml"
    text = world.settings.read_text() + "# Größe\n"
    content = rng.choice([text.encode("utf-16"), text.encode("latin-1"), b"\xff" + text.encode(), rng.randbytes(200)])
    path.write_bytes(content)
    return ["train", path], [path.name]


def architectures(rng, here, world):
    known = load_config(world.settings).model.architecture
    key = rng.choice(sorted(known))
    value = rng.choice(
        ["text", "[]", "[1]", "null", "{a: 1}", "-1", "0", ".nan", "1.5", "[0, 0, 0]", "['a', 'b', 'c']"]
    )
    if rng.random() < 0.3:
        key, value = f"zz{word(rng)}", "1"
    elif key in ("num_layers", "ffn_dim", "freq_dim", "rope_max_seq_len", "out_channels") and value in "-1 0 null":
        value = "text"
    return ["train", world.settings, "--set", f"model.architecture.{key}={value}"], ["model.architecture", "data.store"]


def paths(rng, here, world):
    (here / "file").write_text("x")
    value = rng.choice(
        ["x" * 5000, "a/" * 2500, "/dev/null", "/dev/null/x", str(here / "file"), str(here / "file" / "x")]
    )
    key = rng.choice(["data.store", "data.reference_cache", "output.dir"])
    return ["train", world.settings, "--set", f"{key}={value}"], [key, value[:50]]


def command_lines(rng, here, world):
    encode = ["encode", "-m", world.manifest, "-o", here / "s"]
    bad = rng.choice([
        ["train", world.settings, "--set", word(rng)],
        ["train", world.settings, "--set", "=" + word(rng)],
        ["train", world.settings, "--set", f"{word(rng)}..{word(rng)}=1"],
        ["train", world.settings, "--set", "training.steps=1", "training.steps=2"],
        ["train", world.settings, "--set", "training.steps=\udcff"],
        ["train", world.settings, "--resume", f"{word(rng)}"],
        ["train", world.settings, "--resume", "x" * 5000],
        ["train", here / word(rng)],
        ["train", here],
        ["train", "x" * 5000],
        ["train", world.settings, f"--zz{word(rng)}"],
        ["plan", world.settings, "--pairs", word(rng)],
        ["sweep", world.settings, "--grid", word(rng)],
        ["sweep", world.settings, "--grid", f"{word(rng)}=1,2"],
        ["sweep", world.settings, "--grid", "training.steps=" + "[" * 3000],
        ["sweep", world.settings, "--grid", "objective.beta=1,1"],
        ["plan", world.settings, "--pairs", "3", "--frames", str(rng.randrange(10**20, 10**30))],
        [*encode, "--codec", "pixel-unshuffle", "--frames", str(-rng.randrange(9))],
        [*encode, "--codec", "pixel-unshuffle", "--fps", "1e9"],
        [*encode, "--codec", "pixel-unshuffle", "--text-dim", "100000000"],
        [*encode, "--model", here / word(rng)],
        ["cache-reference", world.settings, "--draws", str(-rng.randrange(1, 9)), "-o", here / "c"],
        ["report", here / word(rng)],
        [word(rng)],
    ])  # fmt: skip
    return bad, [str(part).lstrip("-").partition(".")[0][:50] for part in bad[1:]] + [str(bad[-1])[:50]]


def manifests(rng, here, world):
    rows = [json.loads(line) for line in world.manifest.read_text().splitlines()][:3]
    for row in rows:
        row |= {key: str(world.manifest.parent / row[key]) for key in ("chosen", "rejected")}
    name, place = word(rng), rng.randrange(3)
    lines = [json.dumps(row) for row in rows]
    bad_line = rng.choice([
        "[" * 100_000, "[]", "3", "null", '{"a": ' * 1000, '{"prompt": "x"}', lines[0][:-5], "\0", "{}",
        json.dumps({**rows[0], "zz" + word(rng): 1}),
        lines[0][:-1] + ', "prompt": "twice"}',
        json.dumps({**rows[0], "prompt": rng.choice([None, 3, [], {}, ""])}),
        json.dumps({**rows[0], "weight": rng.choice([float("nan"), -1, "x", [], 10**400, float("inf")])}),
        json.dumps({**rows[0], "chosen": rng.choice([None, 3, [], "", "x" * 5000, "a\0b", "/dev/zero", "\ud800"])}),
    ])  # fmt: skip
    lines[place] = bad_line
    header = "id,prompt,chosen,rejected"
    table = rng.choice([
        "", header, header + "\n", "\0" * 50, header + ",id\n1,a,b,c,d\n", "a;b;c\n1;2;3\n", header + '\n1,"a,b,c\n',
        header + "\n1,a\n", header + "\n1," + "y" * 200_000 + ",b,c\n", "prompt\nx\n", header + "\n1,p,/x.mp4,/y.mp4\n",
    ])  # fmt: skip
    path, content = rng.choice([
        (here / f"{name}.jsonl", "\n".join(lines).encode("utf-8", "surrogatepass")),
        (here / f"{name}.jsonl", rng.randbytes(500)),
        (here / f"{name}.jsonl", "\n".join(lines).encode("utf-16", "surrogatepass")),
        (here / f"{name}.csv", table.encode()),
        (here / f"{name}.csv", (header + "\nü,a,b,c\n").encode("latin-1")),
        (here / f"{name}.parquet", b"PAR1" + rng.randbytes(100) + b"PAR1"),
        (here / f"{name}.parquet", b""),
        (here / f"{name}.{word(rng)}", b"x"),
        (here / "pair.json", b"[" * rng.choice([3, 100_000])),
        (here / "pair.json", b"{}"),
    ])  # fmt: skip
    path.write_bytes(content)
    size = ["--frames", "3", "--height", "16", "--width", "16"]
    return ["encode", "-m", path, "-o", here / "s", "--codec", "pixel-unshuffle", *size, "--strict"], [path.name]


def stores(rng, here, world):
    store = here / f"store-{word(rng)}"
    shutil.copytree(world.store, store)
    pattern, kinds = rng.choice([
        ("store.json", [flipped, cut, noise, brackets, other_json, folder, gone]),
        ("*.parquet", [flipped, cut, noise, folder, gone]),
        ("*.safetensors", [cut, noise, brackets, folder, gone]),
    ])  # fmt: skip
    named = damage(rng, store, pattern, kinds)
    return ["plan", world.settings, "--set", f"data.store={store}"], named


def shards(rng, here, world):
    store = here / f"store-{word(rng)}"
    shutil.copytree(world.store, store)
    named = damage(rng, store, "*.safetensors", [flipped])
    return ["train", world.settings, "--display", "none", "--set", f"data.store={store}"], named


def caches(rng, here, world):
    cache = here / f"cache-{word(rng)}"
    shutil.copytree(world.cache, cache)
    named = damage(rng, cache, "[!.]*", [flipped, cut, noise, brackets, folder, gone])
    command = ["train", world.settings, "--display", "none", "--set", f"data.reference_cache={cache}"]
    return [*command, "model.reference=cached"], named


def checkpoints(rng, here, world):
    checkpoint = here / f"checkpoint-{word(rng)}"
    shutil.copytree(sorted((world.run / "checkpoints").iterdir())[-1], checkpoint)
    named = damage(rng, checkpoint, "*.*", [flipped, cut, noise, brackets, folder, gone])
    return ["train", world.settings, "--display", "none", "--resume", checkpoint], named


def runs(rng, here, world):
    run = here / f"run-{word(rng)}"
    shutil.copytree(world.run, run)
    path = run / rng.choice(["config.yaml", "metrics.jsonl", "evaluation.jsonl", "environment.json"])
    if path.suffix == ".jsonl":
        lines = path.read_text().splitlines()
        row = json.loads(lines[0])
        key = rng.choice(["step", "rewards/chosen", "pairs", "loss"] if path.name[0] == "m" else ["step", "pairs"])
        changed = {**row, key: rng.choice([None, "text", [], {}, [1], {"id": 3}, True])}
        without = {name: value for name, value in row.items() if name != key}
        lines[rng.randrange(len(lines))] = rng.choice(
            ["[]", "null", "{", "[" * 100_000, "9" * 5000, "\0", json.dumps(changed), json.dumps(without)]
        )
        path.write_text("\n".join(lines) + "\n")
    elif path.suffix == ".json":
        path.write_text(rng.choice(["[" * 100_000, "{", "", "[]", "3", '{"packages": 3}', "9" * 5000]))
    else:
        wrong = ["[" * 100_000, "[]", "", "objective: 3\n", "objective: {name: [1]}\n", "\tx", "a: &a [*a]\n",
                 "objective: {name: dpo}\n", "objective: {name: dpo}\ntraining: 3\n"]  # fmt: skip
        path.write_bytes(rng.choice([*(text.encode() for text in wrong), b"\xff\xfe\x00", path.read_bytes()[:40]]))
    return ["report", run, "--out", here / "page"], [path.name, run.name]


KINDS = [
    settings_of_a_wrong_type, settings_out_of_bounds, settings_nobody_knows, settings_that_are_no_yaml,
    settings_in_other_bytes, architectures, paths, command_lines, manifests, stores, shards, caches, checkpoints, runs,
]  # fmt: skip
SLOWER = {shards, caches, checkpoints}  # these load a network first


def cases():
    for kind in KINDS:
        for number in range(MANY // 2 if kind in SLOWER else MANY):
            marks = [] if number < (1 if kind in SLOWER else FEW) else [pytest.mark.sweep]
            yield pytest.param(kind, number, marks=marks, id=f"{kind.__name__}-{number}")


@pytest.mark.parametrize(("kind", "number"), list(cases()))
def test_a_hostile_input_ends_in_one_line_that_names_it(kind, number, world, pristine, tiny_config, tmp_path, capfd):
    if kind in (caches, checkpoints, runs):
        make(pristine, tiny_config("out"))
    here = tmp_path / "here"
    here.mkdir()
    rng = random.Random(f"{kind.__name__} {number}")
    command, named = kind(rng, here, world)
    torch.manual_seed(0)
    capfd.readouterr()
    code = main([str(part) for part in command])
    printed = capfd.readouterr().err
    told = [line for line in printed.splitlines() if line.startswith("error: ")]
    shown = printed[-1500:]
    assert code in (2, 3, 4, 5), f"exit {code}: {shown}"
    assert "Traceback" not in printed, shown
    assert len(told) == 1 and printed.rstrip().endswith(told[0]), shown
    assert any(name in printed for name in named), f"{named}: {shown}"
