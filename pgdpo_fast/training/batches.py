"""From (seed, step) to tensors: which pairs a step takes, and the noised latents and targets the network sees.

Nothing here has state. The order of the pairs is a pure function of (seed, step, slot), timestep and noise one of
(seed, pair id, draw index), so a run resumes from its step number alone and any world size sees the same pairs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from pgdpo_fast.data.latent_store import LatentStore
from pgdpo_fast.data.text import pad_text
from pgdpo_fast.diffusion import DiffusionProcess, draw_noise, draw_uniform
from pgdpo_fast.errors import ConfigError
from pgdpo_fast.loss import NoisedTarget

__all__ = ["Batch", "Draw", "PairOrder", "Stage", "hold_out"]


@dataclass(frozen=True)
class Draw:
    """One visit to one pair: its id and the index of the draw."""

    id: str
    draw: int


@dataclass(frozen=True)
class Batch:
    """What one forward needs, B pairs; tensors of 2B rows hold the chosen half first.

    Attributes:
        draws: the B visits.
        weight: `[B]` fp32, the pairs' weights.
        timestep: `[B]`, process time.
        model_timestep: `[2B]`, what the network is called with.
        noised: `[2B, C, F, H, W]` fp32.
        target: what the network should output, built inside the loss from clean latents and noise.
        text: `[2B, L, D]`.
    """

    draws: tuple[Draw, ...]
    weight: Tensor
    timestep: Tensor
    model_timestep: Tensor
    noised: Tensor
    target: NoisedTarget
    text: Tensor

    @property
    def ids(self) -> list[str]:
        return [draw.id for draw in self.draws]


def _rank(seed: int, purpose: str, pair_id: str) -> bytes:
    return hashlib.blake2b(f"{seed}\0{purpose}\0{pair_id}".encode(), digest_size=8).digest()


def hold_out(ids: Sequence[str], count: int, seed: int) -> tuple[list[str], list[str]]:
    """Split ids into (training, held out); which are held out depends on the seed and each id, not on their order.

    Raises:
        ConfigError: no pair would be left to train on.
    """
    if count >= len(ids):
        raise ConfigError(
            f"data.evaluation_pairs={count}: the store has {len(ids)} pairs, at least one must be left to train on"
        )
    held = set(sorted(ids, key=lambda pair_id: _rank(seed, "hold out", pair_id))[:count])
    return [i for i in ids if i not in held], [i for i in ids if i in held]


class PairOrder:
    """The visits of every step: epochs of all pairs, each in an order of its own.

    Args:
        ids: ids of the training pairs.
        pairs_per_step: slots of one step; a step may span two epochs.
        draws_per_pair: number of distinct draws a pair cycles through; 0 gives every visit a new one.
    """

    def __init__(self, ids: Sequence[str], pairs_per_step: int, seed: int, draws_per_pair: int = 0):
        self.ids, self.pairs_per_step, self.seed, self.draws_per_pair = (
            sorted(ids),
            pairs_per_step,
            seed,
            draws_per_pair,
        )
        self._epoch = lru_cache(maxsize=2)(self._shuffled)

    def _shuffled(self, epoch: int) -> list[str]:
        return sorted(self.ids, key=lambda pair_id: _rank(self.seed, f"epoch {epoch}", pair_id))

    def visits(self, step: int) -> list[Draw]:
        """The visits of step `step` (from 0), in slot order."""
        visits = []
        for position in range(step * self.pairs_per_step, (step + 1) * self.pairs_per_step):
            epoch, place = divmod(position, len(self.ids))
            draw = epoch % self.draws_per_pair if self.draws_per_pair else epoch
            visits.append(Draw(self._epoch(epoch)[place], draw))
        return visits


class Stage:
    """Turns visits into batches: reads the store on the host, draws and noises on the device.

    Args:
        text_tokens: length the text is zero-padded to.
        strata: number of strata the timesteps of a pair's consecutive draws visit in turn (`draw_uniform`).
    """

    def __init__(
        self,
        store: LatentStore,
        process: DiffusionProcess,
        text_tokens: int,
        seed: int,
        device: torch.device,
        strata: int = 1,
    ):
        self.store, self.process, self.text_tokens, self.seed, self.device = store, process, text_tokens, seed, device
        self.strata = strata

    def read(self, draws: Sequence[Draw]) -> tuple[Tensor, Tensor, Tensor]:
        """Clean latents `[2B, C, F, H, W]`, padded text `[B, L, D]` and weights `[B]` on the host, pinned for a GPU."""
        examples = [self.store.get(draw.id) for draw in draws]
        tensors = (
            torch.stack([example.chosen for example in examples] + [example.rejected for example in examples]),
            pad_text([example.text for example in examples], self.text_tokens),
            torch.tensor([example.weight for example in examples], dtype=torch.float32),
        )
        return tuple(tensor.pin_memory() for tensor in tensors) if self.device.type == "cuda" else tensors

    def noise(self, draws: Sequence[Draw], tensors: tuple[Tensor, Tensor, Tensor]) -> Batch:
        """Noise what `read` returned; chosen and rejected of a pair share timestep and noise."""
        clean, text, weight = (tensor.to(self.device, non_blocking=True) for tensor in tensors)
        ids, indices = [draw.id for draw in draws], [draw.draw for draw in draws]
        timestep = self.process.timestep(draw_uniform(self.seed, ids, indices, self.strata))
        timestep = timestep.to(self.device, non_blocking=True)
        noise = draw_noise(self.seed, ids, indices, tuple(clean.shape[1:]), self.device)
        both = torch.cat([timestep, timestep])
        return Batch(
            draws=tuple(draws),
            weight=weight,
            timestep=timestep,
            model_timestep=self.process.model_timestep(both),
            noised=self.process.add_noise(clean, torch.cat([noise, noise]), both),
            target=NoisedTarget(clean, noise, *self.process.target_coefficients(timestep)),
            text=torch.cat([text, text]),
        )
