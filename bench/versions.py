"""A plain call of the loss in two versions of the package: `python bench/versions.py OLD/bin/python NEW/bin/python`.

What a version added has to cost nothing where it is not used, which two versions in one process cannot show. So
processes take turns, one interpreter after the other, and each times the same calls by the processor time of one
thread, which other work on the machine stretches little.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess

CASES = {
    # latents of one pair, granularity, form of the reference, calls in a sample
    "host (64 elements), sample, errors": ((1, 4, 4, 4), "sample", "errors", 100),
    "host (64 elements), sample, predictions": ((1, 4, 4, 4), "sample", "predictions", 100),
    "host (64 elements), element, predictions": ((1, 4, 4, 4), "element", "predictions", 100),
    "wan2.1-480p, sample, errors": ((16, 21, 60, 104), "sample", "errors", 3),
    "wan2.1-480p, sample, predictions": ((16, 21, 60, 104), "sample", "predictions", 3),
    "wan2.1-480p, element, predictions": ((16, 21, 60, 104), "element", "predictions", 3),
}
WORKER = """if True:
    import json, statistics, sys, time
    import torch
    import pgdpo_fast as pf

    torch.set_num_threads(1)
    found = {}
    for name, (shape, granularity, form, calls) in json.loads(sys.argv[1]).items():
        y = torch.randn(2, *shape)
        q = y + 0.5 * torch.randn_like(y)
        p = (q + 0.05 * torch.randn_like(y)).bfloat16().requires_grad_()
        y, q = y.bfloat16(), q.bfloat16()
        reference = pf.reference_errors(q, y, backend="native") if form == "errors" else q
        objective, samples = pf.PGDPO(beta=100.0), []
        for _ in range(12):
            begin = time.thread_time()
            for _ in range(calls):
                loss = pf.preference_loss(
                    p, y, reference, objective=objective, granularity=granularity, backend="native"
                ).loss
                torch.autograd.grad(loss, p)
            samples.append((time.thread_time() - begin) / calls)
        found[name] = statistics.median(samples[2:])
    print(json.dumps(found))
"""


def seconds(python: str) -> dict[str, float]:
    """Median seconds of a call by case, in a process of this interpreter's."""
    call = [python, "-c", WORKER, json.dumps(CASES)]
    return json.loads(subprocess.run(call, check=True, capture_output=True, text=True, cwd="/").stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="interpreter of an environment with the earlier version")
    parser.add_argument("new", help="interpreter of an environment with this one")
    parser.add_argument("--processes", type=int, default=8, help="of each version")
    arguments = parser.parse_args()
    pythons = arguments.old, arguments.new
    found: dict[str, list[dict[str, float]]] = {python: [] for python in pythons}
    for turn in range(arguments.processes):
        for python in pythons[:: -1 if turn % 2 else 1]:
            found[python].append(seconds(python))
    print("| call | old | new | new over old |\n| --- | ---: | ---: | ---: |")
    for name in CASES:
        old, new = (statistics.median(run[name] for run in found[python]) for python in pythons)
        print(f"| {name} | {1e3 * old:.3f} ms | {1e3 * new:.3f} ms | {new / old:.2f} |")


if __name__ == "__main__":
    main()
