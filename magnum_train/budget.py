"""Memory, operations and time of a step, predicted from a configuration's numbers alone.

    rank's share    parameters, gradients, moments: what FSDP divides over the ranks
    activations     what the forward keeps for the backward, by layer (`recompute.py`)
    transients      gathered weights, gradients before they are reduced, the loss head's chunk, one block's backward

A step has few moments at which memory can be highest; each is added up, and the highest counts. The count is what the
allocator is asked for: CUDA's context (about half a GB), NCCL's buffers and fragmentation come on top. Held against
measured peaks by a test. Knows shapes and a card's data sheet; touches no device.

Letters: T tokens of a rank's pack, D dim, H and K heads, E head_dim, F hidden_dim, V vocab_size.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

import torch

from magnum_train.optim import parameter_dtype, stored_bytes
from magnum_train.recompute import MODES, layer_modes
from model import TransformerConfig
from model.config import parameter_shapes
from model.flops import train_flops
from model.loss import rows_at_once

if TYPE_CHECKING:  # the type alone: nothing here composes settings
    from magnum_train.config import OptimConfig

USABLE = 0.92
"""Share of a GPU's memory that a step may be reckoned to take: the rest is for CUDA's context, NCCL's buffers, the
workspaces of libraries and what the allocator cannot use for being in pieces. A judgement, not measured."""

WIDE = 4
"""Bytes of float32, in which norms, the loss and reductions over ranks are computed."""


@dataclass(frozen=True)
class Recipe:
    """Bytes that a parameter takes, by what they are for."""

    parameter: int
    """Of a parameter where it is kept."""
    compute: int
    """Of gathered weights and activations."""
    gradient: int
    """Of a gradient once it is reduced."""
    moments: float
    """Of all optimizer state together: moments, scales of their codes, low bits of a split master."""


def recipe(precision: str, optim: OptimConfig, compute_dtype: torch.dtype) -> Recipe:
    """What a run's settings come to.

    Args:
        precision: How parameters are stored, by name.
        optim: The optimizer.
        compute_dtype: Of gathered weights and activations.
    """
    parameter = parameter_dtype(precision).itemsize
    return Recipe(parameter, compute_dtype.itemsize, parameter, stored_bytes(precision, optim) - parameter)


@dataclass(frozen=True)
class Layout:
    """How a step is laid out on the ranks."""

    tokens: int
    """Tokens of a pack that a rank computes: pack_tokens / parallel.sequence."""
    label_tokens: int
    """Of these, the ones with a loss weight; at most `tokens`."""
    shards: int
    """Ranks that the parameters are divided over."""
    modes: Sequence[str]
    """Recomputation of each layer (`recompute.layer_modes`)."""
    compiled: bool = False
    """Whether blocks are compiled."""
    on_gpu: bool = False
    """Whether the loss head works as on a GPU."""
    sequence: int = 1
    """Ranks that share a pack."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the highest moment of a step."""

    moment: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.parts.values())

    @property
    def beyond_state(self) -> int:
        """What a step takes beside parameters and moments, which are there before it."""
        return self.total - self.parts["parameters"] - self.parts["moments"]


def kept_per_token(
    config: TransformerConfig, mode: str, compute: int, *, compiled: bool, exchanged: bool = False
) -> int:
    """Bytes that a block keeps of one token between its forward and its backward.

    Args:
        config: The network's shape.
        mode: One of `recompute.MODES`.
        compute: Bytes of an activation.
        compiled: Whether the block is compiled. The compiler computes norms, rotations and activation functions
            again by itself, so that "none" keeps less; the other modes are the same either way.
        exchanged: Whether ranks that share a pack exchange tokens for heads, and keep what they got too.
    """
    stream, hidden = config.dim, config.hidden_dim
    queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    if mode == "full":
        return compute * stream
    # The stream, queries, keys, values, attention's output and its denominators, and what is added to the stream.
    attention = compute * (2 * stream + 2 * queries + 2 * keys) + WIDE * config.n_heads
    if exchanged:  # results of products beside what attention takes, where those are kept; what it gives, on both sides
        attention += compute * (queries if mode == "none" else 2 * (queries + keys))
    if mode == "mlp":
        return attention
    if mode == "lean":
        return attention + 2 * compute * hidden
    if compiled:  # also both norms' outputs and the last product's input, which products need
        return attention + compute * (2 * stream + 3 * hidden)
    # The norms' outputs, and what they were made from in float32: the stream itself, or a copy that takes its place.
    # Then silu's output and the product with it.
    norms = 2 * (compute * stream + WIDE * stream + WIDE + (WIDE - compute) * stream)
    return attention + norms + 4 * compute * hidden


def backward_per_token(config: TransformerConfig, mode: str, compute: int, *, compiled: bool) -> int:
    """Bytes that a block's backward needs of one token at its highest moment, beside what was kept.

    That is where silu(w1 x) × w3 x is differentiated: three gradients of width F are there at once, the stream's, and
    all that had to be computed again. A compiled block computes again only what it needs next.
    """
    gradients = compute * (2 * config.hidden_dim + config.dim)
    if compiled:  # what products need, and silu's output and the product with it
        lean = kept_per_token(config, "lean", compute, compiled=True)
        again = max(0, lean - kept_per_token(config, mode, compute, compiled=True))
        return again + gradients + 2 * compute * config.hidden_dim
    whole = kept_per_token(config, "none", compute, compiled=False)
    return whole - kept_per_token(config, mode, compute, compiled=False) + gradients


def memory(config: TransformerConfig, recipe: Recipe, layout: Layout) -> Memory:
    """What one rank's memory holds at the highest moment of a step.

    Args:
        config: The network's shape.
        recipe: Bytes of a parameter.
        layout: Tokens, ranks and recomputation.

    Returns:
        The highest moment, with its parts.
    """
    tokens, shards, compute = layout.tokens, layout.shards, recipe.compute
    block = sum(prod(shape) for name, shape in parameter_shapes(config).items() if name.startswith("layers.0."))
    table = config.vocab_size * config.dim  # the embedding's and the head's matrix alike
    root = table + config.dim
    every = block * config.n_layers + root + table
    state = {
        "parameters": recipe.parameter * every // shards,
        "moments": round(recipe.moments * every / shards),
    }

    def reduced(parameters: int) -> int:
        return recipe.gradient * parameters // shards

    # Gathered weights: the embedding's all along, a block's while it is computed, and the next one's beside it.
    ahead = compute * block if shards > 1 else 0
    embedding, blocks = compute * root, compute * block + ahead
    kept = [
        tokens * kept_per_token(config, mode, compute, compiled=layout.compiled, exchanged=layout.sequence > 1)
        for mode in layout.modes
    ]
    stream, count = compute * config.dim * tokens, layout.label_tokens
    last_norm = stream + WIDE * config.dim * tokens * (1 + (compute < WIDE))
    states = WIDE * config.dim * count

    rows, group = (min(tokens, most) for most in rows_at_once(config.vocab_size, on_gpu=layout.on_gpu))
    narrow = compute if layout.on_gpu else WIDE
    logits = config.vocab_size * (rows * WIDE + (group * narrow if layout.on_gpu else 0))
    factor = 0 if narrow == compute else WIDE * table  # a CPU widens the matrix
    chunk = narrow * config.dim * min(group, count)

    moments = [
        (
            "the loss head",
            {
                "activations": sum(kept) + stream + last_norm,
                "loss head": logits + chunk + states + (WIDE + compute) * table + factor,
                "gathered weights": embedding + blocks - ahead,
            },
        ),
        (
            "the head's backward",
            {
                "activations": sum(kept) + last_norm,
                "loss head": states + (WIDE + 2 * compute) * table + 2 * stream,
                "gathered weights": embedding + blocks,
            },
        ),
    ]
    for i, mode in enumerate(layout.modes):
        last = i == config.n_layers - 1
        moments.append(
            (
                f"the backward of layer {i}",
                {
                    "activations": sum(kept[: i + 1]),
                    "gradients": reduced(block * (config.n_layers - 1 - i) + table),
                    "a block's backward": tokens * backward_per_token(config, mode, compute, compiled=layout.compiled),
                    # That of the block's first product, and the flat copy of those of the block before.
                    "gradients to be reduced": compute * config.hidden_dim * config.dim
                    + WIDE * (table if last else block),
                    "gathered weights": embedding + blocks,
                },
            )
        )
    moments += [
        (
            "the embedding's backward",
            {
                "gradients": reduced(every - root),
                "gradients to be reduced": (compute + WIDE) * root + WIDE * block,
                "gathered weights": embedding,
            },
        ),
        ("the update", {"gradients": reduced(every)}),
    ]
    name, parts = max(moments, key=lambda moment: sum(moment[1].values()))
    return Memory(name, state | parts)


@dataclass(frozen=True)
class Card:
    """A GPU's data sheet; bytes and seconds, dense bfloat16, one direction of a link."""

    name: str
    memory: float
    bandwidth: float
    """Of its memory, bytes a second."""
    peak: float
    """Operations a second of dense bfloat16 products."""
    link: float
    """To the other cards of a node, bytes a second in one direction."""


CARDS = {
    # NVIDIA, H100 Tensor Core GPU datasheet (SXM): 80 GB, 3.35 TB/s, 1,979 TFLOP/s with sparsity, NVLink 900 GB/s both
    # ways.
    "h100_80gb": Card("H100 SXM 80 GB", 80e9, 3.35e12, 989e12, 450e9),
    # NVIDIA, H200 Tensor Core GPU datasheet (SXM): 141 GB, 4.8 TB/s, the rest as H100.
    "h200_141gb": Card("H200 SXM 141 GB", 141e9, 4.8e12, 989e12, 450e9),
    # NVIDIA, A100 Tensor Core GPU datasheet (SXM, 80 GB): 2,039 GB/s, 312 TFLOP/s, NVLink 600 GB/s both ways.
    "a100_80gb": Card("A100 SXM 80 GB", 80e9, 2.039e12, 312e12, 300e9),
}

PRODUCTS, LINK = 0.80, 0.82
"""Shares of the data sheet that are reached: by large bfloat16 products on an H100 (794.5 of 989 TFLOP/s, torch 2.7:
github.com/stas00/ml-engineering, compute/accelerator), and on NVLink by collectives (370 of 450 GB/s; a judgement)."""
ATTENTION_FORWARD, ATTENTION_BACKWARD = 365e12 / 989e12, 310e12 / 989e12
"""Shares of a card's peak that FlashAttention 2 reaches on an H100 at 4,096 tokens and head_dim 128 (arXiv 2407.08608,
figures 5 and 6). At 1,024 tokens it reaches five sixths of that, at 512 two thirds."""


@dataclass(frozen=True)
class Time:
    """Seconds of one micro-batch on one rank, and of the update, by what bounds them."""

    parts: dict[str, float]
    communication: float
    """Seconds that weights and gradients are under way in a micro-batch, beside the computation."""
    update: float
    """Seconds of the optimizer."""
    flops: int
    """Operations that count (`train_flops`), of a micro-batch."""

    @property
    def micro_batch(self) -> float:
        """Whichever takes longer: to compute, or to communicate meanwhile."""
        return max(sum(self.parts.values()), self.communication)

    def step(self, micro_batches: int) -> float:
        """Seconds of a step."""
        return micro_batches * self.micro_batch + self.update


def time(config: TransformerConfig, recipe: Recipe, layout: Layout, documents: Sequence[int], card: Card) -> Time:
    """How long a micro-batch takes at the speeds that are known to be reached: what to expect at best.

    Products go by the card's peak and `PRODUCTS`, attention by published speeds of its kernel, all else by the bytes
    that it moves. Gaps between kernels and waiting for data are not in it.

    Args:
        config: The network's shape.
        recipe: Bytes of a parameter.
        layout: Tokens, ranks and recomputation. With parallel.sequence a rank's share of the documents counts.
        documents: Tokens of each document in the pack.
        card: Where it runs.
    """
    shapes = {name: shape for name, shape in parameter_shapes(config).items() if name.startswith("layers.0.")}
    products = sum(prod(shape) for shape in shapes.values() if len(shape) == 2)
    feed_forward, tokens, compute = config.hidden_dim * config.dim, layout.tokens, recipe.compute
    queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    share = tokens / sum(documents)
    squares = share * sum(n * n for n in documents)

    again = {"none": 0, "lean": 0, "mlp": 2 * feed_forward, "full": products - feed_forward}
    block_flops = sum(2 * tokens * (3 * products + again[mode]) for mode in layout.modes)
    forwards = sum(2 if mode == "full" else 1 for mode in layout.modes)
    one_forward = 2 * queries * squares  # scores and values, the causal half
    attention = one_forward * forwards / ATTENTION_FORWARD
    attention += 2 * one_forward * config.n_layers / ATTENTION_BACKWARD

    # Bytes through the card's memory beside products and attention, forward: two norms and two additions read and
    # write the stream, rotation reads and writes queries and keys, SwiGLU reads two and writes one. The backward moves
    # twice as much.
    moved = compute * (10 * config.dim + 2 * (queries + keys) + 3 * config.hidden_dim)
    table = config.vocab_size * config.dim
    head_flops = 6 * table * layout.label_tokens
    # Logits are written once and read twice, their gradients written once and read twice (model/loss.py).
    head_bytes = 3 * (WIDE + compute) * config.vocab_size * layout.label_tokens
    every = sum(prod(shape) for shape in parameter_shapes(config).values())
    # Queries, keys, values there and attention's output back, forward and backward; nothing is computed meanwhile.
    sent = 4 * (layout.sequence - 1) / layout.sequence * compute * (queries + keys) * tokens * config.n_layers
    under_way = (2 * compute + WIDE) * every * (layout.shards - 1) / layout.shards
    share_of_state = (2 * (recipe.parameter + recipe.moments) + recipe.gradient) * every / layout.shards
    return Time(
        parts={
            "products of the blocks": block_flops / (card.peak * PRODUCTS),
            "attention": attention / card.peak,
            "norms, rotation, SwiGLU": 3 * moved * tokens * config.n_layers / card.bandwidth,
            "exchange in attention": sent / (card.link * LINK),
            "loss head": head_flops / (card.peak * PRODUCTS) + head_bytes / card.bandwidth,
        },
        communication=under_way / (card.link * LINK),
        update=share_of_state / card.bandwidth,
        flops=round(share * train_flops(config, documents, 0)) + head_flops,
    )


def modes_that_fit(config: TransformerConfig, recipe: Recipe, layout: Layout, limit: float) -> str:
    """The least recomputation with which a step fits.

    From the fastest on: all layers alike, then one layer more with the next slower mode, the first layers first.

    Args:
        config: The network's shape.
        recipe: Bytes of a parameter.
        layout: Tokens and ranks; its modes are not read.
        limit: Bytes that there are.

    Returns:
        As `recompute.layer_modes` reads it, such as "mlp:12,lean".

    Raises:
        ValueError: Not even recomputing everything fits.
    """
    layers = config.n_layers
    candidates = [MODES[0]]
    for faster, slower in itertools.pairwise(MODES):
        candidates += [f"{slower}:{count},{faster}" for count in range(1, layers)] + [slower]
    for text in candidates:
        least = memory(config, recipe, replace(layout, modes=layer_modes(text, layers)))
        if least.total <= limit:
            return text
    parts = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in least.parts.items())
    raise ValueError(
        f"memory: found {limit / 2**30:.1f} GiB, expected {least.total / 2**30:.1f} GiB for a step that computes every "
        f"block again ({parts}); use more GPUs, a smaller recipe (precision=bf16_split optim.moments=int8), or smaller "
        "packs (data.pack_tokens)"
    )
