"""What a checkpoint is; which of a run's can be trusted; reading one, whatever world size saved it.

    step-00000200/manifest.json   every file with its size and SHA-256
                  state.json      what a step depends on beside weights and moments: `TrainState`
                  weights/        sharded, as the model has them: float32 or bfloat16 (torch's distributed checkpoint)
                  optimizer/      sharded: Adam's moments and counts, and what bfloat16 weights lack of their masters
                  random/         the states of each rank's random generators
                  stream.npz      how far streamed sources were read
                  pin             where it bears a name, which pruning spares; by hand: echo NAME > …/pin
    weights-00000200/             the same with bfloat16 weights alone: to read, not to go on from

A folder with such a name is complete: it was renamed when all of it was on disk and verified (`saver.py`). What can be
worked out from the step (position in the data, learning rate) is not in it.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import pickle
import random
import re
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from magnum_train.distributed import Ranks
from magnum_train.errors import CheckpointError

FORMAT = 2
MANIFEST, STATE, PIN = "manifest.json", "state.json", "pin"
_NAME = re.compile(r"(step|weights)-(\d{8})")
_METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "pathlib": ("PosixPath", "WindowsPath"),
    "pathlib._local": ("PosixPath", "WindowsPath"),  # the same in Python 3.13
}  # fmt: skip
"""What torch's description of a checkpoint is made of, by module; dtypes beside it."""


@dataclass(frozen=True)
class TrainState:
    """What a run knows beside weights and moments, after `step` steps."""

    step: int
    """Optimizer steps done, refused ones included; also the position in the data."""
    refused: list[int]
    """Of these, the ones whose update was refused."""
    data_key: str
    """Key of the prepared data that the steps were taken on; it is a hash of all that decides its contents."""
    settings: str = ""
    """Digest of the settings that may not change when the run goes on."""
    choices: dict[str, str] = field(default_factory=dict)
    """What was chosen at start by looking at the machine, to be chosen again: the attention backend."""
    total_steps: int = 0
    """Steps of the run when it was saved: the horizon of the learning rate."""
    recent: list[list[float]] = field(default_factory=list)
    """Loss and gradient norm of the last applied steps but the newest, by which the next step is judged."""
    newest: list[float] = field(default_factory=list)
    """Those of step `step`, by which the step after the next one is judged: results are read a step late. Empty where
    its update was refused."""
    stepped_over: list[int] = field(default_factory=list)
    """Steps whose update is left out since they went wrong once."""
    owed: list[str] = field(default_factory=list)
    """What was due at this step and left out since somebody asked to stop: validation, samples."""
    saved_on: dict[str, str] = field(default_factory=dict)
    """Ranks, mesh, device and torch, which decide the last bits of what follows."""
    format: int = FORMAT
    """Version of this layout."""


def steps(run_dir: Path) -> list[int]:
    """The steps of a run's complete checkpoints, ascending."""
    return _steps(run_dir, "step")


def weights_only(run_dir: Path) -> list[int]:
    """The steps of which a run has weights alone, ascending."""
    return _steps(run_dir, "weights")


def _steps(run_dir: Path, kind: str) -> list[int]:
    folder = run_dir / "checkpoints"
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[2]) for name in names if (match := _NAME.fullmatch(name)) and match[1] == kind)


def path_of(run_dir: Path, step: int, *, alone: bool = False) -> Path:
    """Where the checkpoint of a step stands; `alone` means its weights alone."""
    return run_dir / "checkpoints" / f"{'weights' if alone else 'step'}-{step:08d}"


def pins(folder: Path) -> list[str]:
    """The names that a checkpoint bears."""
    try:
        return (folder / PIN).read_text(errors="replace").split()
    except FileNotFoundError:  # for most, and for one that is pruned just now
        return []


def named(run_dir: Path) -> dict[str, Path]:
    """A run's checkpoints that bear a name, whole ones before those of weights alone."""
    alone = [path_of(run_dir, step, alone=True) for step in weights_only(run_dir)]
    whole = [path_of(run_dir, step) for step in steps(run_dir)]
    return {name: folder for folder in (*alone, *whole) for name in pins(folder)}


def read_state(folder: Path) -> TrainState:
    """A checkpoint's `state.json`.

    Raises:
        CheckpointError: If it is missing, unreadable, or of another format version.
    """
    file = folder / STATE
    try:
        values = json.loads(file.read_text())
        if isinstance(values, dict) and values.get("format") != FORMAT:
            remedy = "Use the version that made it."
            raise CheckpointError(str(file), f"format {values.get('format')}", f"format {FORMAT}", remedy)
        return TrainState(**values)
    except (OSError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(str(file), str(error), "a checkpoint's state", "Remove this checkpoint.") from error


def digest(file: Path) -> tuple[int, str]:
    """A file's size in bytes and the SHA-256 of its content, in hexadecimal."""
    with file.open("rb") as content:
        sha = hashlib.file_digest(content, "sha256").hexdigest()
        return os.fstat(content.fileno()).st_size, sha


def manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """The files of a checkpoint with their sizes and digests, largest first.

    Raises:
        ValueError: There is none, or it cannot be read; says why.
    """
    file = folder / MANIFEST
    try:
        files = json.loads(file.read_text())["files"]
        found = {str(name): (int(size), str(sha)) for name, (size, sha) in files.items()}
    except OSError as error:
        raise ValueError(f"{MANIFEST}: {error.strerror}") from error
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{MANIFEST} cannot be read") from error
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))


def difference(folder: Path, files: Iterable[tuple[str, tuple[int, str]]]) -> str | None:
    """The first of some files of a checkpoint that is not what its manifest says; None where all are.

    Raises:
        OSError: One is there and cannot be read, which says nothing of its content.
    """
    for name, (size, sha) in files:
        path = folder / name
        try:
            there = path.stat().st_size
            if there != size:
                return f"{name} has {there:,} bytes, not {size:,}"
            if (found := digest(path)[1]) != sha:
                return f"{name} has another content than was written (SHA-256 {found[:8]}…, not {sha[:8]}…)"
        except FileNotFoundError as error:
            return f"{name}: {error.strerror}"
    return None


def check(folder: Path, parts: tuple[str, ...] = ("",)) -> str | None:
    """Compare a checkpoint's files with its manifest, by one process with a few threads.

    Args:
        folder: The checkpoint's.
        parts: Beginnings of the names that matter, such as "weights/"; all by default.

    Returns:
        What is wrong, in words; None where nothing is.
    """
    try:
        files = [(name, entry) for name, entry in manifest(folder).items() if name.startswith(parts)]
    except ValueError as error:
        return str(error)

    def wrong(file: tuple[str, tuple[int, str]]) -> str | None:
        try:
            return difference(folder, [file])
        except OSError as error:
            return f"{file[0]}: {error.strerror}"

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return next(filter(None, pool.map(wrong, files)), None)


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Keep a checkpoint from being pruned while it is read, by any process on any host whose file system has locks.

    Raises:
        CheckpointError: It is gone.
    """
    try:
        file = (folder / MANIFEST).open("rb")
    except OSError as error:
        raise CheckpointError(str(folder), error.strerror or str(error), "a checkpoint") from error
    with file:
        with contextlib.suppress(OSError):  # a file system without locks; there pruning cannot look for readers either
            fcntl.flock(file, fcntl.LOCK_SH)
        try:
            here = (folder / MANIFEST).stat()
        except OSError:
            here = None
        if here is None or here.st_ino != os.fstat(file.fileno()).st_ino:
            raise CheckpointError(str(folder), "one that has just been pruned", "a checkpoint", "Try again.")
        yield


def newest(run_dir: Path, settings: str, ranks: Ranks, occasion: str) -> tuple[TrainState | None, list[str]]:
    """The newest of a run's checkpoints that verifies. Those that do not are set aside, under another name.

    Every rank reads its share of the files, and hears what the others found.

    Args:
        run_dir: The run's folder.
        settings: Digest of the settings that may not change.
        ranks: All of them call this.
        occasion: Names this call among those of the run.

    Returns:
        Its state, or None where the run has no checkpoint yet; and for each one that was passed over, why.

    Raises:
        CheckpointError: There are some, and none verifies; or one is of another format version.
    """
    listed = ranks.once(f"checkpoints {occasion}", lambda: json.dumps(steps(run_dir)))
    passed: list[str] = []
    found = None
    there = json.loads(listed)
    while there and found is None:
        folder = path_of(run_dir, there.pop())
        wrong = _verify(folder, settings, ranks, occasion)
        if wrong is None:
            found = read_state(folder)
        else:
            passed.append(f"{folder.name}: {wrong}")
    if passed and found is None:
        raise CheckpointError(
            str(run_dir / "checkpoints"), "; ".join(passed), "at least one checkpoint that verifies",
            "Remove them to begin anew, or choose another run_dir.",
        )  # fmt: skip
    ranks.once(f"set aside {occasion}", lambda: _set_aside(run_dir, len(passed)))
    return found, [f"passed over {text}; it is now passed-over-{text.partition(':')[0]}" for text in passed]


def _verify(folder: Path, settings: str, ranks: Ranks, occasion: str) -> str | None:
    """What is wrong with a checkpoint, the same on all ranks; None where nothing is."""

    def mine() -> str:
        try:
            files = list(manifest(folder).items())
        except ValueError as error:
            return str(error)
        share = files[ranks.rank :: ranks.world_size]
        try:
            try:
                return difference(folder, share) or ""
            except OSError:
                time.sleep(1)  # a server of files that starts again, or has a new idea of where one lies
                return difference(folder, share) or ""
        except OSError as error:
            remedy = "Nothing was changed. Start again when it can be read, or move this checkpoint away."
            raise CheckpointError(str(folder), error.strerror or str(error), "files to verify", remedy) from error

    if not (folder / MANIFEST).exists() and (folder / ".metadata").exists():
        read_state(folder)  # the layout before this one; says so
    name = f"verify {folder.name} {occasion}"
    found = ranks.settle(name, ranks.attempt(name, mine, lambda wrong: wrong))[1]
    wrong = next((text for text in found if text), None)
    if wrong is None and settings and read_state(folder).settings != settings:
        return "it was saved by a run with other settings"
    return wrong


def _set_aside(run_dir: Path, count: int) -> str:
    """Rename the newest checkpoints, which do not verify, so that nothing takes them for good ones."""
    for step in steps(run_dir)[::-1][:count]:
        folder = path_of(run_dir, step)
        aside = folder.with_name(f"passed-over-{folder.name}")
        number = 1
        while aside.exists():
            number += 1
            aside = folder.with_name(f"passed-over-{folder.name}-{number}")
        folder.rename(aside)
    return ""


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainState:
    """Load a checkpoint in place, whatever world size saved it.

    Args:
        folder: A complete checkpoint.
        model: Sharded, of the same architecture.
        optimizer: Its optimizer.

    Returns:
        The state that stood beside the weights.

    Raises:
        CheckpointError: If its contents do not fit the model.
    """
    state = read_state(folder)
    weights, moments = get_state_dict(model, optimizer)
    read: dict[str, Any] = {"model": weights}
    read_moments: dict[str, Any] = {"optimizer": moments}
    hyper = [dict(group) for group in optimizer.param_groups]
    remedy = "Remove this checkpoint to go on from the one before, or choose another run_dir."
    _read(folder / "weights", read, "the weights of this model", remedy)
    _read(folder / "optimizer", read_moments, "the moments of this model", remedy)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=read["model"],
        optim_state_dict=read_moments["optimizer"],
        options=StateDictOptions(strict=True),
    )
    for group, now in zip(optimizer.param_groups, hyper, strict=True):
        group.update({key: value for key, value in now.items() if key != "params"})  # the configuration decides
    return state


def random_states(device: torch.device) -> bytes:
    """The states of this rank's random generators. Nothing that ships draws from them; a layer of one's own may."""
    version, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    inner = {"key": numpy_state["state"]["key"].tolist(), "pos": int(numpy_state["state"]["pos"])}
    states = {
        "torch": bytes(torch.get_rng_state().numpy()).hex(),
        "cuda": bytes(torch.cuda.get_rng_state(device).numpy()).hex() if device.type == "cuda" else None,
        "python": [version, list(words), gauss],
        "numpy": numpy_state | {"state": inner},
    }
    return json.dumps(states).encode()


def restore_random_states(folder: Path, state: TrainState, seed: int, ranks: Ranks) -> bool:
    """Go on with the random numbers of a checkpoint, where it was saved by as many ranks; else begin new series.

    Args:
        folder: The checkpoint's.
        state: Its state.
        seed: The run's.
        ranks: This process among the others.

    Returns:
        Whether the series go on.
    """
    file = folder / "random" / f"rank-{ranks.rank:05d}.json"
    if state.saved_on.get("ranks") != str(ranks.world_size) or not file.exists():
        seed_random(seed, state.step, ranks.rank)
        return False
    states = json.loads(file.read_bytes())
    torch.set_rng_state(torch.tensor(list(bytes.fromhex(states["torch"])), dtype=torch.uint8))
    if states["cuda"] is not None and ranks.device.type == "cuda":
        torch.cuda.set_rng_state(torch.tensor(list(bytes.fromhex(states["cuda"])), dtype=torch.uint8), ranks.device)
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    numpy_state = states["numpy"]
    numpy_state["state"]["key"] = np.array(numpy_state["state"]["key"], np.uint32)
    np.random.set_state(numpy_state)
    return True


def seed_random(seed: int, step: int, rank: int) -> None:
    """Begin a series of random numbers of its own for each rank."""
    number = int.from_bytes(hashlib.sha256(f"random {seed} {step} {rank}".encode()).digest()[:4], "big")
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def load_weights(folder: Path, model: nn.Module) -> None:
    """Load a checkpoint's weights alone, whatever world size saved it.

    Args:
        folder: A complete checkpoint.
        model: Plain in one process, or sharded with all ranks calling; parameters keep their dtype and device.

    Raises:
        CheckpointError: If its contents do not fit the model.
    """
    weights = {"model": get_model_state_dict(model)}
    _read(folder / "weights", weights, "the weights of this model", alone=not dist.is_initialized())


def read_weight(folder: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """One parameter of a checkpoint, whole, by one process alone.

    Beside the result, as much is held in memory as one rank saved of it.

    Args:
        folder: A complete checkpoint.
        name: The parameter's name.
        shape: Its whole shape.
        dtype: Wanted; values are rounded to it.

    Returns:
        On the CPU.

    Raises:
        CheckpointError: If it is not there in this shape.
    """
    value = torch.empty(shape, dtype=dtype)
    _read(folder / "weights", {"model": {name: value}}, "the weights of this model", alone=True)
    return value


def _read(folder: Path, whole: dict[str, Any], expected: str, remedy: str = "", *, alone: bool = False) -> None:
    """Fill the tensors of a state from a checkpoint, in place; together with the other ranks, or alone."""
    try:
        with warnings.catch_warnings():  # torch remarks that there is no process group; there is to be none
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            reader = _Reader(folder)
            dcp_load(whole, storage_reader=reader, planner=_Planner(reader), no_dist=alone)
    except (Exception, CheckpointException) as error:  # each rank's own error, wrapped in one that is no Exception
        raise CheckpointError(str(folder), _reason(error), expected, remedy) from error


def _reason(error: BaseException) -> str:
    """The first line of what went wrong on the first rank where something did."""
    failures = getattr(error, "failures", None)
    cause = next(iter(failures.values()))[0] if failures else error
    return (str(cause).splitlines() or [type(cause).__name__])[0]


class _Planner(DefaultLoadPlanner):
    """Takes tensors for tensors and plain values for the rest, such as the optimizer's groups; nothing that could act.

    It checks where torch gathers every rank's failure, so that what fails on one ends all with its reason.
    """

    def __init__(self, reader: "_Reader") -> None:
        super().__init__()
        self._reader = reader

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        if self._reader.failure is not None:
            raise ValueError(self._reader.failure)
        super().set_up_planner(state_dict, metadata, is_coordinator)
        there = metadata.state_dict_metadata if metadata is not None else {}
        for name, value in self.state_dict.items():
            if not isinstance(value, Tensor):
                continue
            found, short = there.get(name), name.removeprefix("model.")
            if not isinstance(found, TensorStorageMetadata):  # an object would be put in the tensor's place
                raise ValueError(f"no tensor {short}")
            if found.size != value.shape:
                raise ValueError(f"{short} of shape {list(found.size)}, not {list(value.shape)}")

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)  # refuses all else; what follows would not
        value.seek(0)
        super().load_bytes(read_item, value)


class _Reader(FileSystemReader):
    """Reads a checkpoint whose metadata, a pickle, may name only what checkpoints are made of.

    A run is passed on like any other weights, and opening one must not run what its sender put there.

    Attributes:
        failure: Why the metadata could not be read, for the planner to say: torch 2.11 drops an error raised here.
    """

    failure: str | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        found = Metadata({})
        try:
            with self.fs.create_stream(Path(self.path) / ".metadata", "rb") as file:
                found = _MetadataUnpickler(file).load()
        except Exception as error:  # whatever a damaged pickle may raise
            self.failure = str(error) or type(error).__name__
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class _MetadataUnpickler(pickle.Unpickler):
    """Finds classes of torch's own description of a checkpoint, and nothing that can be called to an effect."""

    def find_class(self, module: str, name: str) -> Any:
        a_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not a_dtype and name not in _METADATA_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"its metadata names {module}.{name}, which is no part of a checkpoint")
        return super().find_class(module, name)
