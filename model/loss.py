"""Cross-entropy straight from hidden states, without ever holding all logits.

Owns the loss and its gradients. Knows nothing of normalisation: it returns a weighted sum, and who divides it
by what is decided once per step, elsewhere.

Letters: T tokens in a pack, D dim, V vocab_size, n positions that bear weight.
"""

import importlib.util
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

# The most logits held at once, in elements. On a GPU 2,048 rows of Nemo's vocabulary (1 GiB in float32): enough for a
# matrix product at full speed. On a CPU 64 MiB.
LOGITS_ON_GPU = 2**28
LOGITS_ON_CPU = 2**24
# The most of their gradients held at once, narrow, on a GPU: 8,192 rows of Nemo's vocabulary (2 GiB), a whole pack. The
# sum over chunks is then the matrix product's own, and the weight gradient (2.5 GiB in float32) is written once, not
# read and written for every chunk.
GRADIENTS_ON_GPU = 2**30
# Fewer rows than this waste the matrix units, whatever the vocabulary.
MIN_ROWS = 64

_HAS_TRITON = importlib.util.find_spec("triton") is not None  # torch's wheels for CUDA bring it


class Loss(NamedTuple):
    """A pack's loss.

    Attributes:
        total: Σ weight × cross-entropy, a scalar in at least float32, differentiable.
        tokens: Unweighted cross-entropy of each token [T], detached; 0 where the token was skipped.
    """

    total: Float[Tensor, ""]
    tokens: Float[Tensor, " T"]


def linear_cross_entropy(
    hidden: Float[Tensor, "T D"],
    output_weight: Float[Tensor, "V D"],
    labels: Int[Tensor, " T"],
    weights: Float[Tensor, " T"],
    label_positions: Int64[Tensor, " n"] | None = None,
) -> Loss:
    """Σ weight × cross-entropy(hidden @ output_weightᵀ, label), and each token's own.

    With 131,072 words the logits of a pack of 8,192 tokens would take 4 GiB in float32, and their gradient as
    much again. So positions go through in chunks, and each chunk's gradients are taken while its logits are
    at hand: nothing is computed twice, and the backward only multiplies by the incoming scalar. Tokens of
    weight 0 are never computed, and cannot leak even where they are NaN. Logits, the softmax, the loss and
    the sum of the weight gradient over chunks are float32 at least; a gradient is rounded to its parameter's
    dtype once, at the end. Without any weighted token both gradients are zeros, so that every parameter still
    receives one.

    Args:
        hidden: Hidden states after the last norm.
        output_weight: Output matrix, in the dtype of `hidden`.
        labels: Word to be predicted at each position, in 0 … V - 1 wherever the weight is not 0. Batches are
            checked on the host; the device is not asked.
        weights: Loss weight of each position; no gradient flows into it.
        label_positions: Where the weight is not 0, if the host knows. Without it the device is asked, which
            stalls it.

    Returns:
        The weighted sum and the tokens' losses.

    Source:
        The idea of taking gradients inside the forward, chunk by chunk, is that of Liger-Kernel's fused
        linear cross-entropy (arXiv 2410.10989, section 3.2). Here: plain torch, float32 sums, weights and
        skipped tokens.
    """
    if label_positions is None:
        label_positions = weights.nonzero().squeeze(-1)
    total, tokens = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, output_weight, labels, weights, label_positions, torch.is_grad_enabled()
    )
    return Loss(total, tokens)


def rows_at_once(vocab_size: int, *, on_gpu: bool) -> tuple[int, int]:
    """Positions whose logits are held at once, and positions whose gradients of logits are, of a whole pack's.

    On a CPU the gradients take the logits' place; on a GPU they are beside them, in the dtype of the hidden states.
    """
    rows = max(MIN_ROWS, (LOGITS_ON_GPU if on_gpu else LOGITS_ON_CPU) // vocab_size)
    return rows, rows * max(1, GRADIENTS_ON_GPU // (rows * vocab_size)) if on_gpu else rows


def _on_gpu(hidden: Tensor) -> bool:
    return hidden.is_cuda


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients of the sum, taken where the logits are.

    For n positions of Nemo on a GPU, at 16 bits: three products of 2 n D V operations (33 T for a pack of 8,192: at
    least 33 ms at 989 T/s), and 18 n V bytes beside their factors: the logits written (4) and read twice (8), their
    gradient written (2) and read by two products (4); 19 GB for a pack, at least 6 ms at 3.35 TB/s. So the products are
    what costs, and all else has to keep out of their way.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        weights: Tensor,
        positions: Tensor,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        wide, on_gpu = torch.promote_types(hidden.dtype, torch.float32), _on_gpu(hidden)
        # A CPU has no product of narrow factors with a wide result, so there the factors are widened.
        narrow = hidden.dtype if on_gpu else wide
        factor = weight.to(narrow)
        labels = labels.index_select(0, positions).long()
        weights = weights.index_select(0, positions).to(wide)

        count, (size, dim) = positions.numel(), weight.shape
        rows, group = rows_at_once(size, on_gpu=on_gpu)
        need_hidden, need_weight = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        losses = hidden.new_empty(count, dtype=wide)
        # As large for every pack, however many positions bear weight: blocks of one size are found again.
        buffer = hidden.new_empty(min(rows, len(hidden)), size, dtype=wide)
        # Gradients of logits take their place; on a GPU, where they are narrower, those of several chunks are gathered.
        gathered = buffer
        if on_gpu and (need_hidden or need_weight):
            gathered = hidden.new_empty(min(group, len(hidden)), size, dtype=narrow)
        grad_hidden = hidden.new_empty(count, dim, dtype=wide) if need_hidden else None
        grad_weight = weight.new_zeros(size, dim, dtype=wide) if need_weight else None

        for start in range(0, count, group):
            here = slice(start, min(start + group, count))
            states = hidden.index_select(0, positions[here]).to(narrow)
            grad_logits = gathered[: len(states)] if need_hidden or need_weight else None
            for first in range(0, len(states), rows):
                part = states[first : first + rows]
                logits = _product(part, factor.t(), buffer[: len(part)])
                chunk = slice(start + first, start + first + len(part))
                gradient = None if grad_logits is None else grad_logits[first : first + rows]
                losses[chunk] = _losses(logits, labels[chunk], weights[chunk], gradient)
            if grad_logits is not None and grad_hidden is not None:
                _product(grad_logits, factor, grad_hidden[here])
            if grad_logits is not None and grad_weight is not None:
                _add_product(grad_logits.t(), states, grad_weight, first=start == 0)

        ctx.save_for_backward(grad_hidden, grad_weight, positions)
        ctx.length, ctx.hidden_dtype, ctx.weight_dtype = hidden.shape[0], hidden.dtype, weight.dtype
        tokens = hidden.new_zeros(hidden.shape[0], dtype=wide).index_copy_(0, positions, losses)
        ctx.mark_non_differentiable(tokens)
        return (losses * weights).sum(), tokens

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, positions = ctx.saved_tensors
        if grad_hidden is not None:
            scaled = (grad_hidden * grad_total).to(ctx.hidden_dtype)
            grad_hidden = scaled.new_zeros(ctx.length, scaled.shape[1]).index_copy_(0, positions, scaled)
        if grad_weight is not None:
            # Multiplied straight into the narrow result: at Nemo's size a wide one would cost 2.5 GiB more.
            result = torch.empty_like(grad_weight, dtype=ctx.weight_dtype)
            grad_weight = torch.mul(grad_weight, grad_total, out=result)
        return grad_hidden, grad_weight, None, None, None, None


def _losses(logits: Tensor, labels: Tensor, weights: Tensor, gradient: Tensor | None) -> Tensor:
    """Each row's cross-entropy, and weight × (softmax - one-hot); the logits are gone afterwards.

    Args:
        logits: [n, V], at least float32.
        labels: [n], int64.
        weights: [n], in the dtype of the logits.
        gradient: Takes the second, [n, V], in its own dtype; may be `logits` itself. None where nobody asks.

    Returns:
        [n], in the dtype of the logits.
    """
    if logits.is_cuda and _HAS_TRITON and logits.dtype == torch.float32:
        from model.loss_triton import losses  # triton is only there with CUDA

        return losses(logits, labels, weights, gradient)
    # In place: logits, then exp(logits - peak), then the gradient.
    peak = logits.amax(dim=1, keepdim=True)
    at_label = logits.gather(1, labels.unsqueeze(1))
    sums = logits.sub_(peak).exp_().sum(dim=1, keepdim=True)
    if gradient is not None:
        logits.mul_(weights.unsqueeze(1) / sums)
        index = (torch.arange(len(logits), device=logits.device), labels)
        # Written, not scatter-added: this has a deterministic kernel on a GPU.
        logits[index] = logits[index] - weights
        if gradient.data_ptr() != logits.data_ptr():
            gradient.copy_(logits)
    return (sums.log() + (peak - at_label)).squeeze(1)


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Write a @ b to `out`, which may be wider than the factors (on a GPU)."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def _add_product(a: Tensor, b: Tensor, out: Tensor, *, first: bool) -> None:
    """Add a @ b to `out`, which may be wider than the factors (on a GPU); the first time it is known to be zero."""
    if first:
        _product(a, b, out)
    elif a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
