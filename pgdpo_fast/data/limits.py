"""What a clip may ask for before it is refused; apart from the decoder, so that `--help` needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from pgdpo_fast.errors import ConfigError

__all__ = ["LIMITS", "MAX_FPS", "VideoLimits"]

MAX_FPS = 1000


@dataclass(frozen=True)
class VideoLimits:
    """Bounds that no clip of a preference data set comes near.

    Attributes:
        pixels: of one picture, as stored, as displayed and as asked for; an 8K picture has 33 million.
        frames: stored in the file, or asked for.
        seconds: from the first time stamp to the last.
        patience: seconds of work on one clip.
    """

    pixels: int = 1 << 26
    frames: int = 250_000
    seconds: float = 86_400.0
    patience: float = 1800.0

    def __post_init__(self):
        for name, value in vars(self).items():
            if not value > 0:
                raise ConfigError(f"limit {name}={value}; expected a positive number")


LIMITS = VideoLimits()
