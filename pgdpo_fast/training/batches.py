"""From (seed, step) to tensors: which pairs a step takes, and the noised latents and targets the network sees.

Nothing here has state. The order of the pairs is a pure function of (seed, step, slot), timestep and noise one of
(seed, pair id, draw index), so a run resumes from its step number alone and any world size sees the same pairs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from pgdpo_fast.data.latent_store import LatentStore
from pgdpo_fast.diffusion import DiffusionProcess, Visit, draw_noise, draw_uniform
from pgdpo_fast.errors import ConfigError
from pgdpo_fast.loss import NoisedTarget
from pgdpo_fast.models import NoisedBatch
from pgdpo_fast.training.config import TrainConfig

__all__ = ["Batch", "HostBatch", "PairLoader", "PairOrder", "Split", "Visit", "hold_out", "split"]


class HostBatch(NamedTuple):
    """What is read of B pairs, on the host, pinned for a GPU.

    Attributes:
        clean: `[2B, C, F, H, W]` latents, the chosen half first.
        conditioning: tensors of B rows by name; a pair shares them.
        weight: `[B]` fp32.
    """

    clean: Tensor
    conditioning: Mapping[str, Tensor]
    weight: Tensor


@dataclass(frozen=True)
class Batch(NoisedBatch):
    """What one forward and its loss need, B pairs; the network's input has 2B rows, the chosen half first.

    Attributes:
        visits: what the B rows are of.
        weight: `[B]` fp32, the pairs' weights.
        timestep: `[B]`, process time.
        target: what the network should output, built inside the loss from clean latents and noise.
    """

    visits: tuple[Visit, ...]
    weight: Tensor
    timestep: Tensor
    target: NoisedTarget

    @property
    def ids(self) -> list[str]:
        return [visit.id for visit in self.visits]


def _rank(seed: int, purpose: str, pair_id: str) -> bytes:
    return hashlib.blake2b(f"{seed}\0{purpose}\0{pair_id}".encode(), digest_size=8).digest()


def hold_out(
    ids: Sequence[str], count: int, seed: int, kin: Mapping[str, str] | None = None
) -> tuple[list[str], list[str]]:
    """Split ids into (training, held out); which are held out depends on the seed and each id, not on their order.

    Args:
        kin: the name of the family of every pair, such as `LatentStore.kin`. Families are held out whole, so fewer
            than `count` pairs may be. None: every pair is a family of its own.

    Raises:
        ConfigError: no pair would be left to train on, or no family is small enough to be held out.
    """
    if count >= len(ids):
        raise ConfigError(
            f"data.evaluation_pairs={count}: the store has {len(ids)} pairs, at least one must be left to train on"
        )
    families: dict[str, list[str]] = {}
    for pair in ids:
        families.setdefault(kin[pair] if kin else pair, []).append(pair)
    held: set[str] = set()
    for name in sorted(families, key=lambda name: _rank(seed, "hold out", name)):
        if len(held) + len(families[name]) <= count:
            held.update(families[name])
    if count and not held:
        raise ConfigError(
            f"data.evaluation_pairs={count}: no pairs can be held out whose prompts and clips are not trained on too; "
            f"expected at least {min(map(len, families.values()))}, the smallest number that shares them, or "
            "data.split=pair to train on them"
        )
    return [i for i in ids if i not in held], [i for i in ids if i in held]


class Split(NamedTuple):
    """The pairs of a store as a run divides them.

    Attributes:
        training, held_out: ids.
        setting: `data.split` by its dotted key, for fingerprints: {} where it makes no difference to this store, so
            that what was made before it was a setting, or with its other value, is the same.
    """

    training: list[str]
    held_out: list[str]
    setting: dict[str, str]


def split(config: TrainConfig, store: LatentStore) -> Split:
    """Divide the pairs of a store as the configuration says. Raises as `hold_out` does."""
    data, seed = config.data, config.training.seed
    by_pair = found = hold_out(store.ids, data.evaluation_pairs, seed)
    if data.split == "content" and data.evaluation_pairs:
        found = hold_out(store.ids, data.evaluation_pairs, seed, store.kin)
    return Split(*found, {} if found == by_pair else {"data.split": data.split})


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

    def visits(self, step: int) -> list[Visit]:
        """The visits of step `step` (from 0), in slot order."""
        visits = []
        for position in range(step * self.pairs_per_step, (step + 1) * self.pairs_per_step):
            epoch, place = divmod(position, len(self.ids))
            draw = epoch % self.draws_per_pair if self.draws_per_pair else epoch
            visits.append(Visit(self._epoch(epoch)[place], draw))
        return visits


class PairLoader:
    """Turns visits into batches: reads the store on the host, draws and noises on the device.

    Args:
        collate: makes the conditioning of a batch out of that of its pairs (`ModelAdapter.collate`).
        strata: number of strata the timesteps of a pair's consecutive draws visit in turn (`draw_uniform`).
    """

    def __init__(
        self,
        store: LatentStore,
        process: DiffusionProcess,
        collate: Callable[[Sequence[Mapping[str, Tensor]]], Mapping[str, Tensor]],
        seed: int,
        device: torch.device,
        strata: int = 1,
    ):
        self.store, self.process, self.collate, self.seed, self.device = store, process, collate, seed, device
        self.strata = strata

    def read(self, visits: Sequence[Visit]) -> HostBatch:
        """The pairs of the visits, from the store."""
        examples = [self.store.get(visit.id) for visit in visits]
        clean = torch.stack([example.chosen for example in examples] + [example.rejected for example in examples])
        conditioning = self.collate([example.conditioning for example in examples])
        weight = torch.tensor([example.weight for example in examples], dtype=torch.float32)
        if self.device.type == "cuda":
            conditioning = {name: tensor.pin_memory() for name, tensor in conditioning.items()}
            clean, weight = clean.pin_memory(), weight.pin_memory()
        return HostBatch(clean, conditioning, weight)

    def noise(self, visits: Sequence[Visit], host: HostBatch) -> Batch:
        """Noise what `read` returned; chosen and rejected of a pair share timestep, noise and conditioning."""
        clean, weight = (tensor.to(self.device, non_blocking=True) for tensor in (host.clean, host.weight))
        conditioning = {name: tensor.to(self.device, non_blocking=True) for name, tensor in host.conditioning.items()}
        ids, indices = [visit.id for visit in visits], [visit.draw for visit in visits]
        timestep = self.process.timestep(draw_uniform(self.seed, ids, indices, self.strata))
        timestep = timestep.to(self.device, non_blocking=True)
        noise = draw_noise(self.seed, ids, indices, tuple(clean.shape[1:]), self.device)
        both = torch.cat([timestep, timestep])
        return Batch(
            visits=tuple(visits),
            weight=weight,
            timestep=timestep,
            model_timestep=self.process.model_timestep(both),
            noised=self.process.add_noise(clean, torch.cat([noise, noise]), both),
            target=NoisedTarget(clean, noise, *self.process.target_coefficients(timestep)),
            conditioning={name: torch.cat([tensor, tensor]) for name, tensor in conditioning.items()},
        )
