"""The shape of a network: one frozen record, and what follows from it alone.

Owns the fields and their limits. Knows nothing of tensors, files, settings or devices.

Letters used throughout this package: T tokens in a pack, D dim, H query heads, K key-value heads, E head_dim,
F hidden_dim, V vocab_size, N documents in a pack.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class TransformerConfig:
    """Everything that decides which parameters exist and what they compute.

    `head_dim` is a field of its own because it does not follow from the others: Mistral-Nemo has 32 heads of
    128 in a network of width 5120.

    Args:
        dim: Width D of the residual stream.
        n_layers: Number of blocks.
        n_heads: Query heads H.
        n_kv_heads: Key-value heads K; divides H, and H / K query heads share one.
        head_dim: Width E of a head; even, since the rotation turns pairs.
        hidden_dim: Width F of the feed-forward layer.
        vocab_size: Rows V of the embedding and of the output.
        norm_eps: Added to the mean square before the root in every norm.
        rope_theta: Base of the rotary frequencies.

    Raises:
        ValueError: A field is out of range; the message names it, what was found and what was expected.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    norm_eps: float = 1e-5
    rope_theta: float = 1e6

    def __post_init__(self) -> None:
        """Check every field where it is first known."""
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}: found {getattr(self, name)}, expected at least 1")
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim: found {self.head_dim}, expected an even number (rotation turns pairs)")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"model.n_kv_heads: found {self.n_kv_heads}, expected a divisor of n_heads = {self.n_heads}"
            )
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"model.{name}: found {value}, expected a positive finite number")


def parameter_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter's name and shape, in the order in which the network uses them.

    Kept apart from the network so that files can be planned and checked, and parameters counted, without
    building it.

    Args:
        config: The network's shape.

    Returns:
        Name → shape, 3 + 9 × n_layers entries.
    """
    dim, hidden = config.dim, config.hidden_dim
    queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (config.vocab_size, dim)}
    for i in range(config.n_layers):
        shapes |= {
            f"layers.{i}.attention_norm.weight": (dim,),
            f"layers.{i}.attention.wq.weight": (queries, dim),
            f"layers.{i}.attention.wk.weight": (keys, dim),
            f"layers.{i}.attention.wv.weight": (keys, dim),
            f"layers.{i}.attention.wo.weight": (dim, queries),
            f"layers.{i}.ffn_norm.weight": (dim,),
            f"layers.{i}.feed_forward.w1.weight": (hidden, dim),
            f"layers.{i}.feed_forward.w2.weight": (dim, hidden),
            f"layers.{i}.feed_forward.w3.weight": (hidden, dim),
        }
    return shapes | {"norm.weight": (dim,), "output.weight": (config.vocab_size, dim)}
