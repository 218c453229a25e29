"""Spikes are told from the noise, the fall and the epoch ends of real series; the same values give the same bits."""

import json
import math
import random
from pathlib import Path

import pytest

from magnum_train import train
from magnum_train.config import GuardConfig, compose
from magnum_train.guard import NO_LIMITS, limits, remembered, verdict
from tiny_runs import metrics, overrides

CONFIG = GuardConfig()


def noisy(count: int, seed: int = 0) -> list[list[float]]:
    draw = random.Random(seed)
    return [[2.0 + draw.gauss(0, 0.1), math.exp(draw.gauss(0, 0.3))] for _ in range(count)]


def alarms(series: list[list[float]], shares: list[float] | None = None) -> list[int]:
    """The steps, from 1, that would be refused: each is judged by those applied before it."""
    recent: list[list[float]] = []
    found = []
    for step, (loss, norm) in enumerate(series, 1):
        if verdict(loss, norm, limits(recent, CONFIG, shares[step - 1] if shares else 1.0)) is None:
            recent = remembered(recent, loss, norm, CONFIG)
        else:
            found.append(step)
    return found


def test_nothing_is_judged_before_there_are_twenty_values() -> None:
    assert limits(noisy(19), CONFIG) is NO_LIMITS
    assert verdict(1e9, 1e9, NO_LIMITS) is None
    assert limits(noisy(20), CONFIG).loss < math.inf


def test_limits_are_median_and_deviations_worked_out_by_hand() -> None:
    recent = [[float(n), math.exp(n)] for n in range(1, 22)]  # median 11, median deviation 5
    found = limits(recent, GuardConfig(spike_deviations=2))
    assert found.median_loss == 11
    assert found.loss == pytest.approx(11 + 2 * 1.4826 * 5, rel=1e-15)
    assert found.median_grad_norm == pytest.approx(math.exp(11), rel=1e-14)
    assert found.grad_norm == pytest.approx(math.exp(11 + 2 * 1.4826 * 5), rel=1e-13)


def test_a_flat_series_raises_no_alarm_at_a_ripple_but_at_a_spike() -> None:
    recent = [[2.0, 0.5]] * 40
    found = limits(recent, CONFIG)
    assert verdict(2.2, 1.5, found) is None
    assert verdict(2.4, 0.5, found) is not None
    assert verdict(2.0, 3.0, found) is not None


def test_only_upward_deviations_count() -> None:
    found = limits(noisy(100), CONFIG)
    assert verdict(0.0, 0.0, found) is None


def test_one_absurd_value_in_the_window_hardly_moves_the_limits() -> None:
    clean, spoilt = noisy(100), [*noisy(99), [1e6, 1e6]]
    assert limits(spoilt, CONFIG).loss == pytest.approx(limits(clean, CONFIG).loss, rel=0.02)
    assert limits(spoilt, CONFIG).grad_norm == pytest.approx(limits(clean, CONFIG).grad_norm, rel=0.2)


def test_only_the_window_counts_also_where_more_was_kept() -> None:
    narrow = GuardConfig(window=20)
    assert limits([[9.0, 9.0]] * 50 + noisy(20), narrow) == limits(noisy(20), narrow)
    assert len(remembered(noisy(100), 1.0, 1.0, narrow)) == 20


def test_values_that_went_through_json_give_the_same_bits() -> None:
    recent = noisy(100, seed=3)
    again = json.loads(json.dumps(recent))
    assert [x.hex() for x in limits(again, CONFIG)] == [x.hex() for x in limits(recent, CONFIG)]
    kept = remembered(recent, 1.0, 2.0, CONFIG)
    assert kept == json.loads(json.dumps(kept))
    assert kept[-1] == [1.0, 2.0]
    assert len(kept) == CONFIG.window
    assert len(recent) == 100  # what was handed in is as it was


def test_a_norm_of_zero_and_limits_beyond_floats_are_no_errors() -> None:
    zero = limits([[0.0, 0.0]] * 20, CONFIG)
    assert verdict(0.0, 0.0, zero) is None
    assert limits([[1.0, 1e300]] * 20, GuardConfig(spike_deviations=1000)).grad_norm == math.inf


@pytest.mark.parametrize(
    ("loss", "norm", "said"),
    [
        (math.nan, 1.0, "loss nan is not finite"),
        (2.0, math.inf, "gradient norm inf is not finite"),
        (9.0, 1.0, "loss 9 is above its limit of 2.297 (median of the steps before 2)"),
        (2.0, 30.0, "gradient norm 30 is above its limit of 4.404 (median of the steps before 1)"),
        (9.0, math.nan, "gradient norm nan is not finite; loss 9 is above its limit of 2.297 (median of"),
    ],
)
def test_a_verdict_names_the_value_the_limit_and_the_median(loss: float, norm: float, said: str) -> None:
    text = verdict(loss, norm, limits([[2.0, 1.0]] * 20, CONFIG))
    assert text is not None
    assert text.startswith(said)


def test_a_step_of_a_few_packs_may_spread_more() -> None:
    recent = noisy(100)
    whole, part = limits(recent, CONFIG), limits(recent, CONFIG, share=1 / 16)
    assert part.loss - part.median_loss == pytest.approx(4 * (whole.loss - whole.median_loss))
    assert part.grad_norm == pytest.approx(4 * whole.grad_norm)


def test_a_rise_for_good_is_refused_for_as_long_as_it_lasts() -> None:
    assert alarms([*noisy(50), *[[9.0, 1.0]] * 10]) == list(range(51, 61))


def test_a_real_series_has_no_alarm_and_each_planted_spike_has_one(tmp_path: Path) -> None:
    line = overrides(
        tmp_path, "train.max_steps=100", "validation.every_steps=null", "checkpoint.every_steps=null", rows=100
    )
    train.train(compose(line))
    rows = metrics(tmp_path / "run")
    series = [[row["loss"], row["grad_norm"]] for row in rows]
    assert rows[-1]["epoch"] > 10
    assert alarms(series) == []
    for step in (30, 60, 99):
        loss, norm = series[step - 1]
        assert alarms([*series[: step - 1], [loss, 30 * norm], *series[step:]]) == [step]
        assert alarms([*series[: step - 1], [loss + 20, norm], *series[step:]]) == [step]
