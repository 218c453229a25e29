"""What `weights=` names, and how it is read: a run, a folder in Hugging Face's layout, or a hub name.

    RUN  RUN@200  RUN@best     a run's newest checkpoint, that of step 200, that of the lowest validation loss
    RUN@NAME                   one that bears a name, such as epoch-1
    FOLDER                     with config.json and safetensors, exported or downloaded
    OWNER/NAME[@REVISION]      the same on the hub, where no folder here bears that name

Training begins from them, chat and export read them; all three by this file. A run's checkpoint is compared with its
manifest before it is used, and is not pruned while it is. Knows files and one process, or a model that is already
sharded; which process downloads is its caller's.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch

from data import DataError, Tokenizer
from data.tokenizer import named_chatml
from magnum_train import checkpoint
from magnum_train.config import ModelConfig, TokenizerConfig, TokenizerFileConfig, TrainConfig, from_yaml
from magnum_train.errors import CheckpointError, ConfigError
from magnum_train.metrics import validation_losses
from magnum_train.optim import parameter_dtype
from model import Transformer, TransformerConfig
from model.config import parameter_shapes
from model.hf import HFFolder, check_same_network, load_hf

ORIGIN = "weights.json"
"""A run's record of the weights that it began from."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tekken.json")
_MODEL_FILES = ("config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class Weights:
    """Weights that are here: a run's checked byte for byte, others as far as their headers go.

    A run's checkpoint is not pruned until they are closed, by `with`, or forgotten.

    Args:
        name: What they are, exactly: a run and its step, a folder, or a hub name and its commit.
        place: What `find` opens again without asking the hub.
        folder: Where they lie.
        config: The network's shape.
        max_positions: Longest context that they are known for, in tokens.
        vocabulary: Folder of their tokenizer.
        dtype: That they have where they lie.
        hf: The opened folder; None for a run's checkpoint.
        lock: Keeps the checkpoint from being pruned.
    """

    name: str
    place: str
    folder: Path
    config: TransformerConfig
    max_positions: int
    vocabulary: Path
    dtype: torch.dtype
    hf: HFFolder | None
    lock: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.lock.close()

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
        """Copy them into a model, plain or sharded. A run's are read with collectives, so all ranks call.

        Args:
            model: Of the same network; its parameters keep their dtype and device.
            new_rows: Whether its vocabulary may be larger than a folder's; the further rows become 0.

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

    def fingerprint(self) -> str:
        """Tells these weights from others of the same shape, on another host: the last norm, which every step moves."""
        norm = self.read("norm.weight", torch.float32).numpy().tobytes()
        return hashlib.sha256(repr(self.config).encode() + norm).hexdigest()

    def had_chatml(self, tokenizer: Tokenizer, path: str | None) -> bool:
        """Whether both ChatML tokens bore these ids before this run, so that somebody trained them.

        Args:
            tokenizer: The run's.
            path: Its file where one is set; asked where no vocabulary lies beside the weights.

        Raises:
            DataError: The vocabulary is not one.
        """
        places = [self.vocabulary, *([Path(path).expanduser()] if path else [])]
        named = next((ids for place in places if (ids := named_chatml(place)) is not None), None)
        return named == (tokenizer.im_start_id, tokenizer.im_end_id)


def find(weights: str, key: str, *, verify: bool = True) -> Weights:
    """Open what a setting names; downloads what is on the hub.

    Args:
        weights: As above.
        key: The setting, for messages.
        verify: Whether to read a run's checkpoint through and compare it with its manifest; another process of the host
            may have done so.

    Raises:
        CheckpointError: There is no such thing, or it is incomplete or damaged.
    """
    if not weights.strip():
        raise CheckpointError(key, "nothing", "a run, a folder or a hub name")
    weights = str(Path(weights).expanduser()) if weights.startswith("~") else weights
    try:
        run = _as_run(weights)
    except OSError as error:
        raise CheckpointError(key, f"{weights[:80]}: {error.strerror}", "a run, a folder or a hub name") from error
    if run is not None:
        return _of_run(*run, key, verify)
    folder, name = fetch(weights, key)
    try:
        hf = HFFolder(folder)
    except ValueError as error:
        raise CheckpointError.of(error) from error
    positions = hf.fields.get("max_position_embeddings")
    if not isinstance(positions, int) or positions < 1:
        raise CheckpointError(
            f"{folder / 'config.json'}: max_position_embeddings", repr(positions), "the longest context, in tokens"
        )
    return Weights(name, str(folder), folder, hf.config, positions, folder, hf.dtype, hf)


def _as_run(weights: str) -> tuple[Path, str | None] | None:
    """A run's folder and what stands behind its @; None where this names no run."""
    for path, asked in ((weights, None), weights.rpartition("@")[::2]):
        folder = Path(path)
        if path and (folder / "config.yaml").is_file() and not (folder / "config.json").is_file():
            return folder, asked
    return None


def _of_run(run_dir: Path, asked: str | None, key: str, verify: bool) -> Weights:
    """The weights of a run's checkpoint, which is not pruned from here on."""
    settings = from_yaml(run_dir / "config.yaml")
    positions = max(read_origin(run_dir).get("max_positions", 0), settings.data.pack_tokens)
    with contextlib.ExitStack() as held:  # closes the lock where what follows fails
        found, place = _locked(run_dir, asked, key, held)
        if verify and (wrong := checkpoint.check(found.folder, _PARTS)):
            others = [other for other in reversed(_saved(run_dir)) if other.step != found.step]
            good = next((other for other in others if checkpoint.check(other.folder, _PARTS) is None), None)
            raise CheckpointError(
                str(found.folder), f"a damaged checkpoint ({wrong})", "what its manifest says",
                f"{run_dir}@{good.step} is whole." if good else "The run has no other that is whole.",
            )  # fmt: skip
        checkpoint.read_state(found.folder)  # refuses another version's format
        return Weights(
            name=place if place.endswith(f"@{found.step}") else f"{place} (step {found.step})",
            place=place,
            folder=found.folder,
            config=settings.model.transformer(),
            max_positions=positions,
            vocabulary=run_dir,
            dtype=parameter_dtype(settings.precision) if found.complete else torch.bfloat16,
            hf=None,
            lock=held.pop_all(),
        )


_PARTS = ("weights/", "state.json")
"""Of a checkpoint, what is read here."""


@dataclass(frozen=True, order=True)
class _Saved:
    """A checkpoint of a run; of one step, the complete one comes after that of weights alone."""

    step: int
    complete: bool
    folder: Path


def _saved(run_dir: Path) -> list[_Saved]:
    """A run's checkpoints of both kinds, ascending."""
    whole = [_Saved(step, True, checkpoint.path_of(run_dir, step)) for step in checkpoint.steps(run_dir)]
    alone = [
        _Saved(step, False, checkpoint.path_of(run_dir, step, alone=True)) for step in checkpoint.weights_only(run_dir)
    ]
    return sorted(whole + alone)


def _locked(run_dir: Path, asked: str | None, key: str, held: contextlib.ExitStack) -> tuple[_Saved, str]:
    """The checkpoint that is asked for, kept from being pruned until `held` is closed; and what always names it.

    One that is pruned while it is being looked for is looked for again, since then the newest is another.
    """
    gone: _Saved | None = None
    while True:
        found, place = _choose(run_dir, asked, key)
        try:
            held.enter_context(checkpoint.reading(found.folder))
            return found, place
        except CheckpointError:
            if found == gone:
                checkpoint.read_state(found.folder)  # one of an older format has no manifest to lock, and says so here
                raise
            gone = found


def _choose(run_dir: Path, asked: str | None, key: str) -> tuple[_Saved, str]:
    """The checkpoint that is asked for: the newest, or by its step, its name, or `best`; and what always names it."""
    there = _saved(run_dir)
    fitting, found = there, f"no checkpoint {run_dir}{'' if asked is None else '@' + asked}"
    by_name = asked is not None and asked != "best" and not asked.isdecimal()
    if asked == "best":
        losses = validation_losses(run_dir)
        measured = [one for one in there if one.step in losses]
        fitting = sorted(measured, key=lambda one: (-losses[one.step], -one.step, one.complete))
        found = f"no validation loss for a checkpoint of {run_dir}"
    elif by_name:
        folder = checkpoint.named(run_dir).get(str(asked))
        fitting = [one for one in there if one.folder == folder]
    elif asked is not None:
        fitting = [one for one in there if one.step == int(asked)]
    if not fitting:
        steps, names = dict.fromkeys(one.step for one in there), checkpoint.named(run_dir)
        listed = f"one of the run's steps: {', '.join(map(str, steps))}" if there else "one; the run has none yet"
        raise CheckpointError(key, found, listed + (f"; or a name: {', '.join(names)}" if names else ""))
    return fitting[-1], f"{run_dir}@{asked if by_name else fitting[-1].step}"


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
    path = Path(weights)
    if path.parent.name == "checkpoints" and (path.parent.parent / "config.yaml").is_file():
        run_dir, step = path.parent.parent, path.name.rpartition("-")[2].lstrip("0")
        raise CheckpointError(key, f"{weights}, a checkpoint inside a run", "the run", f"Name it {run_dir}@{step}.")
    if path.is_dir():
        return path, weights
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", weights)
    expected = "a run's folder, one with config.json and safetensors, or the hub's OWNER/NAME"
    if match is None or _holds_runs(Path(path.parts[0])):  # a typo in a run's name is nobody's model
        raise CheckpointError(key, f"{weights}, a file" if path.is_file() else f"no folder {weights}", expected)
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


def _holds_runs(folder: Path) -> bool:
    """Whether runs lie in a folder."""
    return folder.is_dir() and any((entry / "config.yaml").is_file() for entry in folder.iterdir())


def open_tokenizer(settings: TokenizerConfig | TokenizerFileConfig, beside: Path | None) -> Tokenizer:
    """The tokenizer that is set, or the one beside the weights.

    Args:
        settings: Path, slots.
        beside: Folder of the weights' own.

    Raises:
        DataError: There is none, or it has no ChatML control tokens and no slots were named.
    """
    path = Path(settings.path).expanduser() if settings.path else beside
    assert path is not None
    append = isinstance(settings, TokenizerConfig) and settings.append
    return Tokenizer.from_file(
        path, im_start_slot=settings.im_start_slot, im_end_slot=settings.im_end_slot, append=append
    )


def vocabulary(settings: TrainConfig, recorded: Path | None, beside: Path | None) -> Tokenizer | None:
    """The tokenizer of a training run; None where one is to be trained.

    Args:
        settings: The run's.
        recorded: Folder of the run that goes on, whose own tokenizer serves where its origin is not read or is gone.
        beside: Folder of the weights' own tokenizer, where they are here; else it is fetched.

    Raises:
        CheckpointError: The weights are not there.
        DataError: The tokenizer is not there or has no control tokens.
    """
    own = recorded / "tokenizer.json" if recorded is not None else None
    path, weights = settings.tokenizer.path, settings.model.weights
    origin_is_read = (path is None and weights is None) or (path is not None and Path(path).expanduser().exists())
    if own is not None and own.is_file() and not origin_is_read:
        return Tokenizer.from_file(own)
    if path is not None or beside is not None:
        return open_tokenizer(settings.tokenizer, beside)
    if weights is None:
        return None
    run = _as_run(weights)
    folder = run[0] if run else fetch(weights, "model.weights", tokenizer_alone=True)[0]
    return open_tokenizer(settings.tokenizer, folder)


def architecture(asked: ModelConfig, found: Weights, at_least: int = 0) -> ModelConfig:
    """The model's settings with what was left to the weights taken from them.

    Args:
        asked: Null fields are filled in.
        found: The weights.
        at_least: Rows of the vocabulary that the tokenizer needs, where it may grow.

    Raises:
        ConfigError: A field that is set differs, or a run's vocabulary would have to grow.
    """
    theirs = vars(found.config) | {"vocab_size": max(found.config.vocab_size, at_least)}
    filled = replace(asked, **{name: theirs[name] for name in theirs if getattr(asked, name) is None})
    try:
        check_same_network(filled.transformer(), found.config, f"model of {found.name}", new_rows=at_least > 0)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError.of(error) from error
    if found.hf is None and filled.transformer().vocab_size != found.config.vocab_size:
        raise ConfigError(
            "model.vocab_size", f"{filled.vocab_size:,}", f"{found.config.vocab_size:,}, as in {found.name}",
            "To let the vocabulary of a run grow, export it and begin from the folder.",
        )  # fmt: skip
    return filled


def load_model(found: Weights, tokenizer: TokenizerFileConfig, *, dtype: str) -> tuple[Transformer, Tokenizer]:
    """A model on one device, ready to answer, and its tokenizer.

    Args:
        found: The weights.
        tokenizer: Where the weights' own is not the one to use, or lacks control tokens.
        dtype: "float32", "bfloat16", or "auto": bfloat16 on a GPU, float32 on a CPU, where it is faster.

    Raises:
        CheckpointError: They cannot be read.
        DataError: There is no such tokenizer.
    """
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


def origin_text(found: Weights, rows: Mapping[str, Any]) -> str:
    """What a run's folder records of its beginning, as JSON.

    Args:
        found: The weights.
        rows: What `embeddings.mend` says that it did.
    """
    record = {
        "weights": found.name,
        "fingerprint": found.fingerprint(),
        "network": dataclasses.asdict(found.config),
        "max_positions": found.max_positions,
        "control_rows": rows,
    }
    return json.dumps(record, indent=1, ensure_ascii=False)


def read_origin(run_dir: Path) -> dict[str, Any]:
    """What `origin_text` recorded; empty for a run that began from random weights.

    Raises:
        CheckpointError: The file is there and cannot be read.
    """
    file = run_dir / ORIGIN
    if not file.is_file():
        return {}
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(str(file), str(error), "what the run began from") from error
    if not isinstance(record, dict):
        raise CheckpointError(str(file), type(record).__name__, "what the run began from, an object")
    return record
