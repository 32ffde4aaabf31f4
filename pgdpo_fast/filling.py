"""Fill a folder with numbered shards: any number of processes share the work, and any kill can be resumed.

Which items share a piece and a shard follows from the settings alone. A process claims a shard (a lock the system
releases when it dies), leaves each finished piece in `staging/` under its own hash, and joins them to a shard whose
name ends in its hash. So processes started together or later share the work, a dead one's shard is taken over, a kill
loses at most the piece it was in, and the folder is the same, byte for byte, whoever filled it.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pgdpo_fast.errors import BusyError, DamagedError, DataError
from pgdpo_fast.preemption import Stopping
from pgdpo_fast.storage import (
    Shard,
    exclusive_lock,
    hashed_shard,
    load_tensors,
    real_folder,
    real_path,
    remove_temporaries,
    set_aside,
    verified,
    write_shard,
)

__all__ = ["STAGING", "ShardFolder"]

STAGING = "staging"
POLL_SECONDS = 0.1

Tensors = Mapping[str, torch.Tensor]


@dataclass
class ShardFolder:
    """A folder that is being filled.

    Attributes:
        path: the folder, made when missing.
        kind: what it becomes, for messages: "store".
        description: name of its sealed file, which is written last.
        files: names of its other files that are no shards; like `description` written with the folder's lock held.
        shard_name: regular expression of a shard's whole name, shard-NUMBER-HASH.safetensors and older ones.
        read: the checked content of the description; DamagedError where bytes changed.
        shards: the items of every shard.
        piece: items of a piece, the unit that is made, staged and counted.
        mark: text that every shard carries, so that one of another folder is never taken for this one's.
        stop: what is known of signals.
        tell: called with lines a person should read.
        progress: called with the items finished and the items in all when the first number has changed.
        listed: the finished shards that the description names by now; None stands for one of which nothing was made.
        holds: whether a whole shard has all its items; of one that has not, the others are made and joined to it.
        record: called with the number of a shard when it is finished, while no other process works on it.
        finished: the shards that are, by number.
    """

    path: Path
    kind: str
    description: str
    files: Sequence[str]
    shard_name: str
    read: Callable[[Path], dict[str, Any]]
    shards: Sequence[range]
    piece: int
    mark: str
    stop: Stopping
    tell: Callable[[str], None]
    progress: Callable[[int, int], None] | None = None
    listed: Callable[[], Mapping[int, Shard | None]] = dict
    holds: Callable[[Path, range], bool] = lambda file, items: True
    record: Callable[[int], None] = lambda number: None
    finished: dict[int, Shard | None] = field(default_factory=dict)
    _current: int = 0  # items finished of the shard being worked on
    _reported: int | None = None

    @property
    def total(self) -> int:
        return sum(map(len, self.shards))

    @property
    def done(self) -> int:
        """Items finished, as far as this process knows."""
        return sum(len(self.shards[number]) for number in self.finished) + self._current

    @property
    def missing(self) -> list[int]:
        """Numbers of the shards that are not finished."""
        return [number for number in range(len(self.shards)) if number not in self.finished]

    # -- the folder

    @contextmanager
    def locked(self) -> Iterator[None]:
        """The folder's lock, waited for: its holder is about to let go."""
        with ExitStack() as stack:
            while True:
                self.stop.check()
                try:
                    stack.enter_context(exclusive_lock(self.path))
                    break
                except BusyError:
                    time.sleep(POLL_SECONDS)
            yield

    def described(self) -> dict[str, Any] | None:
        """What an earlier or a concurrent call wrote; None in a new folder and where that is lost or damaged.

        A damaged description is set aside, leftovers of killed writers are removed; the caller holds the lock. Raises
        DataError in a folder that holds something else.
        """
        remove_temporaries(self.path, self.description, *self.files)
        where = real_path(self.path, self.description)
        real_folder(self.path, STAGING)
        if where.exists():
            try:
                return self.read(self.path)
            except DamagedError as error:
                self.tell(f"{error}; set aside as {set_aside(where).name}, the whole shards are found by their hashes")
        fixed = "|".join(map(re.escape, (STAGING, ".lock", *self.files)))
        ours = rf"{fixed}|\..+\.tmp|{re.escape(self.description)}\.damaged.*|{self.shard_name}"
        if foreign := sorted(item.name for item in self.path.iterdir() if not re.fullmatch(ours, item.name)):
            raise DataError(
                f"{self.path}: not empty and no {self.kind} (it holds {foreign[0]}); choose another output folder"
            )
        return None

    def find(self, lost: bool) -> None:
        """Take over the whole shards of earlier and of concurrent processes.

        lost: whether what made the folder is unknown, so that a whole shard of other settings is an error: somebody
            may want it.
        """
        for number, shard in self.listed().items():
            if number in range(len(self.shards)) and self._is_whole(shard):
                self.finished[number] = shard
        for file in self._files():
            number = _number(file)
            if number in self.finished and not lost:
                continue
            found = hashed_shard(file)
            if found and found[1] != self.mark and lost:
                raise DataError(
                    f"{file}: belongs to a {self.kind} of other settings, whose {self.description} is lost or damaged; "
                    "set them back, or choose another output folder"
                )
            if found and found[1] == self.mark and number in range(len(self.shards)):
                with suppress(FileNotFoundError):  # another process has just put a fuller one in its place
                    if self.holds(file, self.shards[number]):
                        self.finished[number] = found[0]
        for number in self.finished:
            shutil.rmtree(self._staging(number), ignore_errors=True)

    def tidy(self) -> None:
        """Remove what is not part of the finished folder; the caller holds the lock."""
        names = {shard.name for shard in self.finished.values() if shard}
        for file in self._files():
            if file.name not in names:
                file.unlink(missing_ok=True)
        shutil.rmtree(real_folder(self.path, STAGING), ignore_errors=True)

    def report(self) -> None:
        if self.progress and self.done != self._reported:
            self._reported = self.done
            self.progress(self.done, self.total)

    # -- the work

    def fill(
        self,
        make: Callable[[Sequence[range]], Iterator[Tensors | None]],
        join: Callable[[Sequence[Tensors]], Tensors],
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Work on whatever no other process works on until every shard is finished.

        Args:
            make: the tensors of each of the given pieces, in their order, None where there are none; asked for one at
                a time.
            join: the tensors of a shard from those of its pieces.
            rank, world_size: of this process, to begin with shards the others do not begin with.
        """
        todo = sorted(self.missing, key=lambda number: (number % world_size != rank, number))
        while todo:
            idle = True
            for number in todo:
                self.stop.check()
                with ExitStack() as claim:
                    if not self._claim(number, claim):
                        continue
                    idle = False
                    begun = self._find(number)
                    if number not in self.finished:
                        self.finished[number] = self._make(number, begun, make, join)
                    self._current = 0
                    self.record(number)
                    shutil.rmtree(self._staging(number), ignore_errors=True)
                self.report()
            todo = [number for number in todo if number not in self.finished]
            if todo and idle:
                time.sleep(POLL_SECONDS)

    def _claim(self, number: int, stack: ExitStack) -> bool:
        """Lock a shard's staging folder until `stack` closes; False while another process holds it."""
        try:
            stack.enter_context(exclusive_lock(self._staging(number)))
        except BusyError:
            return False
        return True

    def _find(self, number: int) -> Path | None:
        """Look again for a shard that is claimed, and remove what is damaged or foreign under its number; returns the
        file of one that lacks items."""
        begun, listed = None, self.listed()
        if number in listed and self._is_whole(listed[number]):
            self.finished[number] = listed[number]
            return None
        for file in self._files(f"shard-{number:05d}[-.]*"):
            found = hashed_shard(file)
            if not found or found[1] != self.mark:
                file.unlink(missing_ok=True)
            elif self.holds(file, self.shards[number]):
                self.finished[number] = found[0]
                return None
            else:
                begun = file
        return begun

    def _make(self, number: int, begun: Path | None, make, join) -> Shard | None:
        """Make the pieces of a shard that are not in staging yet, and join all of them, to those in `begun`."""
        staging, items = self._staging(number), self.shards[number]
        pieces = [range(at, min(at + self.piece, items.stop)) for at in range(items.start, items.stop, self.piece)]
        kept = [] if begun is None else [begun]
        held = [piece for piece in pieces if begun is not None and self.holds(begun, piece)]
        staged = self._staged(staging, [piece.start for piece in pieces])
        with closing(make([piece for piece in pieces if piece.start not in staged and piece not in held])) as made:
            for piece in pieces:
                if piece.start not in staged and piece not in held:
                    self.stop.check()
                    if (tensors := next(made)) is not None:
                        target = staging / f"{piece.start:010d}.safetensors"
                        staged[piece.start] = staging / write_shard(target, tensors, self.mark, False, True).name
                self._current = piece.stop - items.start
                self.report()
        parts = [load_tensors(file) for file in (*kept, *(staged[start] for start in sorted(staged)))]
        if not parts:
            return None
        shard = write_shard(staging / "joined.safetensors", join(parts), self.mark)
        name = f"shard-{number:05d}-{shard.sha256}.safetensors"
        os.replace(staging / shard.name, self.path / name)
        for file in kept:
            if file.name != name:
                file.unlink(missing_ok=True)
        return Shard(name, shard.bytes, shard.sha256)

    def _staged(self, staging: Path, starts: Sequence[int]) -> dict[int, Path]:
        """Pieces that an earlier process finished, by first item; half-written and foreign files are removed."""
        staged = {}
        for file in sorted(staging.iterdir()):
            start = file.name.partition("-")[0]
            found = hashed_shard(file) if start.isdigit() and int(start) in starts else None
            if found and found[1] == self.mark:
                staged[int(start)] = file
            elif file.name != ".lock" and (file.is_symlink() or not file.is_dir()):
                file.unlink()
        return staged

    def _staging(self, number: int) -> Path:
        return real_folder(self.path, f"{STAGING}/{number:05d}")

    def _files(self, pattern: str = "shard-*") -> list[Path]:
        return sorted(file for file in self.path.glob(pattern) if re.fullmatch(self.shard_name, file.name))

    def _is_whole(self, shard: Shard | None) -> bool:
        """Whether a shard that the description lists is as it says; nothing can be wrong with none."""
        try:
            return shard is None or bool(verified(self.path, shard))
        except DataError:
            return False


def _number(file: Path) -> int:
    return int(file.name.split("-")[1].partition(".")[0])
