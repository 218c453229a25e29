"""The whole network: embedding, blocks of attention and feed-forward, and a head that returns the loss.

Owns the modules, their names and their initial weights. Knows no ranks: a sharding library may wrap each
block, the head and the root, because every parameter is used inside the forward of the module that holds it,
and there are no buffers.

Letters: T tokens in a pack, D dim, H query heads, K key-value heads, E head_dim, F hidden_dim, V vocab_size,
N documents; a tensor of `bounds` has N + 1 entries, one of `rows` as many as positions were asked for.
"""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int32, Int64
from torch import Tensor, nn

from model.attention import (
    KeyValueCache,
    LayerCache,
    Newest,
    attention,
    cached_attention,
    choose_backend,
    document_lengths,
)
from model.config import TransformerConfig
from model.loss import Loss, linear_cross_entropy
from model.rope import rotary_tables, rotate

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Documents:
    """Where a pack's documents lie, and the kernel for them: the same for every layer of one forward.

    Attributes:
        cu_seqlens: int32 [N + 1], from 0 to T.
        max_seqlen: At least the longest document.
        backend: The attention kernel, already chosen.
        lengths: The documents' lengths on the host; only where the kernel reads them there.
        newest: Where the tokens go in a cache; None without one.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    backend: str
    lengths: tuple[int, ...] | None
    newest: Newest | None


class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) × weight, computed in at least float32 and returned in the dtype of x.

    Written out, because torch's own warns and changes path when the weight's dtype differs from the input's.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """The formula above."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (wide * scale * self.weight).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotated queries and keys."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.wq = nn.Linear(config.dim, queries, bias=False)
        self.wk = nn.Linear(config.dim, keys, bias=False)
        self.wv = nn.Linear(config.dim, keys, bias=False)
        self.wo = nn.Linear(queries, config.dim, bias=False)
        # May be replaced where a rank holds a part of the pack's tokens, by one that knows where the others are.
        self.kernel: Callable[..., Tensor] = attention

    def forward(
        self,
        x: Float[Tensor, "T D"],
        cos: Float[Tensor, "T 1 E"],
        sin: Float[Tensor, "T 1 E"],
        documents: Documents,
        cache: LayerCache | None,
    ) -> Float[Tensor, "T D"]:
        """Attention of every token to its own document, or to all that the cache holds of it."""
        # Heads are counted from the tensors, so that a shard of the projections would do as well.
        q = rotate(self.wq(x).unflatten(-1, (-1, self.head_dim)), cos, sin)
        k = rotate(self.wk(x).unflatten(-1, (-1, self.head_dim)), cos, sin)
        v = self.wv(x).unflatten(-1, (-1, self.head_dim))
        d = documents
        if cache is None:
            out = self.kernel(q, k, v, d.cu_seqlens, d.max_seqlen, d.backend, d.lengths)
        else:
            assert d.newest is not None
            out = cached_attention(q, k, v, cache, d.newest, d.backend)
        projected: Tensor = self.wo(out.flatten(-2))
        return projected


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) × w3 x).

    Source: Shazeer, GLU Variants Improve Transformer (arXiv 2002.05202), equation 6.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)

    def forward(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """The formula above."""
        out: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


class Block(nn.Module):
    """Attention, then feed-forward, each on a normed copy and added to the stream."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        x: Float[Tensor, "T D"],
        cos: Float[Tensor, "T 1 E"],
        sin: Float[Tensor, "T 1 E"],
        documents: Documents,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "T D"]:
        """One layer of the stream."""
        x = x + self.attention(self.attention_norm(x), cos, sin, documents, cache)
        out: Tensor = x + self.feed_forward(self.ffn_norm(x))
        return out


class Head(nn.Module):
    """The output matrix, with the loss inside: a sharding library shows the whole matrix only here."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.dim).normal_(std=initial_std(config)))

    def forward(
        self,
        hidden: Float[Tensor, "T D"],
        labels: Int[Tensor, " T"] | None = None,
        weights: Float[Tensor, " T"] | None = None,
        label_positions: Int64[Tensor, " n"] | None = None,
    ) -> Loss | Float[Tensor, "rows V"]:
        """The loss where there are labels, else logits; see `Transformer.forward`."""
        if labels is not None:
            if weights is None:
                raise ValueError("weights: found none, expected one for each label")
            return linear_cross_entropy(hidden, self.weight, labels, weights, label_positions)
        if label_positions is not None:
            hidden = hidden.index_select(0, label_positions)
        logits = F.linear(hidden, self.weight)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


class Transformer(nn.Module):
    """Mistral-Nemo on flat packs.

    A fresh one holds torch's own random weights: follow with `init_weights`, or load a checkpoint.

    Args:
        config: The network's shape.
        attention_backend: One of `model.attention.BACKENDS`; what "auto" picks is logged at the first
            forward.
    """

    def __init__(self, config: TransformerConfig, attention_backend: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.attention_backend = attention_backend
        self._announced: str | None = None
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = Head(config)

    def forward(
        self,
        tokens: Int[Tensor, " T"],
        positions: Int[Tensor, " T"],
        cu_seqlens: Int32[Tensor, " bounds"],
        max_seqlen: int,
        labels: Int[Tensor, " T"] | None = None,
        weights: Float[Tensor, " T"] | None = None,
        label_positions: Int64[Tensor, " n"] | None = None,
        cache: KeyValueCache | None = None,
    ) -> Loss | Float[Tensor, "rows V"]:
        """One pack through the network.

        Args:
            tokens: Ids in 0 … V - 1, documents one after another.
            positions: From 0 within each document; with a cache, within the whole document so far.
            cu_seqlens: Where documents begin, from 0 and ending in T; trailing repeats are empty documents.
            max_seqlen: At least the longest document, in tokens.
            labels: What each position predicts; asks for the loss.
            weights: Loss weight of each position, with `labels`. Where it is 0 nothing is computed.
            label_positions: With `labels`, where the weight is not 0, if the host knows (the device is then
                not asked). Without, the positions whose logits are wanted; all by default.
            cache: Keys and values of earlier tokens; document i then is the newest tokens of the cache's
                sequence i, and is added to it.

        Returns:
            The loss, or logits [rows, V] in at least float32.

        Raises:
            ValueError: The attention backend cannot run here, or there are not as many documents as the cache
                has sequences.
        """
        newest = None if cache is None else cache.newest(len(tokens), cu_seqlens, max_seqlen)
        x = self.tok_embeddings(tokens)
        config = self.config
        # At least float32 also where the stream is bfloat16, and float64 where it is float64.
        wide = torch.promote_types(x.dtype, torch.float32)
        cos, sin = rotary_tables(positions, config.head_dim, config.rope_theta, wide)
        backend = self._backend(x)
        asks = backend == "sdpa" and cache is None and cu_seqlens.is_cuda
        lengths = document_lengths(cu_seqlens) if asks else None
        documents = Documents(cu_seqlens, max_seqlen, backend, lengths, newest)
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, documents, None if cache is None else cache.layers[i])
        if cache is not None and newest is not None:
            cache.advance(newest)
        out: Loss | Tensor = self.output(self.norm(x), labels, weights, label_positions)
        return out

    def _backend(self, x: Tensor) -> str:
        """The kernel for this stream, announced when it is first used."""
        backend = choose_backend(self.attention_backend, x.device.type, x.dtype)
        if backend != self._announced:
            log.info("attention: %s (asked for %s; %s on %s)", backend, self.attention_backend, x.dtype, x.device)
            self._announced = backend
        return backend


def initial_std(config: TransformerConfig) -> float:
    """Standard deviation of fresh matrices, √(2 / 5D).

    It follows the width: a constant 0.02 leaves a narrow network's queries and keys so small that attention is uniform
    for hundreds of steps. At Nemo's width it is 0.0088.

    Source:
        Nguyen and Salazar, Transformers without Tears (arXiv 1910.05895), section 2.2, "SmallInit".
    """
    return float((2 / (5 * config.dim)) ** 0.5)


def initial_weight(config: TransformerConfig, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """A parameter's fresh value, from the seed and its name alone.

    Each parameter draws from a generator of its own, so the value depends neither on the order of the calls nor on how
    the tensor is sharded afterwards. Norms are 1. Matrices are normal with `initial_std`; the two that write to the
    residual stream (`wo`, `w2`) are narrower by √(2 × n_layers), so that its variance does not grow with depth.

    Args:
        config: The network's shape.
        name: The parameter's name in `Transformer.named_parameters()`.
        shape: Its whole shape.
        seed: Of the run.

    Returns:
        float32 on the CPU.

    Source:
        The scaling is that of GPT-2 (Radford et al. 2019, section 2.3).
    """
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)  # 63 bits: a signed seed
    std = initial_std(config)
    if name.endswith((".wo.weight", ".w2.weight")):
        std /= (2 * config.n_layers) ** 0.5
    return torch.empty(shape).normal_(std=std, generator=generator)


@torch.no_grad()
def init_weights(model: Transformer, seed: int) -> None:
    """Give every parameter its `initial_weight`, in place; for a model that is not sharded."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_weight(model.config, name, tuple(parameter.shape), seed))
