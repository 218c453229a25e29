"""What of a block's forward is kept for its backward, and what is computed again: memory against time.

    none   everything is kept
    lean   results of matrix products and of attention; norms, rotations and SwiGLU's product are computed again
    mlp    as lean, but the two wide products of the feed-forward are computed again too
    full   the block's input; all but its last product is computed again

Every mode gives the same numbers: what is computed again is computed by the same kernels from the same inputs. Layers
may differ. Knows torch's selective checkpointing and the order of a block's products, nothing of ranks.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

MODES = ("none", "lean", "mlp", "full")
"""From the fastest to the smallest."""

_PRODUCTS = ("wq", "wk", "wv", "wo", "w1", "w3", "w2")
"""A block's matrix products in the order of its forward."""
_KEPT = {"lean": {"wq", "wk", "wv", "wo", "w1", "w3"}, "mlp": {"wq", "wk", "wv", "wo"}}
"""Products whose results are kept. Never that of `w2`: it is added to the stream, and nothing needs it again."""
_ATTENTION = (
    "magnum_train::attention_on_cpu",
    "magnum_train::flash_attention",
    "magnum_train::cudnn_attention",
    "flash_attn::_flash_attn_varlen_forward",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_attention_math",
    "magnum_train::all_to_all",
)
"""Operators that are attention, on one backend or another, and the exchange around it where ranks share a pack."""


def layer_modes(text: str, n_layers: int | None = None) -> list[str]:
    """One mode for each layer.

    Args:
        text: A mode for all layers, or modes with numbers of layers from the first on, the last without one for the
            rest: "mlp:12,lean".
        n_layers: Layers of the network; None, where it is not known yet, takes one more than are numbered.

    Raises:
        ValueError: It is neither, or names more layers than there are.
    """
    place = "parallel.activation_checkpointing"
    *numbered, rest = text.split(",")
    modes: list[str] = []
    for mode, _, count in (part.partition(":") for part in numbered):
        modes += [mode] * int(count) if count.isdecimal() and len(count) < 5 else [""]
    if not {*modes, rest} <= set(MODES):
        expected = f"one of {', '.join(MODES)}, auto, or numbers of layers as in mlp:12,lean (the rest lean)"
        raise ValueError(f"{place}: found {text!r}, expected {expected}")
    if n_layers is not None and len(modes) > n_layers:
        raise ValueError(f"{place}: found {text!r}, which names {len(modes)} layers, expected at most {n_layers}")
    return modes + [rest] * (1 if n_layers is None else n_layers - len(modes))


def with_recomputation(block: nn.Module, mode: str) -> nn.Module:
    """A block that keeps for its backward what its mode says.

    Args:
        block: A `model.transformer.Block`.
        mode: One of `MODES`.
    """
    if mode == "none":
        return block
    if mode == "full":
        return checkpoint_wrapper(block)
    return checkpoint_wrapper(block, context_fn=partial(_contexts, mode))


def _contexts(mode: str) -> Any:
    """What torch asks for at every forward of a block: counting begins anew."""
    return create_selective_checkpoint_contexts(_policy(mode))  # type: ignore[no-untyped-call]


def _policy(mode: str) -> Callable[..., CheckpointPolicy]:
    """Which results are kept. Products are told apart by their order, since shapes may coincide."""
    seen = {False: 0, True: 0}

    def policy(context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        if operator is torch.ops.aten.mm.default:
            name = _PRODUCTS[seen[context.is_recompute]]
            seen[context.is_recompute] += 1
            if name in _KEPT[mode]:
                return CheckpointPolicy.MUST_SAVE
        elif operator.name().partition(".")[0] in _ATTENTION:
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return policy
