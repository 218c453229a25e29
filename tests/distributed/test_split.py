"""Any split of a step over ranks and micro-batches gives the same update."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from data.loader import Loader, Schedule, StepMaker
from data.prepared import Prepared, open_prepared
from magnum_train import distributed
from magnum_train.config import TrainConfig, compose
from magnum_train.loop import Run, launch, read
from magnum_train.metrics import Terminal
from magnum_train.prepare import prepare_data
from magnum_train.train import assemble
from model import Transformer
from model.transformer import init_weights
from ranks import run_ranks
from tiny_runs import overrides

LOSS_NORMS = ("tokens", "sequences", "micro_batch_2024")
STEPS = 3


def started(settings: TrainConfig, ranks: distributed.Ranks) -> Run:
    """The run as training assembles it, before its first step."""
    terminal = Terminal(is_main=False)
    folder = ranks.once("prepare", lambda: str(prepare_data(settings, terminal).folder))
    run = assemble(settings, open_prepared(folder), None, ranks, terminal)
    assert run is not None
    return run


def three_steps(line: list[str], sgd: bool) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    """Train three steps on this rank's share; the losses and norms, and the whole weights after them."""
    settings = compose(line)
    with distributed.start(
        timeout_seconds=60, replicate=settings.parallel.replicate, threads=1, deterministic=False
    ) as ranks:
        run = started(settings, ranks)
        if sgd:  # Adam turns the sign of a vanishing gradient into a whole step, so weights are compared under SGD
            run.optimizer = torch.optim.SGD(run.model.parameters(), lr=1e-3)
        rows: list[dict[str, Any]] = [read(run, launch(run, step), None)[0] for step in range(1, STEPS + 1)]
        weights = {name: p.full_tensor().clone() for name, p in run.model.named_parameters()}  # type: ignore[attr-defined]
        return [(row["loss"], row["grad_norm"]) for row in rows], weights


def assert_same(one: Any, other: Any) -> None:
    for (loss, norm), (loss2, norm2) in zip(one[0], other[0], strict=True):
        assert loss2 == pytest.approx(loss, rel=1e-5)
        assert norm2 == pytest.approx(norm, rel=1e-5)
    for name, weight in one[1].items():
        assert (other[1][name] - weight).abs().max() <= 1e-5 * weight.abs().max(), name


@pytest.mark.parametrize("loss_norm", LOSS_NORMS)
def test_1x4_2x2_and_4x1_give_the_same_three_steps(loss_norm: str, tmp_path: Path) -> None:
    results = {}
    for world in (1, 2, 4):
        line = overrides(
            tmp_path, f"train.loss_norm={loss_norm}", "optim.lr=1", f"run_dir={tmp_path}/{world}",
            "train.max_grad_norm=null",
        )  # fmt: skip
        results[world] = run_ranks(three_steps, world, line, True)
    for world in (2, 4):
        for rank in range(world):
            assert_same(results[1][0], results[world][rank])


def test_adam_clipping_replicas_and_checkpointing_change_nothing(tmp_path: Path) -> None:
    plain = run_ranks(three_steps, 1, overrides(tmp_path, f"run_dir={tmp_path}/1"), False)[0]
    line = overrides(
        tmp_path, f"run_dir={tmp_path}/4", "parallel.replicate=2", "parallel.activation_checkpointing=full",
        "parallel.reshard_after_forward=false",
    )  # fmt: skip
    replicated = run_ranks(three_steps, 4, line, False)[3]
    for (loss, norm), (loss2, norm2) in zip(plain[0], replicated[0], strict=True):
        assert (loss2, norm2) == pytest.approx((loss, norm), rel=1e-5)


def test_bf16_compute_keeps_float32_masters_and_follows_the_float32_run(tmp_path: Path) -> None:
    """bf16 keeps 8 bits of a number, so losses agree to about a percent; a wrong cast or sum would be far off."""
    exact = run_ranks(three_steps, 1, overrides(tmp_path, f"run_dir={tmp_path}/1"), False)[0]
    line = overrides(tmp_path, f"run_dir={tmp_path}/2", "precision=bf16_mixed")
    mixed = run_ranks(three_steps, 2, line, False)[0]
    for (loss, norm), (loss2, norm2) in zip(exact[0], mixed[0], strict=True):
        assert loss2 == pytest.approx(loss, rel=0.01)
        assert norm2 == pytest.approx(norm, rel=0.05)
    assert all(weight.dtype == torch.float32 for weight in mixed[1].values())


def documents_alone(prepared: Prepared, model: Transformer, rows: set[int]) -> dict[int, tuple[float, Any, Any]]:
    """Each conversation by itself: row to its own weight and its tokens' (weight, cross-entropy) in float64."""
    found = {}
    for index, row in enumerate(prepared.train.rows.tolist()):
        if row not in rows:
            continue
        example = prepared.train.example(index)
        ids = torch.tensor(example.tokens, dtype=torch.int64)
        n = len(ids)
        logits = model(ids, torch.arange(n), torch.tensor([0, n], dtype=torch.int32), n)
        losses = F.cross_entropy(logits[:-1].double(), ids[1:], reduction="none")
        found[row] = (example.weight, torch.tensor(example.weights[1:], dtype=torch.float64), losses)
    return found


@pytest.mark.parametrize("loss_norm", LOSS_NORMS)
def test_each_loss_norm_is_what_its_definition_says(loss_norm: str, tmp_path: Path) -> None:
    """The first step against the definition written out over conversations run alone, without packing or ranks."""
    line = overrides(tmp_path, f"train.loss_norm={loss_norm}", "train.max_grad_norm=null")
    [((measured, *_), _)] = run_ranks(three_steps, 1, line, True)
    settings = compose(line)
    prepared = prepare_data(settings, Terminal(is_main=False))
    model = Transformer(settings.model.transformer(), "sdpa")
    init_weights(model, settings.seed)
    schedule = Schedule(
        prepared.train.lengths, pack_tokens=256, pack_documents=8, packs_per_step=4, seed=settings.seed, epochs=None,
        max_steps=10,
    )  # fmt: skip
    # The loader only says which rows stand in which pack.
    rows = [p[:, 1].tolist() for p in Loader(prepared.train, schedule, StepMaker(1, 256, 8)).step(0, 0, 1).rows]
    alone = documents_alone(prepared, model, {row for pack in rows for row in pack})
    packs = [[alone[row] for row in pack] for pack in rows]
    if loss_norm == "tokens":
        top = sum(s * (w * ce).sum() for pack in packs for s, w, ce in pack)
        loss = top / sum(s * w.sum() for pack in packs for s, w, _ in pack)
    elif loss_norm == "sequences":
        top = sum(s * (w * ce).sum() / w.sum() for pack in packs for s, w, ce in pack)
        loss = top / sum(s for pack in packs for s, _, _ in pack)
    else:
        means = [sum(s * (w * ce).sum() for s, w, ce in pack) / sum(s * w.sum() for s, w, _ in pack) for pack in packs]
        loss = sum(means) / len(means)
    loss.backward()  # type: ignore[union-attr]
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert measured == pytest.approx((float(loss.detach()), float(norm)), rel=1e-5)


def initial_weights(line: list[str]) -> dict[str, torch.Tensor]:
    settings = compose(line)
    with distributed.start(
        timeout_seconds=60, replicate=settings.parallel.replicate, threads=1, deterministic=False
    ) as ranks:
        run = started(settings, ranks)
        return {name: p.full_tensor().clone() for name, p in run.model.named_parameters()}  # type: ignore[attr-defined]


def test_initial_weights_are_bit_identical_however_they_are_sharded(tmp_path: Path) -> None:
    line = overrides(tmp_path)
    settings = compose(line)
    plain = Transformer(settings.model.transformer())
    init_weights(plain, settings.seed)
    for world, replicate in ((1, 1), (2, 1), (4, 2)):
        for weights in run_ranks(initial_weights, world, [*line, f"parallel.replicate={replicate}"]):
            for name, parameter in plain.named_parameters():
                assert torch.equal(weights[name], parameter), (world, name)
