"""What is measured: the latents of five video models, the ways a loss can be called on them, and the bytes that takes.

Bytes are counted from the algorithm, never from an implementation: each operand read once, each gradient written once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

GRANULARITIES = ("sample", "frame", "element")
REFERENCE_FORMS = ("errors", "predictions", "bf16", "fp8")
TARGET_FORMS = ("stacked", "shared", "built")
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
BATCHES = (1, 4, 16)
PACK_BLOCK = 128  # float8 values that share one float32 scale


@dataclass(frozen=True)
class VideoShape:
    """Latents `[C, F, H, W]` of one video."""

    name: str
    latents: tuple[int, int, int, int]

    @property
    def numel(self) -> int:
        return math.prod(self.latents)


SHAPES = {
    shape.name: shape
    for shape in (
        VideoShape("videocrafter2", (4, 16, 40, 64)),
        VideoShape("cogvideox-480p", (16, 13, 60, 90)),
        VideoShape("wan2.1-480p", (16, 21, 60, 104)),
        VideoShape("wan2.1-720p", (16, 21, 90, 160)),
        VideoShape("hunyuanvideo-720p", (16, 33, 90, 160)),
    )
}
# For checks alone: even, and odd in every dimension.
SMALL_SHAPES = (VideoShape("small-even", (4, 3, 8, 16)), VideoShape("small-odd", (3, 5, 7, 9)))


@dataclass(frozen=True)
class Case:
    """One way to call the loss: `pairs` pairs of one shape, dtype, granularity and form of reference and target."""

    shape: VideoShape
    pairs: int = 1
    granularity: str = "sample"
    reference_form: str = "predictions"
    target_form: str = "stacked"
    dtype: str = "bfloat16"

    @property
    def key(self) -> str:
        parts = [self.shape.name, f"B{self.pairs}", self.granularity, self.reference_form]
        if self.target_form != "stacked":
            parts.append(self.target_form)
        return "/".join([*parts, self.dtype])

    @property
    def possible(self) -> bool:
        """Errors per video say nothing about elements."""
        return not (self.granularity == "element" and self.reference_form == "errors")

    @property
    def elements(self) -> int:
        """Latent elements of all videos of the batch."""
        return 2 * self.pairs * self.shape.numel

    @property
    def gradient_bytes(self) -> int:
        return self.elements * BYTES[self.dtype]

    @property
    def input_bytes(self) -> int:
        """Predictions, target and reference, each byte once."""
        reference = {
            "errors": 2 * self.pairs * (self.shape.latents[1] if self.granularity == "frame" else 1) * 4,
            "predictions": self.elements * BYTES[self.dtype],
            "bf16": self.elements * 2,
            "fp8": self.elements + 2 * self.pairs * -(-self.shape.numel // PACK_BLOCK) * 4,
        }[self.reference_form]
        return self._policy_and_target + reference

    @property
    def _policy_and_target(self) -> int:
        halves = {"stacked": 2, "shared": 1, "built": 3}[self.target_form]  # built: two clean videos and one noise
        return (self.elements + halves * self.elements // 2) * BYTES[self.dtype]

    @property
    def floor_bytes(self) -> int:
        """The least any implementation of loss and gradients moves."""
        return self.input_bytes + self.gradient_bytes

    @property
    def two_pass_bytes(self) -> int:
        """The least when gradients need a reduced coefficient first and nothing stays on chip between the passes."""
        return self.floor_bytes + (0 if self.granularity == "element" else self._policy_and_target)
