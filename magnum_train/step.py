"""One optimizer step: the mathematics, nothing else.

The loss of a step is one number, the sum of weight times cross-entropy over all of its tokens, on all ranks and in
all micro-batches, divided by the sum of the weights. How tokens, conversations and packs are weighed against each
other is decided when the batch is made (`data/loader.py`); here there is one formula.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from data import PackedBatch
from magnum_train.distributed import all_reduce_sum
from model import Loss


class StepResult(NamedTuple):
    """What a step gives; tensors on the device, equal on all ranks."""

    loss: Tensor
    """The step's loss, scalar float64."""
    grad_norm: Tensor
    """Global L2 norm of the gradient before clipping, scalar."""
    applied: Tensor
    """Whether the update was applied, scalar bool; false where loss or norm is not finite."""
    source_losses: Tensor
    """Sum of weight times cross-entropy by source, [S] float64."""


def forward(model: nn.Module, batch: PackedBatch) -> Loss:
    """Run one pack through the model."""
    loss: Loss = model(
        batch.tokens,
        batch.positions,
        batch.cu_seqlens,
        batch.max_seqlen,
        labels=batch.labels,
        weights=batch.weights,
        label_positions=batch.label_positions,
    )
    return loss


def losses_by_source(loss: Loss, batch: PackedBatch, n_sources: int) -> Tensor:
    """Split a pack's loss by the source of its documents.

    Args:
        loss: Of this pack.
        batch: The pack; `sources` [T] holds each position's source, -1 in padding.
        n_sources: S.

    Returns:
        Σ weight × cross-entropy by source, [S] float64.
    """
    sums = torch.zeros(n_sources + 1, dtype=torch.float64, device=loss.tokens.device)
    sums.index_add_(0, batch.sources + 1, loss.tokens.double() * batch.weights.double())
    return sums[1:]


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[PackedBatch],
    *,
    weight_sum: float,
    n_sources: int,
    lr: float,
    max_grad_norm: float | None,
) -> StepResult:
    """Apply one update from this rank's packs and those of all others.

    A refused update (loss or gradient norm not finite) touches neither weights nor moments nor Adam's count: the
    fused optimizer reads `found_inf` on the device, and the host is not asked.

    Args:
        model: Under FSDP, with gradients summed over ranks.
        optimizer: Fused.
        batches: This rank's micro-batches, on its device; every rank has as many.
        weight_sum: Σ weight over all ranks and micro-batches of the step.
        n_sources: Number of data sources, for the loss by source.
        lr: Learning rate of this step.
        max_grad_norm: Largest global L2 norm; None leaves the gradient.

    Returns:
        Loss, norm and whether the update was applied.
    """
    device = batches[0].tokens.device
    by_source = torch.zeros(n_sources, dtype=torch.float64, device=device)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for batch in batches:
        loss = forward(model, batch)
        (loss.total / weight_sum).backward()  # type: ignore[no-untyped-call]
        total += loss.total.detach()
        by_source += losses_by_source(loss, batch, n_sources)
    sums = all_reduce_sum(torch.cat([total[None], by_source]))
    step_loss = sums[0] / weight_sum

    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if max_grad_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
    whole_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    applied = torch.isfinite(step_loss) & torch.isfinite(whole_norm)

    optimizer.found_inf = (~applied).float()  # type: ignore[attr-defined]
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return StepResult(step_loss, whole_norm, applied, sums[1:])
