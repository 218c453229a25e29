"""Parameters and floating-point operations, counted from the shape alone.

Owns the convention behind every utilisation figure. Knows nothing of time or devices.
"""

from collections.abc import Sequence
from math import prod

from model.config import TransformerConfig, parameter_shapes


def parameter_count(config: TransformerConfig) -> int:
    """All parameters, embedding and norms included."""
    return sum(prod(shape) for shape in parameter_shapes(config).values())


def block_matmul_parameters(config: TransformerConfig) -> int:
    """Parameters of the blocks' matrices, each of which multiplies every token once."""
    return sum(
        prod(shape)
        for name, shape in parameter_shapes(config).items()
        if name.startswith("layers.") and len(shape) == 2
    )


def train_flops(config: TransformerConfig, lengths: Sequence[int], label_tokens: int) -> int:
    """Operations of one forward and backward over documents of these lengths.

    A product of matrices takes 2 operations per weight and token, and its backward two more such products: 6
    in all. Attention is counted as what is needed, not what some kernel spends: document by document and only
    the causal half, 2 × H × E × n² forward for scores and values together, 3 times that with the backward.
    The embedding looks up and multiplies nothing; the head works on labelled tokens alone. Recomputation,
    norms, rotations and the softmax do not count.

    Utilisation by this number is lower than by the common count of whole packs without the causal mask, which
    at 8,192 tokens adds a tenth.

    Args:
        config: The network's shape.
        lengths: Tokens of each document.
        label_tokens: Positions with a loss weight other than 0.

    Returns:
        Floating-point operations.

    Source:
        Chowdhery et al., PaLM (arXiv 2204.02311), appendix B; here per document, causal, and without
        unlabelled heads.
    """
    blocks = 6 * block_matmul_parameters(config) * sum(lengths)
    head = 6 * config.vocab_size * config.dim * label_tokens
    squares = sum(length * length for length in lengths)
    return blocks + head + 6 * config.n_layers * config.n_heads * config.head_dim * squares
