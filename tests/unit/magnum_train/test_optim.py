"""The learning rate as a function of the step, which parameters decay, and which optimizer it is."""

import importlib.util
import itertools
from typing import Any

import pytest
import torch

from magnum_train.adamw import AdamW
from magnum_train.config import OptimConfig, compose
from magnum_train.errors import ConfigError
from magnum_train.optim import build_optimizer, learning_rate, parameter_dtype, stored_bytes
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


@pytest.mark.parametrize(
    ("precision", "moments", "kind", "states"),
    [
        ("auto", "float32", torch.optim.AdamW, {"step", "exp_avg", "exp_avg_sq"}),
        ("bf16_mixed", "float32", torch.optim.AdamW, {"step", "exp_avg", "exp_avg_sq"}),
        ("bf16_mixed", "bf16", AdamW, {"step", "exp_avg", "exp_avg_sq"}),
        ("bf16_split", "float32", AdamW, {"step", "low", "exp_avg", "exp_avg_sq"}),
        ("bf16_stochastic", "float32", AdamW, {"step", "exp_avg", "exp_avg_sq"}),
    ],
)
def test_a_recipe_has_its_optimizer(precision: str, moments: str, kind: type, states: set[str]) -> None:
    model = torch.nn.Linear(4, 4).to(parameter_dtype(precision))
    optimizer = build_optimizer(model, OptimConfig(moments=moments), precision)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert type(optimizer) is kind
    assert all(set(state) == states for state in optimizer.state.values())
    dtypes = {state["exp_avg"].dtype for p, state in optimizer.state.items() if p.dim() == 2}
    assert dtypes == {torch.bfloat16 if moments == "bf16" else torch.float32}


def test_what_the_recipes_take_of_memory() -> None:
    """Bytes of a parameter with its states, the gradient aside."""
    told = {
        (precision, moments): stored_bytes(precision, OptimConfig(moments=moments))
        for precision in ("auto", "float32", "bf16_mixed", "bf16_split", "bf16_stochastic")
        for moments in ("float32", "int8")
    }
    assert {told[precision, "float32"] for precision in ("auto", "float32", "bf16_mixed", "bf16_split")} == {12}
    assert told["bf16_stochastic", "float32"] == 10
    assert told["bf16_split", "int8"] == pytest.approx(6.0078, abs=1e-4)
    assert told["bf16_stochastic", "int8"] == pytest.approx(4.0078, abs=1e-4)


def test_a_class_by_its_dotted_name_gets_groups_rate_and_options() -> None:
    config = OptimConfig(name="torch.optim.SGD", lr=0.5, weight_decay=0.1, options={"momentum": 0.9, "nesterov": True})
    optimizer = build_optimizer(torch.nn.Linear(4, 4), config)
    assert type(optimizer) is torch.optim.SGD
    assert [(group["lr"], group["momentum"], group["nesterov"]) for group in optimizer.param_groups] == [
        (0.5, 0.9, True)
    ] * 2
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "torch.optim.Nothing"}, "optim.name: found torch.optim.Nothing: "),
        ({"name": "nowhere.at_all.Class"}, "No module named 'nowhere'"),
        ({"name": "torch.pi"}, "torch.pi, a float; expected a class of optimizers"),
        ({"name": "torch.optim.SGD", "options": {"speed": 3}}, "optim.options: found speed=3: "),
        ({"name": "torch.optim.SGD", "options": {"momentum": -1}}, "Invalid momentum value: -1"),
    ],
)
def test_an_optimizer_that_is_not_there_or_takes_no_such_option_is_told(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_optimizer(torch.nn.Linear(4, 4), OptimConfig(**settings))
    assert said in str(caught.value)


@pytest.mark.skipif(importlib.util.find_spec("torchao") is not None, reason="torchao is installed")
def test_adamw8bit_without_torchao_says_how_to_have_it() -> None:
    with pytest.raises(ConfigError, match=r"expected torchao, an extra\.\n  pip install"):
        build_optimizer(torch.nn.Linear(4, 4), OptimConfig(name="adamw8bit"))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["optim.name=lion"], "optim.name: found 'lion'; expected adamw, adamw8bit, or a class"),
        (["optim.moments=int4"], "optim.moments: found 'int4'"),
        (["+optim.options.momentum=0.9"], "optim.options: found momentum; expected nothing"),
        (["optim.name=torch.optim.SGD", "optim.moments=int8"], "optim.moments: found int8; expected float32"),
        (["precision=bf16"], "precision: found 'bf16'; expected one of auto, float32, bf16_mixed, bf16_split"),
        (["optim.name=adamw8bit"], "checkpoint.asynchronous: found true, with optim.name=adamw8bit; expected false"),
        (["precision=bf16_split", "optim.name=adamw8bit"], "precision, with optim.name=adamw8bit: found 'bf16_split'"),
        (["precision=bf16_stochastic", "optim.name=torch.optim.SGD"], "expected one of auto, float32, bf16_mixed."),
        (["optimizer=adamw"], "optimizer: found an unknown setting"),
    ],
)
def test_recipes_that_nothing_knows_are_refused_by_name(line: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(line)
    assert said in str(caught.value)
