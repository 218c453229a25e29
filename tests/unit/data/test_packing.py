"""Packing puts each document in exactly one pack, within capacity, full, random and repeatable."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.packing import pack


def fill(lengths: np.ndarray, capacity: int, packs: list[list[int]]) -> float:
    return float(lengths.sum() / (len(packs) * capacity))


def log_normal(count: int, median: float, sigma: float, capacity: int) -> np.ndarray:
    lengths = np.random.default_rng(3).lognormal(np.log(median), sigma, count).astype(int)
    return np.clip(lengths, 1, capacity)


@given(
    st.integers(1, 60).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=80))),
    st.integers(0, 2**64 - 1),
    st.integers(1, 9),
)
def test_each_index_once_and_within_both_limits(case: tuple[int, list[int]], seed: int, most: int) -> None:
    capacity, lengths = case
    packs = pack(lengths, capacity, seed, max_documents=most)
    assert sorted(index for p in packs for index in p) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in p) <= capacity for p in packs)
    assert all(len(p) <= most for p in packs)


def test_the_same_seed_gives_the_same_packs_and_another_gives_others() -> None:
    lengths = log_normal(2000, 200, 0.8, 1024)
    assert pack(lengths, 1024, 5) == pack(lengths.tolist(), 1024, 5)
    assert pack(lengths, 1024, 5) != pack(lengths, 1024, 6)


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


def test_no_documents_need_no_packs() -> None:
    assert pack([], 8, seed=0) == []


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
def test_numbers_out_of_range_are_refused(lengths: list[int], capacity: int, most: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        pack(lengths, capacity, 0, max_documents=most)
