"""Checkpoints that are whole or not there: staged, hashed, listed in a sealed manifest, moved into place by one rename.

`step_00000100/` holds `weights/` (what diffusers loads: a LoRA file or the network), `optimizer-*.safetensors`
and `manifest.json` with every file's size and sha256. A kill at any moment leaves the older checkpoints as they were; a
file that changed on disk is noticed before anything is loaded from it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pgdpo_fast.errors import ConfigError, DataError
from pgdpo_fast.models import ModelAdapter
from pgdpo_fast.options import as_typed
from pgdpo_fast.storage import (
    Shard,
    check_disk,
    describe_bytes,
    fresh_folder,
    fsync_path,
    laid_out,
    read_json,
    real_folder,
    real_folders,
    remove_folder,
    sha256_file,
    verified,
    write_json,
    write_shard,
)
from pgdpo_fast.training.config import CHANGEABLE
from pgdpo_fast.training.measure import check_weights
from pgdpo_fast.training.optimizer import MasterAdamW

__all__ = ["Checkpoints", "Manifest", "check_checkpoint", "find_checkpoint"]

MANIFEST, WEIGHTS = "manifest.json", "weights"
STEP = r"step_\d{8}"  # the name of a checkpoint's folder
SHARD_BYTES = 1 << 30  # of optimizer state in one file
REHEARSED_BYTES = 64 << 20  # of optimizer state written in a rehearsal when all of it would take minutes


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
        step: optimizer steps made.
        identity: the settings a run that goes on from it must share.
        files: every other file of it.
    """

    step: int
    identity: Mapping[str, Any]
    files: list[Shard]


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run: the folder they lie in, what they hold, and how many of them are kept."""

    root: Path
    adapter: ModelAdapter
    policy: nn.Module
    optimizer: MasterAdamW
    identity: Mapping[str, Any]
    keep: int

    def load(
        self, path: Path, manifest: Manifest, change: Sequence[str] = ()
    ) -> tuple[int, dict[str, tuple[Any, Any]]]:
        """Put weights and optimizer state of a checked checkpoint, of this run or another, back bit for bit.

        Args:
            manifest: what `check_checkpoint` returned for `path`; nothing is hashed again here.
            change: those of `CHANGEABLE` that may differ from the checkpoint's.

        Returns:
            Its step, and of every setting that is another now (its value then, its value now).

        Raises:
            DataError: it was made for another network.
            ConfigError: a setting that decides the numbers differs from the checkpoint's; all such settings are named.
        """
        saved, identity = manifest.identity, self.identity
        different = [key for key in sorted(saved.keys() | identity.keys()) if saved.get(key) != identity.get(key)]
        changed = {key: (saved.get(key), identity.get(key)) for key in different}
        if refused := [key for key in different if not _is_among(key, change)]:
            said = "; ".join(
                f"{key} was {as_typed(changed[key][0])}, is {as_typed(changed[key][1])}" for key in refused
            )
            remedy = "Set them back or choose another output.dir"
            if all(_is_among(key, CHANGEABLE) for key in refused):
                keys = dict.fromkeys(key if key in CHANGEABLE else "objective" for key in different)
                remedy += f", or go on with the new values: --change {' '.join(keys)}"
            raise ConfigError(f"{path} cannot be continued with other settings: {said}. {remedy}")
        self.adapter.restore(self.policy, path / WEIGHTS)
        self.optimizer.load_state(_optimizer_state(path, manifest))
        return manifest.step, changed

    def check_space(self) -> int:
        """Bytes of one checkpoint; DataError when the disk cannot hold those kept and one being written."""
        parameters, masters = self.optimizer.parameters, self.optimizer.masters
        trained = sum(parameter.numel() * parameter.element_size() for parameter in parameters.values())
        copies = sum(4 * parameter.numel() for name, parameter in parameters.items() if masters[name] is not parameter)
        moments = sum(8 * parameter.numel() for parameter in parameters.values())
        size = trained + copies + moments
        present = len(real_folders(self.root, STEP))
        check_disk(
            self.root,
            size * max(1, self.keep + 1 - present),
            f"{self.keep} checkpoints of {describe_bytes(size)} and one being written",
        )
        return size

    def save(self, step: int) -> Path:
        """Write `root/step_XXXXXXXX`, read the weights back and compare, then drop all but the `keep` newest.

        Raises:
            DataError: the disk is full or changes what is written.
            NonFiniteError: a trained weight is NaN or infinite; the older checkpoints stay.
        """
        check_weights(self.optimizer.parameters.items(), f"after step {step}")
        final = self.root / f"step_{step:08d}"
        with _disk_errors(self.root):
            staging = fresh_folder(self.root / f".writing_{final.name}")
            self._write(staging, step, self.optimizer.state(), network=True)
            if final.exists():  # only a damaged one: a whole one would have been resumed from
                remove_folder(final)
            os.replace(staging, final)
            fsync_path(self.root)
            finished = real_folders(self.root, STEP)
            # a newer one was damaged or abandoned: the run went on from an older step
            kept = [path for path in finished if path.name <= final.name][-self.keep :]
            for path in reversed(finished):
                if path not in kept:
                    remove_folder(path)
        return final

    def rehearse(self, step: int) -> str:
        """Write, verify, read back and remove a checkpoint, so that a run that cannot save fails in its first minute.

        LoRA runs rehearse all of it; where every weight is trained, the network and its state are cut to
        `REHEARSED_BYTES`. Returns one line for the log.
        """
        check_weights(self.optimizer.parameters.items(), f"after step {step}")
        state, size = {}, 0
        for key, value in self.optimizer.state().items():
            size += value.nbytes
            if state and size > REHEARSED_BYTES:
                break
            state[key] = value
        whole = len(state) == len(self.optimizer.state())
        with _disk_errors(self.root):
            path = fresh_folder(self.root / ".rehearsal")
            self._write(path, step, state, network=whole)
        manifest = check_checkpoint(path)
        for key, value in _optimizer_state(path, manifest):
            if not torch.equal(value, state[key].cpu()):
                raise DataError(f"{path}: {key} read back differs from what was written; the disk is damaging files")
        written = sum(file.bytes for file in manifest.files)
        shutil.rmtree(path)
        part = "" if whole else ", a part of the state"
        return f"save rehearsed: {describe_bytes(written)} written, verified and read back{part}"

    def _write(self, folder: Path, step: int, state: Mapping[str, torch.Tensor], network: bool) -> None:
        files = [write_shard(folder / f"optimizer-{number:05d}.safetensors", part) for number, part in _parts(state)]
        if network:
            self.adapter.export(self.policy, folder / WEIGHTS)
            for file in sorted((folder / WEIGHTS).iterdir()):
                fsync_path(file)
                files.append(Shard(f"{WEIGHTS}/{file.name}", file.stat().st_size, sha256_file(file)))
            fsync_path(folder / WEIGHTS)
            self.adapter.check_export(self.policy, folder / WEIGHTS)
        listed = [file.to_dict() for file in files]
        write_json(folder / MANIFEST, {"step": step, "identity": dict(self.identity), "files": listed})


def _is_among(key: str, keys: Sequence[str]) -> bool:
    return key in keys or key.partition(".")[0] in keys


def check_checkpoint(path: Path) -> Manifest:
    """The manifest of a checkpoint whose every file is as it was written; DataError otherwise."""
    where = path / MANIFEST
    content = read_json(where)
    with laid_out(where):
        files = [Shard.listed(where, entry) for entry in content["files"]]
        manifest = Manifest(content["step"] + 0, dict(content["identity"].items()), files)
    for file in manifest.files:
        verified(path, file)
    extra = {f"{WEIGHTS}/{file.name}" for file in real_folder(path, WEIGHTS).glob("*.safetensors")}
    if extra := sorted(extra - {file.name for file in manifest.files}):
        raise DataError(f"{path / extra[0]}: is not of this checkpoint, whose {MANIFEST} does not list it; delete it")
    return manifest


def find_checkpoint(root: Path, note: Callable[[str], None]) -> tuple[Path, Manifest] | None:
    """The newest whole checkpoint and its manifest, or None where there never was one.

    Damaged ones are passed over with a note.

    Raises:
        DataError: there are checkpoints and all are damaged.
    """
    finished = real_folders(root, STEP)
    for path in reversed(finished):
        try:
            return path, check_checkpoint(path)
        except DataError as error:
            note(f"{path.name} is damaged and passed over: {error}")
    if finished:
        raise DataError(
            f"{root}: all {len(finished)} checkpoints are damaged; restore one from a copy or choose another output.dir"
        )
    return None


def _parts(state: Mapping[str, torch.Tensor]) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """The state in numbered parts of `SHARD_BYTES` or one tensor, so that saving never holds all of it on the host."""
    number, part, size = 0, {}, 0
    for key, value in state.items():
        if part and size + value.nbytes > SHARD_BYTES:
            yield number, part
            number, part, size = number + 1, {}, 0
        part[key] = value
        size += value.nbytes
    if part:
        yield number, part


def _optimizer_state(path: Path, manifest: Manifest) -> Iterator[tuple[str, torch.Tensor]]:
    """Every entry of the optimizer state of a checkpoint whose files have been checked."""
    from safetensors import safe_open

    for file in manifest.files:
        if file.name.startswith("optimizer-"):
            with safe_open(path / file.name, "pt") as tensors:
                for key in tensors.keys():
                    yield key, tensors.get_tensor(key)


@contextmanager
def _disk_errors(root: Path) -> Iterator[None]:
    """What the file system or safetensors cannot write, as DataError."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise DataError(f"{root}: a checkpoint could not be written ({error}); free space, then resume") from error
