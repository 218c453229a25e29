"""Saving as a transaction: copied, written aside, verified, made visible by one rename, then pruned.

The main thread copies weights and moments to the host's memory (page-locked where there is a GPU) and goes on training;
a thread of each rank writes them. The threads of all ranks talk over a process group of their own, since on training's
group their collectives would mix. What fails on one rank fails on all. It is tried again from the same copy; after the
last attempt it is an error.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from magnum_train import checkpoint
from magnum_train.checkpoint import FORMAT, MANIFEST, PIN, STATE, TrainState, digest, path_of, pins, steps
from magnum_train.config import CheckpointConfig
from magnum_train.distributed import Ranks
from magnum_train.errors import RunError
from magnum_train.metrics import validation_losses
from magnum_train.run_folder import clear_away, size_text
from model.hf import sync_to_disk

Result = TypeVar("Result")
Digests = dict[str, tuple[int, str]]
"""Files of a checkpoint by name, with size and SHA-256."""
PAUSES = (5.0, 30.0, 120.0)
"""Seconds before each further attempt, after the last of which a failure is an error. Training does not wait for them,
and a disk that is being freed or a server that starts again takes its time."""


@dataclass(frozen=True)
class Saved:
    """One checkpoint that has become visible."""

    step: int
    folder: Path
    size: int
    """Bytes of all of its files."""
    stall_seconds: float
    """How long training waited: for the save before, and for the copy."""
    seconds: float
    """From the call until it was visible."""
    remarks: list[str]
    """Attempts that failed before the one that did not; old checkpoints that could not be removed."""


@dataclass(frozen=True)
class _Task:
    """What a rank's thread has to write."""

    final: Path
    need: int
    """Bytes of all ranks' shards together."""
    shards: dict[str, dict[str, Any]]
    """Weights and moments, by folder."""
    small: dict[str, bytes]
    """This rank's other files, by name."""
    names: tuple[str, ...]
    before: Callable[[], None]

    @property
    def aside(self) -> Path:
        """Where it is written; nothing reads this name."""
        return self.final.with_name(f".writing-{self.final.name}")


class _FailedError(Exception):
    """Something failed on one rank, as all of them have heard."""


class Saver:
    """Saves a run's checkpoints, one at a time. All ranks call `begin` and `wait` alike.

    Args:
        run_dir: The run's folder, shared by all ranks.
        config: How to save, and what stays; when is the caller's.
        ranks: This process among the others.
        expected_seconds: How long a save is expected to take.
        say: Told on rank 0 of attempts that fail, by the thread that saves.

    Attributes:
        newest: Step of the newest whole checkpoint that was begun here or gone on from; 0 where there is none. The
            same on all ranks.
        seconds: How long the last complete save took, on this rank; before there was one, what was expected.
    """

    def __init__(
        self,
        run_dir: Path,
        config: CheckpointConfig,
        ranks: Ranks,
        expected_seconds: float = 0.0,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._run_dir, self._config, self._ranks = run_dir, config, ranks
        # Keeps its memory from save to save; torch 2.11's `DefaultStager`, which wraps it, drops it after each.
        self._stager = StateDictStager(pin_memory=ranks.device.type == "cuda", share_memory=False)
        self._thread: threading.Thread | None = None
        self._deadline = 0.0
        self._outcome: Saved | BaseException | None = None
        self._finished: list[Saved] = []
        self.seconds, self.newest, self._say = expected_seconds, 0, say

    def reserve(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Have the memory for copies made while training goes on, which would stall the first save else.

        Args:
            model: As for `begin`.
            optimizer: After its first step; before it there are no moments.
        """
        if not self._config.asynchronous:
            return
        shards = _state(model, optimizer)

        def work() -> None:
            try:
                self._on_own_device()
                self._copy(shards)  # while weights change; the values are worth nothing, the memory is kept
            except BaseException as error:
                self._outcome = RunError(
                    "checkpoint.asynchronous", f"true, and {_reason(error)}", "room in the host's memory for the copy",
                    "Set checkpoint.asynchronous=false, with which training waits for each save.",
                )  # fmt: skip

        self._deadline = time.monotonic() + self._config.timeout_seconds
        self._thread = threading.Thread(target=work, name="reserve", daemon=True)
        self._thread.start()

    def begin(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: TrainState,
        *,
        files: Mapping[str, bytes] | None = None,
        names: tuple[str, ...] = (),
        alone: bool = False,
        before: Callable[[], None] | None = None,
    ) -> None:
        """Copy what is to be saved and have it written. When this returns, the weights may change again.

        Args:
            model: Sharded.
            optimizer: Its optimizer.
            state: What else belongs to the step.
            files: Further files that belong to it, by name; rank 0's are written.
            names: What it is called; one that has a name is spared by pruning.
            alone: Whether to save weights alone, in bfloat16.
            before: Puts on disk what must be there before the checkpoint is visible. Rank 0's is called, by the thread
                that saves; where it raises OSError or ValueError, the attempt has failed.

        Raises:
            RunError: It could not be saved, where `checkpoint.asynchronous` is off, or the one before could not.
        """
        begun = time.perf_counter()
        self.wait()
        self._deadline = time.monotonic() + self._config.timeout_seconds
        self.newest = self.newest if alone else state.step
        if alone:
            weights = get_model_state_dict(model)
            shards = {"weights": {"model": {k: cast(torch.Tensor, v).to(torch.bfloat16) for k, v in weights.items()}}}
        else:
            shards = _state(model, optimizer)
        small = {}
        if not alone:
            small[f"random/rank-{self._ranks.rank:05d}.json"] = checkpoint.random_states(self._ranks.device)
        if self._ranks.is_main:
            small |= {STATE: json.dumps(asdict(state), indent=1).encode(), **(files or {})}
        if self._config.asynchronous:
            shards = self._copy(shards)
        stall = time.perf_counter() - begun
        task = _Task(
            final=path_of(self._run_dir, state.step, alone=alone),
            need=_whole_bytes(shards),
            shards=shards,
            small=small,
            names=names,
            before=before or (lambda: None),
        )

        def work() -> None:
            try:
                self._on_own_device()
                size, remarks = self._write(task)
                seconds = time.perf_counter() - begun
                self._outcome = Saved(
                    state.step, task.final, size, stall if self._config.asynchronous else seconds, seconds, remarks
                )
            except BaseException as error:  # for the main thread to raise
                self._outcome = error

        if self._config.asynchronous:
            self._thread = threading.Thread(target=work, name="saver", daemon=True)
            self._thread.start()
        else:
            work()
            self.wait()

    def _on_own_device(self) -> None:
        """What a thread does on a GPU it does on the first one, unless told."""
        if self._ranks.device.type == "cuda":
            torch.cuda.set_device(self._ranks.device)

    def _copy(self, shards: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Weights and moments in the host's memory; complete when this returns."""
        cuda = self._ranks.device.type == "cuda"
        copied = self._stager.stage(shards, non_blocking=cuda)
        if cuda:
            torch.cuda.synchronize(self._ranks.device)
        return cast(dict[str, dict[str, Any]], copied)

    @property
    def failure(self) -> RunError | None:
        """Why what was begun has failed on this rank, or that it takes longer than it may; None while all is well."""
        if isinstance(self._outcome, RunError):
            return self._outcome
        place = str(self._run_dir / "checkpoints")
        if isinstance(self._outcome, BaseException):
            error = RunError(place, f"{type(self._outcome).__name__}: {_reason(self._outcome)}", "to save there")
            error.__cause__ = self._outcome
            return error
        if self._thread is not None and self._thread.is_alive() and time.monotonic() > self._deadline:
            limit = self._config.timeout_seconds
            return RunError(
                place, f"a save that has not ended after {limit} s", "one that ends in checkpoint.timeout_seconds",
                "Look at the file system, or allow it more time.",
            )  # fmt: skip
        return None

    def finished(self) -> list[Saved]:
        """What has become visible since the last call; does not wait."""
        if self._thread is not None and not self._thread.is_alive() and isinstance(self._outcome, Saved):
            self.wait()
        finished, self._finished = self._finished, []
        return finished

    def wait(self) -> None:
        """Wait until what was begun is visible.

        Raises:
            RunError: It could not be saved, or takes longer than it may.
        """
        if self._thread is not None:
            self._thread.join(max(self._deadline - time.monotonic(), 0.0))
        failure, outcome = self.failure, self._outcome
        self._outcome, self._thread = None, None
        if failure is not None:
            raise failure
        if isinstance(outcome, Saved):
            self._finished.append(outcome)
            self.seconds = outcome.seconds

    def abandon(self) -> None:
        """Wait no more for what was begun: it has failed on another rank."""
        self._thread, self._outcome = None, None

    def _write(self, task: _Task) -> tuple[int, list[str]]:
        """Write a checkpoint, trying again where that fails; its size, and what is worth a remark."""
        reasons: list[str] = []
        for pause in (*PAUSES, None):
            try:
                size = self._attempt(task)
                break
            except _FailedError as error:
                reasons.append(_reason(error))
                with contextlib.suppress(_FailedError):  # what cannot be removed now is removed by the next start
                    self._by_main(lambda: shutil.rmtree(task.aside, ignore_errors=True))
                if pause is None:
                    raise RunError(
                        str(task.final), f"{'; then '.join(dict.fromkeys(reasons))} ({len(reasons)} attempts)",
                        f"to write {size_text(task.need)} there",
                        "What was saved before stands: the same command goes on from it.",
                    ) from error  # fmt: skip
                self._say(f"{task.final.name}: attempt {len(reasons)} failed: {reasons[-1]}; again in {pause:g} s")
            time.sleep(pause)
        remarks = [f"attempt {number} failed: {reason}" for number, reason in enumerate(reasons, 1)]
        if self._ranks.is_main:
            remarks += prune(self._run_dir, self._config)
        self._agree(lambda: None)  # no rank is done before the old ones are gone
        return size, remarks

    def _attempt(self, task: _Task) -> int:
        self._by_main(lambda: _open(task.aside, task.need))
        meant: Digests = {}
        for part, shards in task.shards.items():
            writer = FileSystemWriter(task.aside / part)
            writer.fs = digesting = _DigestingFiles()
            try:
                dcp_save(shards, storage_writer=writer, process_group=self._ranks.saving)
            except CheckpointException as error:
                self._agree(digesting.raise_failure)
                raise _FailedError(_reason(error)) from error
            meant |= {f"{part}/{name}": entry for name, entry in digesting.digests.items()}
        written = self._agree(lambda: _finish(task.aside, meant, task.small))
        self._by_main(task.before)
        files = {name: entry for part in written for name, entry in part.items()}
        self._by_main(lambda: _publish(task, files))
        return sum(size for size, _ in files.values())

    def _by_main(self, task: Callable[[], None]) -> None:
        """Run something on rank 0; where it failed, it failed on all."""
        self._agree(task if self._ranks.is_main else lambda: None)

    def _agree(self, task: Callable[[], Result]) -> list[Result]:
        """Run something on every rank and hear what came of it on each; where it failed on one, it failed on all.

        Raises:
            _FailedError: With the first failing rank's reason.
        """
        word: tuple[Result | None, str]
        try:
            word = task(), ""
        except (OSError, ValueError, _FailedError) as error:
            word = None, _reason(error)
        words: list[Any] = [None] * self._ranks.world_size
        dist.all_gather_object(words, word, group=self._ranks.saving)
        for rank, (_, failure) in enumerate(words):
            if failure:
                raise _FailedError(failure if len(words) == 1 else f"rank {rank}: {failure}")
        return [result for result, _ in words]


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """Weights and moments of this rank, by the folder that they are written in."""
    weights, moments = get_state_dict(model, optimizer)
    return {"weights": {"model": weights}, "optimizer": {"optimizer": moments}}


def _whole_bytes(state: Any) -> int:
    """Bytes of all tensors in a state, those of other ranks included."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.dtype.itemsize  # the whole tensor's, where it is sharded
    return sum(map(_whole_bytes, state.values())) if isinstance(state, dict) else 0


def _reason(error: BaseException) -> str:
    """What went wrong, in one line; of several ranks' errors the first."""
    failures = getattr(error, "failures", None)
    if failures:
        rank, (cause, _) = next(iter(failures.items()))
        return f"rank {rank}: {_reason(cause)}" if len(failures) > 1 or rank else _reason(cause)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]


def _open(aside: Path, need: int) -> None:
    """Make an empty folder to write in, and room for it."""
    clear_away(aside.parent)
    aside.mkdir(parents=True)
    if (free := shutil.disk_usage(aside).free) < need:
        raise _FailedError(f"{size_text(free)} free, {size_text(need)} needed")


def _finish(aside: Path, meant: Digests, small: dict[str, bytes]) -> Digests:
    """Write this rank's small files, and read back all that it wrote."""
    for name, data in small.items():
        file = aside / name
        file.parent.mkdir(exist_ok=True)
        with file.open("wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        meant[name] = len(data), hashlib.sha256(data).hexdigest()
    for name, entry in meant.items():
        if digest(aside / name) != entry:
            raise _FailedError(f"{name} does not read back as it was written")
    return meant


def _publish(task: _Task, files: Digests) -> None:
    """Write the manifest, see that all is there and on disk, and make it visible."""
    aside, final = task.aside, task.final
    names = dict.fromkeys((*task.names, *pins(final)))  # also those of one that is saved a second time
    (aside / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}, indent=1))
    if names:
        (aside / PIN).write_text("\n".join(names) + "\n")
    there = {path.relative_to(aside).as_posix() for path in aside.rglob("*") if path.is_file()}
    if there - {MANIFEST, PIN} != files.keys():
        odd = ", ".join(sorted((there - {MANIFEST, PIN}) ^ files.keys())[:3])
        raise _FailedError(f"rank 0 misses files, or finds some that nobody wrote: {odd}")
    for path in (aside / MANIFEST, *([aside / PIN] if names else []), *(p for p in aside.rglob("*") if p.is_dir())):
        sync_to_disk(path)
    sync_to_disk(aside)
    replaced = final.with_name(f".replaced-{final.name}")  # put back by the next start, if this one is killed here
    if final.exists():
        final.rename(replaced)
    aside.rename(final)
    sync_to_disk(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def spared(run_dir: Path, config: CheckpointConfig) -> set[int]:
    """The steps of a run's checkpoints that pruning leaves: the newest, the best, the round ones, those with a name."""
    there = steps(run_dir)
    kept = set(there[-config.keep_last :] if config.keep_last else there)
    every = config.keep_every_steps
    kept |= {step for step in there if (every and step % every == 0) or pins(path_of(run_dir, step))}
    losses = sorted((loss, step) for step, loss in validation_losses(run_dir).items() if step in there)
    return kept | {step for _, step in losses[: config.keep_best]}


def prune(run_dir: Path, config: CheckpointConfig) -> list[str]:
    """Remove the checkpoints that need not stay and that nobody reads.

    Returns:
        What could not be removed, and why. It is tried again after the next save.
    """
    remarks = []
    try:
        superfluous = sorted(set(steps(run_dir)) - spared(run_dir, config))
    except OSError as error:
        return [f"nothing could be pruned: {_reason(error)}"]
    for step in superfluous:
        folder = path_of(run_dir, step)
        try:
            with (folder / MANIFEST).open("r+b") as lock:
                if not _unread(lock):
                    continue
                removed = folder.rename(folder.with_name(f".removing-{folder.name}"))
                shutil.rmtree(removed)
        except OSError as error:
            remarks.append(f"{folder.name} could not be removed: {_reason(error)}")
    return remarks


def _unread(lock: io.BufferedRandom) -> bool:
    """Whether no chat or export reads the checkpoint to which this file belongs; see `checkpoint.reading`."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks tells nobody about readers, and must not fill up
        return True
    return True


class _DigestingFiles(FileSystem):
    """Knows the size and digest of what was written, so that it can be compared with what is on disk.

    Attributes:
        digests: Of complete files, by name.
    """

    def __init__(self) -> None:
        self.digests: Digests = {}
        self._failure: OSError | None = None

    def raise_failure(self) -> None:
        """Raise what kept a file from being written, if anything did: torch's own serialiser loses the reason."""
        if self._failure is not None:
            raise self._failure

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        with super().create_stream(path, mode) as stream:
            if mode != "wb":
                yield stream
                return
            digesting = _Digesting(stream)
            try:
                yield digesting
            except BaseException:
                self._failure = digesting.failure
                raise
            self.digests[Path(path).name.removesuffix(".tmp")] = digesting.size, digesting.sha.hexdigest()


class _Digesting(io.RawIOBase):
    """A file that is written from its beginning to its end."""

    def __init__(self, file: io.IOBase) -> None:
        self._file = cast(io.BufferedWriter, file)
        self.size, self.sha = 0, hashlib.sha256()
        self.failure: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            written = self._file.write(data)
        except OSError as error:
            self.failure = error
            raise
        self.sha.update(data)
        self.size += written
        return written

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        self.flush()
