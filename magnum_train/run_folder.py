"""A run's folder before training begins: whose it is, what a killed start left there, and what will fit.

Rank 0 claims the folder until the run ends, so that a second start is refused, and what lies there half written is
known to be dead. Knows files, sizes and settings; not what is in a checkpoint.
"""

import contextlib
import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from magnum_train.config import TrainConfig
from magnum_train.distributed import Ranks
from magnum_train.errors import CheckpointError, ConfigError
from magnum_train.optim import stored_bytes
from model.hf import NO_LOCKS, remove_abandoned, sync_to_disk, try_lock

LOCK = ".lock"
"""Locked while a run goes on. The file stays where a run was killed, and means nothing: the lock counts."""
ROUNDED_BYTES = 2
"""Of one parameter in bfloat16."""
TRIAL_BYTES = 2**26
"""Most that a rank writes to find out how fast the folder is."""


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[str]:
    """Make a run's folder and keep every other start out of it; rank 0 alone.

    The kernel holds the lock for this process and drops it when the process ends, however it ends. Hosts that share the
    folder see each other's locks where their file system has any.

    Args:
        folder: The run's. If it, or a folder above it, is made here and nothing comes to lie in it, it is gone again in
            the end.

    Yields:
        A remark, where the file system has no locks; else an empty text.

    Raises:
        CheckpointError: Another process has it; says which, where, and since when.
        ConfigError: It cannot be made or written, or is a file.
    """
    made: list[Path] = []
    held: list[int] = []  # the lock's descriptor
    # A forked process would share the lock, and keep it when this one is gone.
    os.register_at_fork(after_in_child=lambda: _close(held))
    try:
        try:
            remark = _lock(folder, made, held)
        except OSError as error:
            found = f"{folder}, which is a file" if folder.is_file() else f"{folder}: {error.strerror}"
            raise ConfigError("run_dir", found, "a folder that can be written") from error
        yield remark
    finally:
        if held:
            with contextlib.suppress(OSError):  # where the folder cannot be written any more the file stays, harmless
                (folder / LOCK).unlink(missing_ok=True)  # before the lock goes: later it may be another's
        _close(held)
        for path in made:
            with contextlib.suppress(OSError):  # something lies in it, as it should
                path.rmdir()


def _close(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())


def _lock(folder: Path, made: list[Path], held: list[int]) -> str:
    """Make a folder and lock it, noting the folders made, deepest first, and the lock; the remark of `claim`."""
    while True:
        absent = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:  # also of one that another start has removed since
            if any(os.path.lexists(path) and not path.is_dir() for path in (folder, *folder.parents)):
                raise
            continue
        made[:] = absent
        try:
            descriptor = try_lock(folder / LOCK)
        except FileNotFoundError:
            continue  # a start that came to nothing has removed the folder just now
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            (folder / LOCK).unlink(missing_ok=True)
            return (
                f"the file system of {folder} has no locks ({error.strerror}): a second start of this run would go "
                "unnoticed, and spoil it"
            )
        break
    if descriptor is None:
        raise CheckpointError(
            str(folder), f"in use by {_holder(folder / LOCK)}", "one run at a time",
            "Wait for that one or stop it, or choose another run_dir.",
        )  # fmt: skip
    held.append(descriptor)
    since = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    os.ftruncate(descriptor, 0)  # what a killed run has left
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {since}".encode())
    return ""


def _holder(file: Path) -> str:
    """Who says that it holds a lock that is held."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")[:200].strip()
    except OSError:  # it ends just now
        text = ""
    return text if text and text.isprintable() else "another process"


def tidy(folder: Path) -> list[str]:
    """Remove what an earlier start left half written when it was killed; under `claim` alone.

    Checkpoints under their names are not touched, nor is an export that another process is writing.

    Args:
        folder: The run's.

    Returns:
        What was removed, relative to the folder.

    Raises:
        ConfigError: Something cannot be removed.
    """
    left = [*folder.glob("*.tmp")]
    try:
        for path in left:
            path.unlink()
        left += clear_away(folder / "checkpoints")
        left += remove_abandoned(folder / "exports")
    except OSError as error:
        found = f"{error.filename}, of a start that was killed: {error.strerror}"
        raise ConfigError("run_dir", found, "a folder in which it can be removed") from error
    return sorted(path.relative_to(folder).as_posix() for path in left)


def clear_away(checkpoints: Path) -> list[Path]:
    """Remove what a process that died in saving or pruning has left; put back what it was about to replace."""
    for replaced in checkpoints.glob(".replaced-*"):
        final = replaced.with_name(replaced.name.removeprefix(".replaced-"))
        replaced.rename(final if not final.exists() else final.with_name(f".removing-{final.name}"))
    left = [*checkpoints.glob(".writing-*"), *checkpoints.glob(".removing-*")]
    for path in left:
        shutil.rmtree(path)
    return left


def read(file: Path) -> str:
    """A text file's content; empty where there is none."""
    return file.read_text(encoding="utf-8") if file.exists() else ""


def write(file: Path, text: str) -> None:
    """Replace a text file as a whole, so that a process or a host that dies leaves the old one or the new one."""
    aside = file.with_name(f".{file.name}.tmp")
    aside.write_text(text, encoding="utf-8")
    sync_to_disk(aside)
    aside.replace(file)


@dataclass(frozen=True)
class Disk:
    """What a run takes on disk, in bytes, and what there is. Beside this are logs and a few small files."""

    checkpoint: int
    """One complete checkpoint."""
    peak: int
    """The most that checkpoints and the export at the end take at once, however often the run is stopped; if nobody
    gives a name to further ones, and no chat or export keeps one from being pruned."""
    parts: str
    """What the peak is made of, in words."""
    further: str
    """Where no number of checkpoints bounds it: what comes to the peak, in words; else empty."""
    held: int
    """Already there, of this run: part of the peak."""
    free: int
    copy: int
    """The host's memory that a rank takes for a copy while it saves; 0 where training waits instead."""

    @property
    def missing(self) -> int:
        """How much too little there is; 0 where the run fits."""
        return max(0, self.peak - self.held - self.free)

    @property
    def text(self) -> str:
        """All this for people."""
        there = f", and {size_text(self.held)} of the run there already" if self.held else ""
        copy = f"; saving takes {size_text(self.copy)} more of the host's memory for each rank" if self.copy else ""
        return (
            f"a checkpoint takes {size_text(self.checkpoint)}, the run at most {size_text(self.peak)} on disk "
            f"({self.parts}){self.further}; {size_text(self.free)} free{there}{copy}"
        )


def disk(
    settings: TrainConfig,
    parameters: int,
    total_steps: int,
    epoch_ends: Sequence[int],
    *,
    held: int,
    free: int,
    shards: int,
) -> Disk:
    """Work out what a run takes on disk at the worst: the best checkpoints are old ones, and one is being written.

    Pruning follows each save before the next one begins, so the worst moment is the last save, or the export after it.
    The clock and whoever stops the run may have it saved after any step; where `keep_last` bounds how many of these
    stay, they are counted.

    Args:
        settings: The run's.
        parameters: Of the model.
        total_steps: Of the run.
        epoch_ends: The last step of each epoch that ends in the run, ascending; none where sources are streamed.
        held: Bytes of what the run has on disk already; see `held_bytes`.
        free: Bytes free on disk.
        shards: Ranks that share one copy of the model.

    Returns:
        The account.
    """
    config, every = settings.checkpoint, settings.checkpoint.every_epochs
    names = {step for step in config.pin.values() if step <= total_steps}
    names |= set(epoch_ends[every - 1 :: every]) if every else set()
    alone = len(names) if config.pinned_weights_only else 0
    pinned = set() if config.pinned_weights_only else names
    saved = pinned | _multiples(1 if config.keep_last else config.every_steps, total_steps) | {total_steps}
    before = _kept(settings, sorted(saved - {total_steps}), pinned)
    after = _kept(settings, sorted(saved), pinned)
    rounded = {f"{alone:,} of weights alone": alone} if alone else {}
    full, export = checkpoint_bytes(settings, parameters), ROUNDED_BYTES * parameters
    if sum(after.values()) > sum(before.values()) and settings.train.export_at_end:
        counted, peak = {**after, **rounded, "an export": 1}, full * sum(after.values()) + export
    else:
        counted, peak = {**before, "one being written": 1, **rounded}, full * (sum(before.values()) + 1)
    further = ""
    if not config.keep_last:
        clock = f"every {config.every_minutes:g} minutes and " if config.every_minutes is not None else ""
        further = f" and, since all are kept, {size_text(full)} more {clock}whenever it is stopped"
    return Disk(
        checkpoint=full,
        peak=peak + ROUNDED_BYTES * parameters * alone,
        parts=", ".join(counted),
        further=further,
        held=held,
        free=free,
        copy=-(-full // shards) if config.asynchronous else 0,
    )


def checkpoint_bytes(settings: TrainConfig, parameters: int) -> int:
    """What one complete checkpoint of a run takes: its parameters and the optimizer's states.

    Args:
        settings: The run's.
        parameters: Of the model.
    """
    return round(stored_bytes(settings.precision, settings.optim) * parameters)


def _kept(settings: TrainConfig, saved: list[int], pinned: set[int]) -> dict[str, int]:
    """How many complete checkpoints pruning leaves of those saved, each counted for its first reason."""
    config, every = settings.checkpoint, settings.checkpoint.keep_every_steps
    newest = set(saved[-config.keep_last :] if config.keep_last else saved)
    named = pinned.intersection(saved) - newest
    left = [step for step in saved if step not in newest and step not in named]
    spaced = [step for step in left if every and step % every == 0]
    validated = settings.validation.every_steps
    others = [step for step in left if validated and step % validated == 0 and not (every and step % every == 0)]
    best = min(config.keep_best, len(others))
    counts = {
        f"{len(newest):,} newest" if config.keep_last else f"all {len(newest):,}": len(newest),
        f"{best:,} best": best, f"{len(named):,} with a name": len(named),
        f"{len(spaced):,} at multiples of {every or 0:,} steps": len(spaced),
    }  # fmt: skip
    return {words: count for words, count in counts.items() if count}


def _multiples(every: int | None, last: int) -> set[int]:
    return set(range(every, last + 1, every)) if every else set()


def held_bytes(folder: Path, total_steps: int) -> int:
    """Bytes on disk of a run's checkpoints and of the export of its last step: what need not be free any more.

    Args:
        folder: The run's.
        total_steps: Of the run.
    """
    places = [*(folder / "checkpoints").glob("step-*"), *(folder / "checkpoints").glob("weights-*")]
    places.append(folder / "exports" / f"step-{total_steps:08d}")
    return sum(file.stat().st_size for place in places for file in place.rglob("*") if file.is_file())


def size_text(size: int) -> str:
    """Bytes for people, with one decimal: GB of 1e9 bytes, or MB or kB where it is little."""
    unit, name = (1e9, "GB") if size >= 1e9 else (1e6, "MB") if size >= 1e6 else (1e3, "kB")
    return f"{size / unit:,.1f} {name}"


def write_speed(folder: Path, size: int, ranks: Ranks) -> float:
    """Bytes a second that all ranks together put on disk, measured with files that are removed again.

    Caches of the disk's own make it an upper bound for files that are much larger than `TRIAL_BYTES`.

    Args:
        folder: The run's; claimed, and seen by every rank.
        size: Bytes that all ranks are going to write; no rank tries more than its share.
        ranks: All of them call this.

    Raises:
        ConfigError: A rank cannot write there; on another rank than 0 a HostError.
    """
    share = max(1, min(TRIAL_BYTES, size // ranks.world_size))
    block = os.urandom(min(share, 2**20))  # which no file system can make smaller
    file = folder / f".speed-{ranks.rank}.tmp"

    def timed() -> float:
        begin = time.perf_counter()
        try:
            with file.open("wb") as out:
                for start in range(0, share, len(block)):
                    out.write(block[: share - start])
                out.flush()
                os.fsync(out.fileno())
            return time.perf_counter() - begin
        except OSError as error:
            expected = "a folder that every rank can write"
            raise ConfigError("run_dir", f"{folder}: {error.strerror}", expected) from error
        finally:
            file.unlink(missing_ok=True)

    ranks.barrier()  # so that all write at once
    seconds = ranks.settle("write speed", ranks.attempt("write speed", timed, repr))[1]
    return share * ranks.world_size / max(map(float, seconds))
