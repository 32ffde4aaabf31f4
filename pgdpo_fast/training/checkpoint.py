"""Checkpoints that are whole or not there: staged, hashed, listed in a sealed manifest, moved into place by one rename.

`step_00000100/` holds `weights/` (what diffusers loads: a LoRA file or the network), `optimizer-*.safetensors`
and `manifest.json` with every file's size and sha256. A kill at any moment leaves the older checkpoints as they were; a
file that changed on disk is noticed before anything is loaded from it.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
    fsync_path,
    laid_out,
    read_json,
    real_folder,
    sha256_file,
    verified,
    write_json,
    write_shard,
)
from pgdpo_fast.training.config import CHANGEABLE
from pgdpo_fast.training.measure import check_weights
from pgdpo_fast.training.optimizer import MasterAdamW

__all__ = ["check_checkpoint", "check_space", "find_checkpoint", "load_checkpoint", "rehearse", "save_checkpoint"]

MANIFEST, WEIGHTS = "manifest.json", "weights"
SHARD_BYTES = 1 << 30  # of optimizer state in one file
REHEARSED_BYTES = 64 << 20  # of optimizer state written in a rehearsal when all of it would take minutes


def save_checkpoint(
    root: Path,
    step: int,
    adapter: ModelAdapter,
    model: nn.Module,
    optimizer: MasterAdamW,
    identity: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write `root/step_XXXXXXXX`, read the weights back and compare, then drop all but the `keep` newest.

    Raises:
        DataError: the disk is full or changes what is written.
        NonFiniteError: a trained weight is NaN or infinite; the older checkpoints stay.
    """
    check_weights(optimizer.parameters.items(), f"after step {step}")
    final = root / f"step_{step:08d}"
    with _disk_errors(root):
        staging = _fresh(root / f".writing_{final.name}")
        _write(staging, step, adapter, model, optimizer.state(), identity)
        if final.exists():  # only a damaged one: a whole one would have been resumed from
            _remove(final)
        os.replace(staging, final)
        fsync_path(root)
        # a newer one was damaged or abandoned: the run went on from an older step
        newer = [path for path in _finished(root) if path.name > final.name]
        for path in newer + [path for path in _finished(root) if path not in newer][keep:]:
            _remove(path)
    return final


def load_checkpoint(
    path: Path,
    manifest: Mapping[str, Any],
    adapter: ModelAdapter,
    model: nn.Module,
    optimizer: MasterAdamW,
    identity: Mapping[str, Any],
    change: Sequence[str] = (),
) -> tuple[int, dict[str, tuple[Any, Any]]]:
    """Put weights and optimizer state of a checked checkpoint back bit for bit.

    Args:
        manifest: what `check_checkpoint` returned for `path`; nothing is hashed again here.
        change: those of `CHANGEABLE` that may differ from the checkpoint's.

    Returns:
        Its step, and of every setting that is another now (its value then, its value now).

    Raises:
        DataError: it was made for another network.
        ConfigError: a setting that decides the numbers differs from the checkpoint's; all such settings are named.
    """
    saved = manifest["identity"]
    different = [key for key in sorted(saved.keys() | identity.keys()) if saved.get(key) != identity.get(key)]
    changed = {key: (saved.get(key), identity.get(key)) for key in different}
    if refused := [key for key in different if not _is_among(key, change)]:
        said = "; ".join(f"{key} was {as_typed(changed[key][0])}, is {as_typed(changed[key][1])}" for key in refused)
        remedy = "Set them back or choose another output.dir"
        if all(_is_among(key, CHANGEABLE) for key in refused):
            keys = dict.fromkeys(key if key in CHANGEABLE else "objective" for key in different)
            remedy += f", or go on with the new values: --change {' '.join(keys)}"
        raise ConfigError(f"{path} cannot be continued with other settings: {said}. {remedy}")
    adapter.restore(model, path / WEIGHTS)
    optimizer.load_state(_optimizer_state(path, manifest))
    return manifest["step"], changed


def _is_among(key: str, keys: Sequence[str]) -> bool:
    return key in keys or key.partition(".")[0] in keys


def check_checkpoint(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose every file is as it was written; DataError otherwise."""
    manifest = read_json(path / MANIFEST)
    with laid_out(path / MANIFEST):
        manifest["identity"].items(), manifest["step"] + 0
        listed = _shards(path, manifest)
    for shard in listed:
        verified(path, shard)
    extra = {f"{WEIGHTS}/{file.name}" for file in real_folder(path, WEIGHTS).glob("*.safetensors")}
    if extra := sorted(extra - {shard.name for shard in listed}):
        raise DataError(f"{path / extra[0]}: is not of this checkpoint, whose {MANIFEST} does not list it; delete it")
    return manifest


def find_checkpoint(root: Path, note: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint and its manifest, or None where there never was one.

    Damaged ones are passed over with a note.

    Raises:
        DataError: there are checkpoints and all are damaged.
    """
    finished = _finished(root)
    for path in finished:
        try:
            return path, check_checkpoint(path)
        except DataError as error:
            note(f"{path.name} is damaged and passed over: {error}")
    if finished:
        raise DataError(
            f"{root}: all {len(finished)} checkpoints are damaged; restore one from a copy or choose another output.dir"
        )
    return None


def check_space(root: Path, optimizer: MasterAdamW, keep: int) -> int:
    """Bytes of one checkpoint; DataError when the disk cannot hold the ones that will be kept and one being written."""
    trained = sum(parameter.numel() * parameter.element_size() for parameter in optimizer.parameters.values())
    masters = sum(
        4 * parameter.numel()
        for name, parameter in optimizer.parameters.items()
        if optimizer.masters[name] is not parameter
    )
    moments = sum(8 * parameter.numel() for parameter in optimizer.parameters.values())
    size = trained + masters + moments
    present = len(_finished(root)) if root.exists() else 0
    check_disk(
        root, size * max(1, keep + 1 - present), f"{keep} checkpoints of {describe_bytes(size)} and one being written"
    )
    return size


def rehearse(
    root: Path, step: int, adapter: ModelAdapter, model: nn.Module, optimizer: MasterAdamW, identity: Mapping[str, Any]
) -> str:
    """Write, verify, read back and remove a checkpoint, so that a run that cannot save fails in its first minute.

    LoRA runs rehearse all of it; where every weight is trained, the network and its state are cut to `REHEARSED_BYTES`.
    Returns one line for the log.
    """
    check_weights(optimizer.parameters.items(), f"after step {step}")
    state, size = {}, 0
    for key, value in optimizer.state().items():
        size += value.nbytes
        if state and size > REHEARSED_BYTES:
            break
        state[key] = value
    whole = len(state) == len(optimizer.state())
    with _disk_errors(root):
        path = _fresh(root / ".rehearsal")
        _write(path, step, adapter, model if whole else None, state, identity)
    manifest = check_checkpoint(path)
    for key, value in _optimizer_state(path, manifest):
        if not torch.equal(value, state[key].cpu()):
            raise DataError(f"{path}: {key} read back differs from what was written; the disk is damaging files")
    written = sum(shard.bytes for shard in _shards(path, manifest))
    shutil.rmtree(path)
    part = "" if whole else ", a part of the state"
    return f"save rehearsed: {describe_bytes(written)} written, verified and read back{part}"


def _write(
    folder: Path,
    step: int,
    adapter: ModelAdapter,
    model: nn.Module | None,
    state: Mapping[str, torch.Tensor],
    identity: Mapping[str, Any],
) -> None:
    shards = [write_shard(folder / f"optimizer-{number:05d}.safetensors", part) for number, part in _parts(state)]
    if model is not None:
        adapter.export(model, folder / WEIGHTS)
        for file in sorted((folder / WEIGHTS).iterdir()):
            fsync_path(file)
            shards.append(Shard(f"{WEIGHTS}/{file.name}", file.stat().st_size, sha256_file(file)))
        fsync_path(folder / WEIGHTS)
        adapter.check_export(model, folder / WEIGHTS)
    write_json(
        folder / MANIFEST, {"step": step, "identity": dict(identity), "files": [shard.to_dict() for shard in shards]}
    )


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


def _optimizer_state(path: Path, manifest: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every entry of the optimizer state of a checkpoint whose files have been checked."""
    from safetensors import safe_open

    for shard in _shards(path, manifest):
        if shard.name.startswith("optimizer-"):
            with safe_open(path / shard.name, "pt") as file:
                for key in file.keys():
                    yield key, file.get_tensor(key)


def _shards(path: Path, manifest: Mapping[str, Any]) -> list[Shard]:
    return [Shard.listed(path / MANIFEST, entry) for entry in manifest["files"]]


@contextmanager
def _disk_errors(root: Path) -> Iterator[None]:
    """What the file system or safetensors cannot write, as DataError."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise DataError(f"{root}: a checkpoint could not be written ({error}); free space, then resume") from error


def _finished(root: Path) -> list[Path]:
    """Checkpoint folders, newest first; DataError where something else has such a name."""
    names = [path.name for path in root.glob("step_*") if re.fullmatch(r"step_\d{8}", path.name)]
    return [real_folder(root, name) for name in sorted(names, reverse=True)]


def _fresh(folder: Path) -> Path:
    if real_folder(folder.parent, folder.name).exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


def _remove(folder: Path) -> None:
    # renamed first: a kill half-way through the deletion must not leave something that looks like a checkpoint
    doomed = real_folder(folder.parent, f".removing_{folder.name}")
    if doomed.exists():
        shutil.rmtree(doomed)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)
