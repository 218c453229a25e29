"""Numbers that go wrong: which loss and which gradient norm are spikes, judged by those of the steps before.

Pure functions of a few floats, so that a resumed run decides as the run that never stopped, to the bit. Knows no
tensors, no ranks and no files; `step.py` refuses an update by the limits, and `train.py` says what follows from it.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # the type alone: a step is also used where there is no Hydra
    from magnum_train.config import GuardConfig

JUDGED_FROM = 20
"""Applied steps before anything is judged: fewer say too little about how far values spread."""

LOSS_FLOOR = 0.01
"""Least median deviation of the loss that is reckoned with, as a share of its median. With the default of ten
deviations a loss is no spike below 1.15 times the median, however flat the series."""

NORM_FLOOR = 0.1
"""Least median deviation of the norm's logarithm. With ten deviations a norm is no spike below 4.4 times the median."""

DEVIATION = 1.4826
"""Standard deviation of a normal distribution whose median absolute deviation is 1."""


class Limits(NamedTuple):
    """What a step's loss and gradient norm may be at most, and the medians that this follows from."""

    loss: float
    grad_norm: float
    median_loss: float
    median_grad_norm: float


NO_LIMITS = Limits(math.inf, math.inf, math.nan, math.nan)
"""Nothing is judged, and there are no medians."""


def limits(recent: Sequence[Sequence[float]], config: GuardConfig, share: float = 1.0) -> Limits:
    """Work out how high loss and gradient norm may be in the next step.

    Median and median absolute deviation, since neither moves when one value in a hundred is absurd, as mean and
    standard deviation would. Only upward: a loss that falls is what training is for. The norm is judged by its
    logarithm, since norms spread by factors. Without the floors a flat series would make every ripple a spike.

    An epoch's last step may hold a fraction of the packs of the others, and its mean spreads the more: the loss by
    1/√share, and noise makes the gradient longer by up to as much. Without regard to this, it would be a false alarm
    in every epoch.

    Args:
        recent: Loss and gradient norm of applied steps, the newest last, as `remembered` keeps them.
        config: How many of them count, and how far from the median a spike begins.
        share: Packs of the step to be judged as a share of a whole step's, above 0 and at most 1.

    Returns:
        The limits; `NO_LIMITS` before there are 20 values. The same arguments give the same bits.
    """
    recent = recent[-config.window :]
    if len(recent) < JUDGED_FROM:
        return NO_LIMITS
    losses = [loss for loss, _ in recent]
    logs = [math.log(max(norm, sys.float_info.min)) for _, norm in recent]
    loss, loss_deviation = _median_and_deviation(losses)
    log, log_deviation = _median_and_deviation(logs)
    far = config.spike_deviations * DEVIATION
    highest = log + far * max(log_deviation, NORM_FLOOR) - 0.5 * math.log(share)
    return Limits(
        loss=loss + far * max(loss_deviation, LOSS_FLOOR * loss) / math.sqrt(share),
        grad_norm=math.exp(highest) if highest < math.log(sys.float_info.max) else math.inf,
        median_loss=loss,
        median_grad_norm=math.exp(log),
    )


def verdict(loss: float, grad_norm: float, limits: Limits) -> str | None:
    """Say what is wrong with a step's numbers, for a person.

    Args:
        loss: The step's.
        grad_norm: The step's, before clipping.
        limits: What they were judged by.

    Returns:
        Which value is not finite or too high, with its limit and median; None where all is well.
    """
    values = (
        ("loss", loss, limits.loss, limits.median_loss),
        ("gradient norm", grad_norm, limits.grad_norm, limits.median_grad_norm),
    )
    wrong = [f"{name} {value} is not finite" for name, value, _, _ in values if not math.isfinite(value)]
    wrong += [
        f"{name} {value:.4g} is above its limit of {limit:.4g} (median of the steps before {median:.4g})"
        for name, value, limit, median in values
        if math.isfinite(value) and value > limit
    ]
    return "; ".join(wrong) or None


def remembered(
    recent: Sequence[Sequence[float]], loss: float, grad_norm: float, config: GuardConfig
) -> list[list[float]]:
    """The values to judge the next steps by, once one more update has been applied.

    Refused steps are not among them. So where losses rise for good and steps are refused for it, the limits stay, and
    `train.max_skipped_steps` ends the run.

    Args:
        recent: Those kept so far, the newest last.
        loss: The applied step's.
        grad_norm: The applied step's.
        config: How many are kept.

    Returns:
        At most `config.window` pairs of loss and norm, the newest last; plain lists, as JSON has them.
    """
    return [*map(list, recent), [loss, grad_norm]][-config.window :]


def _median_and_deviation(values: list[float]) -> tuple[float, float]:
    """The median, and the median of the distances from it."""
    median = statistics.median(values)
    return median, statistics.median([abs(value - median) for value in values])
