"""Seeded signals at random moments and damage in every file: no wrong byte is ever read, and no traceback is printed.

`make test` strikes a few times, `make test-all` many times.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from pgdpo_fast.cli import main
from pgdpo_fast.data.latent_store import LatentStore
from pgdpo_fast.data.synthetic import render_pairs
from pgdpo_fast.errors import DataError
from pgdpo_fast.reference.cache import ReferenceCache
from tests.commands import Command

SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
SMALL = ["--codec", "pixel-unshuffle", "--frames", "3", "--height", "16", "--width", "16"]


def same(found, right):
    return found.keys() == right.keys() and all(torch.equal(found[name], right[name]) for name in right)


class Made:
    """What a command makes in a folder, and how it is read."""

    def __init__(self, verb, arguments):
        self.verb, self.arguments = verb, arguments

    def read(self, folder):
        """All tensors and numbers in the folder by name; DataError where it is not finished or damaged."""
        if self.verb == "encode":
            store = LatentStore(folder)
            named = {"chosen": lambda item: item.chosen, "rejected": lambda item: item.rejected}
            named["text"] = lambda item: item.conditioning["text"]
            return {f"{item.id} {name}": get(item) for item in store for name, get in named.items()}
        if self.verb == "cache-reference":
            return ReferenceCache(folder).table()
        (weights,) = folder.glob("checkpoints/step_00000004/weights/*.safetensors")
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2, 3, 4]
        return load_file(weights) | {"loss": torch.tensor([row["loss"] for row in rows], dtype=torch.float64)}

    def at(self, folder):
        where = ["--set", f"output.dir={folder}"] if self.verb == "train" else ["-o", str(folder)]
        return [self.verb, *self.arguments, *where]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return render_pairs(tmp_path_factory.mktemp("clips"), pairs=4, frames=3, height=16, width=16)


@pytest.fixture
def made(clips, tiny_config, tmp_path):
    """Of every kind: the command, what it makes undisturbed, the folder of that, and the seconds it took."""
    settings = tmp_path / "settings.yaml"
    settings.write_text(tiny_config(training={"checkpoint_every": 1}).to_yaml())
    kinds = [
        Made("encode", ["-m", str(clips), *SMALL]),
        Made("cache-reference", [str(settings)]),
        Made("train", [str(settings)]),
    ]
    found = []
    for kind in kinds:
        folder = tmp_path / f"whole-{kind.verb}"
        command = Command(tmp_path, *kind.at(folder))  # as it is killed, so that kills fall into its time
        assert command.begun.wait(120)
        code, seconds = command.end()
        assert code == 0, command.wrote
        found.append((kind, kind.read(folder), folder, seconds))
    return found


def kill_some(made, tmp_path, kills, seed):
    """Run the commands and end them by signals until `kills` have struck; each is then finished and compared."""
    order, counts, number = random.Random(seed), {}, 0
    while sum(counts.values()) < kills:
        kind, right, _, seconds = made[number % len(made)]
        folder, number = tmp_path / f"killed-{number}", number + 1
        for _ in range(order.randint(1, 3)):
            sent = order.choice(SIGNALS)
            command = Command(tmp_path, *kind.at(folder))
            assert command.begun.wait(120)
            command.process.join(order.uniform(0, 1.2 * seconds))
            if command.process.is_alive():
                command.send(sent)
            code, _ = command.end()
            assert code in (0, 75, -sent), command.wrote
            if code:
                counts[kind.verb, sent.name] = counts.get((kind.verb, sent.name), 0) + 1
            elif kind.verb == "train":
                break
            try:
                if kind.verb != "train":
                    assert same(kind.read(folder), right)
            except DataError:
                assert code  # not finished
        assert main(kind.at(folder)) == 0
        assert same(kind.read(folder), right)
        assert not list(folder.rglob("*.tmp"))
    assert "Traceback" not in command.wrote
    return counts


def damage(path, order):
    """Flip a bit of the file or cut it short; returns which."""
    data = bytearray(path.read_bytes())
    if order.random() < 0.5:
        data[order.randrange(len(data))] ^= 1 << order.randrange(8)
        path.write_bytes(data)
        return "flip"
    path.write_bytes(data[: order.randrange(len(data))])
    return "cut"


def hurt_some(made, tmp_path, capfd, faults, seed):
    """Damage one file at a time in a copy: reading it, and the command again, give the right bytes or one line."""
    order, counts, copy, number = random.Random(seed), {}, tmp_path / "copy", 0
    files = [
        (kind, right, whole, path.relative_to(whole))
        for kind, right, whole, _ in made
        for path in sorted(whole.rglob("*"))
        if path.is_file() and path.stat().st_size
    ]
    order.shuffle(files)
    while number < faults:
        kind, right, whole, name = files[number % len(files)]
        number += 1
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy)
        how = damage(copy / name, order)
        if kind.verb != "train":
            try:
                assert same(kind.read(copy), right), f"{kind.verb} {name} {how}"
            except DataError as error:
                assert "\n" not in str(error) and "copy" in str(error)
        capfd.readouterr()
        code = main(kind.at(copy))
        said = capfd.readouterr().err
        assert code in (0, 3), f"{kind.verb} {name} {how}: {said}"
        assert "Traceback" not in said and said.count("error: ") == (code != 0), said
        if code == 0:
            result = kind.read(copy) if kind.verb != "train" or name.name != "metrics.jsonl" else right
            assert same(result, right), f"{kind.verb} {name} {how}: {said}"
        counts[kind.verb, how, code] = counts.get((kind.verb, how, code), 0) + 1
    return counts


def test_a_few_signals_leave_no_wrong_byte(made, tmp_path):
    assert sum(kill_some(made, tmp_path, 3, seed=1).values()) >= 3


def test_a_few_damaged_files_are_repaired_or_named(made, tmp_path, capfd):
    assert sum(hurt_some(made, tmp_path, capfd, 6, seed=2).values()) == 6


@pytest.mark.sweep
def test_many_signals_leave_no_wrong_byte(made, tmp_path):
    counts = kill_some(made, tmp_path, 30, seed=int(os.environ.get("FAULT_SEED", "3")))
    print(counts)
    assert len({verb for verb, _ in counts}) == 3


@pytest.mark.sweep
def test_many_damaged_files_are_repaired_or_named(made, tmp_path, capfd):
    counts = hurt_some(made, tmp_path, capfd, 60, seed=int(os.environ.get("FAULT_SEED", "4")))
    with capfd.disabled():
        print(counts)
    assert {verb for verb, *_ in counts} == {"encode", "cache-reference", "train"}
