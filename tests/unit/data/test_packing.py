"""Packing puts each document in exactly one pack, within capacity, full, random and repeatable."""

from collections.abc import Callable
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.packing import PACKINGS, Packs, next_fit, pack, pack_flat

BY_NAME: dict[str, Callable[..., list[list[int]]]] = {"best_fit": pack, "next_fit": next_fit}

cases = st.integers(1, 60).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=80)))
"""A capacity, and lengths that it holds."""


def fill(lengths: np.ndarray, capacity: int, packs: list[list[int]]) -> float:
    return float(lengths.sum() / (len(packs) * capacity))


def log_normal(count: int, median: float, sigma: float, capacity: int) -> np.ndarray:
    lengths = np.random.default_rng(3).lognormal(np.log(median), sigma, count).astype(int)
    return np.clip(lengths, 1, capacity)


@pytest.mark.parametrize("packing", PACKINGS)
@given(cases, st.integers(0, 2**64 - 1), st.integers(1, 9))
def test_each_index_once_and_within_both_limits(
    packing: str, case: tuple[int, list[int]], seed: int, most: int
) -> None:
    capacity, lengths = case
    packs = BY_NAME[packing](lengths, capacity, seed, max_documents=most)
    assert sorted(index for p in packs for index in p) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in p) <= capacity for p in packs)
    assert all(len(p) <= most for p in packs)


@given(cases, st.integers(0, 99), st.integers(1, 9))
def test_next_fit_opens_a_pack_only_when_the_next_document_does_not_fit(
    case: tuple[int, list[int]], seed: int, most: int
) -> None:
    capacity, lengths = case
    packs = next_fit(lengths, capacity, seed, max_documents=most)
    for full, then in pairwise(packs):
        assert len(full) == most or sum(lengths[n] for n in full) + lengths[then[0]] > capacity
    # The order is the seed's alone: with other lengths the same documents follow each other.
    order = [n for p in packs for n in p]
    assert order == [n for p in next_fit([1] * len(lengths), 1, seed) for n in p]


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_same_seed_gives_the_same_packs_and_another_gives_others(packing: str) -> None:
    lengths, made = log_normal(2000, 200, 0.8, 1024), BY_NAME[packing]
    assert made(lengths, 1024, 5) == made(lengths.tolist(), 1024, 5)
    assert made(lengths, 1024, 5) == pack_flat(lengths, 1024, 5, packing=packing).lists()
    assert made(lengths, 1024, 5) != made(lengths, 1024, 6)


@given(st.lists(st.integers(0, 4), max_size=6), st.integers(0, 6), st.integers(0, 9))
def test_flat_packs_are_lists_that_share_an_array(sizes: list[int], start: int, more: int) -> None:
    bounds = np.concatenate([[0], np.cumsum(np.asarray(sizes, np.int64))])
    packs = Packs(np.arange(bounds[-1]) * 3, bounds)
    lists = packs.lists()
    assert (len(packs), [len(p) for p in lists]) == (len(sizes), sizes)
    assert [n for p in lists for n in p] == packs.members.tolist()
    assert packs.pack_of().tolist() == [number for number, p in enumerate(lists) for _ in p]
    start = min(start, len(sizes))
    assert packs.part(start, start + more).lists() == lists[start : start + more]


@pytest.mark.parametrize(
    ("count", "median", "sigma", "capacity", "least"),
    [(200_000, 600, 1.0, 8192, 0.995), (60_000, 2500, 0.8, 8192, 0.98), (60_000, 2500, 0.8, 16384, 0.98),
     (1_000, 2500, 0.8, 8192, 0.98), (300, 180, 0.5, 1024, 0.98)],
)  # fmt: skip
def test_log_normal_lengths_fill_packs(count: int, median: float, sigma: float, capacity: int, least: float) -> None:
    lengths = log_normal(count, median, sigma, capacity)
    assert fill(lengths, capacity, pack(lengths, capacity, seed=1)) >= least


def test_a_small_set_needs_at_most_one_pack_more_than_its_tokens() -> None:
    lengths = np.clip(np.random.default_rng(1).normal(200, 60, 300).astype(int), 20, 1024)
    for seed in range(5):
        assert len(pack(lengths, 1024, seed)) <= -(-int(lengths.sum()) // 1024) + 1


def test_packs_do_not_depend_on_where_in_the_run_they_stand() -> None:
    lengths = log_normal(50_000, 600, 1.0, 8192)
    packs = pack(lengths, 8192, seed=2)
    longest = np.array([max(lengths[index] for index in p) for p in packs], dtype=float)
    early, late = longest[: len(packs) // 2].mean(), longest[len(packs) // 2 :].mean()
    assert abs(early - late) < 0.05 * longest.mean()
    # Documents of the file's first half are spread over all packs.
    share = np.array([np.mean(np.asarray(p) < len(lengths) // 2) for p in packs[:-1]])
    assert 0.1 < share.std() < 0.3
    assert abs(share.mean() - 0.5) < 0.02


def neighbours(lengths: np.ndarray, packs: Packs) -> float:
    """Correlation of the lengths of documents that follow each other in a pack."""
    ordered, pack_of = lengths[packs.members].astype(float), packs.pack_of()
    same = pack_of[1:] == pack_of[:-1]
    return float(np.corrcoef(ordered[:-1][same], ordered[1:][same])[0, 1])


def test_neither_a_documents_neighbours_nor_its_place_tell_its_length() -> None:
    lengths = log_normal(200_000, 600, 1.0, 8192)
    packs = pack_flat(lengths, 8192, seed=4)
    # Two long ones do not fit into one pack, which next fit's order, the shuffled one, shows as well.
    assert abs(neighbours(lengths, packs) - neighbours(lengths, pack_flat(lengths, 8192, 4, packing="next_fit"))) < 0.04
    sizes = np.diff(packs.bounds)[packs.pack_of()]
    place = (np.arange(len(lengths)) - packs.bounds[packs.pack_of()])[sizes > 1] / (sizes[sizes > 1] - 1)
    assert abs(np.corrcoef(place, lengths[packs.members][sizes > 1])[0, 1]) < 0.01  # 4 standard errors
    # What packs of documents taken longest first would show; so the measure tells them apart.
    order = np.argsort(-lengths)
    assert neighbours(lengths, Packs(order, np.arange(0, len(order) + 1, 10))) > 0.9


def test_pairs_meet_again_in_another_epoch_as_often_as_chance_has_it() -> None:
    lengths = log_normal(20_000, 600, 1.0, 8192)
    epochs = []
    for seed in range(6):
        packs = pack_flat(lengths, 8192, seed)
        pack_of, most = packs.pack_of(), np.diff(packs.bounds).max()
        pairs = set()
        for apart in range(1, most):
            same = pack_of[apart:] == pack_of[:-apart]
            ends = np.sort([packs.members[:-apart][same], packs.members[apart:][same]], axis=0)
            pairs |= set((ends[0] * len(lengths) + ends[1]).tolist())
        epochs.append(pairs)
    met = sum(len(one & other) for one, other in combinations(epochs, 2))
    chance = sum(len(one) * len(other) for one, other in combinations(epochs, 2)) * 2 / len(lengths) ** 2
    assert 0.8 < met / chance < 1.3  # some 600 by chance; with a quarter sorted it is twenty times as many


def test_lengths_that_leave_gaps_are_sorted_until_they_fill() -> None:
    """Many blocks, each of which needs more than the first share."""
    lengths = log_normal(120_000, 2500, 0.8, 8192)
    assert fill(lengths, 8192, pack(lengths, 8192, seed=3)) >= 0.99


@pytest.mark.parametrize("packing", PACKINGS)
def test_no_documents_need_no_packs(packing: str) -> None:
    assert BY_NAME[packing]([], 8, seed=0) == []
    assert len(pack_flat([], 8, 0, packing=packing)) == 0


@pytest.mark.parametrize(
    ("lengths", "capacity", "most", "reason"),
    [
        ([1, 9], 8, 4, "length 1 is 9; expected from 1 to the capacity of 8"),
        ([3, 2, 0], 8, 4, "length 2 is 0"),
        ([-1], 8, 4, "length 0 is -1"),
        ([1], 0, 4, "capacity is 0"),
        ([1], 8, 0, "max_documents is 0"),
        (np.ones((2, 2), int), 8, 4, "2 dimensions"),
    ],
)
@pytest.mark.parametrize("packing", PACKINGS)
def test_numbers_out_of_range_are_refused(
    packing: str, lengths: list[int], capacity: int, most: int, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        BY_NAME[packing](lengths, capacity, 0, max_documents=most)


def test_a_packing_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="packing is 'worst_fit'; expected one of best_fit, next_fit"):
        pack_flat([1], 8, 0, packing="worst_fit")
