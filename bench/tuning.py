"""Which launch a device wants for every size of call, timed against the default and written as the table that dispatch
reads, `launches.json`; and the experiments on settings of the code.

The stream counts only where its bits are those of two passes on the timed inputs, another block only where it agrees
with float64; a launch is taken where it is at least 3% faster beyond both spreads.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch

from pgdpo_fast.backends import launches
from pgdpo_fast.backends.launches import Entry, Launch

from . import harness
from .contenders import STREAM, TRITON, Inputs, make_inputs
from .experiments import KEEP_GAIN, Candidate, Experiment, Size, applied, given
from .shapes import Case

DEFAULT = Launch()


def verdict(pairs: list[tuple[dict, dict]]) -> tuple[str, float | None]:
    """keep, drop, no difference or red, with the geometric mean of new over old."""
    if any(x["status"] != "ok" for pair in pairs for x in pair):
        return "red", None
    ratios = [new["median"] / old["median"] for old, new in pairs]
    worst = max(ratio - 1 - max(old["spread"], new["spread"]) for ratio, (old, new) in zip(ratios, pairs, strict=True))
    mean = statistics.geometric_mean(ratios)
    if mean <= 1 - KEEP_GAIN and worst <= KEEP_GAIN:
        return "keep", mean
    return ("drop" if mean >= 1 + KEEP_GAIN else "no difference"), mean


def faster(old: dict, new: dict) -> bool:
    """Whether `new` takes at least 3% less than `old`, beyond both spreads."""
    if old["status"] != "ok" or new["status"] != "ok":
        return False
    return new["median"] / old["median"] + max(old["spread"], new["spread"]) <= 1 - KEEP_GAIN


class Tuner:
    """Timings of one device, and the launches chosen so far.

    Args:
        tables: where the table goes each time a size is done; entries of other devices and kinds of call stay.
        withheld: as in `harness.measure`: why a contender must not be chosen on a case.
    """

    def __init__(self, device: torch.device, seed: int, tables: Iterable[Path], withheld):
        self.device, self.seed, self.tables, self.withheld = device, seed, tuple(tables), withheld
        self.before = [path for path in self.tables if path.exists()][:1]
        self.before = launches.read(self.before[0]) if self.before else ()
        self.entries: dict[Size, list[Entry]] = {}
        self._inputs: tuple[Case, list[Inputs]] | None = None

    def inputs(self, case: Case) -> list[Inputs]:
        if self._inputs is None or self._inputs[0] != case:
            self._inputs = None  # the last case's memory first
            sets = harness.input_sets(case, self.device) if self.device.type == "cuda" else 2
            self._inputs = case, [make_inputs(case, self.device, self.seed + i) for i in range(sets)]
        return self._inputs[1]

    def time(self, case: Case, launch: Launch, like: dict | None = None, settings: dict | None = None) -> dict:
        """Median and spread of a call with `launch`, after a check: that its bits are those of `like`, or without it
        that it agrees with float64."""
        inputs, call = self.inputs(case), TRITON.prepare(case)

        def step(i):
            return call(inputs[i % len(inputs)])

        with ExitStack() as stack:
            keys = stack.enter_context(given(launch))
            stack.enter_context(applied(settings or {}))
            loss, gradient = found = step(0)
            if like is None:
                gate = harness.check(case, inputs[0], TRITON, loss, gradient)
                if not gate.green:
                    return {"status": "red", "gate": asdict(gate)}
            elif not all(torch.equal(a, b) for a, b in zip(found, like["found"], strict=True)):
                return {"status": "red", "detail": "other bits than two passes"}
            if self.device.type == "cuda":
                timing = harness.time_graph(step, len(inputs))
            else:
                timing = harness.time_in_turns({"one": step}, 0.0, (2, 2))["one"]
        return {"status": "ok", **asdict(timing), "found": found, "key": next(iter(keys))}

    def choose(self, size: Size, streams: tuple[Candidate, ...], block: Launch = DEFAULT) -> list[dict]:
        """Time the forms of every batch of `size` in `block`, note the fastest and write the table; a record a case."""
        entries, records = [], []
        if size.granularity == "element":  # which has one form
            streams = ()
        for case in size.cases():
            record = {"case": case.key, "candidates": {}}
            records.append(record)
            if reason := self.withheld(TRITON, case):
                return [record | {"verdict": "withheld", "detail": reason}]
            default = self.time(case, DEFAULT)
            plain = default if block == DEFAULT else self.time(case, block)
            if default["status"] != "ok" or plain["status"] != "ok":
                return [record | {"verdict": "red", "detail": str(plain.get("gate", default.get("gate")))}]
            if reason := self.withheld(STREAM, case):
                record["stream"] = reason
                streams = ()
            best, launch = plain, block
            for candidate in streams:
                asked = candidate.launch._replace(block=block.block, warps=block.warps)
                try:
                    new = self.time(case, asked, like=plain)
                except Exception as error:  # a form that does not even run is an outcome
                    new = {"status": "failed", "detail": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
                record["candidates"][candidate.name] = told(new, default) | {"expected": candidate.expected_ratio}
                if faster(plain, new) and new["median"] < best["median"]:
                    best, launch = new, asked
            ratio = best["median"] / default["median"]
            record |= {"default": told(default, default), "launch": launch._asdict(), "ratio": ratio}
            record["verdict"] = "two-pass" if launch == DEFAULT else f"{launch.form}, block {launch.block}"
            entries.append(Entry(default["key"], launch, harness.device_name(self.device), ratio))
        self.entries[size] = entries
        self.write()
        return records

    def block(self, size: Size, blocks: tuple[Candidate, ...]) -> tuple[Launch, list[dict]]:
        """The block that wins with the fewest and with the most pairs of `size`, the default where none does."""
        cases = dict.fromkeys((size.cases()[0], size.cases()[-1]))
        before = {case: self.time(case, DEFAULT) for case in cases}
        records, best = [], (1.0, DEFAULT)
        for candidate in blocks:
            pairs = [(before[case], self.time(case, candidate.launch)) for case in cases]
            decision, ratio = verdict(pairs)
            records.append(
                {
                    "name": f"{candidate.name}: {size.shape.name}, {size.granularity}, {size.reference_form}",
                    "backend": "triton",
                    "because": candidate.because,
                    "expected_ratio": candidate.expected_ratio,
                    "verdict": decision,
                    "ratio": ratio,
                }
            )
            if decision == "keep":
                best = min(best, (ratio, candidate.launch))
        return best[1], records

    def write(self) -> None:
        found = launches.combine(self.before, [entry for entries in self.entries.values() for entry in entries])
        for path in self.tables:
            launches.write(found, path)

    def experiment(self, experiment: Experiment) -> dict:
        """Time one experiment on all of its cases, each against the present setting."""
        record = {
            "name": experiment.name,
            "backend": experiment.backend,
            "because": experiment.because,
            "expected_ratio": experiment.expected_ratio,
            "settings": {path: repr(value) for path, value in experiment.settings.items()},
        }
        pairs = []
        try:
            for case in experiment.cases:
                before = self.time(case, experiment.launch)
                pairs.append((before, self.time(case, experiment.launch, settings=experiment.settings)))
        except Exception as error:  # a setting that does not even run is an outcome
            return record | {"verdict": "failed", "detail": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        decision, ratio = verdict(pairs)
        return record | {
            "verdict": decision,
            "ratio": ratio,
            "cases": {
                case.key: {"before": told(old, old), "after": told(new, old)}
                for case, (old, new) in zip(experiment.cases, pairs, strict=True)
            },
        }


def told(new: dict, old: dict) -> dict:
    """What of a timing goes into the record, with its ratio to `old`."""
    kept = {k: v for k, v in new.items() if k not in ("found", "key")}
    if new["status"] == old["status"] == "ok":
        kept["ratio"] = new["median"] / old["median"]
    return kept
