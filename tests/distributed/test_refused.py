"""A refused update moves the data and the rate on, and nothing else."""

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data import PackedBatch
from data.prepared import open_prepared
from magnum_train import distributed, guard, loop, step, train
from magnum_train.batches import schedule
from magnum_train.config import compose
from magnum_train.errors import RunError
from magnum_train.flight import FlightRecorder, read
from magnum_train.metrics import Terminal
from magnum_train.prepare import prepare_data
from model import Loss
from ranks import run_ranks, whole
from tiny_runs import metrics, overrides


def spoilt(loss: Loss) -> Loss:
    return loss._replace(total=loss.total * math.nan)


def snapshot(run: Any) -> list[torch.Tensor]:
    tensors = []
    for parameter in run.model.parameters():
        tensors += [whole(tensor) for tensor in (parameter, *run.optimizer.state[parameter].values())]
    return tensors


def poisoned_step(line: list[str]) -> tuple[bool, dict[str, Any], dict[str, Any]]:
    """One good step, then one with a NaN in the loss of rank 1 alone; whether anything changed, and both rows."""
    settings = compose(line)
    with distributed.start(timeout_seconds=60, replicate=1, threads=1, deterministic=False) as ranks:
        folder = ranks.once("prepare", lambda: str(prepare_data(settings, Terminal(is_main=False)).folder))
        run = train.assemble(settings, open_prepared(folder), None, ranks, Terminal(is_main=False))
        assert run is not None
        good, _ = loop.read(run, loop.launch(run, 1), None)
        before = snapshot(run)
        real = step.forward
        if ranks.rank == 1:
            step.forward = lambda model, batch: spoilt(real(model, batch))
        bad, _ = loop.read(run, loop.launch(run, 2), None)
        same = all(torch.equal(a, b) for a, b in zip(before, snapshot(run), strict=True))
        return same, good, bad


def test_a_nan_on_one_rank_leaves_weights_moments_and_count_on_all(tmp_path: Path) -> None:
    line = overrides(tmp_path, "optim.weight_decay=0.1", "train.max_skipped_steps=1")
    results = run_ranks(poisoned_step, 2, line)
    for same, good, bad in results:
        assert same
        assert good["applied"]
        assert not bad["applied"]
        assert bad["lr"] != good["lr"]
        assert bad["step"] == 2
    [entry] = [json.loads(row) for row in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert entry["step"] == 2
    assert len(entry["packs"]) == 4
    assert all(source == "numbers" for pack in entry["packs"] for source, _ in pack)


@contextlib.contextmanager
def running(line: list[str]) -> Iterator[Any]:
    """A run that is ready for its first step."""
    settings = compose(line)
    replicate = settings.parallel.replicate
    with distributed.start(timeout_seconds=60, replicate=replicate, threads=1, deterministic=False) as ranks:
        folder = ranks.once("prepare", lambda: str(prepare_data(settings, Terminal(is_main=False)).folder))
        run = train.assemble(settings, open_prepared(folder), None, ranks, Terminal(is_main=False))
        assert run is not None
        with contextlib.closing(run.batches):
            yield run


def update(run: Any, number: int, **more: Any) -> step.StepResult:
    """One step as the run takes it."""
    data = run.batches.step(number - 1)
    return step.train_step(
        run.model, run.optimizer, data.micro_batches,
        weight_sum=data.weight_sum, n_sources=1, lr=run.settings.optim.lr, max_grad_norm=1.0, **more,
    )  # fmt: skip


def unchanged(run: Any, before: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, snapshot(run), strict=True))


def told(result: step.StepResult) -> list[Any]:
    return [result.loss.item(), result.grad_norm.item(), result.applied.item()]


def planted_gradient(line: list[str], at: int, value: float) -> tuple[bool, list[list[Any]]]:
    """A step, one with `value` in the gradient of one rank's shard, and one more."""
    real = torch.nn.utils.get_total_norm

    def planted(gradients: list[Any]) -> Any:
        gradients[3].to_local().view(-1)[1] = value
        return real(gradients)

    with running(line) as run:
        results = [update(run, 1)]
        before = snapshot(run)
        if run.ranks.rank == at:
            torch.nn.utils.get_total_norm = planted
        results.append(update(run, 2))
        torch.nn.utils.get_total_norm = real
        same = unchanged(run, before)
        results.append(update(run, 3))
        return same, [told(result) for result in results]


@pytest.mark.parametrize(("world", "replicate"), [(2, 1), (2, 2), (4, 2)])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_what_is_not_finite_in_one_ranks_gradient_is_refused_on_all(
    value: float, world: int, replicate: int, tmp_path: Path
) -> None:
    # With replicas, the others' norms are finite: they refuse only because they are told.
    line = overrides(tmp_path, f"parallel.replicate={replicate}", "optim.weight_decay=0.1")
    results = run_ranks(planted_gradient, world, line, world - 1, value)
    for same, (first, bad, next_) in results:
        assert same
        assert (first[2], bad[2], next_[2]) == (True, False, True)
        assert math.isfinite(bad[0])
        assert math.isnan(bad[1]) if math.isnan(value) else bad[1] == math.inf
        assert [repr(first), repr(bad), repr(next_)] == [repr(told) for told in results[0][1]]


BAD = 56


def bad_batch(line: list[str], at: int, planted: str) -> tuple[bool, list[list[Any]], list[str]]:
    """Steps judged by the guard's limits; in step `BAD` one rank's labels or gradients are absurd."""
    real, config = step.forward, compose(line).guard

    def shifted(model: torch.nn.Module, batch: PackedBatch) -> Loss:
        return real(model, replace(batch, labels=(batch.labels + 150) % 256))

    def steep(model: torch.nn.Module, batch: PackedBatch) -> Loss:
        loss = real(model, batch)
        return loss._replace(total=loss.total + 50 * (loss.total - loss.total.detach()))

    with running(line) as run:
        recent: list[list[float]] = []
        results, texts, same = [], [], False
        for number in range(1, BAD + 5):
            limits = guard.limits(recent, config)
            before = snapshot(run) if number == BAD else []
            if number == BAD and run.ranks.rank == at:
                step.forward = {"labels": shifted, "gradient": steep}[planted]
            result = update(run, number, limits=limits)
            step.forward = real
            results.append(told(result))
            loss, grad_norm, applied = results[-1]
            texts.append(guard.verdict(loss, grad_norm, limits) or "")
            if applied:
                recent = guard.remembered(recent, loss, grad_norm, config)
            if number == BAD:
                same = unchanged(run, before)
        return same, results, texts


@pytest.mark.parametrize(("planted", "said"), [("labels", "loss "), ("gradient", "gradient norm ")])
def test_a_spike_from_one_ranks_bad_batch_is_refused_on_all_and_training_goes_on(
    planted: str, said: str, tmp_path: Path
) -> None:
    line = overrides(tmp_path, f"train.max_steps={BAD + 4}", "guard.window=20", "optim.lr=1e-2")
    results = run_ranks(bad_batch, 2, line, 1, planted)
    for same, told, texts in results:
        assert same
        assert [number for number, (*_, applied) in enumerate(told, 1) if not applied] == [BAD]
        assert [number for number, text in enumerate(texts, 1) if text] == [BAD]
        assert said in texts[BAD - 1]
        assert "is above its limit of" in texts[BAD - 1]
    assert results == [results[0]] * 2


def an_ulp_apart(line: list[str]) -> tuple[list[bool], bool]:
    """A step whose norm is at the limit on one replica and an ulp above it on the other."""
    with running(line) as run:
        first = update(run, 1)
        before = snapshot(run)
        real = torch.nn.utils.get_total_norm
        seen: list[float] = []

        def measured(gradients: list[Any]) -> Any:
            norm = real(gradients)
            seen.append(norm.full_tensor().item())
            return norm

        torch.nn.utils.get_total_norm = measured
        second = update(run, 2, refuse=True)
        torch.nn.utils.get_total_norm = real
        # The same gradients again: nothing has changed.
        below = seen[0] if run.ranks.rank < 2 else math.nextafter(seen[0], 0.0)
        third = update(run, 2, limits=guard.NO_LIMITS._replace(grad_norm=below))
        assert second.grad_norm.item() == third.grad_norm.item() == seen[0]
        applied = [result.applied.item() for result in (first, second, third)]
        return applied, unchanged(run, before)


def test_replicas_that_would_decide_differently_by_an_ulp_decide_alike(tmp_path: Path) -> None:
    results = run_ranks(an_ulp_apart, 4, overrides(tmp_path, "parallel.replicate=2"))
    assert results == [([True, False, False], True)] * 4


def stepped_over(line: list[str]) -> tuple[bool, list[list[Any]]]:
    with running(line) as run:
        update(run, 1)
        before = snapshot(run)
        refused = update(run, 2, refuse=True)
        same = unchanged(run, before)
        return same, [told(refused), told(update(run, 2))]


def test_a_step_to_be_stepped_over_is_computed_and_not_applied(tmp_path: Path) -> None:
    for same, (refused, again) in run_ranks(stepped_over, 2, overrides(tmp_path)):
        assert same
        assert refused == [*again[:2], False]
        assert again[2] is True


def recorded(line: list[str], folder: Path) -> list[float]:
    """Three steps with the flight recorder; their losses."""
    losses = []
    with running(line) as run:
        recorder = FlightRecorder(folder, run.ranks.rank, run.prepared.sources)
        for number in (1, 2, 3):
            loss, grad_norm, applied = told(result := update(run, number))
            row = {"step": number, "loss": loss, "grad_norm": grad_norm, "lr": 1e-3, "applied": applied}
            recorder.record(row | {"step_seconds": 0.1}, run.batches.step(number - 1), result.row_losses)
            losses.append(loss)
    return losses


@pytest.mark.parametrize("world", [1, 3])
def test_the_flight_record_has_each_document_of_a_step_once_and_its_losses_make_the_steps(
    world: int, tmp_path: Path
) -> None:
    # Conversations counting alike, the step's loss is the plain mean of theirs. 23 rows leave packs of padding.
    line = overrides(tmp_path, "train.loss_norm=sequences", "train.tokens_per_step=1536", rows=23)
    [losses, *_] = run_ranks(recorded, world, line, tmp_path / "flight")
    settings = compose(line)
    prepared = open_prepared(prepare_data(settings, Terminal(is_main=False)).folder)
    plan = schedule(settings, prepared)
    tokens = dict(zip(prepared.train.rows.tolist(), prepared.train.lengths.tolist(), strict=True))
    entries = read(tmp_path / "flight")
    assert [entry["step"] for entry in entries] == [1, 2, 3]
    for entry, loss in zip(entries, losses, strict=True):
        _, packs = plan.locate(entry["step"] - 1)
        expected = [sorted(prepared.train.rows[pack].tolist()) for pack in packs.lists()]
        assert sorted(sorted(row for _, row, _, _ in pack) for pack in entry["packs"]) == sorted(expected)
        documents = [document for pack in entry["packs"] for document in pack]
        assert all(source == "numbers" and size == tokens[row] for source, row, size, _ in documents)
        assert entry["loss"] == pytest.approx(loss, rel=1e-6)
        assert sum(own for *_, own in documents) / len(documents) == pytest.approx(loss, rel=1e-5)


def always_poisoned(line: list[str]) -> str:
    real = loop.launch

    def broken(run: Any, step: int) -> Any:
        with torch.no_grad():
            if step == 3:
                run.model.norm.weight.fill_(float("inf"))
        return real(run, step)

    loop.launch = broken
    try:
        train.train(compose(line))
    except RunError as error:
        return str(error)
    finally:
        loop.launch = real
    return ""


def test_too_many_refused_updates_stop_the_run(tmp_path: Path) -> None:
    line = overrides(tmp_path, "train.max_steps=10", "train.max_skipped_steps=2", "validation.every_steps=null")
    for said in run_ranks(always_poisoned, 2, line):
        assert "train.max_skipped_steps: found 3 refused updates; expected at most 2" in said
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["loss"] for row in rows[2:]] == [None, None, None]
    assert len((tmp_path / "run" / "skipped.jsonl").read_text().splitlines()) == 3
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text


@pytest.mark.parametrize("world", [3])
def test_a_batch_that_the_ranks_do_not_divide_is_refused_before_the_first_step(world: int, tmp_path: Path) -> None:
    from test_resume import resume_errors

    for said in run_ranks(resume_errors, world, overrides(tmp_path)):
        assert "train.tokens_per_step: found 4 packs of 256 on 3 ranks" in said
        assert "Try train.tokens_per_step=1536." in said
    assert not (tmp_path / "run").exists()
