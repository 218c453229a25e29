"""A batch covers its T tokens with documents apart from each other, and padding that counts for nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data import Example, PackedBatch
from data.batch import PADDING_TOKENS, assemble

T, N = 96, 8


def example(length: int, seed: int = 0, weight: float = 1.0) -> Example:
    rng = np.random.default_rng(seed)
    weights = rng.choice(np.array([0.0, 0.5, 1.0], np.float32), length).astype(np.float32)
    weights[0] = 0.0
    return Example(rng.integers(1, 99, length).astype(np.int32), weights, weight)


fitting = st.lists(st.integers(1, T), max_size=N - 1).filter(lambda lengths: sum(lengths) <= T)


@given(fitting, st.floats(0.1, 3))
def test_every_token_label_weight_and_position_is_its_documents(lengths: list[int], weight: float) -> None:
    documents = [example(length, seed, weight) for seed, length in enumerate(lengths)]
    sources = [seed % 3 for seed in range(len(lengths))]
    batch = assemble(documents, T, N, rows=[10 + n for n in range(len(lengths))], sources=sources)
    start = 0
    for slot, document in enumerate(documents):
        size = len(document.tokens)
        part = slice(start, start + size)
        assert batch.tokens[part].tolist() == document.tokens.tolist()
        assert batch.labels[part].tolist() == [*document.tokens[1:].tolist(), 0]
        expected = (document.weights[1:].astype(np.float64) * weight).astype(np.float32)
        assert batch.weights[part].tolist() == [*expected.tolist(), 0.0]
        assert batch.positions[part].tolist() == list(range(size))
        assert set(batch.sources[part].tolist()) == {sources[slot]}
        assert batch.rows[slot] == 10 + slot
        start += size
    assert not batch.weights[start:].any()
    assert not batch.tokens[start:].any()
    assert set(batch.sources[start:].tolist()) <= {-1}
    assert set(batch.rows[len(documents) :].tolist()) <= {-1}
    assert batch.lengths == tuple(lengths)
    assert batch.documents == len(lengths)


@given(fitting)
def test_documents_cover_the_pack_in_a_fixed_number_of_slots(lengths: list[int]) -> None:
    batch = assemble([example(length) for length in lengths], T, N)
    assert batch.cu_seqlens.shape == (N + 1,)
    assert batch.rows.shape == (N,)
    assert batch.cu_seqlens[-1] == T
    assert batch.max_seqlen == T
    sizes = np.diff(batch.cu_seqlens.numpy())[len(lengths) :]
    padding = sizes[sizes > 0]
    assert not len(padding) or padding.max() - padding.min() <= 1
    assert not sizes[len(padding) :].any()


def test_padding_is_short_where_slots_allow() -> None:
    batch = assemble([example(100)], 1000, 130)
    assert np.diff(batch.cu_seqlens.numpy())[1:].max() <= PADDING_TOKENS
    crowded = assemble([example(100)], 1000, 3)
    assert np.diff(crowded.cu_seqlens.numpy()).tolist() == [100, 450, 450]


def test_a_pack_may_be_padding_alone() -> None:
    batch = assemble([], T, N)
    assert batch.documents == 0
    assert not batch.weights.any()
    assert batch.label_positions.shape == (0,)
    assert batch.cu_seqlens[-1] == T


def test_dtypes_are_as_kernels_expect_them() -> None:
    batch = assemble([example(5)], T, N)
    kinds = {name: getattr(batch, name).dtype for name in ("tokens", "labels", "positions", "rows", "sources")}
    assert set(kinds.values()) == {torch.int64}
    assert batch.weights.dtype == torch.float32
    assert batch.cu_seqlens.dtype == torch.int32


def test_moving_keeps_all_values() -> None:
    batch = assemble([example(5)], T, N)
    moved = batch.to("cpu")
    assert torch.equal(moved.weights, batch.weights)
    assert moved.lengths == batch.lengths
    assert batch.to("meta").tokens.device.type == "meta"


@given(fitting, st.sampled_from([1, 2, 3, 4, 8]))
def test_the_parts_of_a_pack_make_it_up_and_know_its_documents(lengths: list[int], parts: int) -> None:
    batch = assemble([example(length, seed) for seed, length in enumerate(lengths)], T, N)
    cut = [batch.cut(part, parts) for part in range(parts)]
    for name in ("tokens", "labels", "weights", "positions", "sources"):
        assert torch.equal(torch.cat([getattr(part, name) for part in cut]), getattr(batch, name))
    places = [part.label_positions + number * T // parts for number, part in enumerate(cut)]
    assert torch.equal(torch.cat(places), batch.label_positions)
    for part in cut:
        assert torch.equal(part.cu_seqlens, batch.cu_seqlens)
        assert (part.max_seqlen, part.lengths, part.documents) == (T, batch.lengths, batch.documents)
        assert torch.equal(part.to("cpu").tokens, part.tokens)


def test_a_pack_that_cannot_be_cut_so_is_refused() -> None:
    batch = assemble([example(50)], T, N)
    with pytest.raises(ValueError, match="96 tokens in 1 parts cannot be cut into 5"):
        batch.cut(0, 5)
    with pytest.raises(ValueError, match="48 tokens in 2 parts cannot be cut into 2"):
        batch.cut(0, 2).cut(0, 2)
    with pytest.raises(ValueError, match="part is 2; expected from 0 to below the 2 parts"):
        replace(batch.cut(1, 2), part=2)
    with pytest.raises(ValueError, match="count from 0"):
        replace(batch.cut(1, 2), part=0)
    with pytest.raises(ValueError, match="rise from 0 to 144"):
        replace(batch.cut(1, 2), parts=3)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="2 documents have 120 tokens; the pack holds 96"):
        assemble([example(60), example(60)], T, N)
    with pytest.raises(ValueError, match="3 documents and 93 tokens of padding do not fit into 3 slots"):
        assemble([example(1)] * 3, T, 3)
    full = assemble([example(32)] * 3, T, 3)
    assert full.documents == 3


BROKEN: list[tuple[str, dict[str, object], str]] = [
    ("last weight", {"weights": torch.ones(T)}, "last position has no label"),
    ("negative", {"weights": torch.full((T,), -1.0)}, "finite and not negative"),
    ("nan", {"weights": torch.full((T,), float("nan"))}, "finite and not negative"),
    ("positions", {"positions": torch.arange(T) + 1}, "count from 0"),
    ("bounds", {"cu_seqlens": torch.zeros(N + 1, dtype=torch.int32)}, "rise from 0 to 96"),
    ("slots", {"rows": torch.zeros(N + 1, dtype=torch.int64)}, "expected one more"),
    ("max", {"max_seqlen": 2}, "more than max_seqlen 2"),
    ("labels", {"label_positions": torch.tensor([0])}, "label_positions must be"),
    ("sources", {"sources": torch.full((T,), -1)}, "no source"),
    ("lengths", {"lengths": (9,)}, "lengths must be"),
]


@pytest.mark.parametrize(("change", "reason"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_a_batch_that_breaks_an_invariant_cannot_be_made(change: dict[str, object], reason: str) -> None:
    document = Example(np.array([1, 2, 3], np.int32), np.array([0, 1, 1], np.float32))
    batch = assemble([document], T, N)
    assert isinstance(batch, PackedBatch)
    with pytest.raises(ValueError, match=reason):
        replace(batch, **change)  # type: ignore[arg-type]
