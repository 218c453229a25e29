"""Sharded checkpoints that are complete or not there, and can be read at another world size.

A checkpoint is written beside its place under a name that nothing reads, and renamed once every rank's files and
`state.json` are on disk. What can be worked out from the step (position in the data, learning rate) is not in it.
"""

import io
import json
import pickle
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

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
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from magnum_train.distributed import Ranks
from magnum_train.errors import CheckpointError
from model.hf import sync_to_disk

FORMAT = 1
_NAME = re.compile(r"step-(\d{8})")
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
    choices: dict[str, str] = field(default_factory=dict)
    """What was chosen at start by looking at the machine, to be chosen again: the attention backend."""
    format: int = FORMAT
    """Version of this layout."""


def steps(run_dir: Path) -> list[int]:
    """The steps of a run's complete checkpoints, ascending."""
    folder = run_dir / "checkpoints"
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))


def path_of(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def read_state(folder: Path) -> TrainState:
    """A checkpoint's `state.json`.

    Raises:
        CheckpointError: If it is missing, unreadable, or of another format version.
    """
    file = folder / "state.json"
    try:
        state = TrainState(**json.loads(file.read_text()))
    except (OSError, TypeError, json.JSONDecodeError) as error:
        raise CheckpointError(str(file), str(error), "a checkpoint's state", "Remove this checkpoint.") from error
    if state.format != FORMAT:
        raise CheckpointError(str(file), f"format {state.format}", f"format {FORMAT}", "Use the version that made it.")
    return state


def save(
    run_dir: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    *,
    files: Mapping[str, bytes] | None = None,
    keep_last: int | None,
    ranks: Ranks,
) -> Path:
    """Save a checkpoint, make it visible by one rename, then drop the oldest.

    Args:
        run_dir: The run's folder, shared by all ranks.
        model: Sharded.
        optimizer: Its optimizer.
        state: What else belongs to the step.
        files: Further files that belong to it, by name; rank 0's are written.
        keep_last: How many of the newest stay; None keeps all.
        ranks: All of them call this.

    Returns:
        The checkpoint's folder.
    """
    final = path_of(run_dir, state.step)
    aside = final.with_name(f".writing-{final.name}")
    if ranks.is_main:
        for left in (*final.parent.glob(".writing-*"), *final.parent.glob(".removing-*")):
            shutil.rmtree(left)  # by an earlier start that died in a save
        aside.mkdir(parents=True)
    ranks.barrier()
    weights, moments = get_state_dict(model, optimizer)
    dcp_save({"model": weights, "optimizer": moments}, checkpoint_id=str(aside))
    if ranks.is_main:
        (aside / "state.json").write_text(json.dumps(asdict(state), indent=1))
        for name, content in (files or {}).items():
            (aside / name).write_bytes(content)
        for file in aside.iterdir():
            sync_to_disk(file)
        sync_to_disk(aside)
        aside.rename(final)
        sync_to_disk(final.parent)
        for step in steps(run_dir)[: -keep_last if keep_last else 0]:
            removed = path_of(run_dir, step)
            shutil.rmtree(removed.rename(removed.with_name(f".removing-{removed.name}")))
    ranks.barrier()
    return final


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
    whole: dict[str, Any] = {"model": weights, "optimizer": moments}
    hyper = [dict(group) for group in optimizer.param_groups]
    remedy = "Remove this checkpoint to go on from the one before, or choose another run_dir."
    _read(folder, whole, "the weights and moments of this model", remedy)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=whole["model"],
        optim_state_dict=whole["optimizer"],
        options=StateDictOptions(strict=True),
    )
    for group, now in zip(optimizer.param_groups, hyper, strict=True):
        group.update({key: value for key, value in now.items() if key != "params"})  # the configuration decides
    return state


def load_weights(folder: Path, model: nn.Module) -> None:
    """Load a checkpoint's weights alone, whatever world size saved it.

    Args:
        folder: A complete checkpoint.
        model: Plain in one process, or sharded with all ranks calling; parameters keep their dtype and device.

    Raises:
        CheckpointError: If its contents do not fit the model.
    """
    _read(folder, {"model": get_model_state_dict(model)}, "the weights of this model", alone=not dist.is_initialized())


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
    _read(folder, {"model": {name: value}}, "the weights of this model", alone=True)
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
