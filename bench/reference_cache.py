"""What the reference cache costs and saves on this machine: rounding, disk tier, training steps with each reference.

    python bench/reference_cache.py [--only packing disk step] [--folder SCRATCH] [--out bench/results]

packing   change of loss and gradient by rounded predictions, against the predictions themselves
disk      writing and reading rows of Wan2.1 480p videos, and how long a step waits for rows read ahead of it
step      seconds per step and peak memory of training a small Wan network; references cached, adapter-off and copied
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import pgdpo_fast as pf
from pgdpo_fast.reference.build import build_cache
from pgdpo_fast.reference.cache import Block, Layout, ReferenceCache
from pgdpo_fast.reference.rows import pack
from pgdpo_fast.reference.stream import RowStream

WAN_480P = (16, 21, 60, 104)
STEP_SECONDS = 1.0  # below what one pair (65,520 tokens) takes Wan2.1-1.3B forward and back on any current GPU


def realistic(pairs: int, rms: float, drift: float, shape=(16, 5, 60, 104), seed: int = 0):
    """Policy, target, reference: residuals of size `rms` that vary over the video with heavy tails, and a policy
    `drift` residuals away from the reference."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator)

    target = normal(2 * pairs, *shape)
    size = rms * torch.exp(0.5 * normal(2 * pairs, 1, *shape[1:]))
    reference = target + size * normal(2 * pairs, *shape)
    return (reference + drift * size * normal(2 * pairs, *shape)).requires_grad_(), target, reference


def packing() -> list[dict]:
    """One row an objective, granularity, drift and format."""
    cases = [
        (pf.DPO(beta=100.0), "sample"),
        (pf.DPO(beta=5000.0), "sample"),
        (pf.PGDPO(beta=100.0), "sample"),
        (pf.DPO(beta=5000.0), "frame"),
        (pf.PGDPO(beta=100.0), "frame"),
        (pf.PGDPO(beta=100.0), "element"),
        (pf.PGDPO(beta=100.0, ipr="anchor"), "sample"),
    ]
    rows = []
    for drift in (0.01, 0.1):
        policy, target, reference = realistic(4, 0.3, drift)

        def run(given, objective, granularity, policy=policy, target=target):
            out = pf.preference_loss(
                policy, target, given, objective=objective, granularity=granularity, backend="eager"
            )
            return out.loss.item(), torch.autograd.grad(out.loss, policy)[0].double().flatten()

        for objective, granularity in cases:
            loss, gradient = run(reference, objective, granularity)
            for format in ("bf16", "fp8"):
                rounded, other = run(pf.PackedReference.pack(reference, target, format), objective, granularity)
                anchor = ", anchor" if getattr(objective, "ipr", "") == "anchor" else ""
                rows.append(
                    {
                        "objective": f"{type(objective).__name__} beta {objective.beta:g}{anchor}",
                        "granularity": granularity,
                        "drift": drift,
                        "format": format,
                        "loss": abs(rounded - loss) / abs(loss),
                        "one_minus_cosine": 1 - F.cosine_similarity(gradient, other, dim=0).item(),
                    }
                )
    return rows


def disk(folder: Path, rows: int = 48, pairs: int = 2, steps: int = 12) -> list[dict]:
    """Write and read throughput, and the wait of a step of `STEP_SECONDS`, for each format that holds predictions."""
    found = []
    prediction = torch.randn(2, *WAN_480P)
    target = torch.randn(2, *WAN_480P)
    for format in ("predictions", "bf16", "fp8"):
        one = pack(prediction.bfloat16() if format == "predictions" else prediction, target, format)
        layout = Layout.of(format, "any", WAN_480P, "bf16", 1)
        began = time.perf_counter()
        cache = build_cache(
            folder / format,
            fingerprint={"bench": 1},
            layout=layout,
            compute=lambda keys, one=one: one,
            blocks=[Block(tuple(map(str, range(rows))), 1)],
        )
        written = time.perf_counter() - began
        keys = [(str(i), 0) for i in random.Random(0).sample(range(rows), rows)]
        cache = ReferenceCache(cache.path)
        timings = []
        for _ in ("first", "again"):  # the first pass hashes every shard; both find the files in the page cache
            began = time.perf_counter()
            for start in range(0, rows, pairs):
                cache.rows(keys[start : start + pairs])
            timings.append(time.perf_counter() - began)
        stream = RowStream(ReferenceCache(cache.path), pairs=pairs)
        batches = [keys[i * pairs : (i + 1) * pairs] for i in range(steps)]
        stream.prefetch(batches[0])
        time.sleep(STEP_SECONDS)  # the network loads meanwhile
        began = time.perf_counter()
        for number, batch in enumerate(batches):
            for coming in batches[number + 1 : number + 3]:
                stream.prefetch(coming)
            stream.take(batch)
            time.sleep(STEP_SECONDS)
        total = time.perf_counter() - began
        found.append(
            {
                "format": format,
                "row_mb": layout.row_bytes / 1e6,
                "rows": rows,
                "write_mb_s": rows * layout.row_bytes / written / 1e6,
                "first_read_mb_s": rows * layout.row_bytes / timings[0] / 1e6,
                "read_mb_s": rows * layout.row_bytes / timings[1] / 1e6,
                "pairs_a_step": pairs,
                "step_seconds": STEP_SECONDS,
                "wait_share": stream.waited / total,
            }
        )
    return found


TRAIN = """
import json, resource, sys
from pgdpo_fast.training.config import TrainConfig
from pgdpo_fast.training.trainer import train
result = train(TrainConfig.from_mapping(json.loads(sys.argv[1])), display="none")
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
"""


def step(folder: Path, steps: int = 10) -> list[dict]:
    """Each reference in a process of its own, on a Wan network of 7M weights and latents of 48x3x16x16."""
    from pgdpo_fast.data.codec import PixelUnshuffleCodec
    from pgdpo_fast.data.encode import encode_manifest
    from pgdpo_fast.data.synthetic import render_pairs
    from pgdpo_fast.data.text import HashTextEncoder
    from pgdpo_fast.training.config import TrainConfig
    from pgdpo_fast.training.reference_pass import cache_reference

    manifest = render_pairs(folder / "clips", pairs=8, seed=0, frames=3, height=64, width=64)
    encode_manifest(
        manifest,
        folder / "store",
        codec=PixelUnshuffleCodec(spatial=4),
        text=HashTextEncoder(32, 16),
        frames=3,
        height=64,
        width=64,
    )
    network = dict(
        patch_size=[1, 2, 2],
        num_attention_heads=4,
        attention_head_dim=64,
        in_channels=48,
        out_channels=48,
        text_dim=32,
        freq_dim=64,
        ffn_dim=1024,
        num_layers=6,
        rope_max_seq_len=32,
    )
    found = []
    for kind, modes in (("full", ("copy", "cached")), ("lora", ("copy", "adapter-off", "cached"))):

        def config(mode, cache="", kind=kind):
            return {
                "model": {
                    "architecture": network,
                    "dtype": "fp32",
                    "text_tokens": 16,
                    "train": kind,
                    "reference": mode,
                },
                "data": {"store": str(folder / "store"), "reference_cache": cache},
                "training": {"steps": steps, "pairs_per_step": 2, "draws_per_pair": 2, "device": "cpu"},
                "output": {"dir": str(folder / f"{kind}-{mode}"), "tensorboard": False},
            }

        cache_reference(TrainConfig.from_mapping(config("auto")), folder / f"cache-{kind}")
        for mode in modes:
            settings = config(mode, str(folder / f"cache-{kind}") if mode == "cached" else "")
            done = subprocess.run([sys.executable, "-c", TRAIN, json.dumps(settings)], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr)
            lines = (folder / f"{kind}-{mode}" / "metrics.jsonl").read_text().splitlines()
            metrics = [json.loads(line) for line in lines]
            found.append(
                {
                    "train": kind,
                    "reference": mode,
                    "steps": steps,
                    "loss": metrics[-1]["loss"],
                    "step_seconds": statistics.median(row["step_seconds"] for row in metrics[2:]),
                    "peak_rss_mb": json.loads(done.stdout) / 1e6,
                }
            )
    return found


def markdown(results: dict) -> str:
    """The results as tables."""
    machine = results["machine"]
    lines = [
        "# Reference cache on a CPU",
        "",
        f"`python bench/reference_cache.py`, {machine['cpu']}, {machine['threads']} threads, load "
        f"{machine['load']:.1f} at the start, torch {machine['torch']}.",
    ]

    def table(title, columns, rows):
        lines.extend(["", f"## {title}", "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"])
        lines.extend(f"| {' | '.join(map(str, row))} |" for row in rows)

    if packed := results.get("packing"):
        table(
            "Rounded predictions against the predictions themselves",
            ("objective", "granularity", "policy moved", "format", "loss, relative", "1 - cosine of the gradient"),
            [
                (
                    r["objective"],
                    r["granularity"],
                    f"{r['drift']:g} residuals",
                    r["format"],
                    f"{r['loss']:.1e}",
                    f"{r['one_minus_cosine']:.1e}",
                )
                for r in packed
            ],
        )
    if tiers := results.get("disk"):
        table(
            "Disk tier, rows of 16x21x60x104",
            (
                "format",
                "MB per row",
                "write MB/s",
                "first read (hashing) MB/s",
                "read again MB/s",
                f"wait of a {STEP_SECONDS:g} s step of {tiers[0]['pairs_a_step']} pairs",
            ),
            [
                (
                    r["format"],
                    f"{r['row_mb']:.1f}",
                    f"{r['write_mb_s']:.0f}",
                    f"{r['first_read_mb_s']:.0f}",
                    f"{r['read_mb_s']:.0f}",
                    f"{r['wait_share']:.2%}",
                )
                for r in tiers
            ],
        )
    if steps := results.get("step"):
        table(
            "A training step, Wan of 7M weights, fp32",
            ("trains", "reference", "s per step", "peak resident MB", "loss of the last step"),
            [
                (r["train"], r["reference"], f"{r['step_seconds']:.3f}", f"{r['peak_rss_mb']:.0f}", repr(r["loss"]))
                for r in steps
            ],
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=("packing", "disk", "step"), default=("packing", "disk", "step"))
    parser.add_argument("--folder", type=Path, default=None, help="scratch, a gigabyte; default: a temporary folder")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    results: dict = {
        "machine": {
            "cpu": cpu,
            "threads": torch.get_num_threads(),
            "load": os.getloadavg()[0],
            "torch": torch.__version__,
        }
    }
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        parts = {"packing": packing, "disk": lambda: disk(Path(scratch)), "step": lambda: step(Path(scratch))}
        for name in options.only:
            results[name] = parts[name]()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "reference_cache_cpu.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.out / "reference_cache_cpu.md").write_text(markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
