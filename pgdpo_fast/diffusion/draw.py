"""The draw: noise and timestep uniforms as a pure function of (seed, pair id, draw index).

Counter-based: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) keyed by a hash
of seed and pair id. There is no generator state to save; batch, order, device and world size change no value.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pgdpo_fast.diffusion.timesteps import stratify
from pgdpo_fast.errors import ConfigError
from pgdpo_fast.options import integer

__all__ = ["Visit", "draw_key", "draw_noise", "draw_uniform", "philox4x32"]

_MASK = 0xFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85

# Fourth counter word: which stream of a draw a value belongs to.
_NOISE, _TIMESTEP, _ROTATION = 0, 1, 2

# Counter blocks worked on at once, each with about 100 bytes of temporaries. On one CPU core 2.1 M normals take 78 ms
# in chunks of 2^12 blocks, 35 ms of 2^15 and 46 ms of 2^20; an accelerator needs more to fill it.
_BLOCKS_CPU, _BLOCKS_ACCELERATOR = 1 << 15, 1 << 20


class Visit(NamedTuple):
    """One use of one pair: its id, and the index of the draw it is noised with."""

    id: str
    draw: int


def philox4x32(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32: four words from four counter words and two key words.

    `counter` is four and `key` two int64 tensors, broadcastable, each holding unsigned 32-bit values (low word first);
    the result is four int64 tensors of unsigned 32-bit values.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # A product wraps modulo 2^64, which keeps its low 64 bits. Odd words carry a whole product: only their low
        # halves count, and the mask after the next exclusive-or removes the rest.
        p0, p1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = ((p1 >> 32) ^ c1 ^ k0) & _MASK, p1, ((p0 >> 32) ^ c3 ^ k1) & _MASK, p0
        k0, k1 = (k0 + _WEYL_0) & _MASK, (k1 + _WEYL_1) & _MASK
    return c0, c1 & _MASK, c2, c3 & _MASK


def draw_key(seed: int, pair_id: str | int) -> int:
    """The 64-bit Philox key of a pair: BLAKE2b of the decimal seed, a zero byte and the id in UTF-8.

    The low 32 bits are the first key word. An integer id names the same pair as its decimal string.
    Raises ConfigError if the seed is not an integer or the id neither a string nor an integer.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ConfigError(f"seed={seed!r}: expected an integer")
    if isinstance(pair_id, bool) or not isinstance(pair_id, (str, int)):
        raise ConfigError(f"pair id {pair_id!r}: expected a string or an integer")
    text = f"{seed}\0{pair_id}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def draw_noise(
    seed: int,
    pair_ids: Sequence[str | int],
    draws: Sequence[int] | Tensor | int,
    shape: Sequence[int],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal noise, float32 [B, *shape], of one draw of each pair.

    seed: an integer. pair_ids: B strings (or integers). draws: the draw index of each pair, in [0, 2^32): B integers,
    an int64 tensor [B], or one integer for all. Element i (row-major in `shape`) of a pair is normal i % 4 of counter
    block i // 4, counter words (block low, block high, draw, 0): a Box-Muller transform of 24-bit uniforms in float64,
    rounded once to float32, so devices agree to one ulp. Magnitudes stay below 5.77 (= √(48 ln 2)).
    Temporaries are bounded (about 4 MiB on a CPU, 128 MiB on an accelerator) whatever the shape.
    Raises ConfigError for an impossible seed, id, draw or shape.
    """
    shape = tuple(shape)
    if not all(isinstance(size, int) and size > 0 for size in shape):
        raise ConfigError(f"shape {shape}: expected positive integers")
    device = torch.device(device)
    key, draws_b = _keys_and_draws(seed, pair_ids, draws, device)
    pairs, size = len(draws_b), math.prod(shape)
    blocks = -(-size // 4)
    noise = torch.empty(pairs, blocks, 4, dtype=torch.float32, device=device)
    budget = _BLOCKS_CPU if device.type == "cpu" else _BLOCKS_ACCELERATOR
    columns = min(blocks, budget)
    rows = max(1, budget // columns)
    for row in range(0, pairs, rows):
        at = slice(row, row + rows)
        for start in range(0, blocks, columns):
            stop = min(start + columns, blocks)
            _fill_normals(noise[at, start:stop], [word[at] for word in key], draws_b[at], start)
    return noise.flatten(1)[:, :size].reshape(pairs, *shape)


def draw_uniform(
    seed: int, pair_ids: Sequence[str | int], draws: Sequence[int] | Tensor | int, strata: int = 1
) -> Tensor:
    """Uniforms, float64 [B] on the CPU, for the timestep of one draw of each pair; never 0 or 1.

    Arguments as in `draw_noise`. The 52 random bits come from counter words (0, 0, draw, 1), which no noise uses.
    With `strata` > 1, each run of `strata` draws of a pair visits every 1/strata of (0, 1) once, in an order that
    starts at random for each run: a lower-variance set of timesteps, each still uniform, still a pure function.
    Raises ConfigError for an impossible seed, id, draw or number of strata.
    """
    integer("strata", strata, 1, 1 << 16)
    key, draws_b = _keys_and_draws(seed, pair_ids, draws, torch.device("cpu"))
    uniform = _uniform(key, draws_b, _TIMESTEP)
    if strata == 1:
        return uniform
    return stratify(uniform, draws_b, _uniform(key, draws_b // strata, _ROTATION), strata)


def _keys_and_draws(
    seed: int, pair_ids: Sequence[str | int], draws: Sequence[int] | Tensor | int, device: torch.device
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Two key words and the draw indices, each int64 [B] on `device`."""
    if isinstance(pair_ids, (str, bytes)) or not isinstance(pair_ids, Sequence):
        raise ConfigError(f"pair_ids={pair_ids!r}: expected a list of ids, one per pair")
    if isinstance(draws, torch.Tensor):
        draws = draws.tolist()
    if isinstance(draws, int):
        draws = [draws] * len(pair_ids)
    if len(draws) != len(pair_ids):
        raise ConfigError(f"{len(draws)} draws for {len(pair_ids)} pair ids: expected one draw index per pair")
    for draw in draws:
        if isinstance(draw, bool) or not isinstance(draw, int) or not 0 <= draw <= _MASK:
            raise ConfigError(f"draw {draw!r}: expected an integer from 0 to {_MASK}")
    keys = [draw_key(seed, pair_id) for pair_id in pair_ids]
    words = torch.tensor(
        [[key & _MASK for key in keys], [key >> 32 for key in keys], list(draws)], dtype=torch.int64, device=device
    )
    return (words[0], words[1]), words[2]


def _uniform(key: Sequence[Tensor], draws_b: Tensor, stream: int) -> Tensor:
    """One float64 in (0, 1) per pair: (k + 1/2) / 2^52 for 52 random bits k, exact."""
    zero = torch.zeros_like(draws_b)
    high, low, _, _ = philox4x32((zero, zero, draws_b, zero + stream), key)
    return ((high << 20 | low >> 12).double() + 0.5) * 2.0**-52


def _fill_normals(out: Tensor, key: Sequence[Tensor], draws_b: Tensor, start: int) -> None:
    """Write into `out`, float32 [rows, blocks, 4], the normals of the counter blocks from `start` on."""
    block = torch.arange(start, start + out.shape[1], dtype=torch.int64, device=out.device)
    draw = draws_b[:, None]
    counter = (block & _MASK, block >> 32, draw, torch.full_like(draw, _NOISE))
    words = philox4x32(counter, [word[:, None] for word in key])
    for first, (radius_word, angle_word) in ((0, words[:2]), (2, words[2:])):
        # (k + 1) / 2^24 is in (0, 1]: its logarithm is finite.
        radius = ((radius_word >> 8) + 1).double().mul_(2.0**-24).log_().mul_(-2.0).sqrt_()
        angle = (angle_word >> 8).double().mul_(2.0**-24 * (2 * math.pi))
        torch.mul(radius, angle.cos(), out=out[..., first])
        torch.mul(radius, angle.sin_(), out=out[..., first + 1])
