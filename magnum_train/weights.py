"""What `weights=` names, and how it is read: a run, a folder in Hugging Face's layout, or a hub name.

    RUN  RUN@200  RUN@best     a run's newest checkpoint, that of step 200, that of the lowest validation loss
    FOLDER                     with config.json and safetensors, exported or downloaded
    OWNER/NAME[@REVISION]      the same on the hub, where no folder here bears that name

Training begins from them, chat and export read them; all three by this file. Knows files and one process, or a model
that is already sharded; which process downloads is its caller's.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from data import DataError, Tokenizer
from magnum_train import checkpoint
from magnum_train.config import ModelConfig, TokenizerConfig, TrainConfig, from_yaml
from magnum_train.errors import CheckpointError, ConfigError
from model import Transformer, TransformerConfig
from model.config import parameter_shapes
from model.hf import HFFolder, load_hf

ORIGIN = "weights.json"
"""A run's record of the weights that it began from."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tekken.json")
_MODEL_FILES = ("config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class Weights:
    """Weights that are here, checked as far as their headers go.

    Args:
        name: What they are, exactly: a run and its step, a folder, or a hub name and its commit.
        folder: Where they lie.
        config: The network's shape.
        max_positions: Longest context that they are known for, in tokens.
        vocabulary: Folder of their tokenizer.
        hf: The opened folder; None for a run's checkpoint.
    """

    name: str
    folder: Path
    config: TransformerConfig
    max_positions: int
    vocabulary: Path
    hf: HFFolder | None

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """One parameter, whole, rounded to `dtype`, on the CPU; for one process alone.

        Raises:
            CheckpointError: It cannot be read.
        """
        if self.hf is None:
            return checkpoint.read_weight(self.folder, name, parameter_shapes(self.config)[name], dtype)
        try:
            return self.hf.read(name).to(dtype)
        except ValueError as error:
            raise CheckpointError.of(error) from error

    def fill(self, model: Transformer, *, new_rows: bool = False) -> None:
        """Copy them into a model, plain or sharded; where sharded, all ranks call.

        Args:
            model: Of the same network; its parameters keep their dtype and device.
            new_rows: Whether its vocabulary may be larger; the further rows become 0.

        Raises:
            CheckpointError: They cannot be read, or do not fit.
        """
        if self.hf is None:
            checkpoint.load_weights(self.folder, model)
            return
        try:
            load_hf(model, self.hf, new_rows=new_rows)
        except ValueError as error:
            raise CheckpointError.of(error) from error


def find(weights: str, key: str) -> Weights:
    """Open what a setting names; downloads what is on the hub.

    Args:
        weights: As above.
        key: The setting, for messages.

    Raises:
        CheckpointError: There is no such thing, or it is incomplete.
    """
    run = _as_run(weights)
    if run is not None:
        run_dir, asked = run
        step = _step(run_dir, asked, key)
        settings = from_yaml(run_dir / "config.yaml")
        origin = read_origin(run_dir)
        positions = int(origin.get("max_positions") or settings.data.pack_tokens)
        folder = checkpoint.path_of(run_dir, step)
        name = f"{run_dir}@{step}"
        return Weights(name, folder, settings.model.transformer(), positions, run_dir, None)
    folder, name = fetch(weights, key)
    try:
        hf = HFFolder(folder)
    except ValueError as error:
        raise CheckpointError.of(error) from error
    positions = int(hf.fields.get("max_position_embeddings") or 0)
    if positions < 1:
        raise CheckpointError(
            str(folder / "config.json"), f"max_position_embeddings {hf.fields.get('max_position_embeddings')}",
            "the longest context, in tokens",
        )  # fmt: skip
    return Weights(name, folder, hf.config, positions, folder, hf)


def _as_run(weights: str) -> tuple[Path, str | None] | None:
    """A run's folder and what stands behind its @; None where this names no run."""
    for path, asked in ((weights, None), weights.rpartition("@")[::2]):
        if path and (Path(path) / "config.yaml").is_file():
            return Path(path), asked
    return None


def _step(run_dir: Path, asked: str | None, key: str) -> int:
    """The step of the checkpoint that is asked for: the newest, a number, or `best`."""
    there = checkpoint.steps(run_dir)
    listed = f"one of the run's steps: {', '.join(map(str, there)) or 'none'}"
    if asked == "best":
        losses = _validation_losses(run_dir)
        measured = [step for step in there if step in losses]
        if not measured:
            raise CheckpointError(key, f"no validation loss for a checkpoint of {run_dir}", "one", "Name a step.")
        return min(measured, key=lambda step: losses[step])
    step = int(asked) if asked and asked.isdecimal() else there[-1] if asked is None and there else None
    if step is None or step not in there:
        raise CheckpointError(key, f"no checkpoint {run_dir}{'' if asked is None else '@' + asked}", listed)
    return step


def _validation_losses(run_dir: Path) -> dict[int, float]:
    """Validation loss by step, from the run's metrics."""
    file = run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return {row["step"]: row["validation_loss"] for row in rows if row.get("validation_loss") is not None}


def fetch(weights: str, key: str, *, tokenizer_alone: bool = False) -> tuple[Path, str]:
    """A folder in Hugging Face's layout, downloaded where it is named by the hub.

    Args:
        weights: A folder, or OWNER/NAME[@REVISION].
        key: The setting, for messages.
        tokenizer_alone: Whether the weights themselves may be left out of a download.

    Returns:
        The folder, and its exact name.

    Raises:
        CheckpointError: There is neither a folder nor a model of that name.
    """
    if Path(weights).is_dir():
        return Path(weights), weights
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", weights)
    expected = "a run's folder, one with config.json and safetensors, or the hub's OWNER/NAME"
    if match is None:
        raise CheckpointError(key, f"no folder {weights}", expected)
    from huggingface_hub import snapshot_download  # slow to import

    files = [*_TOKENIZER_FILES, *(() if tokenizer_alone else _MODEL_FILES)]
    try:
        folder = Path(snapshot_download(match[1], revision=match[2], allow_patterns=files))
    except (OSError, ValueError) as error:  # whatever the hub or the way to it answers
        said = " ".join(str(error).split())
        raise CheckpointError(
            key, f"no folder {weights} here, and from the hub: {said[:300]}", expected,
            "A private or gated model needs `hf auth login`; a machine without a network needs a folder.",
        ) from error  # fmt: skip
    return folder, f"{match[1]}@{folder.name}"


def open_tokenizer(settings: TokenizerConfig, beside: Path | None) -> Tokenizer:
    """The tokenizer that is set, or the one beside the weights.

    Args:
        settings: Path, slots.
        beside: Folder of the weights' own.

    Raises:
        DataError: There is none, or it has no ChatML control tokens and no slots were named.
    """
    path = settings.path or beside
    assert path is not None
    return Tokenizer.from_file(
        path, im_start_slot=settings.im_start_slot, im_end_slot=settings.im_end_slot, append=settings.append
    )


def vocabulary(settings: TrainConfig, recorded: Path | None) -> Tokenizer | None:
    """The tokenizer of a training run; None where one is to be trained.

    Args:
        settings: The run's.
        recorded: Folder of the run that goes on, whose own tokenizer then serves; None for a new one.

    Raises:
        DataError: It is not there or has no control tokens.
    """
    if settings.tokenizer.path is not None:
        return open_tokenizer(settings.tokenizer, None)
    if settings.model.weights is None:
        return None
    if recorded is not None and (recorded / "tokenizer.json").is_file():
        return Tokenizer.from_file(recorded / "tokenizer.json")
    run = _as_run(settings.model.weights)
    beside = run[0] if run else fetch(settings.model.weights, "model.weights", tokenizer_alone=True)[0]
    return open_tokenizer(settings.tokenizer, beside)


def architecture(asked: ModelConfig, found: TransformerConfig, at_least: int = 0) -> ModelConfig:
    """The model's settings with what was left to the weights taken from them.

    Args:
        asked: Null fields are filled in.
        found: The weights'.
        at_least: Rows of the vocabulary that the tokenizer needs, where it may grow.

    Raises:
        ConfigError: A field that is set differs; names each.
    """
    theirs = vars(found) | {"vocab_size": max(found.vocab_size, at_least)}
    differing = [
        f"model.{name}={value} (in the weights {theirs[name]})"
        for name, value in vars(asked).items()
        if name in theirs and value is not None and value != theirs[name]
        and not (name == "vocab_size" and at_least and value >= found.vocab_size)
    ]  # fmt: skip
    if differing:
        raise ConfigError(
            "model", ", ".join(differing), f"the architecture of {asked.weights}",
            "Choose model=from_weights, which takes it from there.",
        )  # fmt: skip
    return replace(asked, **{name: theirs[name] for name in theirs if getattr(asked, name) is None})


def load_model(weights: str, tokenizer: TokenizerConfig, *, dtype: str) -> tuple[Transformer, Tokenizer]:
    """A model on one device, ready to answer, and its tokenizer.

    Args:
        weights: As above.
        tokenizer: Where the weights' own is not the one to use, or lacks control tokens.
        dtype: "float32", "bfloat16", or "auto": bfloat16 on a GPU, float32 on a CPU, where it is faster.

    Raises:
        CheckpointError: There are no such weights.
        DataError: There is no such tokenizer.
    """
    found = find(weights, "weights")
    words = open_tokenizer(tokenizer, found.vocabulary)
    if words.vocab_size > found.config.vocab_size:
        raise DataError(
            f"the tokenizer has {words.vocab_size:,} ids, {found.name} has {found.config.vocab_size:,} rows; "
            "expected no more ids than rows. Appended tokens are made by training with tokenizer.append=true"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    with torch.device("meta"):
        model = Transformer(found.config)
    model.to(getattr(torch, dtype)).to_empty(device=device)
    found.fill(model)
    return model.eval(), words


def write_origin(run_dir: Path, found: Weights, rows: Mapping[str, Any]) -> None:
    """Record in a run's folder what it began from, and what was set in it.

    Args:
        run_dir: The run's.
        found: The weights.
        rows: What `embeddings.mend` says that it did.
    """
    record = {
        "weights": found.name,
        "network": dataclasses.asdict(found.config),
        "max_positions": found.max_positions,
        "control_rows": rows,
    }
    (run_dir / ORIGIN).write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")


def read_origin(run_dir: Path) -> dict[str, Any]:
    """What `write_origin` recorded; empty for a run that began from random weights."""
    file = run_dir / ORIGIN
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return record
