"""Each document is trained once an epoch on any number of ranks; the sums are those of the weights."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.documents import Documents
from data.ledger import Ledger
from data.loader import LOSS_NORMS, Cost, Loader, Schedule, StepData, StepMaker, Validation, assign
from data.packing import next_fit, pack_flat

Make = Callable[..., Documents]
ROUNDING = 1e-6  # float32 weights, summed in float64


def schedule(lengths: Any, **more: Any) -> Schedule:
    settings = {
        "pack_tokens": 128,
        "pack_documents": 6,
        "packs_per_step": 4,
        "seed": 1,
        "epochs": 2,
        "max_steps": None,
    }
    return Schedule(np.asarray(lengths, np.int64), **(settings | more))


def loader(
    documents: Documents,
    norm: str = "tokens",
    cost: Cost | None = None,
    **more: Any,
) -> Loader:
    plan = schedule(documents.lengths, **more)
    maker = StepMaker(3, plan.pack_tokens, plan.pack_documents, norm, cost or Cost())
    return Loader(documents, plan, maker)


def trained_rows(data: StepData) -> list[int]:
    return [row for batch in data.micro_batches for row in batch.rows.tolist() if row >= 0]


@settings(max_examples=40)
@given(
    st.lists(st.integers(2, 128), min_size=1, max_size=60),
    st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2), (6, 3), (8, 4)]),
    st.integers(0, 5),
)
def test_each_document_is_trained_once_an_epoch_over_any_number_of_ranks(
    make_documents: Make, lengths: list[int], shape: tuple[int, int], seed: int
) -> None:
    per_step, world = shape
    made = loader(make_documents(lengths, 3), packs_per_step=per_step, seed=seed)
    visits: dict[int, list[int]] = {0: [], 1: []}
    for step in range(made.schedule.total_steps):
        parts = [made.step(step, rank, world) for rank in range(world)]
        alone = made.step(step, 0, 1)
        # As many on every rank as hold the step's packs, and none of padding more.
        assert {len(part.micro_batches) for part in parts} == {-(-len(alone.rows) // world)}
        here = [row for part in parts for row in trained_rows(part)]
        assert sorted(here) == sorted(trained_rows(alone))  # the set does not depend on the ranks
        visits[alone.epoch] += here
    assert all(sorted(rows) == list(range(len(lengths))) for rows in visits.values())


@settings(max_examples=30)
@given(st.sampled_from(LOSS_NORMS), st.sampled_from([1, 2, 4]), st.integers(0, 100))
def test_sums_known_before_the_step_are_those_of_its_weights(
    make_documents: Make, norm: str, world: int, seed: int
) -> None:
    lengths = np.random.default_rng(seed).integers(2, 100, 23).tolist()
    made = loader(make_documents(lengths, 3, seed), norm)
    for step in range(made.schedule.total_steps):
        parts = [made.step(step, rank, world) for rank in range(world)]
        batches = [batch for part in parts for batch in part.micro_batches]
        weights = np.concatenate([batch.weights.numpy().astype(np.float64) for batch in batches])
        sources = np.concatenate([batch.sources.numpy() for batch in batches])
        data = parts[0]
        np.testing.assert_allclose(weights.sum(), data.weight_sum, rtol=ROUNDING)
        by_source = [weights[sources == source].sum() for source in range(3)]
        np.testing.assert_allclose(by_source, data.source_weight_sums, rtol=ROUNDING)
        assert data.tokens == sum(sum(batch.lengths) for batch in batches) == data.lengths.sum()
        assert data.documents == sum(batch.documents for batch in batches)
        assert data.weighted_tokens == sum(len(batch.label_positions) for batch in batches)
        assert len({part.weight_sum for part in parts}) == 1


def by_hand(make_documents: Make, norm: str) -> tuple[StepData, Documents, list[np.ndarray]]:
    """One step of two packs with known documents; returns it and each document's weights in the batches."""
    documents = make_documents([60, 60, 100], 3, seed=4)
    data = loader(documents, norm, packs_per_step=2, epochs=1).step(0, 0, 1)
    weights: dict[int, np.ndarray] = {}
    for batch in data.micro_batches:
        for slot, row in enumerate(batch.rows.tolist()):
            if row >= 0:
                start, end = batch.cu_seqlens[slot : slot + 2].tolist()
                weights[row] = batch.weights[start : end - 1].numpy()
    return data, documents, [weights[n] for n in range(3)]


def test_by_tokens_each_weight_is_its_documents_times_its_own(make_documents: Make) -> None:
    data, documents, weights = by_hand(make_documents, "tokens")
    for n in range(3):
        example = documents.example(n)
        np.testing.assert_allclose(weights[n], example.weight * example.weights[1:], rtol=ROUNDING)
    assert data.weight_sum == pytest.approx(float((documents.scales * documents.weight_sums).sum()))


def test_by_sequences_each_conversation_weighs_what_it_is_worth(make_documents: Make) -> None:
    data, documents, weights = by_hand(make_documents, "sequences")
    for n in range(3):
        example = documents.example(n)
        expected = example.weight * example.weights[1:] / example.weights.sum()
        np.testing.assert_allclose(weights[n], expected, rtol=ROUNDING)
    assert data.weight_sum == pytest.approx(float(documents.scales.sum()))


def test_as_in_2024_each_pack_weighs_one(make_documents: Make) -> None:
    data, documents, weights = by_hand(make_documents, "micro_batch_2024")
    assert data.weight_sum == pytest.approx(2.0)
    for batch in data.micro_batches:
        assert float(batch.weights.double().sum()) == pytest.approx(1.0, rel=ROUNDING)
    pair = float((documents.scales * documents.weight_sums)[:2].sum())  # the two of 60 share a pack
    example = documents.example(0)
    np.testing.assert_allclose(weights[0], example.weight * example.weights[1:] / pair, rtol=ROUNDING)


def test_an_epochs_last_step_is_trained_and_padded_not_dropped(make_documents: Make) -> None:
    made = loader(make_documents([128] * 5, 3), epochs=1)
    assert made.schedule.total_steps == 2
    last = made.step(1, 0, 1)
    assert [batch.documents for batch in last.micro_batches] == [1]
    assert last.fill == 1.0
    assert [made.step(1, rank, 4).micro_batches[0].documents for rank in range(4)] == [1, 0, 0, 0]


def test_epochs_are_packed_anew_and_a_fresh_loader_agrees(make_documents: Make) -> None:
    documents = make_documents(np.random.default_rng(0).integers(5, 90, 80).tolist(), 3)
    made = loader(documents, epochs=3)
    assert made.schedule.packing(0).lists() != made.schedule.packing(1).lists()
    last = made.schedule.total_steps - 1
    first_look, fresh = made.step(last, 0, 2), loader(documents, epochs=3).step(last, 0, 2)
    for a, b in zip(first_look.micro_batches, fresh.micro_batches, strict=True):
        assert a.tokens.equal(b.tokens)
        assert a.weights.equal(b.weights)
    assert made.step(0, 0, 1).epoch == 0
    assert first_look.epoch == 2


def test_the_schedule_packs_as_it_is_told() -> None:
    lengths = np.random.default_rng(0).integers(5, 90, 80)
    packs = schedule(lengths, packing="next_fit").packing(1).lists()
    order = [n for members in packs for n in members]
    assert sorted(order) == list(range(80))
    for full, then in pairwise(packs):
        assert len(full) == 6 or lengths[full].sum() + lengths[then[0]] > 128
    assert order not in [[n for p in next_fit(lengths, 128, seed) for n in p] for seed in range(3)]
    assert schedule(lengths).fill(0) > schedule(lengths, packing="next_fit").fill(0)
    assert schedule(lengths).fill(1) == lengths.sum() / (len(schedule(lengths).packing(1)) * 128)


def test_max_steps_ends_epochs_early_or_goes_on_without_them() -> None:
    lengths = [128] * 10  # three steps an epoch
    assert schedule(lengths).total_steps == 6
    assert schedule(lengths, max_steps=4).total_steps == 4
    assert schedule(lengths, max_steps=40).total_steps == 6
    endless = schedule(lengths, epochs=None, max_steps=40)
    assert endless.total_steps == 40
    assert [endless.locate(step)[0] for step in (39, 0, 2, 3, 38)] == [13, 0, 0, 1, 12]
    with pytest.raises(ValueError, match="step is 40; expected from 0 to below 40"):
        endless.locate(40)


def test_what_was_trained_is_counted_per_source(make_documents: Make) -> None:
    documents = make_documents(np.random.default_rng(0).integers(5, 90, 40).tolist(), 3)
    made = loader(documents)
    counted, tokens = np.zeros(3, np.int64), np.zeros(3, np.int64)
    for step in range(made.schedule.total_steps):
        for before, now in zip(made.trained(step), (counted, tokens), strict=True):
            np.testing.assert_array_equal(before, now)
        data = made.step(step, 0, 1)
        source_of = np.concatenate(data.rows)[:, 0]
        counted += np.bincount(source_of, minlength=3)
        tokens += np.bincount(source_of, weights=data.lengths, minlength=3).astype(np.int64)
    np.testing.assert_array_equal(made.trained(made.schedule.total_steps)[0], counted)
    ledger = Ledger(["a", "b", "c"])
    ledger.trained(*made.trained(made.schedule.total_steps))
    assert [account.trained_tokens for account in ledger.accounts.values()] == tokens.tolist()
    np.testing.assert_array_equal(counted, 2 * np.bincount(documents.sources, minlength=3))
    with pytest.raises(ValueError, match="expected from 0 to below"):
        made.trained(made.schedule.total_steps + 1)


def test_rows_of_a_step_are_named_by_source_and_row(make_documents: Make) -> None:
    documents = make_documents([30] * 20, 3)
    made = loader(documents)
    _, packs = made.schedule.locate(1)
    for pack, rows in zip(packs.lists(), made.step(1, 0, 1).rows, strict=True):
        assert rows.tolist() == [[documents.sources[n], documents.rows[n]] for n in pack]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_sees_each_document_once_on_any_number_of_ranks(make_documents: Make, world: int) -> None:
    held_out = make_documents(np.random.default_rng(1).integers(5, 90, 17).tolist(), 3)
    made = Validation(held_out, StepMaker(3, 128, 6))
    parts = [made.batches(rank, world) for rank in range(world)]
    assert len({len(part.micro_batches) for part in parts}) == 1
    assert sorted(row for part in parts for row in trained_rows(part)) == list(range(17))
    assert parts[0].weight_sum == pytest.approx(float((held_out.scales * held_out.weight_sums).sum()))
    np.testing.assert_allclose(parts[0].source_weight_sums.sum(), parts[0].weight_sum)


def test_validation_without_documents_is_empty(make_documents: Make) -> None:
    data = Validation(make_documents([], 3), StepMaker(3, 128, 6)).batches(0, 2)
    assert (data.micro_batches, data.weight_sum, data.documents, data.rows) == ([], 0.0, 0, [])


@given(st.lists(st.floats(0, 1e9), max_size=24), st.integers(1, 4), st.integers(6, 8))
def test_each_pack_goes_to_one_rank_and_costly_ones_run_together(costs: list[float], ranks: int, per_rank: int) -> None:
    if len(costs) > ranks * per_rank:
        with pytest.raises(ValueError, match="do not fit"):
            assign(costs, ranks, per_rank)
        return
    shared = assign(costs, ranks, per_rank)
    assert [len(mine) for mine in shared] == [per_rank] * ranks
    assert sorted(n for mine in shared for n in mine if n >= 0) == list(range(len(costs)))
    # No pack of one round costs less than any of the next.
    rounds = [[costs[n] if n >= 0 else -1.0 for n in together] for together in zip(*shared, strict=True)]
    assert all(min(now) >= max(then) for now, then in pairwise(rounds))


def test_a_pack_costs_its_tokens_its_squares_and_its_labels(make_documents: Make) -> None:
    documents = make_documents([10, 20, 30, 40])
    packs = pack_flat(documents.lengths, 60, 0)
    lists = packs.lists()
    costs = Cost(per_token=7.0, per_square=3.0, per_label=5.0).of(packs, documents, 60)
    for cost, members in zip(costs.tolist(), lists, strict=True):
        squares = sum(int(documents.lengths[n]) ** 2 for n in members)
        assert cost == 7 * 60 + 3 * squares + 5 * sum(int(documents.weighted_tokens[n]) for n in members)
    assert len(Cost().of(packs.part(0, 0), documents, 60)) == 0


@pytest.mark.parametrize("cost", [Cost(), Cost(1e6, 0.0, 1.0), Cost(0.0, 1.0, 50.0)])
def test_packs_are_dealt_by_their_cost(make_documents: Make, cost: Cost) -> None:
    documents = make_documents(np.random.default_rng(0).integers(5, 90, 200).tolist(), 3)
    made = loader(documents, cost=cost, packs_per_step=16)
    for step in (0, made.schedule.total_steps - 1):
        _, packs = made.schedule.locate(step)
        costs = dict(zip(map(tuple, packs.lists()), cost.of(packs, documents, 128).tolist(), strict=True))
        parts = [made.step(step, rank, 4).micro_batches for rank in range(4)]
        rows = [
            [tuple(r for r in batch.rows.tolist() if r >= 0) for batch in slot] for slot in zip(*parts, strict=True)
        ]
        assert sorted(row for slot in rows for row in slot if row) == sorted(costs)
        dealt = [[costs.get(row, 0.0) for row in slot] for slot in rows]  # padding costs less than any pack
        assert all(min(now) >= max(then) for now, then in pairwise(dealt))


def test_ranks_wait_little_for_each_other() -> None:
    """Slowest rank of each micro-batch over the mean, as 8 ranks × 16 with documents up to a full pack have it."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(600), 1.3, 60_000).astype(int), 2, 16384)
    packs = pack_flat(lengths, 16384, 0)
    squares = np.bincount(packs.pack_of(), lengths[packs.members] ** 2.0)
    costs = (70_000 * 16384 + squares)[: len(squares) // 128 * 128].reshape(-1, 128)

    def excess(deal: Callable[[np.ndarray], list[list[int]]]) -> float:
        slots = np.array([step[deal(step)] for step in costs])  # [steps, ranks, slots]
        return float(slots.max(axis=1).sum() / slots.mean(axis=1).sum())

    assert excess(lambda step: assign(step, 8, 16)) < 1.01
    assert excess(lambda step: np.arange(128).reshape(8, 16).tolist()) > 1.03  # as they come


def test_ranks_carry_equal_loads() -> None:
    costs = np.random.default_rng(0).uniform(1, 2, 64)
    loads = [costs[mine].sum() for mine in assign(costs, 8, 8)]
    assert max(loads) < 1.02 * min(loads)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"epochs": None}, "neither epochs nor max_steps"),
        ({"epochs": 0}, "epochs is 0; expected at least 1"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"packs_per_step": 0}, "packs_per_step is 0"),
        ({"packing": "bfd"}, "packing is 'bfd'; expected one of best_fit, next_fit"),
    ],
)
def test_schedules_that_cannot_be_are_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        schedule([1, 2], **change)
    with pytest.raises(ValueError, match="no documents to pack"):
        schedule([])


def test_packs_that_do_not_divide_by_the_ranks_are_refused(make_documents: Make) -> None:
    with pytest.raises(ValueError, match="a step of 4 packs does not divide by 3 ranks"):
        loader(make_documents([10], 3)).step(0, 0, 3)
    with pytest.raises(ValueError, match="loss_norm is 'mean'; expected one of tokens"):
        loader(make_documents([10], 3), "mean")
