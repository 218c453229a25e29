"""Cross-entropy straight from hidden states, without ever holding all logits.

Owns the loss and its gradients. Knows nothing of normalisation: it returns a weighted sum, and who divides it
by what is decided once per step, elsewhere.

Letters: T tokens in a pack, D dim, V vocab_size, n positions that bear weight.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

# The most logits held at once, in elements. On a GPU 2,048 rows of Nemo's vocabulary (1 GiB in float32):
# enough for matrix products at full speed. On a CPU 64 MiB.
LOGITS_ON_GPU = 2**28
LOGITS_ON_CPU = 2**24
# Fewer rows than this waste the matrix units, whatever the vocabulary.
MIN_ROWS = 64
# A weight gradient that cannot be added to inside the matrix product is added in slices of so many elements
# (256 MiB).
GRADIENT_SLICE = 2**26


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


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients of the sum, taken where the logits are."""

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
        wide = torch.promote_types(hidden.dtype, torch.float32)
        # A CPU has no product of narrow factors with a wide result, so there the factors are widened.
        narrow = hidden.dtype if hidden.is_cuda else wide
        factor = weight.to(narrow)
        labels = labels.index_select(0, positions).long()
        weights = weights.index_select(0, positions).to(wide)

        count, (size, dim) = positions.numel(), weight.shape
        rows = max(MIN_ROWS, (LOGITS_ON_GPU if hidden.is_cuda else LOGITS_ON_CPU) // size)
        need_hidden, need_weight = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        losses = hidden.new_empty(count, dtype=wide)
        buffer = hidden.new_empty(min(rows, count), size, dtype=wide)
        grad_hidden = hidden.new_empty(count, dim, dtype=wide) if need_hidden else None
        grad_weight = weight.new_zeros(size, dim, dtype=wide) if need_weight else None

        for start in range(0, count, rows):
            chunk = slice(start, min(start + rows, count))
            states = hidden.index_select(0, positions[chunk]).to(narrow)
            logits = _product(states, factor.t(), buffer[: states.shape[0]])
            target = labels[chunk].unsqueeze(1)
            # In place: logits, then exp(logits - peak), then the gradient weight × (softmax - one-hot).
            peak = logits.amax(dim=1, keepdim=True)
            at_label = logits.gather(1, target)
            sums = logits.sub_(peak).exp_().sum(dim=1, keepdim=True)
            losses[chunk] = (sums.log() + (peak - at_label)).squeeze(1)
            if not (need_hidden or need_weight):
                continue
            share = weights[chunk].unsqueeze(1)
            grad_logits = logits.mul_(share / sums)
            index = (torch.arange(states.shape[0], device=logits.device), labels[chunk])
            # Written, not scatter-added: this has a deterministic kernel on a GPU.
            grad_logits[index] = grad_logits[index] - weights[chunk]
            grad_logits = grad_logits.to(narrow)
            if grad_hidden is not None:
                _product(grad_logits, factor, grad_hidden[chunk])
            if grad_weight is not None:
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


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Write a @ b to `out`, which may be wider than the factors (on a GPU)."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def _add_product(a: Tensor, b: Tensor, out: Tensor, *, first: bool) -> None:
    """Add a @ b to `out`; the first time `out` is known to be zero."""
    if first:
        _product(a, b, out)
    elif a.dtype == out.dtype:
        out.addmm_(a, b)
    else:  # not every torch adds narrow products to a wide matrix
        rows = max(1, GRADIENT_SLICE // out.shape[1])
        for start in range(0, out.shape[0], rows):
            part = slice(start, start + rows)
            out[part] += torch.mm(a[part], b, out_dtype=out.dtype)
