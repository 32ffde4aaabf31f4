"""The provider that reads a run's reference from a cache, in place of a network's forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pgdpo_fast.errors import DataError
from pgdpo_fast.loss import PackedReference, ReferenceErrors
from pgdpo_fast.reference.cache import ReferenceCache
from pgdpo_fast.reference.stream import RowStream
from pgdpo_fast.storage import describe_bytes
from pgdpo_fast.training.batches import Batch, Visit
from pgdpo_fast.training.config import TrainConfig
from pgdpo_fast.training.network import Opened
from pgdpo_fast.training.reference import needs_predictions
from pgdpo_fast.training.reference_pass import reference_fingerprint, reference_visits

__all__ = ["CachedReference"]


@dataclass
class CachedReference:
    """Rows of a cache as the reference of a run: no forward, no weights."""

    cache: ReferenceCache
    stream: RowStream
    pairs: int

    @classmethod
    def open(cls, config: TrainConfig, opened: Opened, device: torch.device) -> CachedReference:
        """The cache `config.data.reference_cache` for the network as opened, before adapters and training.

        Raises:
            DataError: it was made for something else (naming every field), does not cover the run, or is damaged.
        """
        cache, options = ReferenceCache(config.data.reference_cache), config.training
        cache.require(reference_fingerprint(config, opened), reference_visits(config, opened.split)[0].draws)
        layout, size = cache.layout, options.pairs_per_step // options.accumulation
        if layout.format == "errors":
            if needs_predictions(config.build_objective(), options.granularity):
                raise DataError(
                    f"{cache.path}: holds errors; objective {config.objective['name']} at "
                    f"training.granularity={options.granularity} needs the reference's predictions; make a "
                    "cache in another folder with --format predictions"
                )
            if layout.granularity != options.granularity:
                raise DataError(
                    f"{cache.path}: training.granularity was {layout.granularity!r}, is now "
                    f"{options.granularity!r}; set it back, or make a cache for it in another folder"
                )
        return cls(cache, RowStream(cache, device, pairs=size, depth=2 * options.accumulation), size)

    def __call__(self, batch: Batch) -> ReferenceErrors | tuple[Tensor, Tensor] | PackedReference:
        return self.stream.take(batch.visits)

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        return ()

    def prefetch(self, visits: Sequence[Visit]) -> None:
        self.stream.prefetch(visits)

    def cost(self) -> str:
        layout = self.cache.layout
        kind = {
            "errors": f"errors per {layout.granularity}",
            "predictions": "exact predictions",
            "bf16": "predictions rounded to bf16",
            "fp8": "predictions rounded to fp8",
        }[layout.format]
        other = (
            ""
            if layout.pairs_per_forward == self.pairs
            else (f"; made {layout.pairs_per_forward} pairs per forward, this run {self.pairs}: equal up to rounding")
        )
        return (
            f"cached: no forward and no weights; {len(self.cache)} rows of {kind}, "
            f"{describe_bytes(self.cache.bytes)} in {self.cache.path}{other}"
        )
