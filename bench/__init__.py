"""Benchmarks of the fused loss: what is timed (shapes, contenders), how (harness), and how it is told (report).

`pgdpo-fast bench` runs the table on this machine, `python bench/gpu.py` everything that needs a GPU, and
`pytest bench --benchmark-only` the CPU suite. The first is installed with the package, as `pgdpo_fast.bench`; the other
two run from a clone.
"""
