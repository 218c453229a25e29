"""Ulysses sequence parallelism: neighbouring ranks train the same pack, each its part of the tokens.

Norms, projections, feed-forward and loss go token by token, so a rank computes them on its own. Attention goes head by
head: before it the ranks exchange their tokens of all heads for all tokens of some heads, after it they change back.
The kernel in between sees whole documents, and is the one that would run on one rank. What is kept for the backward is
divided by the ranks. Owns the exchange; a batch is cut by `PackedBatch.cut`, and forwards with a key-value cache are
not divided.

Letters: S ranks that share a pack, T tokens of the pack, t = T / S of them here, H query heads, K key-value heads, E
head_dim.

Source: DeepSpeed-Ulysses (arXiv 2309.14509), section 3.1. Here grouped heads too, and one exchange for q, k and v.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int32
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import GroupName

from magnum_train.errors import ConfigError
from model import Transformer, TransformerConfig
from model.attention import attention
from model.transformer import Attention


def check_heads(ranks: int, config: TransformerConfig) -> None:
    """Make sure that so many ranks can share a model's heads evenly.

    Args:
        ranks: S, `parallel.sequence`.
        config: The architecture; its query heads are a multiple of its key-value heads.

    Raises:
        ConfigError: They cannot; names the most that can.
    """
    if config.n_kv_heads % ranks:
        fitting = max(n for n in range(1, ranks) if config.n_kv_heads % n == 0)
        raise ConfigError(
            "parallel.sequence", str(ranks), f"a divisor of the model's {config.n_kv_heads} key-value heads",
            f"Try parallel.sequence={fitting}.",
        )  # fmt: skip


def spread(model: Transformer, group: ProcessGroup) -> None:
    """Let a model take a part of a pack's tokens, the other parts being on the other ranks of a group.

    From then on a forward without a cache takes t tokens, labels, weights and positions, the documents' bounds being
    the whole pack's, and all ranks of the group run it at the same time. With a cache nothing changes.

    Args:
        model: Whose attention is to exchange; before it is wrapped, compiled or sharded.
        group: The ranks, in the order of their parts.
    """
    kernel = partial(shared_attention, group.group_name, group.size())
    for module in model.modules():
        if isinstance(module, Attention):  # the same for all, so that one compilation serves them
            module.kernel = kernel


def shared_attention(
    group: str,
    ranks: int,
    q: Float[Tensor, "t H E"],
    k: Float[Tensor, "t K E"],
    v: Float[Tensor, "t K E"],
    cu_seqlens: Int32[Tensor, " bounds"],
    max_seqlen: int,
    backend: str,
    lengths: tuple[int, ...] | None = None,
) -> Float[Tensor, "t H E"]:
    """`model.attention.attention` of the whole pack, for this rank's tokens. Differentiable.

    Args:
        group: Name of the process group.
        ranks: S, its size; divides H and K.
        q: Queries of this rank's tokens, rotated.
        k: Keys, rotated.
        v: Values.
        cu_seqlens: Where the documents of the whole pack begin, ending in T.
        max_seqlen: At least the longest document.
        backend: One of `model.attention.BACKENDS`.
        lengths: The documents' lengths on the host, if they are known there.

    Returns:
        Attention's output for this rank's tokens.
    """
    # Rank j gets the j-th part of the heads. Query heads stay with their key-value head, as both are cut alike.
    size, width = len(q), q.shape[-1]
    parts = [x.view(size, ranks, -1, width).transpose(0, 1) for x in (q, k, v)]  # each [S, t, heads / S, E]
    mine = _all_to_all(torch.cat(parts, dim=2), group).flatten(0, 1)  # [T, (H + 2K) / S, E]
    own_q, own_k, own_v = mine.split([part.shape[2] for part in parts], dim=1)
    out = attention(own_q, own_k, own_v, cu_seqlens, max_seqlen, backend, lengths)
    back: Tensor = _all_to_all(out.view(ranks, size, -1, width), group)  # [S, t, H / S, E], the first over heads
    return back.transpose(0, 1).flatten(1, 2)


@torch.library.custom_op("magnum_train::all_to_all", mutates_args=())
def _all_to_all(x: Tensor, group: str) -> Tensor:
    """Entry j of `x` goes to rank j of the group; entry i of the result came from rank i.

    An operator, so that a compiler sees one node, and selective checkpointing can keep its result by name. torch's own
    functional collectives are private, and differ between the versions that we run on.
    """
    received = x.new_empty(x.shape)
    dist.all_to_all_single(received, x.contiguous(), group=_resolve_process_group(GroupName(group)))
    return received


@_all_to_all.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return x.new_empty(x.shape)


def _keep_group(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.group = inputs[1]


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _all_to_all(grad, ctx.group), None  # what came from rank i goes back to it: the exchange is its own inverse


_all_to_all.register_autograd(_gradient, setup_context=_keep_group)
