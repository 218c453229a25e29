"""Which optimizer, and the learning rate as a function of the step."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from magnum_train.adamw import BLOCK, AdamW
from magnum_train.errors import ConfigError

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


def build_optimizer(model: nn.Module, config: OptimConfig, precision: str = "float32") -> torch.optim.Optimizer:
    """The optimizer over the model's parameters, in two groups: with weight decay and without.

    AdamW over float32 parameters and moments is torch's own, fused; over anything smaller it is `adamw.AdamW`. Both
    obey `found_inf`, by which `step.py` refuses an update on the device.

    Args:
        model: Sharded or plain, its parameters in `parameter_dtype(precision)`.
        config: Which, and its rates.
        precision: How parameters are stored, by name.

    Returns:
        The optimizer; `step.py` sets its learning rate before each update.

    Raises:
        ConfigError: There is no such optimizer here, or it does not take the options.
    """
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        spare = parameter.ndim < 2 or name.startswith("tok_embeddings")
        (spared if spare and not config.decay_all else decayed).append(parameter)
    both = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    groups: list[dict[str, Any]] = [group for group in both if group["params"]]
    if config.name not in ("adamw", "adamw8bit"):
        return _called(_named(config.name), groups, config, {})
    shared: dict[str, Any] = {"betas": (config.beta1, config.beta2), "eps": config.eps}
    if config.name == "adamw8bit":
        by_chance = {"bf16_stochastic_round": True} if precision == "bf16_stochastic" else {}
        return _called(_adamw8bit(), groups, config, shared | by_chance)
    if parameter_dtype(precision) == torch.float32 and config.moments == "float32":
        return torch.optim.AdamW(groups, lr=config.lr, **shared, fused=True)
    return AdamW(groups, lr=config.lr, **shared, low_bits=precision == "bf16_split", moments=config.moments)


def parameter_dtype(precision: str) -> torch.dtype:
    """What parameters are stored in: float32 masters, or what they are computed with."""
    return torch.bfloat16 if precision in ("bf16_split", "bf16_stochastic") else torch.float32


def stored_bytes(precision: str, config: OptimConfig) -> float:
    """Bytes of a parameter and its states, in memory between steps and in a checkpoint, beside its gradient.

    Args:
        precision: How parameters are stored, by name.
        config: The optimizer; one that is not known here counts as having two float32 moments.
    """
    masters = {"bf16_split": 4, "bf16_stochastic": 2}.get(precision, 4)
    if config.name == "adamw8bit":
        return masters + 2 * (1 + 4 / 256)  # a float32 scale for each 256
    return masters + 2 * {"float32": 4, "bf16": 2, "int8": 1 + 1 / BLOCK}[config.moments]


def _named(name: str) -> Callable[..., torch.optim.Optimizer]:
    """The class that a dotted name names."""
    module, _, last = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), last)
    except (ImportError, AttributeError) as error:
        raise ConfigError("optim.name", f"{name}: {error}", "a class that can be imported") from error
    if not callable(found):
        raise ConfigError("optim.name", f"{name}, a {type(found).__name__}", "a class of optimizers")
    return cast(Callable[..., torch.optim.Optimizer], found)


def _adamw8bit() -> Callable[..., torch.optim.Optimizer]:
    """torchao's, where it is installed."""
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        remedy = "pip install -c constraints.txt '.[torchao]'"
        raise ConfigError("optim.name", f"adamw8bit, and {error}", "torchao, an extra", remedy) from error
    return cast(Callable[..., torch.optim.Optimizer], AdamW8bit)


def _called(
    kind: Callable[..., torch.optim.Optimizer], groups: list[dict[str, Any]], config: OptimConfig, known: dict[str, Any]
) -> torch.optim.Optimizer:
    """An optimizer of others, with the options that are set."""
    try:
        return kind(groups, lr=config.lr, **(known | config.options))
    except (TypeError, ValueError) as error:
        found = ", ".join(f"{key}={value}" for key, value in config.options.items()) or "nothing"
        raise ConfigError("optim.options", f"{found}: {error}", f"what {config.name} takes") from error
