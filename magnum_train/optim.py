"""The optimizer, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:  # the type alone: optimizers are also used where there is no Hydra
    from magnum_train.config import OptimConfig


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """The learning rate of a step; a function, so that nothing needs to be restored on resume.

    Args:
        step: From 1 to `total_steps`.
        total_steps: Optimizer steps of the whole run.
        config: Peak, shape and ratios.

    Returns:
        The rate, per update. Warm-up reaches the peak at its last step; cosine, linear and wsd reach
        `min_lr_ratio` of the peak at the last step.
    """
    warmup = round(config.warmup_ratio * total_steps)
    if step <= warmup:
        return config.lr * step / warmup
    if config.schedule == "constant":
        return config.lr
    start = warmup
    if config.schedule == "wsd":
        start = max(warmup, total_steps - round(config.decay_ratio * total_steps))
        if step <= start:
            return config.lr
    progress = (step - start) / (total_steps - start)
    shape = (1 + math.cos(math.pi * progress)) / 2 if config.schedule == "cosine" else 1 - progress
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * shape)


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Fused AdamW over the model's parameters, in two groups: with weight decay and without.

    Fused, because it is the fastest on every device and because it alone obeys `found_inf`, by which `step.py`
    refuses an update on the device.

    Args:
        model: Sharded or plain.
        config: Betas, epsilon, decay.

    Returns:
        The optimizer; `step.py` sets its learning rate before each update.
    """
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        spare = parameter.ndim < 2 or name.startswith("tok_embeddings")
        (spared if spare and not config.decay_all else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
