"""Rotary position embedding in Hugging Face's half-rotation order.

Owns the angles and the rotation. Knows nothing of packs: positions come from the caller and begin at 0 in
each document.

Letters: T tokens, H heads (of either kind), E head_dim.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rotary_tables(
    positions: Int[Tensor, " T"], head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Float[Tensor, "T 1 E"], Float[Tensor, "T 1 E"]]:
    """Cosines and signed sines of every position, once per forward for all layers.

    Nothing is kept between calls: a buffer would be left uninitialised by a build on the meta device, and be
    cast with the weights. In float32 the steps are those of the public implementation, in the same order,
    since at long positions the rounding of an angle is larger than that of anything that follows. The sines
    of the first half carry the minus sign of the rotation, so that applying it takes two multiplications and
    one exchange of halves.

    Args:
        positions: Place of each token within its document, from 0.
        head_dim: Width E of a head, even.
        theta: Base of the frequencies θ^(-2i/E), i = 0 … E/2 - 1.
        dtype: float32, or float64 where the network is float64; bfloat16 angles would be wrong beyond
            position 256.

    Returns:
        Cosines and signed sines, both `dtype`.

    Source:
        Su et al., RoFormer (arXiv 2104.09864), section 3.4.2, with pairs (i, i + E/2) in place of (2i, 2i +
        1), as in transformers' MistralRotaryEmbedding.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device).to(dtype) / head_dim
    angles = torch.outer(positions.to(dtype), 1.0 / theta**exponents)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1).unsqueeze(1), torch.cat((-sin, sin), dim=-1).unsqueeze(1)


def rotate(
    x: Float[Tensor, "T H E"], cos: Float[Tensor, "T 1 E"], sin: Float[Tensor, "T 1 E"]
) -> Float[Tensor, "T H E"]:
    """Turn each pair (x[i], x[i + E/2]) by its token's angle.

    Args:
        x: Queries or keys, any floating dtype.
        cos: From `rotary_tables`.
        sin: From `rotary_tables`, first half negated.

    Returns:
        The rotated tensor in the dtype of `x`; computed in that of the tables.
    """
    wide = x.to(cos.dtype)
    first, second = wide.chunk(2, dim=-1)
    return torch.addcmul(wide * cos, torch.cat((second, first), dim=-1), sin).to(x.dtype)
