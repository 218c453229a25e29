"""Sources seen more or less than once an epoch: each visit is counted exactly, in epochs, steps and the ledger."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data.documents import Documents
from data.loader import Loader, Repeats, Schedule, StepMaker
from data.packing import PACKINGS

Make = Callable[..., Documents]

repeats_of_all_kinds = st.one_of(
    st.integers(1, 10_000_000).map(lambda n: n / 100_000),  # up to 100 with five decimals
    st.sampled_from([0.1, 0.3, 0.5, 0.7, 1.0, 2.0, 2.5, 1 / 3, 2 / 3, 100.0]),
)


def exact(repeat: float) -> Fraction:
    """The repeat that a person means: thirds, or the decimals as they are written."""
    thirds = {1 / 3: Fraction(1, 3), 2 / 3: Fraction(2, 3)}
    return thirds[repeat] if repeat in thirds else Fraction(repr(repeat))


def sources_of(counts: list[int], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))


def schedule(lengths: Any, repeats: Repeats | None, **more: Any) -> Schedule:
    usual = {
        "pack_tokens": 128,
        "pack_documents": 6,
        "packs_per_step": 2,
        "seed": 1,
        "epochs": 3,
        "max_steps": None,
    }
    return Schedule(np.asarray(lengths, np.int64), **(usual | more), repeats=repeats)


@given(
    st.lists(st.tuples(st.integers(0, 40), repeats_of_all_kinds), min_size=1, max_size=4),
    st.integers(0, 1000),
    st.integers(0, 9),
)
def test_sources_and_documents_get_their_visits_to_within_one(
    parts: list[tuple[int, float]], epoch: int, seed: int
) -> None:
    counts, factors = [count for count, _ in parts], [factor for _, factor in parts]
    sources = sources_of(counts, seed)
    repeats = Repeats(sources, factors, seed)
    before, during = repeats.before(epoch), repeats.during(epoch)
    assert (before + during == repeats.before(epoch + 1)).all()
    for source, (count, factor) in enumerate(parts):
        mine = sources == source
        # Exact to the last visit, however many epochs have gone by.
        assert before[mine].sum() == epoch * count * exact(factor) // 1
        assert abs(during[mine].sum() - count * exact(factor)) < 1
        assert (abs(during[mine] - exact(factor)) < 1).all()
        assert (abs(before[mine] - epoch * exact(factor)) < 1).all()


@given(st.floats(1e-6, 1000.0))
def test_any_number_is_met_to_half_a_millionth(repeat: float) -> None:
    epochs = 10**6
    visits = int(Repeats(np.zeros(1, np.int64), [repeat], 0).before(epochs)[0])
    assert abs(visits - epochs * Fraction(repeat)) < 1 + epochs * Fraction(5, 10**7)


@given(st.integers(1, 50), st.integers(1, 40), st.integers(1, 30), st.integers(0, 5))
def test_a_round_of_epochs_visits_each_document_as_often(visits: int, epochs: int, count: int, seed: int) -> None:
    """Seen visits/epochs times an epoch, each is seen `visits` times in any `epochs` from a round's start."""
    repeats = Repeats(np.zeros(count, np.int64), [visits / epochs], seed)
    whole = Fraction(visits, epochs)
    for start in (0, 3 * whole.denominator):
        total = sum(repeats.during(start + epoch) for epoch in range(whole.denominator))
        assert np.array_equal(total, np.full(count, whole.numerator))


def test_a_half_is_drawn_anew_when_all_have_been_seen() -> None:
    repeats = Repeats(np.zeros(1000, np.int64), [0.5], 3)
    halves = [repeats.during(epoch) for epoch in range(4)]
    assert (halves[0] + halves[1] == 1).all()
    assert (halves[2] + halves[3] == 1).all()
    again = (halves[0] * halves[2]).sum()  # of 500, half on average; the standard deviation is 8
    assert 200 < again < 300
    first, last = halves[0][:500].sum(), halves[0][500:].sum()
    assert abs(first - last) < 100  # spread over the file
    assert not np.array_equal(halves[0], Repeats(np.zeros(1000, np.int64), [0.5], 4).during(0))


@pytest.mark.parametrize("packing", PACKINGS)
@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.sampled_from([0.1, 0.3, 0.5, 1.0, 1.5, 3.0])), min_size=1, max_size=3),
    st.integers(0, 9),
)
def test_every_count_is_that_of_the_steps_one_by_one(
    make_documents: Make, packing: str, parts: list[tuple[int, float]], seed: int
) -> None:
    counts, factors = [count for count, _ in parts], [factor for _, factor in parts]
    sources = sources_of(counts, seed)
    lengths = np.random.default_rng(seed).integers(2, 128, len(sources))
    documents = make_documents(lengths.tolist())
    documents = Documents(**(vars(documents) | {"sources": sources}))
    repeats = Repeats(sources, factors, seed)
    assume(repeats.before(4).any())
    plan = schedule(lengths, repeats, epochs=4, seed=seed, packing=packing)
    loader = Loader(documents, plan, StepMaker(len(parts), plan.pack_tokens, plan.pack_documents))

    seen, by_epoch = np.zeros(len(sources), np.int64), np.zeros((4, len(sources)), np.int64)
    for step in range(plan.total_steps):
        assert np.array_equal(plan.visits(step), seen)
        data = loader.step(step, 0, 1)
        rows = [row for batch in data.micro_batches for row in batch.rows.tolist() if row >= 0]
        assert data.documents == len(rows)
        assert data.tokens == sum(lengths[row] for row in rows)
        for row in rows:
            seen[row] += 1
            by_epoch[data.epoch, row] += 1
        trained, tokens = loader.trained(step + 1)
        assert trained.tolist() == [seen[sources == source].sum() for source in range(len(parts))]
        assert tokens.tolist() == [(seen * lengths)[sources == source].sum() for source in range(len(parts))]
    for epoch in range(4):
        assert np.array_equal(by_epoch[epoch], repeats.during(epoch))
        packs = plan.packing(epoch)
        assert np.array_equal(np.bincount(packs.members, minlength=len(sources)), by_epoch[epoch])
        assert plan.fill(epoch) == pytest.approx((by_epoch[epoch] * lengths).sum() / max(len(packs) * 128, 1))


def test_epochs_without_a_visit_have_no_steps_and_are_passed_over() -> None:
    repeats = Repeats(np.zeros(1, np.int64), [0.25], 0)  # one document, in every fourth epoch
    plan = schedule([5], repeats, epochs=9)
    assert plan.total_steps == 2
    assert [plan.locate(step)[0] for step in range(2)] == [3, 7]
    assert [len(plan.packing(epoch)) for epoch in range(5)] == [0, 0, 0, 1, 0]
    assert [plan.visits(steps).tolist() for steps in range(3)] == [[0], [1], [2]]
    assert (plan.fill(0), plan.fill(3)) == (0.0, 5 / 128)
    endless = schedule([5], repeats, epochs=None, max_steps=3)
    assert [endless.locate(step)[0] for step in (2, 0, 1)] == [11, 3, 7]


def test_epochs_that_visit_nothing_at_all_are_refused() -> None:
    repeats = Repeats(np.zeros(1, np.int64), [0.25], 0)
    with pytest.raises(ValueError, match="1 documents are repeated so rarely that 3 epochs visit none of them"):
        schedule([5], repeats, epochs=3)


def test_once_is_the_same_with_and_without_saying_so() -> None:
    lengths = np.random.default_rng(0).integers(2, 128, 60)
    sources = np.arange(60) % 2
    plain, said = schedule(lengths, None), schedule(lengths, Repeats(sources, [1.0, 1.0], 1))
    assert plain.total_steps == said.total_steps
    for step in range(plain.total_steps):
        assert plain.locate(step)[1].lists() == said.locate(step)[1].lists()


@pytest.mark.parametrize("repeat", [0.0, -1.0, float("nan"), float("inf"), 9e-7])
def test_repeats_that_cannot_be_are_refused(repeat: float) -> None:
    with pytest.raises(ValueError, match=rf"the repeat of source 1 is {repeat}; expected at least 0\.000001"):
        Repeats(np.array([0, 1]), [1.0, repeat], 0)


def test_a_source_without_a_repeat_is_refused() -> None:
    with pytest.raises(ValueError, match="source 2 has no repeat; there are 2"):
        Repeats(np.array([0, 2]), [1.0, 2.0], 0)
