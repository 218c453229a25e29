"""One optimizer step: the mathematics, nothing else.

The loss of a step is one number, the sum of weight times cross-entropy over all of its tokens, on all ranks and in
all micro-batches, divided by the sum of the weights. How tokens, conversations and packs are weighed against each
other is decided when the batch is made (`data/loader.py`); here there is one formula.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from data import PackedBatch
from magnum_train.adamw import AdamW
from magnum_train.distributed import all_reduce_sum
from magnum_train.guard import NO_LIMITS, Limits
from model import Loss


class StepResult(NamedTuple):
    """What a step gives; tensors on the device, equal on all ranks but for `row_losses`."""

    loss: Tensor
    """The step's loss, scalar float64."""
    grad_norm: Tensor
    """Global L2 norm of the gradient before clipping, scalar float64; the largest where replicas differ."""
    applied: Tensor
    """Whether the update was applied, scalar bool; false where it was refused."""
    source_losses: Tensor
    """Sum of weight times cross-entropy by source, [S] float64."""
    row_losses: list[Tensor]
    """For each of this rank's micro-batches `losses_by_row`, [2, N]; where ranks share packs, of the whole of them."""


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


def losses_by_row(loss: Loss, batch: PackedBatch) -> Tensor:
    """Split a pack's loss by its documents, to tell which rows a spike came from.

    Added up document by document, not as differences of a running sum, in which one NaN would hide all documents
    behind it. The host knows how many tokens there are, so the device is not asked.

    Args:
        loss: Of this pack, or of this part of it.
        batch: The pack, or the part.

    Returns:
        Σ weight × cross-entropy and Σ weight of each document slot, [2, N] float64. Those of a pack's parts add up to
        those of the pack.
    """
    device, slots, size = loss.tokens.device, len(batch.rows), len(batch.tokens)
    bounds = (batch.cu_seqlens - size * batch.part).clamp(0, size)  # of each document, what lies in this part
    slot_of = torch.repeat_interleave(torch.arange(slots, device=device), bounds.diff(), output_size=size)
    weights = batch.weights.double()
    sums = torch.zeros(2, slots, dtype=torch.float64, device=device)
    return sums.index_add_(1, slot_of, torch.stack([weights * loss.tokens.double(), weights]))


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """The L2 norm of all gradients together.

    Args:
        gradients: float32 or bfloat16, plain or sharded.

    Returns:
        Scalar, a DTensor where they are. Of bfloat16 gradients it is a plain float64, equal on all ranks of a replica:
        torch's own function would add up bfloat16 to a norm of three digits.
    """
    if all(gradient.dtype == torch.float32 for gradient in gradients):
        return torch.nn.utils.get_total_norm(gradients)
    local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    squares = torch.stack(torch._foreach_norm(local, 2, dtype=torch.float32)).double().square().sum()
    first = gradients[0]
    if isinstance(first, DTensor):
        for dimension, placement in enumerate(first.placements):
            if placement.is_shard():
                dist.all_reduce(squares, group=first.device_mesh.get_group(dimension))
    return squares.sqrt()


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients of a norm are multiplied by so that it is at most `max_norm`; torch's own, scalar float32."""
    return (max_norm / (norm.float() + 1e-6)).clamp(max=1.0)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[PackedBatch],
    *,
    weight_sum: float,
    n_sources: int,
    lr: float,
    max_grad_norm: float | None,
    limits: Limits = NO_LIMITS,
    refuse: bool = False,
    sharers: dist.ProcessGroup | None = None,
) -> StepResult:
    """Apply one update from this rank's packs and those of all others, or refuse it on all ranks.

    A refused update touches neither weights nor moments nor Adam's count: the optimizer reads `found_inf` on the
    device, and the host is not asked. One that does not know it, as somebody else's may not, is not called then, and
    for that the host waits for the device.

    Args:
        model: Under FSDP, with gradients summed over ranks.
        optimizer: From `build_optimizer`.
        batches: This rank's micro-batches, on its device; every rank has as many.
        weight_sum: Σ weight over all ranks and micro-batches of the step.
        n_sources: Number of data sources, for the loss by source.
        lr: Learning rate of this step.
        max_grad_norm: Largest global L2 norm; None leaves the gradient.
        limits: The update is refused where loss or norm is above them, or not finite.
        refuse: Refuse the update whatever the numbers: a step that is to be stepped over. The same on all ranks.
        sharers: The ranks that have the other parts of this one's packs, and this one; None where it has whole packs.

    Returns:
        Loss, norm and whether the update was applied.
    """
    device = next(model.parameters()).device
    by_source = torch.zeros(n_sources, dtype=torch.float64, device=device)
    total = torch.zeros((), dtype=torch.float64, device=device)
    row_losses = []
    for batch in batches:
        loss = forward(model, batch)
        (loss.total / weight_sum).backward()  # type: ignore[no-untyped-call]
        total += loss.total.detach()
        by_source += losses_by_source(loss, batch, n_sources)
        row_losses.append(losses_by_row(loss, batch))
        if sharers is not None:
            dist.all_reduce(row_losses[-1], group=sharers)
    sums = all_reduce_sum(torch.cat([total[None], by_source]))
    step_loss = sums[0] / weight_sum

    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = gradient_norm([p.grad for p in parameters if p.grad is not None])
    own_norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).double()
    if isinstance(optimizer, AdamW):  # reads it with the gradient, and so spares a pass over all of them
        optimizer.clip = None if max_grad_norm is None else clip_coefficient(own_norm, max_grad_norm)
    elif max_grad_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
    refused = ~(torch.isfinite(step_loss) & torch.isfinite(own_norm)) | refuse
    refused |= (step_loss > limits.loss) | (own_norm > limits.grad_norm)
    # A norm is summed over the shards of one replica. Another replica has the same only as long as no machine is
    # broken: with a NaN on one of them, or an ulp more at the very limit, it alone would refuse, and its weights would
    # part from the others' for good. So what one refuses all refuse, and all report the same norm.
    agreed = torch.stack([refused.double(), own_norm.isnan().double(), own_norm.nan_to_num(posinf=torch.inf)])
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
    applied = agreed[0] == 0
    whole_norm = torch.where(agreed[1] > 0, torch.nan, agreed[2])

    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
    if getattr(optimizer, "_step_supports_amp_scaling", False):  # torch's sign of those that obey `found_inf`
        optimizer.found_inf = (~applied).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif applied:
        optimizer.step()
    optimizer.zero_grad()
    return StepResult(step_loss, whole_norm, applied, sums[1:], row_losses)
