"""What the GPU benchmark asks of one kernel at a time: the card itself, attention, the loss head, the update.

Each question plans its rows before anything is measured, so that whatever is not reached stands in the record with its
reason. Right comes before fast: a row bears how far its numbers are from exact ones.
"""

import importlib.util
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from gpu_bench import (
    NOT_REACHED,
    TOLERANCE,
    Bench,
    Floor,
    Heads,
    OptimizerSettings,
    Row,
    admitted,
    against,
    attempt,
    blank,
    guarded,
    interleave,
    relative_error,
    settle,
)
from torch import Tensor, nn

from magnum_train.adamw import AdamW, join
from magnum_train.optim import build_optimizer, stored_bytes
from magnum_train.step import clip_coefficient
from model.loss import linear_cross_entropy

# ---- what the card gives


def plan_ceilings(bench: Bench) -> list[Row]:
    dtype = str(bench.dtype).removeprefix("torch.")
    rows = [blank(what="copy", detail="device to device, bytes read and written"),
            blank(what="products", detail=f"matrix products in {dtype}, random factors"),
            blank(what="to_host", detail="device to page-locked host memory"),
            blank(what="products_fp8", detail="matrix products in e4m3, one scale a matrix")]  # fmt: skip
    for row in rows[2:]:
        if not bench.cuda:
            row["not_measured"] = "no CUDA device"
    return rows


def measure_ceilings(bench: Bench, rows: list[Row]) -> None:
    side, size = (8192, 2**31) if bench.cuda else (512, 2**24)

    def copy() -> tuple[Callable[[], Any], float]:
        source = torch.randint(256, (size,), dtype=torch.uint8, device=bench.device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source), 2.0 * size

    def products() -> tuple[Callable[[], Any], float]:
        a, b = bench.random(side, side), bench.random(side, side, seed=1)
        return lambda: a @ b, 2.0 * side**3

    def to_host() -> tuple[Callable[[], Any], float]:
        source = torch.randint(256, (size,), dtype=torch.uint8, device=bench.device)
        target = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        return lambda: target.copy_(source, non_blocking=True), float(size)

    def products_fp8() -> tuple[Callable[[], Any], float]:
        a, b = (bench.random(side, side, seed=seed).to(torch.float8_e4m3fn) for seed in (0, 1))
        one = torch.ones((), device=bench.device)
        form = {"scale_a": one, "scale_b": one, "out_dtype": torch.bfloat16, "use_fast_accum": True}
        return lambda: torch._scaled_mm(a, b.t(), **form), 2.0 * side**3

    made = {"copy": copy, "products": products, "to_host": to_host, "products_fp8": products_fp8}
    for row in rows:
        if row["not_measured"] != NOT_REACHED:
            continue
        with attempt(bench, row):
            bench.check()
            work, amount = made[row["what"]]()
            settle(row, [{"all": bench.timed(work)} for _ in range(bench.warmup + bench.rounds)][bench.warmup :])
            row["rate"] = amount / (row["ms"] / 1e3)
            bench.ceilings[row["what"]] = row["rate"]
        bench.free()


# ---- attention


def plan_attention(bench: Bench) -> list[Row]:
    names, refused = admitted(bench)
    rows = []
    for document in bench.grid.documents:
        tokens = max(document, bench.grid.attention_tokens)
        rows += [blank(attention=name, pack_tokens=tokens, document_length=document) for name in names]
    rows += [{"attention": name, "pack_tokens": bench.grid.attention_tokens, "document_length": 0,
              "not_measured": reason} for name, reason in refused.items()]  # fmt: skip
    return rows


def measure_attention(bench: Bench, rows: list[Row]) -> None:
    config = bench.grid.config
    for document in bench.grid.documents:
        ours = [row for row in rows if row["document_length"] == document and row["not_measured"] == NOT_REACHED]
        if not ours:
            continue
        with attempt(bench, *ours):
            bench.check()
            heads = Heads(bench, ours[0]["pack_tokens"], document)
            exact = heads.exact()
            runs = []
            for row in ours:
                with guarded(bench, row):
                    row["errors"] = heads.errors(row["attention"], exact)
                    row["error"] = max(row["errors"].values())
                    row["right"] = row["error"] <= TOLERANCE
                    runs.append((row, partial(heads.run, row["attention"])))
            interleave(bench, runs)
            squares = sum(length * length for length in heads.pack.lengths)
            flops = 6 * config.n_heads * config.head_dim * squares
            tensors = 4 * config.n_heads + 4 * config.n_kv_heads  # q, out and their gradients; k, v and theirs
            moved = (tensors + config.n_heads) * config.head_dim * ours[0]["pack_tokens"] * bench.dtype.itemsize
            for row in ours:
                if row["not_measured"] is None:
                    row["tflops"] = flops / (row["ms"] / 1e3) / 1e12
                    against(row, Floor.of(bench, flops=flops, moved=moved))
            right = [row for row in ours if row["not_measured"] is None and row["right"]]
            if right:
                bench.fastest[document] = min(right, key=lambda row: row["ms"])["attention"]
            del heads, exact, runs
        bench.free()


# ---- the loss head


def plan_loss(bench: Bench) -> list[Row]:
    rows = []
    for share in (1.0, 0.3):
        rows += [blank(what=what, label_share=share) for what in HEADS]
    if not bench.cuda or importlib.util.find_spec("liger_kernel") is None:
        reason = "the package liger-kernel is not installed" if bench.cuda else "no CUDA device"
        refuse(rows, "liger", reason)
    if not hasattr(nn, "LinearCrossEntropyOptions"):
        refuse(rows, "torch's own", f"torch {torch.__version__} has no linear_cross_entropy")
    return rows


def refuse(rows: list[Row], what: str, reason: str) -> None:
    """Enter why rows of a kind cannot be measured here."""
    for row in rows:
        if row["what"] == what:
            row["not_measured"] = reason


class Problem:
    """Hidden states, an output matrix, labels, and what they exactly come to.

    Args:
        bench: Where.
        share: Of the positions that have a label.
    """

    def __init__(self, bench: Bench, share: float) -> None:
        config, tokens = bench.grid.config, bench.grid.packs[0]
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(config.vocab_size, (tokens,), generator=generator)
        at = torch.randperm(tokens, generator=generator)[: round(share * tokens)].sort().values
        self.bench, self.labels, self.at = bench, labels.to(bench.device), at.to(bench.device)
        self.weights = torch.zeros(tokens, device=bench.device).index_fill_(0, self.at, 1.0)
        # As torch's losses take them: -100 where there is none.
        self.marked = torch.full_like(self.labels, -100).index_copy_(0, self.at, self.labels.index_select(0, self.at))
        self.hidden = bench.random(tokens, config.dim).requires_grad_()
        std = config.dim**-0.5
        self.weight = bench.random(config.vocab_size, config.dim, seed=1, std=std).requires_grad_()

    def ours(self) -> Tensor:
        """`model.loss`, told where labels are, as in training."""
        return linear_cross_entropy(self.hidden, self.weight, self.labels, self.weights, self.at).total

    def liger(self) -> Tensor:
        """Liger-Kernel's fused head."""
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

        return cast(Tensor, LigerFusedLinearCrossEntropyLoss(reduction="sum")(self.weight, self.hidden, self.marked))

    def whole_logits(self) -> Tensor:
        """All logits at once, in float32."""
        return F.cross_entropy((self.hidden @ self.weight.t()).float(), self.marked, reduction="sum")

    def torchs_own(self) -> Tensor:
        """Torch's fused head, in chunks."""
        options = cast(Any, nn).LinearCrossEntropyOptions()
        head = cast(Any, F).linear_cross_entropy
        return cast(Tensor, head(self.hidden, self.weight, self.marked, reduction="sum", options=options))

    def step(self, way: Callable[[], Tensor]) -> Tensor:
        """Forward and backward, gradients anew."""
        self.hidden.grad = self.weight.grad = None
        value = way()
        value.backward()
        return value.detach()

    def run(self, way: Callable[[], Tensor]) -> dict[str, float]:
        """Seconds of a forward and backward together: some take gradients in the forward."""
        return {"both": self.bench.timed(lambda: self.step(way))}

    def verify(self, row: Row, way: Callable[[], Tensor], exact: tuple[float, Tensor, Tensor]) -> None:
        """Enter errors and the memory that it takes."""
        self.hidden.grad = self.weight.grad = None
        self.bench.free()
        held = self.bench.held_gib()
        value = self.step(way)
        self.bench.synchronize()
        peak = self.bench.peak_gib()
        row["extra_gib"] = None if held is None or peak is None else peak - held
        row["value_error"] = abs(float(value) - exact[0]) / exact[0]
        pairs = ((self.hidden.grad, exact[1]), (self.weight.grad, exact[2]))
        row["gradient_error"] = max(relative_error(cast(Tensor, found), right) for found, right in pairs)
        row["right"] = row["value_error"] < 1e-4 and row["gradient_error"] < 2e-2


HEADS = {"ours": "ours", "liger": "liger", "whole logits": "whole_logits", "torch's own": "torchs_own"}
"""Rows, and methods of `Problem`."""


@torch.no_grad()
def exact_loss(hidden: Tensor, weight: Tensor, labels: Tensor, at: Tensor) -> tuple[float, Tensor, Tensor]:
    """Value and gradients in float32 from the same factors, some rows at a time; the value added up in float64."""
    total, wide = 0.0, weight.float()
    grad_hidden, grad_weight = torch.zeros(hidden.shape, device=hidden.device), torch.zeros_like(wide)
    for rows in at.split(512):
        states, label = hidden.index_select(0, rows).float(), labels.index_select(0, rows)
        logits = states @ wide.t()
        total += float(F.cross_entropy(logits, label, reduction="none").double().sum())
        gradient = logits.softmax(1)
        gradient[torch.arange(len(rows), device=rows.device), label] -= 1
        grad_hidden.index_copy_(0, rows, gradient @ wide)
        grad_weight.addmm_(gradient.t(), states)
    return total, grad_hidden, grad_weight


def measure_loss(bench: Bench, rows: list[Row]) -> None:
    config, tokens = bench.grid.config, bench.grid.packs[0]
    for share in dict.fromkeys(row["label_share"] for row in rows):
        ours = [row for row in rows if row["label_share"] == share and row["not_measured"] == NOT_REACHED]
        if not ours:
            continue
        with attempt(bench, *ours):
            bench.check()
            problem = Problem(bench, share)
            exact = exact_loss(problem.hidden, problem.weight, problem.labels, problem.at)
            runs = []
            for row in ours:
                way = getattr(problem, HEADS[row["what"]])
                with guarded(bench, row):
                    problem.verify(row, way, exact)
                    runs.append((row, partial(problem.run, way)))
            del exact
            bench.free()
            interleave(bench, runs)
            flops = 6 * config.vocab_size * config.dim * len(problem.at)
            moved = bench.dtype.itemsize * config.dim * (3 * config.vocab_size + 2 * tokens)
            for row in ours:
                if row["not_measured"] is None:
                    row["tflops"] = flops / (row["ms"] / 1e3) / 1e12
                    against(row, Floor.of(bench, flops=flops, moved=moved))
            del problem, runs, way
        bench.free()


# ---- the update

RECIPES = [
    ("ours", "bf16_split", "int8"),
    ("torch fused", "float32", "float32"),
    ("ours", "bf16_stochastic", "int8"),
    ("ours", "bf16_split", "float32"),
    ("ours", "bf16_split", "bf16"),
    ("ours", "float32", "int8"),
    ("ours", "bf16_stochastic", "bf16"),
    ("torch fused", "bf16", "bf16"),
    ("torchao adamw8bit", "bf16_stochastic", "int8"),
    ("torchao adamw8bit", "float32", "int8"),
]


ROUNDS_SECONDS = 10
"""What all rounds of updates take, with room to spare."""


def plan_optimizer(bench: Bench) -> list[Row]:
    rows = [blank(what=what, precision=precision, moments=moments) for what, precision, moments in RECIPES]
    if importlib.util.find_spec("torchao") is None:
        refuse(rows, "torchao adamw8bit", "the package torchao is not installed")
    return rows


class Matrices(nn.Module):
    """Parameters to be updated, and their gradients.

    Args:
        bench: Where.
        shapes: Of the matrices.
        dtype: Of both.
    """

    def __init__(self, bench: Bench, shapes: list[tuple[int, int]], dtype: torch.dtype) -> None:
        super().__init__()
        draws = [bench.random(*shape, dtype=torch.bfloat16, seed=seed, std=0.01) for seed, shape in enumerate(shapes)]
        self.all = nn.ParameterList(nn.Parameter(draw.to(dtype)) for draw in draws)

    def take(self, bench: Bench, seed: int) -> None:
        """Gradients, the same for every dtype."""
        for place, parameter in enumerate(self.all):
            gradient = bench.random(*parameter.shape, dtype=torch.bfloat16, seed=seed + 1000 * place, std=0.001)
            parameter.grad = gradient.to(parameter.dtype)


def an_optimizer(row: Row, module: nn.Module, lr: float) -> torch.optim.Optimizer:
    """As a row names it."""
    name = "adamw8bit" if row["what"].startswith("torchao") else "adamw"
    if row["precision"] == "bf16":  # torch's own over bfloat16, which rounds small updates away
        return torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    moments = row["moments"] if name == "adamw" else "float32"
    return build_optimizer(module, cast(Any, OptimizerSettings(name, moments, lr=lr)), row["precision"])


def masters(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What parameters stand for, float32."""
    return [
        join(parameter.detach(), optimizer.state[parameter]["low"])
        if "low" in optimizer.state[parameter] else parameter.detach().float()
        for parameter in module.parameters()
    ]  # fmt: skip


def error_of_updates(bench: Bench, row: Row, shapes: list[tuple[int, int]]) -> float:
    """How far three updates at a rate of 1e-3 are from those of float64, by norm."""
    dtype = torch.bfloat16 if row["precision"].startswith("bf16") else torch.float32
    module, exact = Matrices(bench, shapes, dtype), Matrices(bench, shapes, torch.float64)
    before = [parameter.detach().clone() for parameter in exact.all]
    reference = torch.optim.AdamW(exact.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    optimizer = an_optimizer(row, module, 1e-3)
    for seed in range(3):
        for which in (module, exact):
            which.take(bench, seed)
        optimizer.step()
        reference.step()
    pairs = list(zip(masters(module, optimizer), exact.all, before, strict=True))
    off = sum(float((found.double() - right.detach()).square().sum()) for found, right, _ in pairs)
    return math.sqrt(off / sum(float((right.detach() - start).square().sum()) for _, right, start in pairs))


def measure_optimizer(bench: Bench, rows: list[Row]) -> None:
    config = replace(bench.grid.config, n_layers=1)
    queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    wide = (config.hidden_dim, config.dim)
    layer = [(queries, config.dim), (keys, config.dim), (keys, config.dim), (config.dim, queries)]
    layer += [wide, wide, (config.dim, config.hidden_dim)]
    small = [(min(rows_, 256), min(columns, 768)) for rows_, columns in layer[3:]]
    ours = [row for row in rows if row["not_measured"] == NOT_REACHED]
    with attempt(bench, *ours):
        bench.check()
        runs = []
        for row in ours:
            if runs and time.monotonic() > bench.deadline - ROUNDS_SECONDS:
                break  # torchao compiles anew for every shape: what is ready is worth more than one more
            with guarded(bench, row):
                row["error_of_updates"] = error_of_updates(bench, row, small)
                dtype = torch.bfloat16 if row["precision"].startswith("bf16") else torch.float32
                module = Matrices(bench, layer, dtype)
                module.take(bench, 0)
                optimizer = an_optimizer(row, module, 0.0)
                runs.append((row, partial(timed_update, bench, module, optimizer)))
        interleave(bench, runs)
        count = sum(a * b for a, b in layer)
        for row in ours:
            if row["not_measured"] is None:
                row["parameters"], row["bytes_per_parameter"] = count, bytes_moved(row)
                row["ms_per_billion"] = row["ms"] / count * 1e9
                row["gb_per_second"] = bytes_moved(row) * count / (row["ms"] / 1e3) / 1e9
                against(row, Floor.of(bench, moved=bytes_moved(row) * count))
        del runs
    bench.free()


def timed_update(bench: Bench, module: Matrices, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Seconds of an update with clipping, the norm being known."""
    norm = torch.full((), 2.0, device=bench.device)

    def update() -> None:
        if isinstance(optimizer, AdamW):
            optimizer.clip = clip_coefficient(norm, 1.0)
        else:
            torch.nn.utils.clip_grads_with_norm_(list(module.parameters()), 1.0, norm)
        optimizer.step()

    return {"update": bench.timed(update)}


def bytes_moved(row: Row) -> float:
    """Bytes of a parameter that an update must read and write, each once."""
    size = 2 if row["precision"].startswith("bf16") else 4
    if row["precision"] == "bf16":
        return 2 * (size + 2 + 2) + size
    moments = row["moments"] if not row["what"].startswith("torchao") else "int8"
    held = stored_bytes(row["precision"], cast(Any, OptimizerSettings(moments=moments)))
    return 2 * held + size
