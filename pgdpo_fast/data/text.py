"""Prompts to the embeddings a diffusion model attends to, `[L, D]` fp32, padded or not as each family was trained.

What a family needs is in one table here. Embeddings are stored without padding wherever padding is plain zeros; where
the padded positions carry information (CogVideoX attends to them unmasked) they are part of the embedding and stay.
"""

from __future__ import annotations

import hashlib
import html
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from pgdpo_fast.data.codec import device_from_name, dtype_from_name, weights_hash
from pgdpo_fast.errors import ConfigError, DataError

__all__ = [
    "TEXT_ENCODERS",
    "HashTextEncoder",
    "TextEncoder",
    "TransformersTextEncoder",
    "pad_text",
    "text_encoder_from_name",
]


class TextEncoder(Protocol):
    """What an encoder of latent stores needs from a text encoder."""

    dim: int

    @property
    def fingerprint(self) -> dict: ...

    def token_count(self, prompt: str) -> int: ...

    def truncates(self, prompt: str) -> bool: ...

    def encode(self, prompt: str) -> torch.Tensor: ...


@dataclass(frozen=True)
class HashTextEncoder:
    """A parameter-free stand-in: each word is a fixed unit-variance vector drawn from the blake2b of its letters.

    Equal words share their vector, so a small model can learn what they mean; word order is the order of rows.
    """

    dim: int = 32
    max_length: int = 64

    def __post_init__(self):
        for key in ("dim", "max_length"):
            if type(getattr(self, key)) is not int or getattr(self, key) < 1:
                raise ConfigError(f"{key}={getattr(self, key)!r}; expected a whole number of at least 1")

    @property
    def fingerprint(self) -> dict:
        return {
            "class": "HashTextEncoder",
            "dim": self.dim,
            "max_length": self.max_length,
            "padding": "zeros",
            "version": 1,
        }

    def token_count(self, prompt: str) -> int:
        return min(len(self._words(prompt)), self.max_length)

    def truncates(self, prompt: str) -> bool:
        return len(self._words(prompt)) > self.max_length

    def encode(self, prompt: str) -> torch.Tensor:
        """fp32 [L, dim], L = words of the prompt, at least 1 and at most max_length."""
        return torch.stack([self._vector(word) for word in self._words(prompt)[: self.max_length]])

    def _words(self, prompt: str) -> list[str]:
        return re.findall(r"\w+", prompt.lower()) or [""]

    def _vector(self, word: str) -> torch.Tensor:
        stream = b"".join(
            hashlib.blake2b(f"{block}|{word}".encode(), digest_size=64).digest()
            for block in range(-(-2 * self.dim // 64))
        )
        levels = torch.tensor([int.from_bytes(stream[2 * i : 2 * i + 2], "little") for i in range(self.dim)])
        return ((levels.double() + 0.5) / 65536 - 0.5).mul(12**0.5).float()  # uniform of variance 1


@dataclass(frozen=True)
class _Family:
    model: str
    length: int
    masked: bool  # padding masked in the encoder and cut from the result; the model gets zeros up to `length`
    clean: bool = False


FAMILIES = {
    "wan": _Family("UMT5EncoderModel", 512, masked=True, clean=True),
    "cogvideox": _Family("T5EncoderModel", 226, masked=False),
    "clip": _Family("CLIPTextModel", 77, masked=False),
}
TEXT_ENCODERS = ("hash", *FAMILIES)


class TransformersTextEncoder:
    """A transformers text encoder under its family's rules, equal to the diffusers pipelines' prompt embeddings.

    "wan": UMT5, prompt cleaned, 512 tokens, padding masked and cut: rows are the real tokens, zeros are added at use.
    "cogvideox": T5, 226 tokens without mask; "clip": CLIP text, 77 tokens. Both keep every row, padding included,
    because the model attends to it. `path` is a model folder or hub id with `tokenizer` and `text_encoder` subfolders,
    or one folder holding both.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        family: str,
        *,
        revision: str | None = None,
        dtype: str = "float32",
        max_length: int | None = None,
        device: str = "auto",
    ):
        import transformers

        if family not in FAMILIES:
            raise ConfigError(f"family={family!r}; expected one of {', '.join(FAMILIES)}")
        rule = self.rule = FAMILIES[family]
        self.max_length = rule.length if max_length is None else max_length
        if not 1 <= self.max_length <= rule.length:
            raise ConfigError(f"max_length={self.max_length}; {family} takes 1 to {rule.length} tokens")
        self.device = device_from_name(device)
        nested = not Path(path).is_dir() or (Path(path) / "text_encoder").is_dir()
        tokenizer_folder, model_folder = ("tokenizer", "text_encoder") if nested else ("", "")
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(
                path, subfolder=tokenizer_folder, revision=revision
            )
            model = getattr(transformers, rule.model).from_pretrained(
                path, subfolder=model_folder, revision=revision, dtype=dtype_from_name(dtype)
            )
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path}: {rule.model} or its tokenizer could not be loaded ({str(error).splitlines()[0]}); "
                "give a model folder or hub id"
            ) from error
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.dim = model.config.hidden_size
        vocabulary = json.dumps(sorted(self.tokenizer.get_vocab().items())).encode()
        self._fingerprint = {
            "class": rule.model,
            "family": family,
            "dtype": dtype,
            "max_length": self.max_length,
            "version": 1,
            "padding": "zeros" if rule.masked else "kept",
            "weights_sha256": weights_hash(model),
            "vocabulary_sha256": hashlib.sha256(vocabulary).hexdigest(),
        }

    @property
    def fingerprint(self) -> dict:
        return dict(self._fingerprint)

    def token_count(self, prompt: str) -> int:
        """Rows that `encode` will return, without running the model."""
        return int(self._tokens(prompt).attention_mask.sum()) if self.rule.masked else self.max_length

    def truncates(self, prompt: str) -> bool:
        """Whether the prompt has more tokens than `max_length`, so that its end is lost."""
        return len(self.tokenizer(_clean(prompt) if self.rule.clean else prompt).input_ids) > self.max_length

    @torch.no_grad()
    def encode(self, prompt: str) -> torch.Tensor:
        """fp32 [L, D] on the CPU."""
        tokens = self._tokens(prompt)
        ids, mask = tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device)
        hidden = self.model(ids, mask if self.rule.masked else None).last_hidden_state[0]
        return hidden[: int(mask.sum()) if self.rule.masked else None].float().cpu()

    def _tokens(self, prompt: str):
        return self.tokenizer(
            [_clean(prompt) if self.rule.clean else prompt],
            padding="max_length",
            truncation=True,
            max_length=self.max_length,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )


def _clean(prompt: str) -> str:
    """Wan's prompt cleaning: repaired encoding, HTML entities resolved twice, runs of white space made one space."""
    import ftfy

    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()


def text_encoder_from_name(name: str, **options) -> TextEncoder:
    """Make a text encoder from its name and options.

    "hash" takes dim and max_length; "wan", "cogvideox" and "clip" take path, revision, dtype, max_length and device.
    Raises ConfigError on an unknown name or option, DataError when the model cannot be loaded.
    """
    if name not in TEXT_ENCODERS:
        raise ConfigError(f"text encoder {name!r} is not known; expected one of {', '.join(TEXT_ENCODERS)}")
    try:
        if name == "hash":
            return HashTextEncoder(**options)
        if not options.get("path"):
            raise ConfigError(f"text encoder {name!r} needs the path or hub id of its model")
        return TransformersTextEncoder(family=name, **options)
    except TypeError as error:
        raise ConfigError(f"text encoder {name!r}: {error}") from None


def pad_text(texts: Sequence[torch.Tensor], length: int | None = None) -> torch.Tensor:
    """Stack [L_i, D] embeddings into [B, length, D], zeros after each one's rows; length None takes the longest.

    Raises DataError when one is longer than `length`.
    """
    longest = max(text.shape[0] for text in texts)
    length = longest if length is None else length
    if longest > length:
        raise DataError(
            f"a prompt embedding has {longest} rows, the model takes {length}; encode with max_length={length}"
        )
    padded = texts[0].new_zeros(len(texts), length, texts[0].shape[1])
    for row, text in zip(padded, texts, strict=True):
        row[: text.shape[0]] = text
    return padded
