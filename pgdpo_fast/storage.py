"""Files that are whole or absent: atomic writes of JSON and safetensors with sha256, and reads that verify them.

Every write goes to a temporary file in the same folder, is fsynced and moved into place with one `os.replace`, so a
kill at any moment leaves the old file or the new one. Reads compare sizes and hashes first: safetensors itself loads
flipped bytes without a word.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from pgdpo_fast.errors import DataError

__all__ = [
    "Shard",
    "atomic_file",
    "canonical_json",
    "check_disk",
    "describe_bytes",
    "exclusive_lock",
    "fsync_path",
    "open_shard",
    "read_json",
    "sha256_bytes",
    "sha256_file",
    "weights_digest",
    "write_json",
    "write_shard",
]


@dataclass(frozen=True)
class Shard:
    """What is known of a finished file: its name inside the store, its size in bytes and the sha256 of its bytes."""

    name: str
    bytes: int
    sha256: str

    def to_dict(self) -> dict:
        return asdict(self)


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | os.PathLike) -> str:
    """sha256 of a file's bytes, as 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def weights_digest(model: torch.nn.Module) -> str:
    """sha256 over name, dtype, shape and bytes of every entry of the state dict, in name order.

    Reads every weight once (1.8 GB/s a core, all cores at work), moving device weights to the host one at a time.
    """
    state = sorted(model.state_dict().items())
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        digests = pool.map(_tensor_digest, (tensor for _, tensor in state))
        lines = [
            f"{name} {tensor.dtype} {tuple(tensor.shape)} {digest}"
            for (name, tensor), digest in zip(state, digests, strict=True)
        ]
    return sha256_bytes("\n".join(lines).encode())


def _tensor_digest(tensor: torch.Tensor) -> str:
    data = tensor.detach().cpu().contiguous().flatten()
    return hashlib.sha256(data.view(torch.uint8).numpy() if data.numel() else b"").hexdigest()


def canonical_json(value) -> str:
    """One text per value (sorted keys, two-space indent, no NaN), so that equal values have equal hashes."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)


@contextmanager
def atomic_file(path: str | os.PathLike, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well, fsync it and move it into place.

    An exception removes the temporary file and leaves `path` as it was. A full disk surfaces as DataError. Without
    `durable` there is no fsync: a kill is still harmless, a power cut is not; for files that are cheap to redo.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if durable:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if durable:
            fsync_path(path.parent)
    except OSError as error:
        raise DataError(
            f"{path}: could not be written ({error.strerror or error}); free space or fix the folder's "
            "permissions, then run the same command again"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def fsync_path(path: Path) -> None:
    """Make a file's bytes, or a folder's entries, survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | os.PathLike, value: Mapping) -> str:
    """Write a mapping as sealed JSON, atomically, and return its seal.

    The seal is the sha256 of the canonical text without it, stored under the key "sha256"; `read_json` refuses a file
    of which any byte differs from what this function writes.
    """
    if "sha256" in value:
        raise ValueError("the key 'sha256' holds the seal and cannot be part of the content")
    text, seal = _seal(value)
    with atomic_file(path) as temporary:
        temporary.write_bytes(text)
    return seal


def read_json(path: str | os.PathLike) -> dict:
    """Read a sealed JSON file written by `write_json`, without its seal.

    Raises DataError when the file is missing, is not sealed JSON or has a byte changed.
    """
    path = Path(path)
    damaged = (
        f"{path}: damaged (its content does not match its sha256 seal); delete it and run the command that writes it"
    )
    try:
        data = path.read_bytes()
        value = json.loads(data)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; expected one written by pgdpo-fast") from None
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise DataError(damaged) from None
    if not isinstance(value, dict) or "sha256" not in value:
        raise DataError(damaged)
    del value["sha256"]
    try:
        expected, _ = _seal(value)
    except (ValueError, UnicodeEncodeError):
        raise DataError(damaged) from None
    if expected != data:
        raise DataError(damaged)
    return value


def _seal(value: Mapping) -> tuple[bytes, str]:
    seal = sha256_bytes(canonical_json(value).encode())
    return (canonical_json({**value, "sha256": seal}) + "\n").encode(), seal


def write_shard(
    path: str | os.PathLike, tensors: Mapping[str, torch.Tensor], description: str = "", durable: bool = True
) -> Shard:
    """Write tensors as one safetensors file, atomically, and return its name, size and sha256.

    Equal tensors and description give equal bytes. The file carries `description` as its only metadata entry: the
    format writes several entries in random order, which would change the hash from run to run.
    """
    from safetensors.torch import save

    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = save(tensors, metadata={"description": description} if description else None)
    with atomic_file(path, durable) as temporary:
        temporary.write_bytes(data)
    return Shard(path.name, len(data), sha256_bytes(data))


def open_shard(folder: str | os.PathLike, shard: Shard):
    """Check size and sha256 of a shard, then return it memory-mapped (`safetensors.safe_open`, CPU).

    The whole file is hashed here, once per call (about 1-2 GB/s, and it warms the page cache); keep the handle. Raises
    DataError naming the file when it is missing, of another size or changed.
    """
    from safetensors import safe_open

    path = verified(folder, shard)
    return safe_open(path, framework="pt", device="cpu")


def verified(folder: str | os.PathLike, shard: Shard) -> Path:
    """The path of a shard whose size and sha256 are as recorded; DataError otherwise."""
    path = Path(folder) / shard.name
    check_size(folder, shard)
    found = sha256_file(path)
    if found != shard.sha256:
        raise DataError(
            f"{path}: damaged (sha256 {found[:12]}..., expected {shard.sha256[:12]}...); delete this file and "
            "run the command that wrote it again: only what is missing is redone"
        )
    return path


def check_size(folder: str | os.PathLike, shard: Shard) -> None:
    """DataError when a shard is missing or is not exactly as long as recorded. Costs one `stat`."""
    path = Path(folder) / shard.name
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise DataError(
            f"{path}: missing; run the command that wrote it again: only what is missing is redone"
        ) from None
    if size != shard.bytes:
        raise DataError(
            f"{path}: {size} bytes, expected {shard.bytes}; delete this file and run the command that wrote "
            "it again: only what is missing is redone"
        )


def check_disk(folder: str | os.PathLike, needed: int, purpose: str) -> None:
    """DataError when the disk of `folder` has fewer than `needed` bytes free, plus 1% and 64 MiB of headroom."""
    folder = Path(folder)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed * 1.01 + (64 << 20) > free:
        raise DataError(
            f"{folder}: {purpose} needs {describe_bytes(needed)}, {describe_bytes(free)} are free; free space, "
            "choose another output folder, or store in a smaller dtype"
        )


def describe_bytes(count: float) -> str:
    """A size for people: '812 B', '1.4 MiB', '37 GiB'."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" or abs(count) >= 10 else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


@contextmanager
def exclusive_lock(folder: str | os.PathLike) -> Iterator[None]:
    """Hold the folder for one writer: flock on `.lock`, which the system releases however the process ends."""
    import fcntl

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"{folder}: another process is writing here; wait for it or choose another folder"
            ) from None
        yield
