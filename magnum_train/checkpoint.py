"""Sharded checkpoints that are complete or not there, and can be read at another world size.

A checkpoint is written beside its place under a name that nothing reads, and renamed once every rank's files and
`state.json` are on disk. What can be worked out from the step (position in the data, learning rate) is not in it.
"""

import json
import os
import re
import shutil
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from magnum_train.distributed import Ranks
from magnum_train.errors import CheckpointError

FORMAT = 1
_NAME = re.compile(r"step-(\d{8})")


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


def _sync(path: Path) -> None:
    """Have the operating system put a file or folder on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(
    run_dir: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    *,
    keep_last: int | None,
    ranks: Ranks,
) -> Path:
    """Save a checkpoint, make it visible by one rename, then drop the oldest.

    Args:
        run_dir: The run's folder, shared by all ranks.
        model: Sharded.
        optimizer: Its optimizer.
        state: What else belongs to the step.
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
    dcp_save({"model": weights, "optimizer": moments}, checkpoint_id=aside)
    if ranks.is_main:
        (aside / "state.json").write_text(json.dumps(asdict(state), indent=1))
        for file in aside.iterdir():
            _sync(file)
        _sync(aside)
        aside.rename(final)
        _sync(final.parent)
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
    try:
        dcp_load(whole, checkpoint_id=folder)
    except Exception as error:  # torch wraps every rank's own error in one without a common type
        raise CheckpointError(
            str(folder), str(error).splitlines()[0], "the weights and moments of this model",
            "Remove this checkpoint to go on from the one before, or choose another run_dir.",
        ) from error  # fmt: skip
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
    """Load a checkpoint's weights alone into a plain model of one process.

    Args:
        folder: A complete checkpoint.
        model: Not sharded.

    Raises:
        CheckpointError: If its contents do not fit the model.
    """
    weights = model.state_dict()
    try:
        with warnings.catch_warnings():  # torch remarks that there is no process group; there is to be none
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp_load({"model": weights}, checkpoint_id=folder, no_dist=True)
    except Exception as error:  # see load
        raise CheckpointError(str(folder), str(error).splitlines()[0], "the weights of this model") from error
    model.load_state_dict(weights)
