"""Where the reference's half of the loss comes from: the policy without its adapters, or a frozen copy.

A provider is called with a batch before the policy's forward and returns what `pf.preference_loss` takes as its
reference: its two errors per group where the objective needs no more, predictions otherwise. A provider that reads
stored values by (pair id, draw) has the same interface.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from pgdpo_fast.loss import FRAME_DIM, PackedReference, ReferenceErrors, reference_errors
from pgdpo_fast.models import ModelAdapter, adapters_off
from pgdpo_fast.objectives import Objective
from pgdpo_fast.training.batches import Batch, Visit

__all__ = ["AdapterOffReference", "CopyReference", "ReferenceProvider", "needs_predictions"]


class ReferenceProvider(Protocol):
    """What the loop asks of a reference."""

    def __call__(self, batch: Batch) -> ReferenceErrors | PackedReference | tuple[Tensor, Tensor] | Tensor:
        """What `preference_loss` takes as its reference, without gradient: errors (`[B]`, or `[B, F]` per frame) or
        predictions, packed or not."""

    def prefetch(self, visits: Sequence[Visit]) -> None:
        """Begin to bring what a coming batch needs; called from another thread."""

    def cost(self) -> str:
        """What it costs, for the banner."""

    networks: Sequence[nn.Module]  # what it runs, to be compiled with the policy


def needs_predictions(objective: Objective, granularity: str) -> bool:
    """Whether the loss needs the reference's predictions, not just its two errors per group."""
    return granularity == "element" or objective.needs_anchor


class _NetworkReference:
    def __init__(self, adapter: ModelAdapter, model: nn.Module, objective: Objective, granularity: str, backend: str):
        self.adapter, self.model = adapter, model
        self.predictions = needs_predictions(objective, granularity)
        self.options = {"granularity": granularity, "frame_dim": FRAME_DIM, "backend": backend}

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        return (self.model,)

    def prefetch(self, visits: Sequence[Visit]) -> None:
        """A network has nothing to read ahead."""

    @torch.no_grad()
    def __call__(self, batch: Batch) -> ReferenceErrors | Tensor:
        prediction = self._predict(batch)
        return prediction if self.predictions else reference_errors(prediction, batch.target, **self.options)

    def _predict(self, batch: Batch) -> Tensor:
        return self.adapter.predict(self.model, batch)


class AdapterOffReference(_NetworkReference):
    """The policy's own network with its LoRA adapters switched off: no memory, one more forward per step."""

    def _predict(self, batch):
        with adapters_off(self.model):
            return super()._predict(batch)

    def cost(self) -> str:
        return "adapter-off: one extra forward per step, no extra memory"


class CopyReference(_NetworkReference):
    """A frozen copy of the initial weights. Make it before adapters are added and before a checkpoint is loaded."""

    def __init__(self, adapter: ModelAdapter, initial: nn.Module, objective: Objective, granularity: str, backend: str):
        frozen = copy.deepcopy(initial).requires_grad_(False).eval()
        super().__init__(adapter, frozen, objective, granularity, backend)

    def cost(self) -> str:
        size = sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())
        return f"copy: one extra forward per step, {size / 2**30:.2f} GiB of weights"
