"""`pgdpo-fast encode`: manifest of video pairs to a latent store, resumable and verified."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pgdpo_fast.data.limits import LIMITS, VideoLimits
from pgdpo_fast.errors import ConfigError
from pgdpo_fast.families import FAMILIES, ClipSize

PIXELS, WORDS = "pixel-unshuffle", "hash"  # codec and text encoder without weights
CODECS, TEXTS = (*FAMILIES, PIXELS), (*FAMILIES, WORDS)
SMALL = ClipSize(frames=17, height=64, width=64, fps=8.0)
Dtype = Annotated[str, tyro.conf.arg(metavar="bf16|fp16|fp32")]


@dataclass
class Encode:
    """Encode a manifest of preference pairs into a latent store that training reads.

    Decodes both clips of every pair, brings them to one size, length and frame rate, runs the codec and the text
    encoder once, and writes safetensors shards with sha256. Run the same command again after an interruption:
    finished pairs are kept. Pairs that cannot be used are listed with their reasons, never dropped in silence. Started
    with torchrun, or several times, processes share the work.
    """

    manifest: Annotated[Path, tyro.conf.arg(aliases=["-m"])]
    """JSONL, CSV or parquet with prompt, chosen, rejected (optional: id, negative_prompt, first_frame, chosen_score,
    rejected_score, weight), a VideoAlign CSV, or VideoDPO's pair.json. Clip paths start at its folder."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder of the store; created when new, continued when it holds the same settings."""
    codec: Literal[CODECS] = "wan"
    """Model family whose video autoencoder is used; "pixel-unshuffle" has no weights."""
    model: str | None = None
    """Folder or hub id of the model whose VAE and text encoder are used, e.g. Wan-AI/Wan2.1-T2V-1.3B-Diffusers."""
    revision: str | None = None
    """Revision of a hub model."""
    text: Literal[TEXTS] | None = None
    """Model family whose text encoders are used, by default the codec's; "hash" gives each word a fixed vector and
    needs no weights."""
    frames: int | None = None
    """Frames per clip. By default this and the next three are what the family was trained on; the note printed at
    the start says what they came to."""
    height: int | None = None
    """Height in pixels."""
    width: int | None = None
    """Width in pixels."""
    fps: float | None = None
    """Frames per second taken from both clips, by time stamp; 0: the source's own."""
    start: Literal["begin", "center"] = "begin"
    """Where in a longer clip the frames are taken."""
    short: Literal["error", "pad"] = "error"
    """A clip with too few frames: drop the pair ("error"), or repeat the last frame ("pad")."""
    format: Literal["plain", "videoalign", "videodpo"] | None = None
    """Manifest layout, when the columns should not decide."""
    root: Path | None = None
    """Folder that relative clip paths start at; unset: the manifest's."""
    criterion: Literal["majority", "VQ", "MQ", "TA", "Overall"] | None = None
    """VideoAlign: the label that decides, or (unset) the majority of VQ, MQ and TA. Ties are dropped."""
    dtype: Dtype = "fp32"
    """Precision of the stored latents and embeddings."""
    vae_dtype: Dtype | None = None
    """Precision the VAE runs in; unset: fp32. bf16 halves time and memory and changes the latents slightly."""
    text_dtype: Dtype | None = None
    """Precision the text encoder runs in; unset: bf16, as in the diffusers pipelines."""
    vae_mode: Literal["mode", "sample"] | None = None
    """Latent of a clip: the posterior's mean (unset: mode), or one draw from it seeded by the clip itself."""
    device: str = "auto"
    """Device for VAE and text encoder: auto, cpu, cuda or cuda:N."""
    spatial: int | None = None
    """pixel-unshuffle: pixels per latent side; unset: 4."""
    temporal: int | None = None
    """pixel-unshuffle: frames per latent frame (F = temporal*k + 1); unset: 1."""
    text_dim: int | None = None
    """hash: length of a word's vector; unset: 32."""
    strict: bool = False
    """Stop at the first pair that cannot be used, instead of dropping it with its reason."""
    max_dropped: float = 0.1
    """Largest share of the manifest's rows that may be unusable; more is an error before anything is encoded."""
    max_pixels: int = LIMITS.pixels
    """Clips with larger pictures are refused."""
    max_clip_frames: int = LIMITS.frames
    """Longer clips are refused."""
    max_clip_seconds: float = LIMITS.seconds
    """Clips whose time stamps span more are refused."""
    patience: float = LIMITS.patience
    """Seconds of work after which a clip is given up."""

    def run(self) -> int:
        import shlex

        from rich.console import Console

        from pgdpo_fast.cli.processes import share_of_environment
        from pgdpo_fast.cli.progress import rows_progress
        from pgdpo_fast.data.encode import DROPPED_FILE, encode_manifest
        from pgdpo_fast.data.manifest import Manifest, read_manifest, used_dropped_table
        from pgdpo_fast.devices import select_device, select_dtype
        from pgdpo_fast.models import adapter_class
        from pgdpo_fast.printable import printable
        from pgdpo_fast.storage import describe_bytes

        console, share = Console(stderr=True), share_of_environment()
        device = select_device(self.device, "--device")
        if device.type == "cuda" and device.index is None:
            self.device = f"cuda:{share.local_rank}"
        for key in ("dtype", "vae_dtype", "text_dtype"):
            if (value := getattr(self, key)) is not None:
                select_dtype(value, f"--{key.replace('_', '-')}")
        text_name = self.text or (WORDS if self.codec == PIXELS else self.codec)
        pixels, words = self.codec == PIXELS, text_name == WORDS
        chosen = {
            **self._flags(pixels, f"--codec {PIXELS}", spatial=4, temporal=1),
            **self._flags(not pixels, "a codec with weights", vae_dtype="fp32", vae_mode="mode"),
            **self._flags(words, f"--text {WORDS}", text_dim=32),
            **self._flags(not words, "a text encoder with weights", text_dtype="bf16"),
            **self._flags(not (pixels and words), "a codec or text encoder with weights", model=None, revision=None),
        }
        if self.model is None and (self.codec != PIXELS or text_name != WORDS):
            raise ConfigError(
                f"codec {self.codec!r} with text {text_name!r} needs --model, the folder or hub id of a "
                f"diffusers model; or use --codec {PIXELS} --text {WORDS}"
            )
        usual = SMALL if self.codec == PIXELS else adapter_class(self.codec).clip
        given = {key: getattr(self, key) for key in ClipSize._fields}
        clip = usual._replace(**{key: value for key, value in given.items() if value is not None})
        manifest = read_manifest(
            self.manifest, root=self.root, format=self.format, criterion=self.criterion, strict=self.strict
        )

        def tell(line: str) -> None:
            if share.rank == 0:
                console.print(printable(line), highlight=False, markup=False, soft_wrap=True)

        for note in manifest.notes:
            tell(f"note: {note}")
        if any(pair.first_frame for pair in manifest.pairs):
            tell("note: first_frame is recorded in the index and not encoded")
        rate = f"{clip.fps:g} frames per second" if clip.fps else "the source's frame rate"
        tell(f"note: clips of {clip.frames} frames, {clip.height}x{clip.width}, at {rate}")
        codec, text = self._codec(chosen), self._text(text_name, chosen)
        with rows_progress(console, "encoding pairs", shown=share.rank == 0) as progress:

            def told(line: str) -> None:
                progress.dropped += line.startswith("dropped: ")
                tell(line)

            store = encode_manifest(
                manifest,
                self.output.expanduser(),
                codec=codec,
                text=text,
                frames=clip.frames,
                height=clip.height,
                width=clip.width,
                fps=clip.fps or None,
                start=self.start,
                short=self.short,
                dtype=self.dtype,
                strict=self.strict,
                max_dropped=self.max_dropped,
                limits=VideoLimits(self.max_pixels, self.max_clip_frames, self.max_clip_seconds, self.patience),
                tell=told,
                provenance={"model": self.model, "revision": self.revision},
                progress=progress,
                reading=progress.before,
                rank=share.rank,
                world_size=share.world_size,
                resume_command=shlex.join(["pgdpo-fast", *sys.argv[1:]]),
            )
        if share.rank:
            return 0
        kept = set(store.ids)
        used = tuple(pair for pair in manifest.pairs if pair.id in kept)
        Console().print(
            used_dropped_table(Manifest(manifest.path, manifest.format, used, (*manifest.dropped, *store.dropped)))
        )
        if cut := store.metadata["truncated_prompts"]:
            tell(f"note: {cut} prompt(s) were longer than the text encoder takes and lost their end")
        shape = "x".join(map(str, store.shape))
        tell(f"store: {store.path} ({len(store)} pairs, latents {shape}, {describe_bytes(store.bytes)})")
        if (listed := store.path / DROPPED_FILE).exists():
            tell(f"dropped rows: {listed}")
        return 0

    def _flags(self, apply: bool, takers: str, **defaults) -> dict:
        """These flags as given, or their defaults; ConfigError when one is given that nothing would read."""
        given = {key: getattr(self, key) for key in defaults if getattr(self, key) is not None}
        if given and not apply:
            key = next(iter(given))
            raise ConfigError(f"--{key.replace('_', '-')} {given[key]}: only {takers} takes it; leave it out")
        return {**defaults, **given}

    def _codec(self, chosen: dict):
        from pgdpo_fast.data.codec import DiffusersVAECodec, PixelUnshuffleCodec
        from pgdpo_fast.models import adapter_class

        if self.codec == PIXELS:
            return PixelUnshuffleCodec(spatial=chosen["spatial"], temporal=chosen["temporal"])
        return DiffusersVAECodec(
            self._model(),
            adapter_class(self.codec).latents,
            revision=self.revision,
            dtype=chosen["vae_dtype"],
            mode=chosen["vae_mode"],
            device=self.device,
        )

    def _text(self, name: str, chosen: dict):
        from pgdpo_fast.data.text import HashTextEncoder, TransformersTextEncoder
        from pgdpo_fast.models import adapter_class

        if name == WORDS:
            return HashTextEncoder(dim=chosen["text_dim"])
        return TransformersTextEncoder(
            self._model(),
            adapter_class(name).text,
            revision=self.revision,
            dtype=chosen["text_dtype"],
            device=self.device,
        )

    def _model(self) -> str:
        return os.path.expanduser(self.model)
