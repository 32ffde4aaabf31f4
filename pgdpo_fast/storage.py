"""Files that are whole or absent: atomic writes of JSON and safetensors with sha256, and reads that verify them.

Every write goes to a temporary file in the same folder, is fsynced and moved into place with one `os.replace`, so a
kill at any moment leaves the old file or the new one. Reads compare sizes and hashes first: safetensors itself loads
flipped bytes without a word. A folder may come from someone else, so a name read from a file counts only as a plain
name inside that file's folder, and a link below the folder a user named is never followed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch

from pgdpo_fast.errors import BusyError, DamagedError, DataError, PgdpoError
from pgdpo_fast.preemption import check_stop

__all__ = [
    "Shard",
    "append_line",
    "atomic_file",
    "canonical_json",
    "check_disk",
    "describe_bytes",
    "exclusive_lock",
    "follow_umask",
    "fresh_folder",
    "fsync_path",
    "hashed_shard",
    "laid_out",
    "load_tensors",
    "make_folder",
    "open_shard",
    "read_json",
    "real_folder",
    "real_folders",
    "real_path",
    "remove_folder",
    "remove_temporaries",
    "set_aside",
    "sha256_bytes",
    "sha256_file",
    "verified",
    "weights_digest",
    "write_json",
    "write_shard",
]


@dataclass(frozen=True)
class Shard:
    """What is known of a finished file: its name inside the store, its size in bytes and the sha256 of its bytes.

    Raises DataError on a name that leads out of the folder and on values that are no size or hash.
    """

    name: str
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not all(map(_plain, self.name.split("/"))):
            raise DataError(
                f"a file is named {str(self.name)[:200]!r}, expected a plain name inside the folder; this was not "
                "written by pgdpo-fast: do not use it"
            )
        if type(self.bytes) is not int or self.bytes < 0 or not re.fullmatch("[0-9a-f]{64}", str(self.sha256)):
            raise DataError(f"{self.name}: expected a size in bytes and the sha256 of the file in 64 hex digits")

    @classmethod
    def listed(cls, where: Path, entry: Mapping) -> Shard:
        """The file that an entry of the sealed file `where` names; DataError naming `where` when it is none."""
        try:
            return cls(**entry)
        except (DataError, TypeError) as error:
            raise DataError(f"{where}: {error}") from None

    def to_dict(self) -> dict:
        return asdict(self)


def _plain(name: str) -> bool:
    """Whether a name is that of something right inside a folder, on any system."""
    return bool(re.fullmatch(r"[^/\\:\x00-\x1f]{1,255}", name)) and name not in (".", "..")


def real_path(folder: str | os.PathLike, name: str) -> Path:
    """`folder / name` after a look that nothing below `folder` on the way is a link; it need not exist.

    Raises DataError on a link and on a name that is not made of plain names joined by "/".
    """
    path = Path(folder)
    for part in name.split("/"):
        if not _plain(part):
            raise DataError(f"{folder}: {name!r} is no plain name inside the folder")
        path /= part
        if path.is_symlink():
            raise DataError(
                f"{path}: is a link; put the file or folder itself there, links in a folder are not followed"
            )
    return path


def real_folder(folder: str | os.PathLike, name: str) -> Path:
    """`real_path` of a folder that need not exist yet; DataError where something else has its name."""
    path = real_path(folder, name)
    if os.path.exists(path) and not path.is_dir():
        raise DataError(f"{path}: is a file where a folder is expected; move it away")
    return path


def real_folders(folder: Path, pattern: str) -> list[Path]:
    """The folders right inside `folder` whose names match the regular expression, in order of their names.

    Raises DataError where something else has such a name.
    """
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return [real_folder(folder, name) for name in sorted(names) if re.fullmatch(pattern, name)]


def fresh_folder(folder: Path) -> Path:
    """`folder`, made anew and empty; DataError where something else has its name."""
    if real_folder(folder.parent, folder.name).exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


def remove_folder(folder: Path) -> None:
    """Remove a folder, renamed first: a kill half-way leaves nothing that looks like it."""
    doomed = real_folder(folder.parent, f".removing_{folder.name}")
    if doomed.exists():
        shutil.rmtree(doomed)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


@contextmanager
def laid_out(path: str | os.PathLike) -> Iterator[None]:
    """Within the block a missing key or a value of another kind in what was read from `path` is a DataError."""
    from safetensors import SafetensorError

    try:
        yield
    except PgdpoError:
        raise
    except (AttributeError, LookupError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        what = f"no {error.args[0]!r} in it" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
        raise DataError(
            f"{path}: whole, but not laid out as this version writes it ({what}); make it again with this version"
        ) from error


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | os.PathLike) -> str:
    """sha256 of a file's bytes, as 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 22):
            digest.update(block)
            check_stop()
    return digest.hexdigest()


def weights_digest(model: torch.nn.Module) -> str:
    """sha256 over name, dtype, shape and bytes of every entry of the state dict, in name order.

    Reads every weight once (1.8 GB/s per core, all cores at work), moving device weights to the host one at a time.
    """
    state = sorted(model.state_dict().items())
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        try:
            digests = pool.map(_tensor_digest, (tensor for _, tensor in state))
            lines = [
                f"{name} {tensor.dtype} {tuple(tensor.shape)} {digest}"
                for (name, tensor), digest in zip(state, digests, strict=True)
            ]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return sha256_bytes("\n".join(lines).encode())


def _tensor_digest(tensor: torch.Tensor) -> str:
    data, digest = tensor.detach().cpu().contiguous().flatten(), hashlib.sha256()
    if data.numel():
        for block in data.view(torch.uint8).split(1 << 26):
            digest.update(block.numpy())  # type: ignore[arg-type]  # a buffer, which its type does not say before 3.12
            check_stop()
    return digest.hexdigest()


def canonical_json(value: object) -> str:
    """One text per value (sorted keys, two-space indent, no NaN), so that equal values have equal hashes."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)


@contextmanager
def atomic_file(path: str | os.PathLike, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well, fsync it and move it into place.

    An exception removes the temporary file and leaves `path` as it was. A full disk surfaces as DataError. Without
    `durable` there is no fsync: a kill is still harmless, a power cut is not; for files that are cheap to redo.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # a dead process of this number may have left it, or a link
        yield temporary
        if durable:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if durable:
            fsync_path(path.parent)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _unwritable(path: Path, error: OSError) -> DataError:
    shown = str(path) if len(str(path)) < 300 else f"{str(path)[:300]}..."
    return DataError(
        f"{shown}: could not be written ({error.strerror or error}); free space, fix the folder's permissions or "
        "choose another folder, then run the same command again"
    )


def make_folder(folder: str | os.PathLike) -> None:
    """Make a folder for what a command will write at its end; DataError now, before the work, where that cannot be."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _unwritable(folder, error) from error


def remove_temporaries(folder: str | os.PathLike, *names: str) -> None:
    """Remove what killed writers left of `atomic_file`, of files `names` or of any, in a folder this process holds."""
    wanted = "|".join(map(re.escape, names)) or ".+"
    for path in Path(folder).glob(".*.tmp"):
        if re.fullmatch(rf"\.({wanted})\.\d+\.tmp", path.name):
            path.unlink(missing_ok=True)


def set_aside(path: Path) -> Path:
    """Rename a damaged file to `NAME.damaged`, or `.damaged-2` and so on where that is taken; returns the new path."""
    number = 1
    while os.path.lexists(kept := path.with_name(f"{path.name}.damaged{f'-{number}' * (number > 1)}")):
        number += 1
    os.replace(path, kept)
    return kept


def append_line(path: str | os.PathLike, line: str) -> None:
    """Append a line to a text file that is no link."""
    with open(path, "a", encoding="utf-8", errors="backslashreplace", opener=_not_through_links) as file:
        file.write(f"{line}\n")


def _not_through_links(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def follow_umask(folder: str | os.PathLike) -> None:
    """Give the files in a folder that this process made the mode of every other file: safetensors writes 0600.

    The folder's own mode tells the umask, which a process can only read by changing it for all its threads.
    """
    mode = os.stat(folder).st_mode & 0o666
    for path in Path(folder).iterdir():
        if path.is_file():
            path.chmod(mode)


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

    Raises DataError when the file is missing, DamagedError when it is not sealed JSON or has a byte changed.
    """
    path = Path(path)
    damaged = f"{path}: damaged (its content does not match its sha256 seal); run the command that writes it again"
    try:
        data = path.read_bytes()
        value = json.loads(data)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; expected one written by pgdpo-fast") from None
    except OSError as error:
        raise DataError(f"{path}: could not be read ({error.strerror or error})") from None
    except (ValueError, RecursionError):
        raise DamagedError(damaged) from None
    if not isinstance(value, dict) or "sha256" not in value:
        raise DamagedError(damaged)
    del value["sha256"]
    try:
        expected, _ = _seal(value)
    except (ValueError, RecursionError):
        raise DamagedError(damaged) from None
    if expected != data:
        raise DamagedError(damaged)
    return value


def _seal(value: Mapping) -> tuple[bytes, str]:
    seal = sha256_bytes(canonical_json(value).encode())
    return (canonical_json({**value, "sha256": seal}) + "\n").encode(), seal


def write_shard(
    path: str | os.PathLike,
    tensors: Mapping[str, torch.Tensor],
    description: str = "",
    durable: bool = True,
    hashed: bool = False,
) -> Shard:
    """Write tensors as one safetensors file, atomically, and return its name, size and sha256.

    Equal tensors and description give equal bytes. The file carries `description` as its only metadata entry: the
    format writes several entries in random order, which would change the hash from run to run. With `hashed` the name
    is `STEM-SHA256.safetensors`, by which `hashed_shard` finds it again.
    """
    from safetensors.torch import save

    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = save(tensors, metadata={"description": description} if description else None)
    digest = sha256_bytes(data)
    if hashed:
        path = path.with_name(f"{path.stem}-{digest}{path.suffix}")
    with atomic_file(path, durable) as temporary:
        temporary.write_bytes(data)
    return Shard(path.name, len(data), digest)


def hashed_shard(path: Path) -> tuple[Shard, str] | None:
    """A file whose name ends in its own sha256, and its description; None where it is damaged or not so named."""
    from safetensors import SafetensorError, safe_open

    digest = path.stem.rpartition("-")[2]
    try:
        if not stat.S_ISREG(path.lstat().st_mode) or sha256_file(path) != digest:
            return None
        with safe_open(path, "pt") as file:
            return Shard(path.name, path.stat().st_size, digest), (file.metadata() or {}).get("description", "")
    except (OSError, SafetensorError):
        return None


def load_tensors(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file whose bytes were checked before."""
    from safetensors.torch import load_file

    return load_file(path)


def open_shard(folder: str | os.PathLike, shard: Shard) -> Any:
    """Check size and sha256 of a shard, then return it memory-mapped (`safetensors.safe_open`, CPU).

    The whole file is hashed here, once per call (about 1-2 GB/s, and it warms the page cache); keep the handle. Raises
    DataError naming the file when it is missing, of another size or changed.
    """
    from safetensors import safe_open

    path = verified(folder, shard)
    with laid_out(path):
        return safe_open(path, framework="pt", device="cpu")


def verified(folder: str | os.PathLike, shard: Shard) -> Path:
    """The path of a shard whose size and sha256 are as recorded; DataError otherwise."""
    path = check_size(folder, shard)
    found = sha256_file(path)
    if found != shard.sha256:
        raise DataError(
            f"{path}: damaged (sha256 {found[:12]}..., expected {shard.sha256[:12]}...); delete this file and "
            "run the command that wrote it again: only what is missing is redone"
        )
    return path


def check_size(folder: str | os.PathLike, shard: Shard) -> Path:
    """The path of a shard; DataError when it is missing, no plain file or not exactly as long as recorded."""
    path = real_path(folder, shard.name)
    try:
        found = path.stat()
    except FileNotFoundError:
        raise DataError(
            f"{path}: missing; run the command that wrote it again: only what is missing is redone"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: could not be read ({error.strerror or error})") from None
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"{path}: expected a file; delete it and run the command that wrote it again")
    if found.st_size != shard.bytes:
        raise DataError(
            f"{path}: {found.st_size} bytes, expected {shard.bytes}; delete this file and run the command that wrote "
            "it again: only what is missing is redone"
        )
    return path


def check_disk(folder: str | os.PathLike, needed: int, purpose: str) -> None:
    """DataError when the disk of `folder` has fewer than `needed` bytes free, plus 1% and 64 MiB of headroom."""
    folder = Path(folder)
    while not os.path.exists(folder):
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
    """Make the folder if need be and hold it for one writer: flock on `.lock`, which the system releases however the
    process ends. BusyError when another process holds it, DataError when nothing can be written there."""
    import fcntl

    folder = Path(folder)
    for attempt in range(3):  # a holder that is done may remove the folder or its parent while it is made
        try:
            folder.mkdir(parents=True, exist_ok=True)
            break
        except OSError as error:
            if attempt == 2 or not isinstance(error, (FileNotFoundError, FileExistsError)):
                raise _unwritable(folder, error) from error
    try:
        file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except FileNotFoundError:  # its holder was done with it and removed it after mkdir
        raise BusyError(f"{folder}: another process has just removed it; run the same command again") from None
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(
                f"{folder}: another process is writing here; wait for it or choose another folder"
            ) from None
        yield
    finally:
        os.close(file)
