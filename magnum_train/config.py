"""Every setting once: type, default, unit, reason. And the one place that knows Hydra.

`conf/*.yaml` and the command line go in, a frozen `TrainConfig` comes out. Below `verb` nobody sees Hydra or
OmegaConf; each part receives its own section. Values that follow from settings (steps, accumulation) are not
settings: they are worked out in `train.py` and printed at start.
"""

import ast
import dataclasses
import difflib
import functools
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import shutil
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_type_hints

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data import DataError
from data.chatml import EncodeOptions
from data.gates import Rules
from data.loader import LOSS_NORMS
from data.packing import PACKINGS
from data.sources import SourceConfig
from magnum_train.distributed import ElsewhereError, HostError, launch
from magnum_train.errors import CheckpointError, ConfigError, LostRankError, UserError
from magnum_train.fp8 import RECIPES
from magnum_train.recompute import layer_modes
from model import TransformerConfig

Schema = TypeVar("Schema")
CONF = Path(__file__).resolve().parent.parent / "conf"
_GROUPS = ("experiment", "model", "data", "era")
PRECISIONS = ("auto", "float32", "bf16_mixed", "bf16_split", "bf16_stochastic")


def _choice(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(key, repr(value), "one of " + ", ".join(allowed))


def _above(key: str, value: float | None, bound: float, *, equal: bool = False) -> None:
    if value is not None and (not math.isfinite(value) or value < bound or (value == bound and not equal)):
        raise ConfigError(key, str(value), f"{'at least' if equal else 'more than'} {bound}")


@dataclass(frozen=True)
class ModelConfig:
    """The weights to begin from, the architecture (Mistral's names), and the attention kernel.

    With `weights`, their config.json decides the architecture: fields that are null are taken from it, others must
    agree with it. `model=from_weights` leaves all of them null.
    """

    weights: str | None = None
    """A folder in Hugging Face's layout, a hub name (owner/name or owner/name@revision), or a run (RUN, RUN@200,
    RUN@NAME, RUN@best); null begins from random weights."""
    dim: int | None = None
    """Width of the residual stream."""
    n_layers: int | None = None
    """Number of transformer blocks."""
    n_heads: int | None = None
    """Query heads."""
    n_kv_heads: int | None = None
    """Key-value heads; each serves n_heads / n_kv_heads query heads."""
    head_dim: int | None = None
    """Width of one head. Given, never derived: Nemo's 128 is not 5120 / 32."""
    hidden_dim: int | None = None
    """Width of the feed-forward layer."""
    vocab_size: int | None = None
    """Rows of the embedding and output matrices; at least the tokenizer's vocabulary."""
    norm_eps: float | None = 1e-5
    """Added to the mean square in RMSNorm."""
    rope_theta: float | None = 1_000_000.0
    """Base of the rotary wavelengths; Nemo's is a million, for long contexts."""
    attention: str = "auto"
    """Attention kernel: auto, sdpa, varlen, varlen_fa3, varlen_fa4, cudnn or flash_attn. On a GPU each is checked at
    start, and auto takes the fastest of those that are right, a resumed run the one that it began with."""

    def transformer(self) -> TransformerConfig:
        """The architecture alone, checked."""
        names = [f.name for f in dataclasses.fields(TransformerConfig)]
        if unset := [f"model.{name}" for name in names if getattr(self, name) is None]:
            remedy = f"Set {unset[0]}, choose a model (model=nemo_12b), or give model.weights."
            raise ConfigError(", ".join(unset), "nothing", "a value, or weights to take it from", remedy)
        try:
            return TransformerConfig(**{name: getattr(self, name) for name in names})
        except ValueError as error:
            raise ConfigError.of(error) from error


@dataclass(frozen=True)
class TokenizerConfig:
    """Text to ids."""

    path: str | None = None
    """A tokenizer.json, a Tekken file, or a folder with one; null takes the one beside the weights, and without weights
    trains a byte-level BPE on the training conversations."""
    vocab_size: int | None = 2048
    """Entries of the trained vocabulary; read only where one is trained. null forbids that."""
    im_start_slot: int | None = None
    """Reserved id that becomes <|im_start|> where the file has none; null means 14 for a Tekken file."""
    im_end_slot: int | None = None
    """Reserved id that becomes <|im_end|>; null means 15 for a Tekken file."""
    append: bool = False
    """Add <|im_start|> and <|im_end|> as new ids, where the file has neither them nor reserved ones; matrices grow."""

    def __post_init__(self) -> None:
        if self.append and not (self.im_start_slot is None and self.im_end_slot is None):
            raise ConfigError("tokenizer.append", "true, and a slot", "one of the two", "Slots need no new ids.")


@dataclass(frozen=True)
class TokenizerFileConfig:
    """Which tokenizer goes with weights that are there already."""

    path: str | None = None
    """A tokenizer.json, a Tekken file, or a folder with one; null takes the one beside the weights."""
    im_start_slot: int | None = None
    """Reserved id that becomes <|im_start|> where the file has none; null means 14 for a Tekken file."""
    im_end_slot: int | None = None
    """Reserved id that becomes <|im_end|>; null means 15 for a Tekken file."""


@dataclass(frozen=True)
class DataConfig:
    """Which conversations, what of them is trained, and how they are packed."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Sources by name; see `data/sources.py` for what one holds."""
    pack_tokens: int = 8192
    """Tokens of a pack. A micro-batch is one pack."""
    pack_documents: int = 128
    """Most conversations in a pack; fixes the shape of cu_seqlens."""
    packing: str = "best_fit"
    """best_fit fills packs; next_fit takes conversations as they come, as trainers did in 2024."""
    max_tokens: int | None = None
    """Most tokens of a conversation; null means pack_tokens, which is the most there can be."""
    too_long: str = "drop"
    """What happens to longer ones: drop, cut_turns (at the last trained turn's end that fits), or error."""
    default_system: str | None = None
    """System message of conversations that have none; a source may set its own. null adds none."""
    deduplicate: str = "none"
    """none, exact (same roles and texts) or near (exact, and similar texts); within and across sources, the first
    stays. Whatever is chosen, a conversation that validates does not train."""
    near_threshold: float = 0.8
    """Similarity (estimated Jaccard index of word shingles) from which conversations are near duplicates; the
    system message, letter case and punctuation do not count."""
    newline_in_content: bool = False
    """Encode the newline after the role's name with the content and give it the content's weight, as in 2024; otherwise
    it is part of the header, which is not trained."""
    train_closing_newline: bool = False
    """Give the newline after <|im_end|> the content's weight, as in 2024. No server ever asks the model for it."""
    prepared_dir: str = "prepared"
    """Folder of tokenised data, one sub-folder per content; may be copied to another machine."""
    max_loss_share: float = 0.1
    """Share of a source's rows that may be unusable, too long or without weight before the run refuses to start."""
    streaming: bool = False
    """Tokenise in the course of training, for sources that do not fit on the disk; needs train.max_steps and a
    tokenizer that is there already."""
    stream_documents: int = 10_000
    """Conversations from which a step's packs are chosen when streaming: more fill better and mix better. Fewer wait
    where a source would stand there twice."""

    def __post_init__(self) -> None:
        _above("data.pack_tokens", self.pack_tokens, 2, equal=True)
        _above("data.pack_documents", self.pack_documents, 1, equal=True)
        _above("data.stream_documents", self.stream_documents, 1, equal=True)
        _choice("data.packing", self.packing, PACKINGS)
        if not 0 <= self.max_loss_share <= 1:
            raise ConfigError("data.max_loss_share", str(self.max_loss_share), "a share from 0 to 1")
        _above("data.max_tokens", self.max_tokens, 2, equal=True)
        if self.max_tokens is not None and self.max_tokens > self.pack_tokens:
            found = f"{self.max_tokens:,}"
            raise ConfigError("data.max_tokens", found, f"at most data.pack_tokens = {self.pack_tokens:,}")
        self.rules(seed=0)

    @property
    def encoding(self) -> EncodeOptions:
        """What of a conversation is trained."""
        return EncodeOptions(
            newline_in_content=self.newline_in_content, train_closing_newline=self.train_closing_newline
        )

    def rules(self, seed: int) -> Rules:
        """What decides, beside a source's own settings, what a row becomes.

        Args:
            seed: The run's; decides which rows are drawn.
        """
        try:
            return Rules(
                max_tokens=self.pack_tokens if self.max_tokens is None else self.max_tokens,
                seed=seed,
                too_long=self.too_long,
                default_system=self.default_system,
                deduplicate=self.deduplicate,
                near_threshold=self.near_threshold,
                options=self.encoding,
            )
        except ValueError as error:
            place, _, rest = str(error).partition(" is ")
            raise ConfigError(f"data.{place}", *rest.split("; expected ", 1)) from error


@dataclass(frozen=True)
class StepConfig:
    """The optimizer step and the length of the run."""

    tokens_per_step: int = 1_048_576
    """Tokens of a step over all ranks, padding included; a multiple of data.pack_tokens. 128 packs of 8,192."""
    epochs: int = 2
    """Passes over the data; the horizon of the run unless max_steps is set. magnum-v2-12b: 2."""
    max_steps: int | None = None
    """Optimizer steps; overrides epochs. The learning rate's horizon follows it."""
    loss_norm: str = "tokens"
    """What the step's loss is a mean over: tokens, sequences, or micro_batch_2024 (mean of means over packs)."""
    max_grad_norm: float | None = 1.0
    """Gradients are scaled down to this global L2 norm; null leaves them."""
    max_skipped_steps: int = 10
    """Updates refused, in the whole run, before it stops with an error; see guard."""
    max_minutes: float | None = None
    """Minutes after which a start saves and ends, for the next one to go on; for queues with a time limit."""
    threads: int | None = None
    """CPU threads of a process; null shares the host's cores among its processes (torchrun alone sets one)."""
    deterministic: bool = False
    """Deterministic kernels, so that a resumed run is bit-identical on a GPU too; the start says what attention's cost.
    CPU runs always are."""
    export_at_end: bool = False
    """At the end, write the last checkpoint as a folder that servers load, in bfloat16: RUN/exports/step-…"""
    collect_garbage_every_steps: int = 100
    """Python's collector is off and runs on all ranks at these steps: a collection on one stalls them all."""

    def __post_init__(self) -> None:
        _choice("train.loss_norm", self.loss_norm, LOSS_NORMS)
        _above("train.tokens_per_step", self.tokens_per_step, 1, equal=True)
        _above("train.epochs", self.epochs, 1, equal=True)
        _above("train.max_steps", self.max_steps, 1, equal=True)
        _above("train.max_grad_norm", self.max_grad_norm, 0)
        _above("train.max_skipped_steps", self.max_skipped_steps, 0, equal=True)
        _above("train.max_minutes", self.max_minutes, 0)
        _above("train.threads", self.threads, 1, equal=True)
        _above("train.collect_garbage_every_steps", self.collect_garbage_every_steps, 1, equal=True)


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer, and the learning rate as a function of the step."""

    name: str = "adamw"
    """adamw; adamw8bit, torchao's, to compare with; or the dotted name of a class of torch's form, called with groups
    of parameters, lr and options. One that does not obey `found_inf` makes the host wait once a step."""
    moments: str = "float32"
    """How adamw stores its two moments: float32, bf16, or int8 (codes of 8 bits, an exponent for each 256 of a row).
    What is less than float32 is rounded by chance, reproducibly; norms have float32 moments in any case."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of adamw8bit or of the named class, recorded with the run: +optim.options.NAME=VALUE."""
    lr: float = 1e-5
    """Peak learning rate. Nemo's neighbours used 5e-6 to 1e-5 for full-parameter tuning."""
    schedule: str = "cosine"
    """cosine, linear, constant, or wsd (warm-up, stable, linear decay)."""
    warmup_ratio: float = 0.03
    """Share of all steps in which the rate rises linearly from near zero."""
    min_lr_ratio: float = 0.1
    """The rate at the last step, as a share of the peak (cosine, linear, wsd)."""
    decay_ratio: float = 0.2
    """Share of all steps in which wsd decays; read by wsd alone."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment; below Adam's 0.999 since runs are short."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled decay, per unit of learning rate. Short fine-tunes seldom gain from it."""
    decay_all: bool = False
    """Decay norms and embeddings too; they are spared otherwise."""

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "adamw8bit") and "." not in self.name:
            raise ConfigError("optim.name", repr(self.name), "adamw, adamw8bit, or a class such as torch.optim.SGD")
        _choice("optim.moments", self.moments, ("float32", "bf16", "int8"))
        if self.name == "adamw" and self.options:
            raise ConfigError("optim.options", ", ".join(self.options), "nothing, with optim.name=adamw")
        if self.name != "adamw" and self.moments != "float32":
            raise ConfigError("optim.moments", self.moments, "float32, with an optimizer that has moments of its own")
        _choice("optim.schedule", self.schedule, ("cosine", "linear", "constant", "wsd"))
        _above("optim.lr", self.lr, 0)
        _above("optim.eps", self.eps, 0)
        _above("optim.weight_decay", self.weight_decay, 0, equal=True)
        for name in ("warmup_ratio", "min_lr_ratio", "decay_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"optim.{name}", str(getattr(self, name)), "a share from 0 to 1")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optim.{name}", str(getattr(self, name)), "from 0 to below 1")


@dataclass(frozen=True)
class ParallelConfig:
    """How the model lies on the ranks."""

    replicate: int = 1
    """Copies of the sharded model; ranks = replicate x shard. 1 shards over all ranks."""
    sequence: int = 1
    """Ranks that train a pack together, each on its part of the tokens, for conversations too long for one; divides the
    key-value heads, the ranks of a replica and data.pack_tokens. 1: each rank has packs of its own."""
    activation_checkpointing: str = "none"
    """none keeps all activations; lean computes all but matrix products and attention again in the backward, mlp also
    the feed-forward's two wide products, full the whole block. "mlp:12,lean": 12 layers mlp, the rest lean. auto takes
    the least that fits into a GPU's memory, by the formula of `budget.py`; on a CPU none."""
    compile: bool | None = None
    """Compile the blocks, one graph for all of them; takes a minute at start. null: on a GPU, where attention is varlen
    or flash_attn."""
    fp8: str = "none"
    """Make the blocks' matrix products in 8-bit floating point, through torchao: tensorwise scales each matrix, rowwise
    each of its rows. Other numbers than without, on Ada, Hopper and newer GPUs."""
    reshard_after_forward: bool = True
    """Free a block's gathered weights after its forward; false trades memory for one all-gather less."""

    def __post_init__(self) -> None:
        try:
            if self.activation_checkpointing != "auto":
                layer_modes(self.activation_checkpointing)
        except ValueError as error:
            raise ConfigError.of(error) from error
        _above("parallel.replicate", self.replicate, 1, equal=True)
        _above("parallel.sequence", self.sequence, 1, equal=True)
        _choice("parallel.fp8", self.fp8, RECIPES)


@dataclass(frozen=True)
class ValidationConfig:
    """Validation loss, per source, over a fixed set of packs."""

    every_steps: int | None = 50
    """Steps between validations; there is one at the end as well. null: never."""

    def __post_init__(self) -> None:
        _above("validation.every_steps", self.every_steps, 1, equal=True)


@dataclass(frozen=True)
class SamplesConfig:
    """Replies to fixed prompts in the course of training, shown as text in TensorBoard."""

    every_steps: int | None = None
    """Steps between samples; there is one at the end as well. null: never."""
    prompts: str = "shipped:held_out.jsonl"
    """JSONL of {"prompt": …, "system": …}; `shipped:` names a file that comes with the project."""
    max_prompts: int = 3
    """How many of the file's prompts are answered."""
    max_new_tokens: int = 96
    """Longest reply, in tokens."""
    temperature: float = 0.0
    """0 takes the likeliest token."""

    def __post_init__(self) -> None:
        _above("samples.every_steps", self.every_steps, 1, equal=True)
        _above("samples.max_prompts", self.max_prompts, 1, equal=True)
        _above("samples.max_new_tokens", self.max_new_tokens, 1, equal=True)
        _above("samples.temperature", self.temperature, 0, equal=True)


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved, and which checkpoints stay. There is one at the end as well."""

    every_steps: int | None = 200
    """Steps between checkpoints; null: none by steps."""
    every_minutes: float | None = None
    """Minutes between checkpoints, by rank 0's clock; null: none by time."""
    every_epochs: int | None = None
    """Epochs between checkpoints that are kept under the name epoch-N; null: none by epochs."""
    pin: dict[str, int] = field(default_factory=dict)
    """Steps after which a checkpoint is saved and kept under a name: +checkpoint.pin.NAME=STEP."""
    pinned_weights_only: bool = False
    """Checkpoints with a name hold weights alone, in bfloat16: a sixth of the size, to chat with and to export, not to
    go on from."""
    keep_last: int | None = 3
    """Newest checkpoints that stay; null keeps all."""
    keep_every_steps: int | None = None
    """Checkpoints of steps that this divides stay too; null: none for that reason."""
    keep_best: int = 1
    """Checkpoints of the lowest validation loss that stay too, of those whose step was validated."""
    asynchronous: bool = True
    """Write while training goes on; needs a copy of weights and moments in the hosts' memory. false: training waits."""
    timeout_seconds: int = 3600
    """Longest time of one save, before the run ends with an error."""

    def __post_init__(self) -> None:
        _above("checkpoint.every_steps", self.every_steps, 1, equal=True)
        _above("checkpoint.every_minutes", self.every_minutes, 0)
        _above("checkpoint.every_epochs", self.every_epochs, 1, equal=True)
        _above("checkpoint.keep_last", self.keep_last, 1, equal=True)
        _above("checkpoint.keep_every_steps", self.keep_every_steps, 1, equal=True)
        _above("checkpoint.keep_best", self.keep_best, 0, equal=True)
        _above("checkpoint.timeout_seconds", self.timeout_seconds, 1, equal=True)
        for name, step in self.pin.items():
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]*", name) or name == "best" or name.startswith("epoch-"):
                expected = "a letter, then letters, digits, - . _; not best, and not epoch-N, which epochs bear"
                raise ConfigError(f"checkpoint.pin.{name}", repr(name), expected)
            if not isinstance(step, int) or isinstance(step, bool) or step < 1:
                raise ConfigError(f"checkpoint.pin.{name}", repr(step), "a step, at least 1")


@dataclass(frozen=True)
class GuardConfig:
    """What happens when numbers go wrong. What decides is the same on all ranks, and is saved with the run."""

    nonfinite: str = "skip"
    """A loss or gradient norm that is not finite: skip refuses the update; roll_back goes back to the newest checkpoint
    and leaves the step out on the way."""
    spike: str = "warn"
    """A loss or gradient norm far above its recent values: warn says so and applies the update; skip and roll_back."""
    spike_deviations: float = 10.0
    """How far above the median counts as a spike, in standard deviations (estimated from the median deviation)."""
    window: int = 100
    """Applied steps whose loss and gradient norm are looked back on; nothing is a spike before there are 20."""
    step_over: int = 1
    """Steps left out after a roll-back, the last of them the one that went wrong. 1 helps against a broken machine,
    more also against updates whose harm showed late."""
    max_roll_backs: int = 3
    """Roll-backs without a checkpoint beyond the step that went wrong, before the run stops with an error."""
    compare_replicas_every_steps: int | None = None
    """Steps between comparisons of the weights over the copies of the model; needs parallel.replicate of 2 or more."""

    def __post_init__(self) -> None:
        _choice("guard.nonfinite", self.nonfinite, ("skip", "roll_back"))
        _choice("guard.spike", self.spike, ("warn", "skip", "roll_back"))
        _above("guard.spike_deviations", self.spike_deviations, 0)
        _above("guard.window", self.window, 20, equal=True)
        _above("guard.step_over", self.step_over, 1, equal=True)
        _above("guard.max_roll_backs", self.max_roll_backs, 0, equal=True)
        _above("guard.compare_replicas_every_steps", self.compare_replicas_every_steps, 1, equal=True)


@dataclass(frozen=True)
class MetricsConfig:
    """What is measured beside the loss."""

    peak_tflops: float | None = None
    """Peak of one device, TFLOP/s, for MFU; null takes the known peak of the GPU, and leaves MFU null elsewhere."""

    def __post_init__(self) -> None:
        _above("metrics.peak_tflops", self.peak_tflops, 0)


@dataclass(frozen=True)
class ProfileConfig:
    """A closer look at chosen steps."""

    steps: list[int] = field(default_factory=list)
    """Steps whose profiler trace (and, on a GPU, memory snapshot) rank 0 writes to the run's profile folder."""


@dataclass(frozen=True)
class DistributedConfig:
    """The process group."""

    timeout_seconds: int = 600
    """Longest wait for another rank. One that hangs is found at three quarters of it, one that is gone at a quarter."""

    def __post_init__(self) -> None:
        _above("distributed.timeout_seconds", self.timeout_seconds, 1, equal=True)


@dataclass(frozen=True)
class ReportConfig:
    """Settings that `python -m magnum_train.report` alone reads."""

    out: str = "report.html"
    """The page to write."""
    samples: int = 2
    """Conversations of each kind (random, longest, shortest, oddest) that are shown of each source."""
    tokens: int = 2000
    """Most tokens that are shown of one conversation; a longer one is cut in its middle."""

    def __post_init__(self) -> None:
        _above("report.samples", self.samples, 0, equal=True)
        _above("report.tokens", self.tokens, 1, equal=True)


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a run."""

    run_dir: str | None = None
    """The run's folder; null makes it from the experiment's name and the overrides, under runs/."""
    seed: int = 1
    """Seeds initial weights, the order of data and the packing, each by a stream of its own."""
    precision: str = "auto"
    """float32; or with bf16 compute: bf16_mixed, float32 masters; bf16_split, the same masters, half of each being the
    bf16 parameter; bf16_stochastic, no masters, rounded by chance. auto: bf16_mixed on a GPU, else float32."""
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: StepConfig = field(default_factory=StepConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

    def __post_init__(self) -> None:
        _above("seed", self.seed, 0, equal=True)
        _choice("precision", self.precision, PRECISIONS)
        masters = ("auto", "float32", "bf16_mixed")
        knows = {"adamw": PRECISIONS, "adamw8bit": (*masters, "bf16_stochastic")}.get(self.optim.name, masters)
        _choice(f"precision, with optim.name={self.optim.name}", self.precision, knows)
        if self.tokenizer.path is None and self.model.weights is None and self.tokenizer.vocab_size is None:
            raise ConfigError(
                "tokenizer.path", "nothing", "a tokenizer.json or a Tekken file",
                "Give tokenizer.path=FILE, or model.weights=FOLDER with one in it.",
            )  # fmt: skip
        if self.data.streaming:
            self._check_streaming()
        if self.guard.compare_replicas_every_steps is not None and self.parallel.replicate == 1:
            raise ConfigError(
                "guard.compare_replicas_every_steps", "a number, with parallel.replicate=1",
                "at least two copies of the model to compare", "Set parallel.replicate, or leave this null.",
            )  # fmt: skip
        if self.data.pack_tokens % self.parallel.sequence:
            parts = -(-self.data.pack_tokens // self.parallel.sequence)
            raise ConfigError(
                "data.pack_tokens", f"{self.data.pack_tokens:,}",
                f"a multiple of parallel.sequence = {self.parallel.sequence}",
                f"Try data.pack_tokens={parts * self.parallel.sequence}.",
            )  # fmt: skip
        if self.optim.name == "adamw8bit" and self.checkpoint.asynchronous:
            raise ConfigError(
                "checkpoint.asynchronous",
                "true, with optim.name=adamw8bit",
                "false",
                "Its states cannot be copied aside.",
            )
        if self.tokenizer.append and self.model.weights is None:
            raise ConfigError("tokenizer.append", "true without model.weights", "weights whose matrices are to grow")
        if self.train.tokens_per_step % self.data.pack_tokens:
            raise ConfigError(
                "train.tokens_per_step",
                f"{self.train.tokens_per_step:,}",
                f"a multiple of data.pack_tokens = {self.data.pack_tokens:,}",
                f"Try train.tokens_per_step={self.data.pack_tokens * (self.packs_per_step + 1)}.",
            )

    def _check_streaming(self) -> None:
        if self.train.max_steps is None:
            raise ConfigError("train.max_steps", "nothing", "a number of steps, with data.streaming: no end is known")
        if self.tokenizer.path is None and self.model.weights is None:
            raise ConfigError("tokenizer.path", "nothing", "a tokenizer, with data.streaming: none can be trained")
        if self.data.deduplicate != "none":
            raise ConfigError("data.deduplicate", repr(self.data.deduplicate), "none, with data.streaming")
        if self.data.packing != "best_fit":
            remedy = "era=axolotl_2024 sets it; add data.packing=best_fit."
            raise ConfigError("data.packing", repr(self.data.packing), "best_fit, with data.streaming", remedy)

    @property
    def packs_per_step(self) -> int:
        """Packs of a full step, over all ranks."""
        return self.train.tokens_per_step // self.data.pack_tokens


@dataclass(frozen=True)
class ChatConfig:
    """Settings of `python -m magnum_train.chat`. Without a prompt of any kind it is a conversation at the terminal."""

    weights: str = MISSING
    """A run (RUN, RUN@200, RUN@NAME, RUN@best), a folder in Hugging Face's layout, or a hub name."""
    prompt: str | None = None
    """One user message, literally: what stands behind the = needs no quotes but the shell's."""
    prompt_file: str | None = None
    """A file with one user message, or - for standard input; a newline at its end is not part of it."""
    system: str | None = None
    """System message, literally as well."""
    prompts: str | None = None
    """JSONL of {"prompt": …, "system": …}, answered one by one; `shipped:` names a file of the project."""
    max_prompts: int | None = None
    """How many of the file's prompts are answered; null answers all."""
    max_new_tokens: int = 256
    """Longest reply, in tokens."""
    temperature: float = 0.0
    """0 takes the likeliest token; 1 samples from the model's own distribution."""
    top_p: float = 1.0
    """Samples from the smallest set of tokens that holds this much probability."""
    repetition_penalty: float = 1.0
    """Logits of tokens that have occurred are divided by it (multiplied where negative); 1 leaves them."""
    seed: int = 1
    """Seed of the sampling."""
    dtype: str = "auto"
    """float32 or bfloat16; auto: bfloat16 on a GPU, else float32."""
    tokenizer: TokenizerFileConfig = field(default_factory=TokenizerFileConfig)
    """Where the weights' own tokenizer is not the one to use, or lacks control tokens."""

    def __post_init__(self) -> None:
        _above("max_new_tokens", self.max_new_tokens, 1, equal=True)
        _above("temperature", self.temperature, 0, equal=True)
        _above("repetition_penalty", self.repetition_penalty, 0)
        _above("max_prompts", self.max_prompts, 1, equal=True)
        _above("seed", self.seed, 0, equal=True)
        _choice("dtype", self.dtype, ("auto", "float32", "bfloat16"))
        if not 0 < self.top_p <= 1:
            raise ConfigError("top_p", str(self.top_p), "more than 0 and at most 1")
        given = [name for name in ("prompt", "prompt_file", "prompts") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(given[0], " and ".join(given), "one of them")
        if self.prompts is not None and self.system is not None:
            raise ConfigError("system", "a text beside prompts", "one in each of their rows")


@dataclass(frozen=True)
class ExportConfig:
    """Settings of `python -m magnum_train.export`."""

    weights: str = MISSING
    """A run (RUN, RUN@200, RUN@NAME, RUN@best), a folder in Hugging Face's layout, or a hub name."""
    out: str = MISSING
    """The folder to write; must not exist."""
    dtype: str = "bfloat16"
    """bfloat16 as published and served, float32 (a run's masters themselves), or float16."""
    max_shard_gb: float = 5.0
    """Most gigabytes (1e9 bytes) of a file. So much is held in memory, and beside it one rank's part of a tensor."""
    tokenizer: TokenizerFileConfig = field(default_factory=TokenizerFileConfig)
    """Where the weights' own tokenizer is not the one to use, or lacks control tokens."""

    def __post_init__(self) -> None:
        _choice("dtype", self.dtype, ("bfloat16", "float16", "float32"))
        _above("max_shard_gb", self.max_shard_gb, 0)


RESUMABLE = (
    "run_dir", "model.attention", "data.prepared_dir", "data.max_loss_share", "data.sources.*.path",
    "data.sources.*.validation_path", "data.sources.*.revision", "data.sources.*.missing", "tokenizer.path",
    "train.max_steps", "train.epochs", "train.max_skipped_steps", "train.max_minutes", "train.threads",
    "train.collect_garbage_every_steps", "train.export_at_end", "parallel.*", "validation.*", "samples.*",
    "checkpoint.*", "guard.*", "metrics.*", "profile.*", "distributed.*", "report.*",
)  # fmt: skip
"""Settings that may differ when a run is resumed. Data and tokenizer are compared by content; files may move."""

_ALIASES = {
    "learning_rate": "optim.lr", "lr": "optim.lr", "weight_decay": "optim.weight_decay",
    "optimizer": "optim.name", "optim": "optim.name",
    "lr_scheduler": "optim.schedule", "lr_scheduler_type": "optim.schedule", "scheduler": "optim.schedule",
    "warmup_steps": "optim.warmup_ratio", "warmup_ratio": "optim.warmup_ratio", "warmup": "optim.warmup_ratio",
    "min_lr": "optim.min_lr_ratio", "adam_beta1": "optim.beta1", "adam_beta2": "optim.beta2",
    "num_epochs": "train.epochs", "num_train_epochs": "train.epochs", "epochs": "train.epochs",
    "max_steps": "train.max_steps", "steps": "train.max_steps",
    "micro_batch_size": "train.tokens_per_step", "batch_size": "train.tokens_per_step",
    "per_device_train_batch_size": "train.tokens_per_step", "global_batch_size": "train.tokens_per_step",
    "gradient_accumulation_steps": "train.tokens_per_step",
    "sequence_len": "data.pack_tokens", "max_seq_length": "data.pack_tokens", "max_length": "data.pack_tokens",
    "seq_len": "data.pack_tokens", "context_length": "data.pack_tokens",
    "output_dir": "run_dir", "save_dir": "run_dir", "dataset": "data.sources", "datasets": "data.sources",
    "max_grad_norm": "train.max_grad_norm", "gradient_clipping": "train.max_grad_norm",
    "save_steps": "checkpoint.every_steps", "save_total_limit": "checkpoint.keep_last",
    "eval_steps": "validation.every_steps", "gradient_checkpointing": "parallel.activation_checkpointing",
    "sequence_parallel_degree": "parallel.sequence", "context_parallel_size": "parallel.sequence",
    "torch_compile": "parallel.compile", "compile": "parallel.compile", "fp8": "parallel.fp8",
    "bf16": "precision", "dtype": "precision", "attn_implementation": "model.attention",
    "flash_attention": "model.attention", "dataset_prepared_path": "data.prepared_dir",
    "base_model": "model.weights", "model_name_or_path": "model.weights", "pretrained": "model.weights",
}  # fmt: skip
"""What people know a setting as from other trainers."""


def setting_keys(schema: type) -> Iterator[str]:
    """Every dotted key of a schema, a source's own keys under `data.sources.NAME`."""
    hints = get_type_hints(schema)
    for f in dataclasses.fields(schema):
        kind = hints[f.name]
        yield f.name
        if dataclasses.is_dataclass(kind):
            yield from (f"{f.name}.{key}" for key in setting_keys(cast(type, kind)))
        for inner in get_args(kind):
            if dataclasses.is_dataclass(inner):
                yield from (f"{f.name}.NAME.{key}" for key in setting_keys(cast(type, inner)))


def nearest_keys(unknown: str, schema: type) -> list[str]:
    """The settings that the writer of an unknown key may have meant, likeliest first."""
    named = re.match(r"data\.sources\.([^.]+)\.", unknown)
    every = list(setting_keys(schema))
    leaves = [key for key in every if not any(other.startswith(f"{key}.") for other in every)]
    keys = [key.replace("NAME", named[1] if named else "NAME") for key in leaves]
    last = unknown.rsplit(".", 1)[-1]
    found = [_ALIASES[name] for name in (unknown, last) if _ALIASES.get(name) in every]
    found += [key for key in keys if key.rsplit(".", 1)[-1] == last]
    found += difflib.get_close_matches(unknown, keys, n=3, cutoff=0.6)
    by_last = {key.rsplit(".", 1)[-1]: key for key in keys}
    found += [by_last[name] for name in difflib.get_close_matches(last, by_last, n=2, cutoff=0.75)]
    return list(dict.fromkeys(found))[:3]


def _unknown(key: str, schema: type) -> ConfigError:
    """The answer to a key that no setting has."""
    if key == "experiment" or key.startswith("experiment."):
        hint = "Put `# @package _global_` on the first line of the experiment's file."
        return ConfigError(key, "a setting inside `experiment`", "settings at the root", hint)
    near = nearest_keys(key, schema)
    remedy = f"Did you mean {' or '.join(near)}?" if near else ""
    return ConfigError(key, "an unknown setting", "one of the settings in magnum_train/config.py", remedy)


def _as_user_error(error: Exception, schema: type) -> ValueError | None:
    """Hydra's and OmegaConf's complaint about a setting, in our form; None where it is not about one."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    ours = next((e for e in chain if isinstance(e, (UserError, DataError))), None)
    if ours is not None:
        return ours
    choice = re.search(r"Could not find '(.+)/(.+)'.*?Available options in '[^']*':\s*(.*)", str(error), re.DOTALL)
    if choice:
        return ConfigError(choice[1], repr(choice[2]), "one of " + ", ".join(choice[3].split("\nConfig")[0].split()))
    folder = re.search(r"Additional config directory '(.*)' not found", str(error))
    if folder:
        return ConfigError("--config-dir", folder[1], "a folder that is there")
    if isinstance(error, ValueError) and "Config group override" in str(error):
        asked = next((w for w in sys.argv[1:] if w.split("=")[0].lstrip("+") in _GROUPS), "command line")
        return ConfigError(asked, str(error), "the name of a file in that group; leave it out for none")
    if not isinstance(error, (HydraException, OmegaConfBaseException)):
        return None
    text = "\n".join(str(e) for e in chain)
    if "hydra/launcher" in text and "Could not load" in text:
        remedy = "pip install -c constraints.txt '.[slurm]'"
        return ConfigError("hydra/launcher", "a launcher that is not installed", "the extra for it", remedy)
    omega = next((e for e in chain if isinstance(e, OmegaConfBaseException)), None)
    key = str(getattr(omega, "full_key", None) or "")
    unknown = re.search(r"Key '([^']+)' (?:is )?not in|Could not override '([^']+)'", text)
    if unknown and "could not be converted" not in text:
        key = key or next(name for name in unknown.groups() if name)
        return _unknown(key, schema)
    if "could not be converted" in text or "Incompatible value" in text or "Invalid type" in text:
        return ConfigError(key or "setting", str(omega).splitlines()[0], "a value of the setting's type")
    if "Missing mandatory value" in text:
        return ConfigError(key, "nothing", "a value", f"Add {key}=… to the command line.")
    if omega is not None and key:
        return ConfigError(key, str(omega).splitlines()[0], "a value of the setting's type")
    merging = re.search(r"Error merging override \+*([^=\s]+)=(\S*)", text)
    if merging:
        found = str(omega).splitlines()[0] if omega is not None else merging[2]
        return ConfigError(merging[1], found, "a value of the setting's type")
    lines = [" ".join(line.split()) for line in str(error).strip().splitlines() if line.strip()]
    lines = lines[: next((i for i, line in enumerate(lines) if line.startswith("Config search path")), 4)]
    return ConfigError("command line", " ".join(lines), "an override that Hydra can read (key=value)")


@functools.cache
def _composable(schema: type) -> type:
    """A frozen schema without its freeze: OmegaConf would make frozen nodes read-only, and compose nothing."""
    hints, fields = get_type_hints(schema), []
    for f in dataclasses.fields(schema):
        kind = hints[f.name]
        default: dict[str, Any] = {"default": f.default, "default_factory": f.default_factory}
        if dataclasses.is_dataclass(kind):
            kind = _composable(cast(type, kind))
            default["default_factory"] = kind
        elif dataclasses.is_dataclass((get_args(kind) or (None,))[-1]):
            kind = dict[str, Any]  # Hydra cannot add to a typed one key by key; `_entry` checks instead
        fields.append((f.name, kind, field(**default)))
    return dataclasses.make_dataclass(schema.__name__, fields)


def _freeze(kind: Any, value: Any, place: str = "", root: type | None = None) -> Any:
    """Plain containers, as composed, to the frozen objects of a schema, which check themselves."""
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints, root = get_type_hints(kind), root or cast(type, kind)
        for name in value.keys() - hints.keys():  # a + on the command line adds any key
            raise _unknown(f"{place}{name}", root)
        return cast(type, kind)(**{k: _freeze(hints[k], inner, f"{place}{k}.", root) for k, inner in value.items()})
    entry = (get_args(kind) or (None,))[-1]
    if isinstance(value, dict) and dataclasses.is_dataclass(entry):
        return {name: _entry(cast(type, entry), inner, f"{place}{name}") for name, inner in value.items()}
    return value


def _entry(schema: type, value: Any, place: str) -> Any:
    """One entry of a map by name, checked against its schema."""
    if not isinstance(value, dict):
        raise ConfigError(place, repr(value), "settings such as path and form", f"Try {place}.path={value}.")
    try:
        node = OmegaConf.merge(OmegaConf.structured(_composable(schema)), value)
        return _frozen(schema, node)
    except OmegaConfBaseException as error:
        error.full_key = f"{place}.{error.full_key}" if error.full_key else place
        raise


def _frozen(schema: type[Schema], node: Any) -> Schema:
    # The text "???" is OmegaConf's sign for a missing value; where nothing is mandatory, somebody has typed it.
    typed = {key: "???" for key in _TEXTS if OmegaConf.is_missing(node, key)}
    if typed:
        node = OmegaConf.merge(node, dict.fromkeys(typed))
    found = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    return cast(Schema, _freeze(schema, cast(dict[str, Any], found) | typed))


def register() -> None:
    """Store the schemas so that `conf/*.yaml` can name them."""
    schemas = (("train_schema", TrainConfig), ("chat_schema", ChatConfig), ("export_schema", ExportConfig))
    for name, schema in schemas:
        ConfigStore.instance().store(name=name, node=_composable(schema))


_TEXTS = ("prompt", "system")
_PATHS = ("weights", "out", "prompts", "prompt_file", "model.weights", "tokenizer.path")


def _overrides(line: list[str]) -> list[str]:
    """A command line as Hydra can read it.

    A key of a source is set the same way whether the files name it or not; free text is quoted, so that any text that a
    shell can pass arrives as it is.

    Raises:
        ConfigError: A word is not UTF-8.
    """
    for word in line:
        if re.search("[\ud800-\udfff]", word):  # how Python holds bytes that are no text
            key, equals, _ = word.partition("=")
            place = key if equals and key.isprintable() else "command line"
            raise ConfigError(place, "bytes that are not UTF-8", "text in UTF-8", "Check the terminal's encoding.")
    before = ""
    for word in line:
        if "=" not in word and not word.startswith(("-", "~")) and not before.startswith("-"):
            remedy = f"Did you mean weights={word}?" if Path(word).exists() else ""
            raise ConfigError("command line", repr(word), "settings as key=value", remedy)
        before = word
    return [_quoted(re.sub(r"^\+*(?=data\.sources\.[^.=]+\.)", "++", word)) for word in line]


def _quoted(word: str) -> str:
    """An override whose value is free text, in Hydra's quotes; any other word unchanged.

    A text is literal, whatever it holds. A path that is quoted already is left as it is, null means none, and in a
    setting of training ${…} is Hydra's and a comma makes a sweep.
    """
    key, equals, text = word.partition("=")
    name = key.lstrip("+")
    if not equals or name not in _TEXTS + _PATHS:
        return word
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if name in _PATHS and (quoted or text in ("", "null") or ("." in name and "," in text)):
        return word
    if "." not in name:  # for OmegaConf: no interpolation; backslashes count only before one
        text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    text = re.sub(r"(\\*)'", r"\1\1\'", text)  # for Hydra: backslashes count only before a quote
    text = re.sub(r"(\\+)\Z", r"\1\1", text)
    return f"{key}='{text}'"


def default_run_dir(experiment: str | None, overrides: list[str]) -> str:
    """`runs/`, the experiment's name, and a suffix from the overrides that is equal on all ranks.

    The suffix names the changed settings in short and ends in four digits of a digest of all of them, so that
    two lines share a folder only if they ask for the same run.
    """
    kept = sorted(o.lstrip("+") for o in overrides if not re.match(r"\+*(experiment|run_dir|report[.]|hydra[./])", o))
    name = experiment or "run"
    if not kept:
        return f"runs/{name}"
    short = "_".join(o.split("=", 1)[0].rsplit(".", 1)[-1] + "_" + o.split("=", 1)[-1] for o in kept)
    short = re.sub(r"[^A-Za-z0-9._+-]", "_", short)[:40]  # nothing that Hydra's grammar would stumble over
    return f"runs/{name}-{short}-{hashlib.sha256(chr(10).join(kept).encode()).hexdigest()[:4]}"


@functools.cache
def _field_docs() -> dict[tuple[str, str], str]:
    """What stands below each field of a settings class, by class and field: its meaning, as one line."""
    docs = {}
    for file in (Path(__file__), Path(str(inspect.getsourcefile(SourceConfig)))):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.ClassDef):
                continue
            for at, below in itertools.pairwise(node.body):
                if not (isinstance(at, ast.AnnAssign) and isinstance(at.target, ast.Name)):
                    continue
                if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                    docs[node.name, at.target.id] = " ".join(str(below.value.value).split())
    return docs


def _described(schema: type, prefix: str = "") -> Iterator[str]:
    """Each setting of a schema with its default and its meaning."""
    hints = get_type_hints(schema)
    for f in dataclasses.fields(schema):
        kind, doc = hints[f.name], _field_docs().get((schema.__name__, f.name), "")
        inner = next((k for k in (kind, *get_args(kind)) if dataclasses.is_dataclass(k)), None)
        if inner is not None:
            yield from _described(cast(type, inner), f"{prefix}{f.name}." + ("" if inner is kind else "NAME."))
            continue
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        required = default is dataclasses.MISSING or default == MISSING
        shown = str(default).lower() if isinstance(default, bool) else "null" if default is None else str(default)
        yield f"  {prefix}{f.name}={'VALUE' if required else shown}"
        yield textwrap.fill(doc, 110, initial_indent="      ", subsequent_indent="      ")


def help_text(program: str, schema: type) -> str:
    """What --help prints: every setting, its default and its meaning."""
    lines = [f"python -m {program} KEY=VALUE …", "", str(inspect.getdoc(schema)), ""]
    end: list[str] = []
    if schema is TrainConfig:
        choices = {group: sorted(file.stem for file in (CONF / group).glob("*.yaml")) for group in _GROUPS}
        lines += [f"  {group}={'|'.join(names)}" for group, names in choices.items()]
        lines.append("      Files of settings in conf/, model=tiny and data=shipped where none is named.")
        lines += ["      They win over the defaults below, and the command line wins over them.", ""]
        end = ["", "--cfg job prints the settings as composed; --multirun sweeps over values between commas."]
    return "\n".join([*lines, *_described(schema), *end])


def verb(run: Callable[[Schema], bool | None], schema: type[Schema], config_name: str) -> None:
    """Run a program under Hydra: compose, turn into frozen objects, call, and end as users expect.

    Args:
        run: Takes the composed configuration; what it returns is False where a sweep is not to go on.
        schema: Its type, a frozen dataclass of this file.
        config_name: The root file in `conf/`.

    A `UserError` ends in its message on rank 0 and status 2 on all; anything else in a traceback and status 1.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        if launch().rank == 0:
            spec = run.__globals__["__spec__"]  # None where the file itself was started
            try:
                print(help_text(spec.name if spec else f"magnum_train.{Path(sys.argv[0]).stem}", schema), flush=True)
            except BrokenPipeError as error:  # `--help | head`
                _end(error, schema)
        return
    register()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors to us instead of printing them its own way

    def job(node: DictConfig) -> None:
        # Hydra would note an error, go on with a sweep's next job and raise at its end; the other ranks of a
        # failed job would wait for it meanwhile. So a job that fails ends the process here.
        try:
            config = _frozen(schema, node)
            if isinstance(config, TrainConfig) and config.run_dir is None:
                choices, overrides = HydraConfig.get().runtime.choices, HydraConfig.get().overrides.task
                folder = default_run_dir(choices.get("experiment"), list(overrides))
                config = cast(Schema, dataclasses.replace(config, run_dir=folder))
            goes_on = run(config)
        except (Exception, KeyboardInterrupt) as error:
            _end(error, schema, scratch)
        if goes_on is False:
            raise SystemExit(0)

    with tempfile.TemporaryDirectory() as scratch:
        # Hydra wants to write a sweep's folder on every rank; ours are the run folders, so it gets a scratch one.
        OmegaConf.register_new_resolver("scratch", lambda: scratch, replace=True)  # named in conf/*.yaml
        try:
            sys.argv[1:] = _overrides(sys.argv[1:])
            hydra.main(config_path=str(CONF), config_name=config_name, version_base="1.3")(job)()
        except (Exception, KeyboardInterrupt) as error:
            _end(error, schema)


def _end(error: BaseException, schema: type, scratch: str = "") -> None:
    """Say what went wrong, once, and leave with the status that fits.

    Args:
        error: What went wrong.
        schema: The program's settings.
        scratch: A folder that is to be gone.
    """
    if isinstance(error, BrokenPipeError):  # nobody listens any more; the interpreter must not try again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    if isinstance(error, KeyboardInterrupt):
        if launch().rank == 0:
            goes_on = "; the same command starts it again" if schema is TrainConfig else ""
            print(f"\ninterrupted{goes_on}", file=sys.stderr)
        raise SystemExit(130) from None
    known = _as_user_error(error, schema) if isinstance(error, Exception) else None
    if known is None or isinstance(known, LostRankError):
        if known is None:  # a lost rank has been told of already, by one of the others
            traceback.print_exception(error)
        if launch().world_size > 1:
            # Threads may wait in collectives for a rank that is gone; taking the interpreter down around them aborts.
            shutil.rmtree(scratch, ignore_errors=True)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
        raise SystemExit(1) from None
    if not isinstance(known, ElsewhereError) and (launch().rank == 0 or isinstance(known, HostError)):
        print(f"error: {known}", file=sys.stderr, flush=True)
    else:
        time.sleep(3)  # torchrun ends all ranks when the first one exits: let it be the one that speaks
    raise SystemExit(2) from None


def compose(overrides: list[str]) -> TrainConfig:
    """The training configuration for a list of overrides, for programs and tests that have no command line."""
    register()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            return _frozen(TrainConfig, hydra.compose("config", overrides=_overrides(overrides)))
        except Exception as error:
            known = _as_user_error(error, TrainConfig)
            if known is None:
                raise
            raise known from error


def to_yaml(config: Any) -> str:
    """A configuration as YAML text, complete."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def from_yaml(path: Path) -> TrainConfig:
    """A run's recorded configuration; settings that have since been added take their defaults.

    Raises:
        CheckpointError: It cannot be read as one.
    """
    try:
        read = OmegaConf.load(path)
        return _frozen(TrainConfig, OmegaConf.merge(OmegaConf.structured(_composable(TrainConfig)), read))
    except Exception as error:  # whatever a file can hold; YAML's own errors have no base that OmegaConf names
        said = str(error).strip().splitlines()
        raise CheckpointError(str(path), said[0] if said else type(error).__name__, "a run's settings") from error


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key to value, for comparing two configurations and for TensorBoard's table."""
    out: dict[str, Any] = {}
    items = config.items() if isinstance(config, dict) else vars(config).items()
    for name, value in items:
        if dataclasses.is_dataclass(value) or isinstance(value, dict):
            out |= flat(value, f"{prefix}{name}.")
        else:
            out[f"{prefix}{name}"] = value
    return out


def differences(old: TrainConfig, new: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Settings that differ and may not when a run is resumed: key to (recorded, asked)."""
    a, b = _lasting(old), _lasting(new)
    return {key: (a.get(key), b.get(key)) for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)}


def settings_digest(settings: TrainConfig) -> str:
    """Tells runs apart whose settings differ where they may not when a run is resumed; sixteen hexadecimal digits.

    Settings that stand at their default do not count, so that a new one does not make old checkpoints strange.
    """
    default = flat(TrainConfig())
    said = {key: value for key, value in _lasting(settings).items() if key not in default or value != default[key]}
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _lasting(settings: TrainConfig) -> dict[str, Any]:
    """Dotted key to value of the settings that may not change when a run is resumed."""
    free = [re.compile(re.escape(pattern).replace(r"\*", ".*") + "$") for pattern in RESUMABLE]
    return {key: value for key, value in flat(settings).items() if not any(pattern.match(key) for pattern in free)}
