"""Prompts to the tensors a diffusion model is told, by name: "text" `[L, D]` fp32, padded or not as its rule says.

Embeddings are stored without padding wherever padding is plain zeros; where
the padded positions carry information (the network attends to them unmasked) they are part of the embedding and stay.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from pgdpo_fast.devices import select_device, select_dtype
from pgdpo_fast.errors import ConfigError, DataError
from pgdpo_fast.families import TextRule
from pgdpo_fast.options import integer
from pgdpo_fast.storage import weights_digest

__all__ = [
    "HashTextEncoder",
    "TextEncoder",
    "TransformersTextEncoder",
    "pad_text",
]


class TextEncoder(Protocol):
    """What an encoder of latent stores needs from a text encoder.

    `shapes` names what `encode` returns; -1 stands for a number of rows that varies. One of them is "text" [-1, D].
    """

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    @property
    def fingerprint(self) -> dict: ...

    def token_count(self, prompt: str) -> int: ...

    def truncates(self, prompt: str) -> bool: ...

    def encode(self, prompt: str) -> dict[str, torch.Tensor]: ...


@dataclass(frozen=True)
class HashTextEncoder:
    """A parameter-free stand-in: each word is a fixed unit-variance vector drawn from the blake2b of its letters.

    Equal words share their vector, so a small model can learn what they mean; word order is the order of rows.
    """

    dim: int = 32
    max_length: int = 64

    def __post_init__(self):
        for key in ("dim", "max_length"):
            integer(key, getattr(self, key), 1, 65_536)  # four times the widest text encoder; rows are kept in memory

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"text": (-1, self.dim)}

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

    def encode(self, prompt: str) -> dict[str, torch.Tensor]:
        """{"text": fp32 [L, dim]}, L = words of the prompt, at least 1 and at most max_length."""
        return {"text": torch.stack([self._vector(word) for word in self._words(prompt)[: self.max_length]])}

    def _words(self, prompt: str) -> list[str]:
        return re.findall(r"\w+", prompt.lower()) or [""]

    def _vector(self, word: str) -> torch.Tensor:
        stream = b"".join(
            hashlib.blake2b(f"{block}|{word}".encode(), digest_size=64).digest()
            for block in range(-(-2 * self.dim // 64))
        )
        levels = torch.tensor([int.from_bytes(stream[2 * i : 2 * i + 2], "little") for i in range(self.dim)])
        return ((levels.double() + 0.5) / 65536 - 0.5).mul(12**0.5).float()  # uniform of variance 1


class TransformersTextEncoder:
    """A family's text encoders under its rules, equal to the diffusers pipelines' prompt embeddings.

    `path` is a model folder or hub id that holds the rules' subfolders; one encoder and its tokenizer may also lie
    together at its root. `max_length` lowers the number of tokens of the rule called "text".

    Raises ConfigError on an unknown dtype or device or an impossible length, DataError when a model cannot be loaded.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        rules: Sequence[TextRule],
        *,
        revision: str | None = None,
        dtype: str = "fp32",
        max_length: int | None = None,
        device: str = "auto",
    ):
        device, dtype = select_device(device), select_dtype(dtype)
        self.parts = {}
        for rule in rules:
            length = max_length if max_length is not None and rule.name == "text" else rule.length
            if not 1 <= length <= rule.length:
                raise ConfigError(f"max_length={length}; the {rule.encoder} takes 1 to {rule.length} tokens")
            self.parts[rule.name] = _TextModel(path, rule, length, revision, dtype, device)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: part.shape for name, part in self.parts.items()}

    @property
    def fingerprint(self) -> dict:
        parts = {name: dict(part.fingerprint) for name, part in self.parts.items()}
        return {"class": "TransformersTextEncoder", "version": 2, **parts}

    def token_count(self, prompt: str) -> int:
        """Rows of "text" that `encode` will return, without running the model."""
        return self.parts["text"].token_count(prompt)

    def truncates(self, prompt: str) -> bool:
        """Whether the prompt has more tokens than "text" has room for, so that its end is lost."""
        return self.parts["text"].truncates(prompt)

    def encode(self, prompt: str) -> dict[str, torch.Tensor]:
        """By name, fp32 on the CPU: [L, D], or [D] where pooled."""
        return {name: part.encode(prompt) for name, part in self.parts.items()}


class _TextModel:
    """One transformers text encoder with its tokenizer, under one rule."""

    def __init__(
        self,
        path: str | os.PathLike,
        rule: TextRule,
        length: int,
        revision: str | None,
        dtype: torch.dtype,
        device: torch.device,
    ):
        import transformers

        self.rule, self.length, self.device = rule, length, device
        nested = not Path(path).is_dir() or (Path(path) / rule.folder).is_dir()
        tokenizer_folder, model_folder = (rule.tokenizer, rule.folder) if nested else ("", "")
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(
                path, subfolder=tokenizer_folder, revision=revision
            )
            model = getattr(transformers, rule.encoder).from_pretrained(
                path, subfolder=model_folder, revision=revision, dtype=dtype
            )
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path}: {rule.encoder} or its tokenizer could not be loaded ({str(error).splitlines()[0]}); "
                "give a model folder or hub id"
            ) from error
        self.model = model.to(device).eval().requires_grad_(False)
        width = model.config.hidden_size
        self.shape = (width,) if rule.pooled else (-1, width)
        vocabulary = json.dumps(sorted(self.tokenizer.get_vocab().items())).encode()
        self.fingerprint = {
            "class": rule.encoder,
            "dtype": str(dtype).removeprefix("torch."),
            "max_length": length,
            "masked": rule.masked,
            "padding": "kept" if rule.kept else "zeros",
            "output": "pooled" if rule.pooled else "last" if rule.layer is None else rule.layer,
            "prepare": rule.prepare and [rule.prepare.__name__, rule.prepare("")],
            "crop": rule.crop,
            "weights_sha256": weights_digest(model),
            "vocabulary_sha256": hashlib.sha256(vocabulary).hexdigest(),
        }

    def token_count(self, prompt: str) -> int:
        return self.length if self.rule.kept else int(self._tokens(prompt).attention_mask[:, self.rule.crop :].sum())

    def truncates(self, prompt: str) -> bool:
        return len(self.tokenizer(self._text(prompt)).input_ids) > self.length + self.rule.crop

    @torch.no_grad()
    def encode(self, prompt: str) -> torch.Tensor:
        rule, tokens = self.rule, self._tokens(prompt)
        ids, mask = tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device)
        out = self.model(ids, mask if rule.masked else None, output_hidden_states=rule.layer is not None)
        if rule.pooled:
            return out.pooler_output[0].float().cpu()
        hidden = out.last_hidden_state if rule.layer is None else out.hidden_states[rule.layer]
        rows = slice(rule.crop, None if rule.kept else int(mask.sum()))
        return hidden[0, rows].float().cpu()

    def _text(self, prompt: str) -> str:
        return self.rule.prepare(prompt) if self.rule.prepare else prompt

    def _tokens(self, prompt: str):
        return self.tokenizer(
            [self._text(prompt)],
            padding="max_length",
            padding_side="right",  # the networks take their real tokens first
            truncation=True,
            max_length=self.length + self.rule.crop,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )


def pad_text(texts: Sequence[torch.Tensor], length: int | None = None) -> torch.Tensor:
    """Stack [L_i, D] embeddings into [B, length, D], zeros after each one's rows; length None takes the longest.

    Raises DataError when one is longer than `length`.
    """
    longest = max(text.shape[0] for text in texts)
    length = longest if length is None else length
    if longest > length:
        raise DataError(
            f"a prompt embedding has {longest} rows, the model takes {length}; set model.text_tokens={longest}, or "
            f"encode with max_length={length}, which the --text of the model's family has"
        )
    padded = texts[0].new_zeros(len(texts), length, texts[0].shape[1])
    for row, text in zip(padded, texts, strict=True):
        row[: text.shape[0]] = text
    return padded
