"""How long it takes on a device from the release of a flag to its sight by another program: what the gradients of the
stream kernel wait for at least, by the very operations that kernel uses."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def ping_pong_kernel(
    flags_ptr,  # [3 * APART] int32, zero: a flag of each program and tickets, on cache lines of their own
    looks_ptr,  # [2] int32, written: how often each program looked, negative where it gave up
    rounds,
    APART: tl.constexpr,
    POLLS: tl.constexpr,
):
    """Two programs hand a number back and forth; each look is the stream's, and so is each release."""
    me = tl.atomic_add(flags_ptr + 2 * APART, 1, sem="relaxed")
    looks = 0
    turn = 1
    patience = POLLS
    while (turn <= rounds) & (patience > 0):
        if me == 0:
            tl.atomic_xchg(flags_ptr + APART, turn, sem="release")
        patience = POLLS
        seen = 0
        while (seen < turn) & (patience > 0):
            seen = tl.atomic_add(flags_ptr + me * APART, 0, sem="acquire")
            looks += 1
            patience -= 1
        if (me == 1) & (patience > 0):
            tl.atomic_xchg(flags_ptr, turn, sem="release")
        turn += 1
    if patience == 0:
        looks = -looks
    tl.store(looks_ptr + me, looks)


def play(rounds: int, device: torch.device, polls: int = 1 << 20) -> torch.Tensor:
    """The looks `[2]` of both programs over `rounds` there and back, negative where one waited in vain."""
    flags = torch.zeros(3 * 64, dtype=torch.int32, device=device)
    looks = torch.zeros(2, dtype=torch.int32, device=device)
    ping_pong_kernel[(2,)](flags, looks, rounds, APART=64, POLLS=polls, num_warps=4)
    return looks


def flag_latency(device: torch.device, rounds: int = 2000) -> tuple[float, float]:
    """Seconds from a release to its sight, and looks that took.

    Raises:
        RuntimeError: the programs did not run at the same time.
    """
    play(10, device)  # compiled now
    begin, end, after = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    begin.record()
    play(1, device)
    end.record()
    looks = play(rounds, device)
    after.record()
    after.synchronize()
    if (looks < 0).any():
        raise RuntimeError("two programs of a launch waited for one another in vain")
    seconds = 1e-3 * (end.elapsed_time(after) - begin.elapsed_time(end)) / (2 * (rounds - 1))
    return seconds, looks.sum().item() / (2 * rounds)
