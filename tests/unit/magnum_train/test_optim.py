"""The learning rate as a function of the step, and which parameters decay."""

import itertools

import pytest
import torch

from magnum_train.config import OptimConfig
from magnum_train.optim import build_optimizer, learning_rate
from model import Transformer, TransformerConfig

TOTAL = 100


def rates(**settings: object) -> list[float]:
    config = OptimConfig(lr=1.0, warmup_ratio=0.1, min_lr_ratio=0.2, **settings)  # type: ignore[arg-type]
    return [learning_rate(step, TOTAL, config) for step in range(1, TOTAL + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_warms_up_linearly_to_the_peak(schedule: str) -> None:
    assert rates(schedule=schedule)[:10] == pytest.approx([0.1 * s for s in range(1, 11)])


@pytest.mark.parametrize(("schedule", "last"), [("cosine", 0.2), ("linear", 0.2), ("constant", 1.0), ("wsd", 0.2)])
def test_ends_where_it_should_and_never_rises_again(schedule: str, last: float) -> None:
    after = rates(schedule=schedule)[9:]
    assert after[-1] == pytest.approx(last)
    assert all(a >= b for a, b in itertools.pairwise(after))


def test_cosine_is_half_way_down_half_way_through() -> None:
    assert rates(schedule="cosine")[54] == pytest.approx(0.6)


def test_wsd_is_flat_until_its_decay() -> None:
    values = rates(schedule="wsd", decay_ratio=0.3)
    assert values[9:70] == [1.0] * 61
    assert values[84] == pytest.approx(0.6)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("total", [1, 2, 3])
def test_the_shortest_runs_have_a_rate_at_every_step(schedule: str, total: int) -> None:
    config = OptimConfig(lr=1.0, schedule=schedule, warmup_ratio=1.0)
    assert all(0 < learning_rate(step, total, config) <= 1 for step in range(1, total + 1))


@pytest.mark.parametrize(("decay_all", "spared"), [(False, {"tok_embeddings.weight"}), (True, set())])
def test_decay_spares_norms_and_embeddings_unless_asked(decay_all: bool, spared: set[str]) -> None:
    model = Transformer(TransformerConfig(40, 1, 4, 2, 16, 64, 50))
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.1, decay_all=decay_all))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decays) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        expected = 0.0 if not decay_all and ("norm" in name or name in spared) else 0.1
        assert decays[id(parameter)] == expected, name


def test_a_refused_update_leaves_weights_moments_and_count() -> None:
    model = torch.nn.Linear(4, 4)
    optimizer = build_optimizer(model, OptimConfig(lr=0.1, weight_decay=0.5))
    for found_inf in (0.0, 1.0):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, float("nan") if found_inf else 1.0)
        before = [t.clone() for p in model.parameters() for t in (p.data, *optimizer.state[p].values())]
        optimizer.found_inf = torch.tensor(found_inf)  # type: ignore[attr-defined]
        optimizer.step()
    after = [t for p in model.parameters() for t in (p.data, *optimizer.state[p].values())]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
