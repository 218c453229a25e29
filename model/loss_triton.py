"""The rows of the loss head on a GPU as one Triton kernel: losses, and gradients of the logits.

What `model.loss` does in torch's operations beside its matrix products, in two passes over the logits and not in nine;
`tests/unit/model/test_loss_triton.py` holds one against the other in Triton's interpreter, `tests/gpu` on a device. A
program computes a row alone, so nothing depends on the order in which programs run.
"""

# Triton has no types, and is not there where there is no CUDA.
# mypy: disable-error-code="import-not-found, import-untyped, untyped-decorator, no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
"""Logits that a program holds at once: 16 to each of its threads."""


def losses(logits: Tensor, labels: Tensor, weights: Tensor, gradient: Tensor | None) -> Tensor:
    """Each row's cross-entropy; where asked for, weight × (softmax - one-hot) beside it.

    Per logit 8 bytes are read and, with the gradient, 2 or 4 written: a row of Nemo's vocabulary (512 KiB) does not
    stay in a multiprocessor between the passes, and those of all that run at once not in the second-level cache.

    Args:
        logits: [n, V], float32, rows contiguous.
        labels: [n], int64, in 0 … V - 1.
        weights: [n], float32.
        gradient: Takes the gradient, [n, V], rows contiguous, in any floating dtype; memory of its own. None where
            nobody asks.

    Returns:
        [n], float32.

    Source:
        The softmax in one pass is that of Milakov and Gimelshein (arXiv 1805.02867), algorithm 3, here for each of
        `_BLOCK` columns on its own, so that a program's threads meet once a row and not once a block.
    """
    rows, columns = logits.shape
    out = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        into = logits if gradient is None else gradient
        _row[(rows,)](
            logits, into, labels, weights, out, columns, logits.stride(0), into.stride(0),
            GRADIENT=gradient is not None, BLOCK=min(_BLOCK, triton.next_power_of_2(columns)), num_warps=8,
        )  # fmt: skip
    return out


@triton.jit
def _row(
    logits_at, gradient_at, labels_at, weights_at, losses_at,
    columns, logits_stride, gradient_stride,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: its logits once for peak and sum, and once more for the gradient."""
    row = tl.program_id(0).to(tl.int64)
    logits_at += row * logits_stride
    gradient_at += row * gradient_stride
    label = tl.load(labels_at + row)
    at_label = tl.load(logits_at + label)
    lanes = tl.arange(0, BLOCK)
    # The least number and not -inf, so that a lane beyond the last column has no -inf - -inf.
    peaks = tl.full([BLOCK], -3.4028234663852886e38, tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        inside = start + lanes < columns
        logits = tl.load(logits_at + start + lanes, mask=inside, other=-float("inf"))
        higher = tl.maximum(peaks, logits)
        sums = sums * tl.exp(peaks - higher) + tl.exp(logits - higher)
        peaks = higher
    peak = tl.max(peaks, axis=0)
    total = tl.sum(sums * tl.exp(peaks - peak), axis=0)
    tl.store(losses_at + row, tl.log(total) + (peak - at_label))
    if GRADIENT:
        weight = tl.load(weights_at + row)
        share = weight / total
        for start in range(0, columns, BLOCK):
            inside = start + lanes < columns
            logits = tl.load(logits_at + start + lanes, mask=inside, other=0.0)
            gradient = tl.exp(logits - peak) * share
            gradient = tl.where(start + lanes == label, gradient - weight, gradient)
            tl.store(gradient_at + start + lanes, gradient.to(gradient_at.dtype.element_ty), mask=inside)
