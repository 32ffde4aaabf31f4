"""`pgdpo-fast encode`: manifest of video pairs to a latent store, resumable and verified."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

# What each model family was trained on: frames, height, width, fps, text encoder.
DEFAULTS = {
    "pixel-unshuffle": (17, 64, 64, 8.0, "hash"),
    "wan": (81, 480, 832, 16.0, "wan"),
    "cogvideox": (49, 480, 720, 8.0, "cogvideox"),
    "image": (16, 320, 512, 8.0, "clip"),
}


@dataclass
class Encode:
    """Encode a manifest of preference pairs into a latent store that training reads.

    Decodes both clips of every pair, brings them to one size, length and frame rate, runs the codec and the text
    encoder once, and writes safetensors shards with sha256. Run the same command again after an interruption:
    finished pairs are kept. Pairs that cannot be used are listed with their reasons, never dropped in silence.
    """

    manifest: Annotated[Path, tyro.conf.arg(aliases=["-m"])]
    """JSONL, CSV or parquet with prompt, chosen, rejected (optional: id, negative_prompt, first_frame, chosen_score,
    rejected_score, weight), a VideoAlign CSV, or VideoDPO's pair.json. Clip paths start at its folder."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder of the store; created when new, continued when it holds the same settings."""
    codec: Literal["wan", "cogvideox", "image", "pixel-unshuffle"] = "wan"
    """Video autoencoder: "image" is AutoencoderKL frame by frame (VideoCrafter2), "pixel-unshuffle" has no weights."""
    model: str | None = None
    """Folder or hub id of the model whose VAE and text encoder are used, e.g. Wan-AI/Wan2.1-T2V-1.3B-Diffusers."""
    revision: str | None = None
    """Revision of a hub model."""
    text: Literal["wan", "cogvideox", "clip", "hash"] | None = None
    """Text encoder family; by default the codec's own. "hash" gives each word a fixed vector and needs no weights."""
    frames: int | None = None
    """Frames per clip. Default 81 (wan), 49 (cogvideox), 16 (image), 17 (pixel-unshuffle)."""
    height: int | None = None
    """Height in pixels. Default 480 (wan, cogvideox), 320 (image), 64 (pixel-unshuffle)."""
    width: int | None = None
    """Width in pixels. Default 832 (wan), 720 (cogvideox), 512 (image), 64 (pixel-unshuffle)."""
    fps: float | None = None
    """Frames per second taken from both clips, by time stamp; 0: the source's own. Default 16 (wan), 8 (others)."""
    start: Literal["begin", "center"] = "begin"
    """Where in a longer clip the frames are taken."""
    short: Literal["error", "pad"] = "error"
    """A clip with too few frames: drop the pair ("error"), or repeat the last frame ("pad")."""
    format: Literal["plain", "videoalign", "videodpo"] | None = None
    """Manifest layout, when the columns should not decide."""
    criterion: Literal["majority", "VQ", "MQ", "TA", "Overall"] = "majority"
    """VideoAlign: the label that decides, or the majority of VQ, MQ and TA. Ties are dropped."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the stored latents and embeddings."""
    vae_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision the VAE runs in. bfloat16 halves time and memory and changes the latents slightly."""
    text_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Precision the text encoder runs in, as in the diffusers pipelines."""
    vae_mode: Literal["mode", "sample"] = "mode"
    """Latent of a clip: the posterior's mean, or one draw from it seeded by the clip itself."""
    device: str = "auto"
    """Device for VAE and text encoder: auto, cpu, cuda, cuda:1."""
    spatial: int = 4
    """pixel-unshuffle: pixels per latent side."""
    temporal: int = 1
    """pixel-unshuffle: frames per latent frame (F = temporal*k + 1)."""
    text_dim: int = 32
    """hash: length of a word's vector."""
    strict: bool = False
    """Stop at the first pair that cannot be used, instead of dropping it with its reason."""

    def run(self) -> int:
        import shlex

        from rich.console import Console

        from pgdpo_fast.cli.progress import rows_progress
        from pgdpo_fast.data.encode import encode_manifest
        from pgdpo_fast.data.manifest import Manifest, read_manifest, used_dropped_table
        from pgdpo_fast.errors import ConfigError
        from pgdpo_fast.storage import describe_bytes

        console = Console(stderr=True)
        frames, height, width, fps, text_name = (
            default if given is None else given
            for given, default in zip(
                (self.frames, self.height, self.width, self.fps, self.text), DEFAULTS[self.codec], strict=True
            )
        )
        if self.model is None and (self.codec != "pixel-unshuffle" or text_name != "hash"):
            raise ConfigError(
                f"codec {self.codec!r} with text {text_name!r} needs --model, the folder or hub id of a "
                "diffusers model; or use --codec pixel-unshuffle --text hash"
            )
        manifest = read_manifest(self.manifest, format=self.format, criterion=self.criterion, strict=self.strict)
        for note in manifest.notes:
            console.print(f"note: {note}", highlight=False)
        if any(pair.first_frame for pair in manifest.pairs):
            console.print("note: first_frame is recorded in the index and not encoded", highlight=False)
        codec, text = self._codec(), self._text(text_name)
        with rows_progress(console, "encoding pairs") as progress:
            store = encode_manifest(
                manifest,
                self.output,
                codec=codec,
                text=text,
                frames=frames,
                height=height,
                width=width,
                fps=fps or None,
                start=self.start,
                short=self.short,
                dtype=self.dtype,
                strict=self.strict,
                provenance={"model": self.model, "revision": self.revision},
                progress=progress,
                resume_command=shlex.join(["pgdpo-fast", *sys.argv[1:]]),
            )
        kept = set(store.ids)
        used = tuple(pair for pair in manifest.pairs if pair.id in kept)
        Console().print(
            used_dropped_table(Manifest(manifest.path, manifest.format, used, (*manifest.dropped, *store.dropped)))
        )
        if cut := store.metadata["truncated_prompts"]:
            console.print(
                f"note: {cut} prompt(s) were longer than the text encoder takes and lost their end", highlight=False
            )
        shape = "x".join(map(str, store.shape))
        console.print(
            f"store: {store.path} ({len(store)} pairs, latents {shape}, {describe_bytes(store.bytes)})",
            highlight=False,
            soft_wrap=True,
        )
        return 0

    def _codec(self):
        from pgdpo_fast.data.codec import codec_from_name

        if self.codec == "pixel-unshuffle":
            return codec_from_name(self.codec, spatial=self.spatial, temporal=self.temporal)
        return codec_from_name(
            self.codec,
            path=self.model,
            revision=self.revision,
            dtype=self.vae_dtype,
            mode=self.vae_mode,
            device=self.device,
        )

    def _text(self, name: str):
        from pgdpo_fast.data.text import text_encoder_from_name

        if name == "hash":
            return text_encoder_from_name(name, dim=self.text_dim)
        return text_encoder_from_name(
            name, path=self.model, revision=self.revision, dtype=self.text_dtype, device=self.device
        )
