"""What the GPU benchmark measures with: rounds in turn, floors, and the trainer's own parts put together."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from data import Example, PackedBatch
from data.batch import assemble
from magnum_train.budget import CARDS, USABLE, Card, Layout, memory, modes_that_fit, recipe
from magnum_train.distributed import Ranks
from magnum_train.optim import build_optimizer, parameter_dtype, stored_bytes
from magnum_train.parallelize import build
from magnum_train.recompute import layer_modes
from magnum_train.step import StepResult, train_step
from model import Transformer, TransformerConfig
from model.attention import BACKENDS, attention, choose_backend
from model.flops import parameter_count
from model.transformer import initial_std

WARMUP, ROUNDS, FEWEST = 3, 7, 5
"""Runs before the clock counts, runs that count, and how few of them will do where the time ends. On a CPU, which shows
no more than that all fits together, 1, 5 and 5."""
SLOTS = 128
"""Documents that a pack has room for, as `data.pack_documents` has it; fixes the shape of cu_seqlens."""
SEED = 0
DEPTHS = (40, 36, 32, 28, 24, 20, 16, 12, 10, 8, 6, 5, 4, 3, 2, 1)
"""Of networks with fewer layers, where the memory does not hold the whole one."""
ROOM = 0.97
"""Share of the card's memory that a network may be predicted to fill; CUDA's own context takes half a GB of it."""

NOT_REACHED = "time: the time given was used up before its turn"
RUNNING = "it was under way when the time was up or the process ended"

Row = dict[str, Any]


class OutOfTimeError(Exception):
    """The time given is used up; what was under way is not measured."""


class DeviceLostError(Exception):
    """The process can do nothing more on its GPU."""


@dataclass(frozen=True)
class Grid:
    """What is measured: a network, its packs and documents."""

    config: TransformerConfig
    packs: tuple[int, int]
    """Tokens of the usual pack and of the long one."""
    documents: tuple[int, ...]
    """Of attention alone."""
    attention_tokens: int
    """Of a pack for attention alone; a longer document makes a longer pack."""
    short: int
    """Tokens of a document in a pack of many."""


GRIDS = {
    "nemo": Grid(
        TransformerConfig(
            dim=5120, n_layers=40, n_heads=32, n_kv_heads=8, head_dim=128, hidden_dim=14336, vocab_size=131072
        ),
        (8192, 16384),
        (8192, 2048, 512, 32768, 1024, 4096, 16384),
        16384,
        2048,
    ),
    "tiny": Grid(
        TransformerConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=32, hidden_dim=96, vocab_size=512),
        (128, 256),
        (64, 128),
        128,
        32,
    ),
}


@dataclass(frozen=True)
class OptimizerSettings:
    """What `build_optimizer` reads. The rate of 0 lets an update do all its work and move nothing.

    So every row sees the same weights, and on the same pack all must agree on the loss.
    """

    name: str = "adamw"
    moments: str = "float32"
    options: dict[str, Any] = field(default_factory=dict)
    lr: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay_all: bool = False


@dataclass(frozen=True)
class Setup:
    """A way to train: a row of several tables."""

    precision: str
    moments: str
    mode: str
    """Of recomputation."""
    tokens: int
    document: int
    """Tokens of each document."""
    layers: int
    backend: str
    compiled: bool
    fp8: str = "none"

    def columns(self) -> Row:
        """What it is, as a row bears it."""
        return {
            "precision": self.precision, "moments": self.moments, "activation_checkpointing": self.mode,
            "pack_tokens": self.tokens, "document_length": self.document, "layers": self.layers,
            "attention": self.backend, "compiled": self.compiled, "fp8": self.fp8,
        }  # fmt: skip


@dataclass(frozen=True)
class Floor:
    """The least time that something can take, and what bounds it."""

    seconds: float
    bound: str

    @staticmethod
    def of(bench: "Bench", *, flops: float = 0.0, moved: float = 0.0) -> "Floor | None":
        """By the operations that must be done and the bytes that must be moved, whichever takes longer.

        Peaks are the card's data sheet (`magnum_train.budget.CARDS`), where it is known; else what was measured here.
        """
        peak, bandwidth = bench.peak, bench.bandwidth
        if not peak or not bandwidth:
            return None
        arithmetic, memory_time = flops / peak, moved / bandwidth
        if arithmetic >= memory_time:
            return Floor(arithmetic, f"{flops / 1e12:.4g} TFLOP at {peak / 1e12:.4g} TFLOP/s")
        return Floor(memory_time, f"{moved / 1e9:.4g} GB at {bandwidth / 1e9:,.0f} GB/s")


@dataclass
class Bench:
    """Where and how long is measured."""

    grid: Grid
    device: torch.device
    ranks: Ranks
    save: Callable[[], None]
    """Writes the record."""
    deadline: float = math.inf
    """Of the part under way, by `time.monotonic`."""
    ceilings: dict[str, float] = field(default_factory=dict)
    """Measured here: `copy` and `to_host` in bytes a second, `products` in operations a second."""
    layers: int | None = None
    """Depth that was asked for."""
    avoided: list[str] = field(default_factory=list)
    """Attention kernels that are being tried, or that have broken the device; in the record."""
    fastest: dict[int, str] = field(default_factory=dict)
    """Attention kernel by document length, once it has been measured."""

    @property
    def cuda(self) -> bool:
        """Whether there is a GPU."""
        return self.device.type == "cuda"

    @property
    def warmup(self) -> int:
        """Runs before the clock counts."""
        return WARMUP if self.cuda else 1

    @property
    def rounds(self) -> int:
        """Runs that count."""
        return ROUNDS if self.cuda else FEWEST

    @property
    def dtype(self) -> torch.dtype:
        """Of activations."""
        return torch.bfloat16 if self.cuda else torch.float32

    @property
    def card(self) -> Card | None:
        """The GPU's data sheet, where it is known. PCIe and NVL parts are others than SXM."""
        if not self.cuda:
            return None
        name = torch.cuda.get_device_name(self.device)
        if "PCIe" in name or "NVL" in name:
            return None
        key = {"H200": "h200_141gb", "H100": "h100_80gb", "A100": "a100_80gb"}
        return next((CARDS[value] for part, value in key.items() if part in name), None)

    @property
    def peak(self) -> float | None:
        """Operations a second."""
        return self.card.peak if self.card else self.ceilings.get("products")

    @property
    def bandwidth(self) -> float | None:
        """Bytes a second of the device's memory."""
        return self.card.bandwidth if self.card else self.ceilings.get("copy")

    def check(self, needed: float = 0.0) -> None:
        """Go on, or raise `OutOfTimeError` where fewer seconds than needed are left to this part."""
        if time.monotonic() + needed > self.deadline:
            raise OutOfTimeError

    def synchronize(self) -> None:
        """Wait for the device to finish."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        """Give back the memory that nothing holds any more, and count its peak anew."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_gib(self) -> float | None:
        """Most memory that tensors held since `free`; None on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) / 2**30 if self.cuda else None

    def held_gib(self) -> float | None:
        """Memory that tensors hold now."""
        return torch.cuda.memory_allocated(self.device) / 2**30 if self.cuda else None

    def timed(self, work: Callable[[], Any]) -> float:
        """Seconds from the first of the work's kernels to the end of the last; the device is idle before."""
        self.synchronize()
        if not self.cuda:
            begin = time.perf_counter()
            work()
            return time.perf_counter() - begin
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        work()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3

    def random(self, *shape: int, dtype: torch.dtype | None = None, seed: int = SEED, std: float = 1.0) -> Tensor:
        """Normal numbers."""
        generator = torch.Generator(self.device).manual_seed(seed)
        wide = torch.randn(*shape, generator=generator, device=self.device)
        return (wide * std).to(dtype or self.dtype)


def describe(error: BaseException) -> str:
    """An error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def device_is_lost(device: torch.device) -> bool:
    """Whether the process can do nothing more on its GPU: an illegal access there spoils the whole context."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
        torch.ones(1, device=device).item()
    except torch.cuda.OutOfMemoryError:
        return False
    except RuntimeError:
        return True
    return False


@contextmanager
def attempt(bench: Bench, *rows: Row) -> Iterator[None]:
    """Measure rows; where that cannot be done, its reason goes into them instead.

    Raises:
        DeviceLostError: The device is lost. Rows that are not to blame are left for a new process.
    """
    waiting = [row for row in rows if row["not_measured"] == NOT_REACHED]
    try:
        for row in waiting:
            row["not_measured"] = RUNNING  # what the record says if the process ends here
        bench.save()
        yield
        _mark_as(waiting, NOT_REACHED)  # what the body left out for lack of time
    except OutOfTimeError:
        _mark_as(waiting, NOT_REACHED)
    except DeviceLostError:
        _mark_as(waiting, NOT_REACHED)
        raise
    except Exception as error:  # of any kind: the other rows are worth having
        _mark_as(waiting, describe(error))
        if device_is_lost(bench.device):
            raise DeviceLostError from error
    finally:
        bench.save()


@contextmanager
def guarded(bench: Bench, row: Row) -> Iterator[None]:
    """Have a row bear the reason for which it, and nothing else, could not be measured.

    Raises:
        OutOfTimeError: The time is up, which is no fault of the row.
        DeviceLostError: The device is lost, and the row is to blame.
    """
    try:
        yield
    except OutOfTimeError:
        raise
    except Exception as error:  # of any kind
        row["not_measured"] = describe(error)
        if device_is_lost(bench.device):
            raise DeviceLostError from error


def _mark_as(rows: list[Row], reason: str) -> None:
    """Enter why those that are still under way were not measured."""
    for row in rows:
        if row["not_measured"] == RUNNING:
            row["not_measured"] = reason


def blank(**columns: Any) -> Row:
    """A row that is not measured yet."""
    return {**columns, "not_measured": NOT_REACHED}


def interleave(bench: Bench, runs: list[tuple[Row, Callable[[], dict[str, float]]]]) -> None:
    """Time several things in turn, round by round, so that what disturbs one disturbs all.

    Args:
        bench: Where.
        runs: Rows, and what gives their seconds by part; one that fails drops out, with its reason.

    Raises:
        OutOfTimeError: Fewer rounds than `FEWEST` could be made.
    """
    samples: list[list[dict[str, float]]] = [[] for _ in runs]
    failed: set[int] = set()
    for number in range(bench.warmup + bench.rounds):
        if number == bench.warmup + FEWEST and time.monotonic() > bench.deadline:
            break
        if number < bench.warmup + FEWEST:
            bench.check()
        for place, (row, run) in enumerate(runs):
            if place in failed:
                continue
            failed.add(place)
            with guarded(bench, row):
                found = run()
                failed.remove(place)
                if number >= bench.warmup:
                    samples[place].append(found)
    for place, (row, _) in enumerate(runs):
        if place not in failed:
            settle(row, samples[place])


def settle(row: Row, samples: list[dict[str, float]]) -> None:
    """Enter raw seconds and their medians into a row; the total is that of each round."""
    parts = list(samples[0])
    row["raw_seconds"] = {part: [sample[part] for sample in samples] for part in parts}
    for part in parts:
        row[f"{part}_ms"] = statistics.median(row["raw_seconds"][part]) * 1e3
    row["ms"] = statistics.median(sum(sample.values()) for sample in samples) * 1e3
    row["rounds"] = len(samples)
    row["not_measured"] = None


def against(row: Row, floor: Floor | None) -> None:
    """Enter a floor, and how many times as long was taken."""
    if floor is None or row["not_measured"]:
        return
    row["floor_ms"], row["floor_by"] = floor.seconds * 1e3, floor.bound
    row["gap"] = row["ms"] / row["floor_ms"] if floor.seconds else None


def relative_error(found: Tensor, exact: Tensor) -> float:
    """‖found - exact‖ / ‖exact‖; NaN and infinities stay what they are."""
    exact = exact.double()
    return float((found.double() - exact).norm() / exact.norm())


def random_pack(vocab_size: int, tokens: int, document: int) -> PackedBatch:
    """A full pack of random documents, every token but a document's first with weight 1.

    Args:
        vocab_size: Ids are drawn from 0 up to it.
        tokens: T.
        document: Tokens of each document; the last takes what remains.
    """
    generator = np.random.default_rng([SEED, tokens, document])
    documents = []
    for start in range(0, tokens, document):
        length = min(document, tokens - start)
        weights = np.ones(length, np.float32)
        weights[0] = 0
        documents.append(Example(generator.integers(vocab_size, size=length, dtype=np.int32), weights))
    return assemble(documents, tokens, SLOTS)


def admitted(bench: Bench) -> tuple[list[str], dict[str, str]]:
    """The attention kernels that run here, and those that do not, each with the reason."""
    names, refused = [], {}
    for name in BACKENDS:
        if name == "auto":
            continue
        try:
            names.append(choose_backend(name, bench.device.type, bench.dtype))
        except ValueError as error:
            refused[name] = str(error)
    return names, refused


class Heads:
    """Attention alone, at the network's heads: inputs, their upstream gradient, and its exact values.

    Args:
        bench: Where.
        tokens: T.
        document: Tokens of each document.
    """

    def __init__(self, bench: Bench, tokens: int, document: int) -> None:
        config = bench.grid.config
        self.bench, self.pack = bench, random_pack(config.vocab_size, tokens, document)
        self.bounds = self.pack.cu_seqlens.to(bench.device)
        self.slots = tuple(self.pack.cu_seqlens.diff().tolist())  # `sdpa` has them on the host, as within the network
        heads = (config.n_heads, config.n_kv_heads, config.n_kv_heads, config.n_heads)
        q, k, v, self.upstream = (bench.random(tokens, n, config.head_dim, seed=place) for place, n in enumerate(heads))
        self.inputs = [x.requires_grad_() for x in (q, k, v)]

    def run(self, backend: str) -> dict[str, float]:
        """Seconds of a forward and of a backward."""
        out: list[Tensor] = []
        forward = self.bench.timed(lambda: out.append(self._forward(self.inputs, backend)))
        backward = self.bench.timed(lambda: torch.autograd.grad(out[0], self.inputs, self.upstream))
        return {"forward": forward, "backward": backward}

    def _forward(self, inputs: list[Tensor], backend: str) -> Tensor:
        return attention(*inputs, self.bounds, self.pack.max_seqlen, backend, self.slots)

    def exact(self) -> list[Tensor]:
        """Output and gradients of queries, keys and values in float32, document by document.

        Keys are written out for every query head, for which torch has a kernel that does not hold all scores.
        """
        inputs = [x.detach().float().requires_grad_() for x in self.inputs]
        groups = inputs[0].shape[1] // inputs[1].shape[1]
        lengths = [length for length in self.slots if length]
        parts = zip(*(x.split(lengths) for x in inputs), strict=True)
        outputs = []
        for q, k, v in parts:
            heads = (q, k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1))
            q, k, v = (x.transpose(0, 1)[None] for x in heads)
            outputs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1))
        out = torch.cat(outputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, self.upstream.float())]

    def errors(self, backend: str, exact: list[Tensor]) -> dict[str, float]:
        """How far a kernel is from the exact values, by tensor."""
        out = self._forward(self.inputs, backend)
        found = [out.detach(), *torch.autograd.grad(out, self.inputs, self.upstream)]
        return {name: relative_error(*pair) for name, *pair in zip("oqkv", found, exact, strict=True)}


TOLERANCE = 2e-2
"""Of attention, by norm: outputs and gradients are rounded to bfloat16, and so are probabilities inside the kernel."""


def fastest_backend(bench: Bench, tokens: int, document: int) -> str:
    """The right kernel that takes the least time for packs of such documents; measured once for each length."""
    if document not in bench.fastest:
        names, _ = admitted(bench)
        names = [name for name in names if name != "sdpa"] or names
        seconds: dict[str, float] = {}
        heads = Heads(bench, tokens, document)
        exact = heads.exact()
        for name in [name for name in names if name not in bench.avoided]:
            bench.avoided.append(name)
            bench.save()
            with guarded(bench, {}):
                if max(heads.errors(name, exact).values()) <= TOLERANCE:
                    seconds[name] = min(sum(heads.run(name).values()) for _ in range(4))
            bench.avoided.remove(name)
        bench.fastest[document] = min(seconds, key=lambda name: seconds[name]) if seconds else "sdpa"
        del heads, exact
        bench.free()
    return bench.fastest[document]


def layout(setup: Setup, *, on_gpu: bool) -> Layout:
    """A setup as the memory model takes it."""
    return Layout(
        tokens=setup.tokens, label_tokens=setup.tokens, shards=1, modes=layer_modes(setup.mode, setup.layers),
        compiled=setup.compiled, on_gpu=on_gpu,
    )  # fmt: skip


def predicted_bytes(bench: Bench, setup: Setup) -> int:
    """Peak memory by the memory model; what fp8 adds is not in it."""
    settings = cast(Any, OptimizerSettings(moments=setup.moments))
    config = replace(bench.grid.config, n_layers=setup.layers)
    return memory(config, recipe(setup.precision, settings, bench.dtype), layout(setup, on_gpu=bench.cuda)).total


def fitting(bench: Bench, setup: Setup, most: int | None = None) -> Setup:
    """The setup with as many layers as its memory holds by the memory model, and as were asked for."""
    most = min(filter(None, (bench.layers, most, bench.grid.config.n_layers)))
    if not bench.cuda:
        return replace(setup, layers=most)
    room = ROOM * torch.cuda.get_device_properties(bench.device).total_memory
    depths = [most, *(depth for depth in DEPTHS if depth < most)]
    fits = (depth for depth in depths if predicted_bytes(bench, replace(setup, layers=depth)) <= room)
    return replace(setup, layers=next(fits, 1))


def chosen(bench: Bench, setup: Setup) -> Setup:
    """The setup with the recomputation that the trainer chooses for `auto`; as it is, where nothing is said to fit."""
    room = USABLE * torch.cuda.get_device_properties(bench.device).total_memory
    config = replace(bench.grid.config, n_layers=setup.layers)
    sizes = recipe(setup.precision, cast(Any, OptimizerSettings(moments=setup.moments)), bench.dtype)
    try:
        return replace(setup, mode=modes_that_fit(config, sizes, layout(setup, on_gpu=bench.cuda), room))
    except ValueError:
        return setup


@torch.no_grad()
def fill(bench: Bench, model: nn.Module) -> None:
    """Initial weights drawn on the device, the same for all of a shape: the trainer's own take minutes for the 12B."""
    for number, (name, parameter) in enumerate(model.named_parameters()):
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if name.endswith("norm.weight"):
            local.fill_(1)
            continue
        generator = torch.Generator(bench.device).manual_seed(SEED + number)
        std = initial_std(bench.grid.config)
        if name.endswith((".wo.weight", ".w2.weight")):
            std /= (2 * bench.grid.config.n_layers) ** 0.5
        for rows in local.split(2**26 // local.shape[1]):  # in float32 first: the same numbers in every precision
            rows.copy_(torch.empty(rows.shape, device=bench.device).normal_(std=std, generator=generator).bfloat16())


class Trainee:
    """A model and its optimizer, made by the trainer's own functions, and a pack; steps with marks in between.

    Args:
        bench: Where.
        setup: How.
        dtype: Of activations; by default what the device trains in.
    """

    def __init__(self, bench: Bench, setup: Setup, dtype: torch.dtype | None = None) -> None:
        self.bench, self.setup = bench, setup
        self.config = replace(bench.grid.config, n_layers=setup.layers)
        self.model: Transformer = build(
            self.config, attention_backend=setup.backend, mesh=bench.ranks.mesh, device=bench.device,
            compute_dtype=dtype or bench.dtype, activation_checkpointing=setup.mode, reshard_after_forward=True,
            seed=None, compiled=setup.compiled, parameter_dtype=parameter_dtype(setup.precision), fp8=setup.fp8,
        )  # fmt: skip
        fill(bench, self.model)
        settings = cast(Any, OptimizerSettings(moments=setup.moments))
        self.optimizer = build_optimizer(self.model, settings, setup.precision)
        self._marks: dict[str, Any] = {}
        self.model.output.register_forward_pre_hook(lambda *_: self._mark("head begins"))
        self.model.output.register_forward_hook(lambda *_: self._mark("head ends"))
        self.optimizer.register_step_pre_hook(lambda *_: self._mark("update begins"))
        self.optimizer.register_step_post_hook(lambda *_: self._mark("update ends"))
        self.use(setup.document, setup.backend)

    def use(self, document: int, backend: str) -> None:
        """Take packs of documents of this length, and another attention kernel."""
        self.model.attention_backend = backend
        pack = random_pack(self.config.vocab_size, self.setup.tokens, document)
        self.pack = pack.pin_memory() if self.bench.cuda else pack
        self.setup = replace(self.setup, document=document, backend=backend)
        self._weight_sum = float(pack.weights.double().sum())

    def _mark(self, name: str) -> None:
        if self.bench.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks[name] = event
        else:
            self._marks[name] = time.perf_counter()

    def _between(self, first: str, last: str) -> float:
        begin, end = self._marks[first], self._marks[last]
        return float(begin.elapsed_time(end)) / 1e3 if self.bench.cuda else end - begin

    def step(self) -> StepResult:
        """From the pack on the host to the end of the update, as in training, less the loader's own work."""
        return train_step(
            self.model, self.optimizer, [self.pack.to(self.bench.device)],
            weight_sum=self._weight_sum, n_sources=1, lr=0.0, max_grad_norm=1.0,
        )  # fmt: skip

    def run(self) -> dict[str, float]:
        """Seconds of a step by part; together, the whole step."""
        self.bench.synchronize()
        self._mark("begins")
        self.result = self.step()
        self._mark("ends")
        self.bench.synchronize()
        seconds = {
            "forward": self._between("begins", "head begins"),
            "head": self._between("head begins", "head ends"),
            "backward": self._between("head ends", "update begins"),
            "update": self._between("update begins", "update ends"),
        }
        return seconds | {"rest": self._between("begins", "ends") - sum(seconds.values())}

    def verify(self) -> None:
        """Make sure that the last step was a step.

        Raises:
            RuntimeError: Its update was refused.
        """
        if not self.result.applied.item():
            found = f"loss {self.result.loss.item()}, gradient norm {self.result.grad_norm.item()}"
            raise RuntimeError(f"{found}: update refused")


def state_bytes(setup: Setup, config: TransformerConfig) -> float:
    """Bytes of parameters and optimizer state."""
    settings = cast(Any, OptimizerSettings(moments=setup.moments))
    return stored_bytes(setup.precision, settings) * parameter_count(config)
