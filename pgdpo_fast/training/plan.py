"""What a configuration will take, and what a cached reference saves of it, before anything runs.

Counts are exact (the network is laid out without its weights); shares of compute are those of forwards and backwards,
and hold where the network dwarfs everything else, as a video transformer does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pgdpo_fast.data.codec import planned_shape
from pgdpo_fast.data.latent_store import LatentStore
from pgdpo_fast.models import adapter_class, adapter_from_config
from pgdpo_fast.reference.cache import Layout
from pgdpo_fast.reference.rows import FORMATS
from pgdpo_fast.storage import describe_bytes
from pgdpo_fast.training.batches import split
from pgdpo_fast.training.config import TrainConfig
from pgdpo_fast.training.reference_pass import choose_format, reference_visits

__all__ = ["ComingStore", "Plan", "make_plan", "reference_share", "saved_share"]


def reference_share(train: str, checkpointing: bool) -> tuple[float, float]:
    """(low, high) share of a training step that the reference's forward takes, a forward being the unit of work.

    Every weight trained: reference 1, policy 1, backward 2, recomputation 1 where activations are. LoRA: the backward
    needs no weight gradients of the base, 1.2 to 1.7 by rank and targets.
    """
    backward = (2.0, 2.0) if train == "full" else (1.7, 1.2)
    return tuple(1 / (2 + cost + checkpointing) for cost in backward)


def saved_share(share: float, reuse: float) -> float:
    """Share of a run's compute a cache saves when every draw is used `reuse` times: share * (1 - 1 / reuse).

    The pass that fills it costs one forward per draw. Negative when draws are made that are never visited.
    """
    return share * (1 - 1 / reuse)


@dataclass(frozen=True)
class Plan:
    """Counts of one run; sizes in bytes, memory on the training device.

    Attributes:
        pairs, held_out: of the store.
        visits: of a pair in the whole run.
        draws: distinct draws per pair; every one is one row of the cache.
        evaluation_rows: rows of held-out pairs.
        total, trained: weights.
        parameters, gradients, optimizer: memory; the optimizer's is fp32 masters (where the network is bf16) and
            two moments.
        reference: memory by mode of the reference.
        cache: bytes on disk by format.
        format: the smallest that serves the objective.
        checkpoint: bytes of one checkpoint.
        share: (low, high), see `reference_share`.
    """

    pairs: int
    held_out: int
    visits: float
    draws: int
    evaluation_rows: int
    total: int
    trained: int
    parameters: int
    gradients: int
    optimizer: int
    reference: dict[str, int]
    cache: dict[str, int]
    format: str
    checkpoint: int
    share: tuple[float, float]

    def saved(self, reuse: float) -> str:
        """`saved_share` in percent, one number where low and high round to the same."""
        low, high = (f"{100 * saved_share(share, reuse):.0f}%" for share in self.share)
        return low if low == high else f"{low} to {high}"

    @property
    def reuse(self) -> float:
        """Times every draw is visited."""
        return self.visits / self.draws

    def verdict(self) -> str:
        """One sentence on what a cache brings this run."""
        memory = 0 if "adapter-off" in self.reference else self.reference["copy"]
        weights = f"{describe_bytes(memory)} of reference weights"
        if self.reuse > 1:
            kept = f" and {weights}" if memory else ""
            return (
                f"every draw is used {self.reuse:.1f} times: a cache saves {self.saved(self.reuse)} of this run's "
                f"compute{kept}, and the whole pass for every further run on the same draws"
            )
        only = f"only memory, {weights}" if memory else "nothing"
        if self.reuse < 1:
            only += (
                f", and costs {self.saved(self.reuse).replace('-', '')} of compute ({self.draws} draws are made, "
                f"{self.visits:.1f} visited)"
            )
        return (
            f"no draw is used twice: in this run alone a cache saves {only}; it pays with training.draws_per_pair "
            f"well below {self.visits:.1f}, or when further runs use the same draws"
        )


@dataclass(frozen=True)
class ComingStore:
    """What a plan asks of a store that is yet to be encoded: ids of its pairs, and (C, F, H, W) of its latents."""

    ids: Sequence[str]
    shape: tuple[int, int, int, int]

    @property
    def kin(self) -> dict[str, str]:
        """As `LatentStore.kin`: every pair has a prompt and clips of its own, as far as is known."""
        return {pair: pair for pair in self.ids}

    @classmethod
    def of(cls, config: TrainConfig, ids: Sequence[str], frames: int = 0, height: int = 0, width: int = 0):
        """The store `encode` will make with the VAE of `model.path`; a size of 0 is the one the family was trained on.

        Raises:
            ConfigError, DataError: the VAE is not there or takes no such clips.
        """
        adapter, model = adapter_class(config.model.family), config.model
        size = (frames or adapter.clip.frames, height or adapter.clip.height, width or adapter.clip.width)
        return cls(ids, planned_shape(model.path, adapter.latents, *size, revision=model.revision))


def make_plan(config: TrainConfig, store: LatentStore | ComingStore | None = None) -> Plan:
    """Count everything `config` needs; reads the store's index and the network's configuration, no weights.

    Args:
        store: in place of that of `data.store`.

    Raises:
        ConfigError, DataError: as training would.
    """
    store, adapter, options = (
        store or LatentStore(config.data.store),
        adapter_from_config(config.model),
        config.training,
    )
    model = adapter.on_meta_device()
    blocks = reference_visits(config, split(config, store))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    count = sum(parameter.numel() for parameter in trained)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    trained_size = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    masters = sum(4 * parameter.numel() for parameter in trained if parameter.element_size() < 4)
    lora = config.model.train == "lora"
    copy = weights - trained_size if lora else weights  # adapters are no part of a copy
    rows = sum(block.rows for block in blocks)
    cache = {
        name: Layout.of(name, options.granularity, store.shape, config.model.dtype, 1).row_bytes for name in FORMATS
    }
    format, size = choose_format(config), options.pairs_per_step // options.accumulation
    # errors lie on the device as one table; of predictions one batch is used while the next arrives
    resident = rows * cache["errors"] if format == "errors" else 2 * size * cache[format]
    return Plan(
        pairs=len(blocks[0].ids),
        held_out=len(blocks[1].ids) if len(blocks) > 1 else 0,
        visits=options.steps * options.pairs_per_step / len(blocks[0].ids),
        draws=blocks[0].draws,
        evaluation_rows=rows - blocks[0].rows,
        total=sum(parameter.numel() for parameter in model.parameters()),
        trained=count,
        parameters=weights,
        gradients=4 * count,
        optimizer=masters + 8 * count,
        reference={"cached": resident, **({"adapter-off": 0} if lora else {}), "copy": copy},
        cache={name: rows * size for name, size in cache.items()},
        format=format,
        checkpoint=trained_size + masters + 8 * count,
        share=reference_share(config.model.train, config.model.gradient_checkpointing),
    )
